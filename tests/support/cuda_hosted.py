"""The cuda-hosted tier: the CUDA kernels executed on this processor (tests/cuda_host), as a backend for CPU tensors.

A module of tests marks itself with ``needs_hosted``, enters ``backend()`` and then names the backend ``"hosted"``.
"""

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from shvit_kernels import backends, ops
from shvit_kernels.backends import operators

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "hosted"
"""The operators' family, and the name of the backend inside ``backend()``."""
ORDERS = ("forward", "reverse", "odd_first", "interleaved", "random:1", "random:2")
"""Orders in which the blocks of a grid and, between barriers, the threads of a block run."""
BUILDS = {
    "checked": {"CHECKS": "-fsanitize=alignment,bounds,thread"},  # races are looked for on demand
    # Checks as calls compile twice as fast.
    "addresses": {
        "CHECKS": "-fsanitize=address --param=asan-instrumentation-with-call-threshold=0",
        "LINK": "-fsanitize=address",
    },
}
"""The libraries that can be built, and how: the harness takes the calls of all checks but those of addresses."""
BUILD = os.environ.get("SHVIT_HOSTED_BUILD", "checked")
"""The library of this process; ``addresses`` in those of ``with_addresses_checked``."""


def why_unavailable() -> str | None:
    missing = [tool for tool in ("g++", "make") if shutil.which(tool) is None]
    return f"the cuda-hosted tier needs {' and '.join(missing)}" if missing else None


needs_hosted = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")


def build(kind: str, kernels: str = "kernels", **changes: str) -> Path:
    """A library of tests/cuda_host/Makefile, brought up to date by one process at a time."""
    out = ROOT / "build" / "cuda_hosted" / f"torch-{torch.__version__}" / f"{kernels}-{kind}"
    out.mkdir(parents=True, exist_ok=True)
    torch_directory = Path(torch.__file__).parent
    variables = {"FAMILY": FAMILY, "OUT": out.relative_to(ROOT), "TORCH": torch_directory} | BUILDS[kind] | changes
    command = ["make", "-f", "tests/cuda_host/Makefile", f"-j{os.cpu_count()}", "CXX=g++"]
    command += [f"{name}={value}" for name, value in variables.items()]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the hosted CUDA kernels do not build:\n{result.stderr}")
    return out / "library.so"


class Launch(NamedTuple):
    kernel: str
    """With its template's arguments."""
    blocks: int
    threads: int
    shared: int
    """Bytes a block."""


class Harness:
    """The switches of a library that was built on the harness."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(path)
        self.path = path
        self.library.cuda_host_record_barriers.restype = ctypes.c_char_p
        self.library.cuda_host_note_launches.restype = ctypes.c_char_p
        self.library.cuda_host_set_order.restype = ctypes.c_bool
        self.library.cuda_host_set_shared_memory_limit.restype = ctypes.c_size_t
        self.library.cuda_host_set_shared_memory_limit.argtypes = (ctypes.c_size_t,)

    def set_thread_order(self, order: str) -> None:
        if not self.library.cuda_host_set_order(order.encode()):
            raise ValueError(f"unknown order {order!r}; known are {', '.join(ORDERS)}")

    def thread_orders(self) -> Iterator[str]:
        """Every order in turn, set while its name is out."""
        try:
            for order in ORDERS:
                self.set_thread_order(order)
                yield order
        finally:
            self.set_thread_order(ORDERS[0])

    @contextmanager
    def finding_races(self) -> Iterator[None]:
        """Inside, a launch fails where no barrier orders two accesses of the same memory; several times slower."""
        self.library.cuda_host_find_races(True)
        try:
            yield
        finally:
            self.library.cuda_host_find_races(False)

    @contextmanager
    def shared_memory_limit(self, size: int) -> Iterator[None]:
        """Inside, a block may have no more than ``size`` bytes of shared memory."""
        before = self.library.cuda_host_set_shared_memory_limit(size)
        try:
            yield
        finally:
            self.library.cuda_host_set_shared_memory_limit(before)

    @contextmanager
    def noted_launches(self) -> Iterator[list[Launch]]:
        """Inside, launches are not run but noted, filled in at the end."""
        launches = []
        self.library.cuda_host_note_launches(True)
        try:
            yield launches
        finally:
            noted = self.library.cuda_host_note_launches(False).decode()
            symbols = subprocess.run(["nm", "-C", self.path], capture_output=True, text=True, check=True).stdout
            names = {int(address, 16): name for address, name in re.findall(r"^([0-9a-f]+) \w (.*)$", symbols, re.M)}
            for line in noted.splitlines():
                address, *sizes = map(int, line.split())
                launches.append(Launch(names[address], *sizes))

    @contextmanager
    def recorded_barriers(self) -> Iterator[list[str]]:
        """The barriers that kernels meet inside, filled in at the end: ``"__syncthreads (norm.cuh:40)"``."""
        barriers = []
        self.library.cuda_host_record_barriers(True)
        try:
            yield barriers
        finally:
            barriers += self.library.cuda_host_record_barriers(False).decode().splitlines()

    @contextmanager
    def without(self, barrier: str) -> Iterator[None]:
        """Inside, kernels pass over one of the recorded barriers."""
        self.library.cuda_host_drop_barrier(barrier.encode())
        try:
            yield
        finally:
            self.library.cuda_host_drop_barrier(b"")


@cache
def harness() -> Harness:
    """The harness under the operators of the family."""
    path = build(BUILD)
    ops.define(FAMILY)
    torch.ops.load_library(path)
    return Harness(path)


def load() -> operators.Functions:
    """The kernels as the functions of a backend, with autograd, on CPU tensors."""
    harness()
    return operators.functions(FAMILY)


@contextmanager
def backend() -> Iterator[Harness]:
    """Inside, ``backend="hosted"`` names the kernels."""
    functions = load()._asdict()
    backends.BACKENDS[FAMILY] = SimpleNamespace(
        name=FAMILY, why_unavailable=lambda: None, why_not=lambda *_: None, **functions
    )
    try:
        yield harness()
    finally:
        del backends.BACKENDS[FAMILY]


def thread_orders() -> Iterator[str]:
    """Every order of the threads in turn, set while its name is out."""
    return harness().thread_orders()


def with_addresses_checked(code: str) -> subprocess.CompletedProcess:
    """Python code in a process of its own with AddressSanitizer under it, and under the kernels that it loads."""
    sanitizer = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(sanitizer).is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    environment = {"LD_PRELOAD": sanitizer, "ASAN_OPTIONS": "detect_leaks=0", "SHVIT_HOSTED_BUILD": "addresses"}
    environment = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
