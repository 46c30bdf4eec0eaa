"""Builds the native operator library; everything else stands in pyproject.toml.

The library uses LibTorch's stable ABI (2.11) and Python's limited API (3.10): one wheel serves later releases of both.
It holds the CPU kernels and, where torch has CUDA and nvcc is found, the CUDA kernels, for the architectures in
TORCH_CUDA_ARCH_LIST or those of the GPUs that are present or, without any, for those named below. What cannot be built
(no torch at build time, no compiler) is left out, with one line that says why.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

TORCH_TARGET = "0x020b000000000000"  # 2.11
EVERY_ARCHITECTURE = "8.0;9.0a;10.0;12.0"
OLDEST = 80
CPP = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
CPP += os.environ.get("CXXFLAGS", "").split()  # last, so that they win
NVCC = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"]


def without(kernels: str, reason: str) -> None:
    print(f"shvit-kernels: installing without {kernels} kernels, because {reason}", file=sys.stderr)


def explained(error: Exception) -> str:
    return f"({type(error).__name__}: {str(error).splitlines()[0]})"


def nvcc() -> str | None:
    home = cpp_extension.CUDA_HOME
    return home and shutil.which("nvcc", path=os.path.join(home, "bin"))


def known_to_nvcc(architectures: str) -> str:
    """Those of a list that this nvcc can build for; all of them if it does not say."""
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout
    known = re.findall(r"sm_(\d+)", listed)  # without the variants of an architecture, 90a
    return ";".join(a for a in architectures.split(";") if str(number(a.replace(".", ""))) in known) or architectures


def cuda_architectures() -> list[str]:
    """The architectures to build for as nvcc names them, ``["80", "90a"]``; sets TORCH_CUDA_ARCH_LIST for torch.

    Lists made for everything that torch supports, as containers have them, also name some that the kernels cannot use.
    """
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        named = ";".join("{}.{}".format(*capability) for capability in sorted(present))
        os.environ["TORCH_CUDA_ARCH_LIST"] = named or known_to_nvcc(EVERY_ARCHITECTURE)
    codes = {code for flag in cpp_extension._get_cuda_arch_flags() for code in re.findall(r"code=(\w+)", flag)}
    names = {code.removeprefix("sm_") for code in codes if code.startswith("sm_")}
    usable = sorted((name for name in names if number(name) >= OLDEST), key=number)
    if usable:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(
            re.sub(r"(\d\D?)$", r".\1", name) + "+PTX" * (f"compute_{name}" in codes) for name in usable
        )
    return usable


def number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def cpu_extension():
    return cpp_extension.CppExtension(
        "shvit_kernels._native",
        ["csrc/module.cpp", *map(str, sorted(Path("csrc/cpu").rglob("*.cpp")))],
        extra_compile_args={"cxx": [*CPP, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]},
        depends=[str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh")],
        py_limited_api=True,
    )


def cuda_extension():
    """The library with the CUDA kernels too, or the reason why it cannot be built."""
    if torch.version.cuda is None:
        return "torch has no CUDA"
    if nvcc() is None:
        return f"torch has CUDA {torch.version.cuda} and nvcc was not found"
    architectures = cuda_architectures()
    if not architectures:
        return f"they need sm_{OLDEST} or newer and TORCH_CUDA_ARCH_LIST is {os.environ['TORCH_CUDA_ARCH_LIST']}"
    plain = cpu_extension()
    arguments = plain.extra_compile_args["cxx"]
    built = " ".join(str(number(name)) for name in architectures)
    # CUDA_HOME may be a directory that only links to nvcc; nvcc itself knows where its libraries are.
    libraries = subprocess.run([nvcc(), "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    return cpp_extension.CUDAExtension(
        plain.name,
        [*plain.sources, *(str(p) for p in sorted(Path("csrc/cuda").iterdir()) if p.suffix in (".cpp", ".cu"))],
        include_dirs=[os.path.abspath("csrc/cuda/device")],
        library_dirs=re.findall(r'"-L([^"]+)"', libraries),
        extra_compile_args={"cxx": [*arguments, f'-DSHVIT_CUDA_ARCHITECTURES="{built}"'], "nvcc": NVCC},
        depends=plain.depends,
        py_limited_api=True,
    )


def native_build() -> dict:
    if torch is None:
        without("compiled", "torch was not importable while building (install torch, then use --no-build-isolation)")
        return {}

    class OptionalBuild(cpp_extension.BuildExtension):
        """Builds as much as the compilers here can."""

        def run(self):
            try:
                super().run()
            except Exception as error:  # whatever the compiler or its absence raises
                without("compiled", f"the C++ build failed {explained(error)}")

        def build_extensions(self):
            if with_cuda:
                try:
                    return super().build_extensions()
                except Exception as error:
                    without("CUDA", f"their build failed {explained(error)}")
                    vars(self.extensions[0]).update(vars(cpu_extension()))
            return super().build_extensions()

    extension = cuda_extension()
    with_cuda = not isinstance(extension, str)
    if not with_cuda:
        if torch.version.cuda is not None:
            without("CUDA", extension)
        extension = cpu_extension()
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native_build())
