"""What the tests know about the native library."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from shvit_kernels.backends import native
from tests.support.numerics import Call

VARIANTS = ("baseline", "baseline_wide", "avx2", "avx2_wide", "avx512")
"""Every variant of the CPU kernels on x86; other processors have the first two."""
FUSED_BFLOAT16_VARIANTS = (*VARIANTS, "avx512_bf16")
"""Those of fused models in bfloat16: in everything else the last one is avx512."""
PROJECTION_VARIANTS = (*VARIANTS, "zen4")
"""Those of fused models, and of the layer with its projection, in float32."""
PAIRED_VARIANTS = ("baseline_wide", "avx2_wide", "zen4")
"""Those whose products of float32 are in pairs (csrc/cpu/pairs.h)."""
ALL_VARIANTS = (*FUSED_BFLOAT16_VARIANTS, "zen4")


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def missing() -> str | None:
    return native.why_unavailable()


def runnable_variants() -> list[str]:
    return [] if missing() else native.instruction_sets()


needs_native = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def each_variant(variants: tuple[str, ...] = VARIANTS) -> list:
    """Parameters for a test that runs on every variant of the kernels."""
    runnable = runnable_variants()
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in runnable, reason=f"this processor cannot run {name}"))
        for name in variants
    ]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the CPU kernels of one variant inside the block."""
    before = native.instruction_set()
    torch.ops.shvit_kernels_native.set_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.shvit_kernels_native.set_instruction_set(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(call: Call, backend: str) -> None:
    """Whatever the number of threads, and in every run."""
    runs = []
    for count in (1, 1, 2, 2, 3):
        with threads(count):
            runs.append(call.run(backend))
    for run in runs[1:]:
        for name, t in run.items():
            assert torch.equal(t, runs[0][name]), name
