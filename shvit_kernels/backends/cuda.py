"""The ``cuda`` backend: the CUDA C++ kernels of the native library, for NVIDIA GPUs from compute capability 8.0."""

from functools import cache

import torch
from torch import Tensor

from . import native, operators

name = "cuda"
devices = ("cuda",)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_PARTIAL_CHANNELS, _MOST_QUERY_WIDTH = 256, 128  # csrc/cuda/kernels.h


def _architectures() -> list[int]:
    return [] if native.why_unavailable() is not None else native.cuda_architectures()


_BUILT_FOR = _architectures()


def _why_not_built() -> str | None:
    if native.why_unavailable() is not None:
        return native.why_unavailable()
    if _BUILT_FOR:
        return None
    return "the native library has no CUDA kernels: torch had no CUDA, nvcc was not found, or their build failed"


@cache
def _why_not_on(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code of one major version runs on that version's later minor ones; PTX is not shipped.
    if not any(a // 10 == major and a % 10 <= minor for a in _BUILT_FOR):
        gpu = torch.cuda.get_device_name(device)
        return f"it was built for sm_{', sm_'.join(map(str, _BUILT_FOR))} and {gpu} is sm_{major}{minor}"
    return None


@torch.compiler.assume_constant_result  # torch.compile would trace into what it asks the driver
def _constant_why_not_on(device: int) -> str | None:
    return _why_not_on(device)


def why_unavailable() -> str | None:
    if _why_not_built() is not None:
        return _why_not_built()
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _why_not_on(torch.cuda.current_device())


def why_not(x: Tensor, pdim: int = 1, qk_dim: int = 1) -> str | None:
    reason = _why_not_built()
    if reason is not None:
        return reason
    if not x.is_cuda:
        return f"it runs on cuda tensors and x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"it has kernels for float16, bfloat16 and float32 and x is {x.dtype}"
    if pdim > _MOST_PARTIAL_CHANNELS or qk_dim > _MOST_QUERY_WIDTH:
        most = f"pdim up to {_MOST_PARTIAL_CHANNELS} and qk_dim up to {_MOST_QUERY_WIDTH}"
        return f"it has kernels for {most}, not {pdim} and {qk_dim}"
    return _constant_why_not_on(x.device.index)


_functions = operators.functions("native")
shsa, partial_moments, shsa_train, shsa_eval, shsa_mixer, update_running_statistics = _functions
