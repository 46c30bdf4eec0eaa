"""The ``cpu`` backend: the C++ kernels of the native library."""

from functools import partial

import torch
from torch import Tensor

from . import eager, native, operators

name = "cpu"
devices = ("cpu",)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def why_unavailable() -> str | None:
    return native.why_unavailable()


def why_not(x: Tensor, pdim: int = 1, qk_dim: int = 1) -> str | None:
    if native._missing is not None:
        return native._missing
    if not x.is_cpu:
        return f"it runs on cpu tensors and x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"it has kernels for float32, float64 and bfloat16 and x is {x.dtype}"
    return None


shsa, partial_moments, shsa_train, shsa_eval, _ = operators.functions("native")

shsa_mixer = partial(eager.mix_after, shsa)  # the projection is PyTorch's
