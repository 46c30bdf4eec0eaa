"""What the tests know about the Triton kernels."""

from importlib import import_module

import pytest

from shvit_kernels.backends import triton


def _older(package: str, release: tuple[int, int]) -> bool:
    return tuple(map(int, import_module(package).__version__.split(".")[:2])) < release


def _why_not() -> str | None:
    reason = triton.why_unavailable()
    if reason is None and triton.INTERPRETED and _older("triton", (3, 7)) and not _older("numpy", (2, 4)):
        return "the interpreter of Triton before 3.7 needs numpy before 2.4"
    return reason


needs_triton = pytest.mark.skipif(_why_not() is not None, reason=_why_not() or "")
