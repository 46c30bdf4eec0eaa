"""Launch parameters, from shapes."""

from typing import NamedTuple

import torch


class Short(NamedTuple):
    """How ``forward.attend_short`` is launched."""

    images: int
    """Images per attention block, a power of two."""
    warps: int
    copied: int
    """Elements per copying block."""


def short(P: int, N: int, dtype: torch.dtype) -> Short:
    if N <= 16:
        return Short(images=2, warps=2, copied=4096)
    return Short(images=1, warps=4, copied=8192)
