"""What all Triton kernels share: helpers inside kernels, then helpers of their launchers."""

from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from . import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)  # kernels see only such globals


# Inside kernels


_COUNTS = (
    "B", "attention_blocks", "tiles", "steps", "weight_programs", "parts", "rows", "matrix_rows", "bias_rows",
    "reductions",
)  # fmt: skip


def launched(function):
    """``triton.jit`` for kernels that are launched: numbers that no address is a multiple of make no builds of their
    own, or there would be one for nearly every size of image and batch."""
    # A single block, though, is every short image, whose divisions by it then vanish.
    return triton.jit(function, do_not_specialize=_COUNTS, do_not_specialize_on_alignment=("blocks",))


@triton.jit
def dot(a, b, precision: tl.constexpr, acc=None):
    """``a @ b (+ acc)`` in float32, of b in the type of a, as autocast leaves x its type and not the parameters.
    ``precision``, "ieee" or "tf32", matters to float32 operands only."""
    b = b.to(a.dtype)
    if _INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def nan_keeping_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_maximum(a, axis: tl.constexpr):
    """Maximum along an axis, NaN where there is one (``tl.max`` drops it)."""
    if _INTERPRETED:  # its reduction with a function of ours goes element by element
        unordered = tl.sum((a != a).to(tl.int32), axis)
        return tl.where(unordered > 0, float("nan"), tl.max(a, axis))
    return tl.reduce(a, axis, nan_keeping_max)


@triton.jit
def rectified(a):
    """ReLU, which keeps NaN."""
    return tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)


# In launchers


def channels_last(x: Tensor) -> bool:
    """Whether ``x`` (contiguous or channels_last, see ``ops.readable``) is to be addressed as channels_last."""
    return not x.is_contiguous()


@cache
def _has_tf32(device: int) -> bool:
    """Whether Triton takes "tf32" for a device of ROCm."""
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0] == "gfx942"


def precision(tf32: bool, x: Tensor) -> str:
    """Of products on the device of ``x``: TF32 where it is allowed and known."""
    return "tf32" if tf32 and (torch.version.hip is None or _has_tf32(x.device.index)) else "ieee"


def on_device_of(x: Tensor):
    """A context in which launches go to the device of ``x``."""
    if INTERPRETED or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``size`` and ``least``, which matrix products need."""
    return max(least, triton.next_power_of_2(size))


def split(size: int) -> tuple[int, int]:
    """Two tiles, powers of two of at least 16, that together hold ``size`` channels; the second is 0 if one does.

    72 = 64 + 16 wastes 8 lanes where 128 would waste 56.
    """
    whole = padded(size)
    if size <= 16 or whole == size:
        return whole, 0
    rest = padded(size - whole // 2)
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def check_images(x: Tensor, P: int) -> None:
    """Kernels read x by pointer: what they cannot read must never reach them."""
    if x.dim() != 4:
        raise RuntimeError(f"image tensors must be [B, C, H, W], got {x.dim()} dimensions")
    if x.shape[2] * x.shape[3] == 0:
        raise RuntimeError("images must have at least one token")
    if not 1 <= P <= x.shape[1]:
        raise RuntimeError(f"pdim must lie between 1 and {x.shape[1]}, got {P}")
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise RuntimeError("image tensors must be NCHW-contiguous or channels_last")


def empty_image(like: Tensor, channels: int) -> Tensor:
    """Images of ``channels`` channels in the memory format of ``like``."""
    B, _, H, W = like.shape
    return torch.empty((B, channels, H, W), dtype=like.dtype, device=like.device, memory_format=ops.memory_format(like))


def parameters(**given: tuple[Tensor | None, int]) -> list[Tensor | None]:
    """Parameters as kernels read them, contiguous in a type of their own; each comes with its number of values."""
    for name, (t, count) in given.items():
        if t is not None and t.numel() != count:
            raise RuntimeError(f"{name} must have {count} values, got {t.numel()}")
    return [t if t is None else t.contiguous() for t, _ in given.values()]
