"""The native library: loading it, and what it says about itself."""

import importlib

import torch


def _load() -> str | None:
    """Load the native library. None, or the sentence that says why it is missing."""
    try:
        importlib.import_module("shvit_kernels._native")
    except ModuleNotFoundError:
        return "the native library is missing: no working C++ compiler was found when shvit_kernels was installed"
    except ImportError as error:
        return f"the native library does not load: {error}"
    return None


_missing = _load()


def why_unavailable() -> str | None:
    """None, or one sentence: why the library is not here."""
    return _missing


def instruction_set() -> str:
    """The instruction set that the CPU kernels run with, for example ``avx512``."""
    return torch.ops.shvit_kernels_native.instruction_set()


def instruction_sets() -> list[str]:
    """The kernel variants that this processor can run, best last."""
    return torch.ops.shvit_kernels_native.instruction_sets().split()


def cuda_architectures() -> list[int]:
    """The CUDA architectures that the library was built for, for example ``[80, 90]``; empty without CUDA."""
    return [int(name) for name in torch.ops.shvit_kernels_native.cuda_architectures().split()]
