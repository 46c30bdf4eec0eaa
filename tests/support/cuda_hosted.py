"""The cuda-hosted tier: the CUDA kernels executed on this processor (tests/cuda_host), as a backend for CPU tensors."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shvit_kernels import backends, ops
from shvit_kernels.backends import operators

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "hosted"
"""The operators' family, and the name of the backend inside ``backend()``."""
ORDERS = ("forward", "reverse", "odd_first", "interleaved", "random:1", "random:2")
"""Orders in which the blocks of a grid and, between barriers, the threads of a block run."""
_CHECKS = "-fsanitize=alignment,bounds,thread"


def why_unavailable() -> str | None:
    missing = [tool for tool in ("g++", "make") if shutil.which(tool) is None]
    return f"the cuda-hosted tier needs {' and '.join(missing)}" if missing else None


needs_hosted = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")


def build(family: str = FAMILY, checks: str = _CHECKS, link: str = "") -> Path:
    """The library, built or brought up to date; one process at a time."""
    out = Path("build") / "cuda_hosted" / f"torch-{torch.__version__}" / family
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    torch_directory = Path(torch.__file__).parent
    variables = {"FAMILY": family, "CHECKS": checks, "LINK": link, "OUT": out, "TORCH": torch_directory, "CXX": "g++"}
    command = ["make", "-f", "tests/cuda_host/Makefile", f"-j{os.cpu_count()}"]
    command += [f"{name}={value}" for name, value in variables.items()]
    with open(ROOT / out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the hosted CUDA kernels do not build:\n{result.stderr}")
    return ROOT / out / f"{family}.so"


@cache
def _library() -> ctypes.CDLL:
    path = build()
    ops.define(FAMILY)
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


def load() -> operators.Functions:
    """The kernels as the functions of a backend, with autograd, on CPU tensors."""
    _library()
    return operators.functions(FAMILY)


@contextmanager
def backend() -> Iterator[None]:
    """Inside, ``backend="hosted"`` names the kernels."""
    module = SimpleNamespace(name=FAMILY, why_unavailable=lambda: None, why_not=lambda *_: None, **load()._asdict())
    backends.BACKENDS[FAMILY] = module
    try:
        yield
    finally:
        del backends.BACKENDS[FAMILY]


def set_thread_order(order: str) -> None:
    if not _library().cuda_host_set_order(order.encode()):
        raise ValueError(f"unknown order {order!r}; known are {', '.join(ORDERS)}")


def thread_orders() -> Iterator[str]:
    """Every order in turn, set while its name is out."""
    try:
        for order in ORDERS:
            set_thread_order(order)
            yield order
    finally:
        set_thread_order(ORDERS[0])


@contextmanager
def shared_memory_limit(size: int) -> Iterator[None]:
    """Inside, a block may have no more than ``size`` bytes of shared memory."""
    before = _library().cuda_host_set_shared_memory_limit(size)
    try:
        yield
    finally:
        _library().cuda_host_set_shared_memory_limit(before)
