"""Builds the native library with sanitizers, and runs the operators' tests on it.

    python -m tests.support.sanitize [address] [thread]

Each build is a copy of the package under ``build/sanitize-*``; Python finds it there before the one in the source tree.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "8"]
PYTEST += ["--import-mode=append", "--capture=sys"]  # what a sanitizer writes before it ends the process is shown
TESTS = [
    *(f"tests/test_{name}.py" for name in ("sanitized", "fused_operators", "pairs", "fuzz")),
    *(f"tests/test_{name}.py" for name in ("shsa", "shsa_eval", "shsa_train", "partial_moments")),
    *(f"tests/test_{name}.py" for name in ("mixer_train", "mixer_eval", "running_statistics")),
    "tests/test_operators.py::test_python_threads_at_once",
    "-k=not N4096 and not N1050 and not triton and not hosted",  # 257 tokens are long images too
]


@dataclass(frozen=True)
class Sanitizer:
    """Its flags, what must be loaded before Python, and its settings."""

    flags: str
    preloaded: tuple[str, ...]
    settings: dict[str, str]


SANITIZERS = {
    "address": Sanitizer(
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
        ("asan", "stdc++"),  # exceptions are caught only where the C++ library is there first
        {
            # PyTorch leaves memory to the end of the process. Fresh memory, scratch of kernels too, is full of NaN.
            "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    ),
    "thread": Sanitizer(
        "-fsanitize=thread",
        ("tsan", "stdc++"),
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"},
    ),
}


def run(command: list[str], **environment: str) -> None:
    if subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode:
        sys.exit(f"failed: {' '.join(command)}")


def library(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip()


def check(name: str) -> None:
    sanitizer, folder = SANITIZERS[name], f"build/sanitize-{name}"
    run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", folder, "--build-lib", f"{folder}/lib"],
        CXX="g++",
        CXXFLAGS=f"-O1 -g1 -fno-wrapv {sanitizer.flags}",  # with -O3 compiling takes many times as long
        LDFLAGS=sanitizer.flags,
        CUDA_HOME="none",  # the CPU kernels alone
    )
    run(
        [*PYTEST, *TESTS],
        PYTHONPATH=str(ROOT / folder / "lib"),
        PYTHONSAFEPATH="1",
        LD_PRELOAD=" ".join(map(library, sanitizer.preloaded)),
        OMP_NUM_THREADS="1",
        **sanitizer.settings,
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or SANITIZERS:
        check(name)
