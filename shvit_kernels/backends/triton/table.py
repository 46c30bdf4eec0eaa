"""Launch parameters, from shapes: those that were measured where the shape was, a rule elsewhere.

``python -m benchmarks.tune_triton --write`` measures the published shapes on the GPU at hand and writes ``MEASURED``
anew.
"""

from typing import NamedTuple

Shape = tuple[int, int, int]
"""P, N and the bytes of an element."""


class Short(NamedTuple):
    """How ``forward.attend_short`` is launched."""

    images: int
    """Images per attention block, a power of two."""
    warps: int
    copied: int
    """Elements per block that copies."""


class Tiled(NamedTuple):
    """How ``tiled.attend_tiled``, ``stage`` and ``measure`` are launched."""

    queries: int
    keys: int
    channels: int
    """Of x in one step of the projection."""
    warps: int
    stages: int
    copied: int


class Mixer(NamedTuple):
    """How ``mixer.project_and_add`` is launched: a tile of the product, and the channels of x in one step."""

    tokens: int
    outs: int
    channels: int
    warps: int
    stages: int


MEASURED: dict[str, dict[Shape, NamedTuple]] = {
    # What follows was written by benchmarks/tune_triton.py.
    "short": {},
    "tiled": {},
    "mixer": {},
    # Until here.
}


def short(P: int, N: int, itemsize: int) -> Short:
    warps = 2 if N <= 16 else 4
    rule = Short(images=1, warps=warps, copied=2048 * warps)
    return MEASURED["short"].get((P, N, itemsize), rule)


def tiled(P: int, N: int, itemsize: int) -> Tiled:
    # Small enough that no device runs out of registers. The projection of keys and values takes most of them, and exact
    # products, which hold their operands there; without both, a pipeline of loads fits.
    if N > 256 and itemsize == 2:
        rule = Tiled(queries=64, keys=32, channels=32, warps=4 if P <= 96 else 8, stages=3, copied=8192)
    elif N <= 16:
        rule = Tiled(queries=16, keys=16, channels=16, warps=8, stages=1, copied=8192)
    elif P <= 80:
        keys = 64 if itemsize == 2 else 32 if N > 256 else 16
        rule = Tiled(queries=64, keys=keys, channels=16, warps=8, stages=1, copied=8192)
    else:
        rule = Tiled(queries=32, keys=16, channels=16, warps=8, stages=1, copied=8192)
    return MEASURED["tiled"].get((P, N, itemsize), rule)


def mixer(P: int, N: int, itemsize: int) -> Mixer:
    if itemsize == 2:  # rows of tokens that are not aligned take an address for every element
        rule = Mixer(tokens=128 if N % 8 == 0 else 64, outs=128, channels=32, warps=8, stages=3)
    else:
        rule = Mixer(tokens=64, outs=64, channels=16, warps=8, stages=3)
    return MEASURED["mixer"].get((P, N, itemsize), rule)
