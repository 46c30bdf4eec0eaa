"""The ``cpu`` backend: C++ kernels of the native library, called through the operators of ``ops``."""

import importlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from . import eager

name = "cpu"

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _load() -> str | None:
    """Load the native library. None, or the sentence that says why it is missing."""
    try:
        importlib.import_module("shvit_kernels._native")
    except ModuleNotFoundError:
        return "the native library is missing: no working C++ compiler was found when shvit_kernels was installed"
    except ImportError as error:
        return f"the native library does not load: {error}"
    return None


def instruction_set() -> str:
    """The instruction set that the CPU kernels run with, for example ``avx512``."""
    return torch.ops.shvit_kernels_native.instruction_set()


def instruction_sets() -> list[str]:
    """The kernel variants that this processor can run, best last."""
    return torch.ops.shvit_kernels_native.instruction_sets().split()


_missing = _load()


def why_unavailable() -> str | None:
    return _missing


def why_not(x: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if not x.is_cpu:
        return f"it runs on cpu tensors and x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"it has kernels for float32, float64 and bfloat16 and x is {x.dtype}"
    return None


def _tracks_gradients(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:  # the autograd functions refuse tangents, bare operators would drop them
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_native = ops.FAMILIES["native"]
_shsa_forward, _moments_forward = _native["shsa_forward"], _native["partial_moments_forward"]
_train_forward, _eval = _native["shsa_train_forward"], _native["shsa_eval"]


def shsa(x: Tensor, *rest) -> Tensor:
    x = ops.readable(x)
    if _tracks_gradients(x, *rest[:4]):
        return ops.Shsa.apply("native", x, *rest)
    return _shsa_forward(x, *rest)[0]


def partial_moments(x: Tensor, *rest) -> tuple[Tensor, Tensor]:
    x = ops.readable(x)
    if _tracks_gradients(x, *rest[:2]):
        return ops.PartialMoments.apply("native", x, *rest)
    return _moments_forward(x, *rest)[:2]


def shsa_train(x: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    x = ops.readable(x)
    if _tracks_gradients(x, *rest[:5]):
        return ops.ShsaTrain.apply("native", x, *rest)
    y, *_, mean, variance = _train_forward(x, *rest)
    return y, mean, variance


def shsa_eval(x: Tensor, *rest) -> Tensor:
    if _tracks_gradients(x, *rest[:8]):
        return eager.fold_and(shsa, x, *rest)
    return _eval(ops.readable(x), *rest)
