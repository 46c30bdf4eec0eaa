"""The ``triton`` backend: kernels for every GPU that Triton reaches."""

import os

import torch
from torch import Tensor

from .. import operators

name = "triton"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets the kernels, which then take CPU tensors: for tests and debugging."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_unavailable() -> str | None:
    return "its kernels are not written yet"


def why_not(x: Tensor) -> str | None:
    return why_unavailable()


shsa, partial_moments, shsa_train, shsa_eval, shsa_mixer = operators.functions("triton")
