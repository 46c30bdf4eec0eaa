"""What the tests know about the Triton kernels."""

import pytest

from shvit_kernels.backends import triton

needs_triton = pytest.mark.skipif(triton.why_unavailable() is not None, reason=triton.why_unavailable() or "")
