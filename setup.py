"""Builds the native operator library; everything else stands in pyproject.toml.

The library uses LibTorch's stable ABI (2.11) and Python's limited API (3.10): one wheel serves later releases of both.
Where it cannot be built (no torch at build time, no C++ compiler) the package is installed without it.
"""

import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    BuildExtension = None

TORCH_TARGET = "0x020b000000000000"  # 2.11


def without_native(reason: str) -> None:
    print(f"shvit-kernels: installing without compiled CPU kernels, because {reason}", file=sys.stderr)


def native_build() -> dict:
    if BuildExtension is None:
        without_native("torch was not importable while building (install torch, then use --no-build-isolation)")
        return {}

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # whatever the compiler or its absence raises
                without_native(f"the C++ build failed ({type(error).__name__}: {str(error).splitlines()[0]})")

    sources = ["csrc/module.cpp", *map(str, sorted(Path("csrc/cpu").rglob("*.cpp")))]
    extension = CppExtension(
        "shvit_kernels._native",
        sources,
        extra_compile_args=[
            "-O3",
            "-g0",
            "-ffp-contract=fast",
            "-fvisibility=hidden",
            "-Wno-psabi",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        ],
        depends=list(map(str, Path("csrc").rglob("*.h"))),
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native_build())
