"""The tests. Without a GPU, Triton interprets its kernels, which it must know before any is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
