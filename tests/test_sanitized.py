"""Under ``make sanitize`` alone: the library is the instrumented one, and its sanitizer speaks up."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SYMBOLS = {"libasan": (b"__asan_", b"__ubsan_"), "libtsan": (b"__tsan_",)}
"""What a sanitizer leaves in a library, by the library that is loaded before Python."""
RUNTIME = next((name for name in SYMBOLS if name in os.environ.get("LD_PRELOAD", "")), None)

pytestmark = pytest.mark.skipif(RUNTIME is None, reason="no sanitizer is here, `make sanitize` brings them")

TOO_FEW_VALUES = """
import torch, shvit_kernels
x = torch.ones(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
x.untyped_storage().resize_(64)
torch.ops.shvit_kernels.fused_pool(x)
"""


def test_library_is_instrumented():
    library = Path(importlib.import_module("shvit_kernels._native").__file__).read_bytes()
    assert all(symbol in library for symbol in SYMBOLS[RUNTIME])


@pytest.mark.skipif(RUNTIME != "libasan", reason="AddressSanitizer's")
def test_reading_past_the_end_is_found():
    done = subprocess.run([sys.executable, "-c", TOO_FEW_VALUES], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
