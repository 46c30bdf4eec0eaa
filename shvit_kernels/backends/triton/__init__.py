"""The ``triton`` backend: kernels for every GPU that Triton reaches.

Each module of kernels has ``OPERATORS``: the operators of ``ops`` that it implements, by name without the family.
"""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from ... import ops
from .. import operators

name = "triton"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets the kernels, which then take CPU tensors: for tests and debugging."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MODULES = ("forward", "mixer", "moments", "backward", "train")
_LEAST_CAPABILITY = (8, 0)
_MOST_QUERY_WIDTH = 256
"""Tiles of wider queries exceed the shared memory of some devices: 99 KiB of NVIDIA's, 64 of AMD's."""

devices = () if INTERPRETED else ("cuda",)


def _why_not_imported() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        import_module("triton.language")
    except Exception as error:  # what a broken installation raises is of any kind
        return f"the package triton cannot be imported ({type(error).__name__}: {error})"
    return None


_missing = _why_not_imported()


def _register() -> None:
    keys = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
    for module in _MODULES:
        for operator, function in import_module(f".{module}", __name__).OPERATORS.items():
            for key in keys:
                ops._library.impl(f"{operator}_triton", function, key)


if _missing is None:
    _register()


@cache
def _why_not_on(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        least, own = (".".join(map(str, c)) for c in (_LEAST_CAPABILITY, capability))
        return f"Triton needs compute capability {least} and {torch.cuda.get_device_name(device)} has {own}"
    return None


@torch.compiler.assume_constant_result  # torch.compile would trace into what it asks the driver
def _constant_why_not_on(device: int) -> str | None:
    return _why_not_on(device)


def why_unavailable() -> str | None:
    if _missing is not None or INTERPRETED:
        return _missing
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return _why_not_on(torch.cuda.current_device())


def why_not(x: Tensor, pdim: int = 1, qk_dim: int = 1) -> str | None:
    if _missing is not None:
        return _missing
    if x.is_cuda:
        reason = None if INTERPRETED else _constant_why_not_on(x.device.index)
    elif x.is_cpu and INTERPRETED:
        reason = None
    else:
        reason = f"it runs on cuda tensors and x is on {x.device}"
    if reason is None and x.dtype not in _DTYPES:
        return f"it has kernels for float16, bfloat16 and float32 and x is {x.dtype}"
    if reason is None and qk_dim > _MOST_QUERY_WIDTH:
        return f"it has kernels for qk_dim up to {_MOST_QUERY_WIDTH}, not {qk_dim}"
    return reason


_functions = operators.functions("triton")
shsa, partial_moments, shsa_train, shsa_eval, shsa_mixer, update_running_statistics = _functions
