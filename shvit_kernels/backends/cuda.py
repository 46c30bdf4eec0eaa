"""The ``cuda`` backend: the CUDA C++ kernels of the native library, for NVIDIA GPUs from compute capability 8.0."""

from functools import cache

import torch
from torch import Tensor

from . import native, operators

name = "cuda"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def _why_not_on(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    built = native.cuda_architectures()
    # Machine code of one major version runs on that version's later minor ones; PTX is not shipped.
    if not any(a // 10 == major and a % 10 <= minor for a in built):
        gpu = torch.cuda.get_device_name(device)
        return f"it was built for sm_{', sm_'.join(map(str, built))} and {gpu} is sm_{major}{minor}"
    return None


@cache
def _why_not_built() -> str | None:
    if native.why_unavailable() is not None:
        return native.why_unavailable()
    if not native.cuda_architectures():
        return "the native library was built without CUDA: torch had no CUDA, or nvcc was not found"
    return None


def why_unavailable() -> str | None:
    if _why_not_built() is not None:
        return _why_not_built()
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _why_not_on(torch.cuda.current_device())


def why_not(x: Tensor) -> str | None:
    if not x.is_cuda:
        return _why_not_built() or f"it runs on cuda tensors and x is on {x.device}"
    reason = _why_not_built() or _why_not_on(x.device.index)
    if reason is None and x.dtype not in _DTYPES:
        return f"it has kernels for float16, bfloat16 and float32 and x is {x.dtype}"
    return reason


shsa, partial_moments, shsa_train, shsa_eval, shsa_mixer = operators.functions("native")
