"""Facts about the machine and the installation, for ``info`` and for kept benchmark results."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__
from .backends import native


def cpu() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what the figures and results depend on; None for what is not installed."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "shvit_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def instruction_set() -> str | None:
    """The instruction set that the CPU kernels run with, None without the native library."""
    return native.instruction_set() if native.why_unavailable() is None else None
