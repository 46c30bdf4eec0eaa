"""The CUDA kernels built by nvcc for devices that need not be here: what they use of a multiprocessor."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
OUT = ROOT / "build" / "cuda_compiled"
BUILDS, LAUNCHES = "cuda_builds", "cuda_launches"
"""Properties of tests: [architecture, source, builds], [architecture, [kernel, threads, shared, blocks, occupancy]]."""


@dataclass(frozen=True)
class Device:
    """What the multiprocessors of an architecture have; all have 65536 registers, given out 256 a warp."""

    warps: int
    blocks: int
    shared: int
    """Bytes of shared memory, of which each block costs 1 KiB more than it asks for."""

    @property
    def shared_of_a_block(self) -> int:
        return self.shared - 1024

    def resident_blocks(self, registers: int, threads: int, shared: int) -> int:
        """How many blocks run at a time on a multiprocessor."""
        warps = -(-threads // 32)
        by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
        return min(self.blocks, self.warps // warps, by_registers, self.shared // (shared + 1024))

    def occupancy(self, registers: int, threads: int, shared: int) -> float:
        return self.resident_blocks(registers, threads, shared) * -(-threads // 32) / self.warps


DEVICES = {
    "80": Device(warps=64, blocks=32, shared=164 << 10),
    "90a": Device(warps=64, blocks=32, shared=228 << 10),
    "100": Device(warps=64, blocks=32, shared=228 << 10),
    "120": Device(warps=48, blocks=24, shared=100 << 10),
}


@dataclass
class Build:
    """One kernel of a source, as ptxas reports it."""

    kernel: str
    registers: int
    spilled: int
    """Bytes of stores and loads."""
    stack: int
    """Bytes of local memory a thread, whatever for."""
    static_shared: int
    """Bytes of shared memory beside what a launch asks for."""


def why_unavailable() -> str | None:
    return None if shutil.which("nvcc") else "nvcc was not found"


@cache
def _compiler() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


@cache
def _flags() -> list[str]:
    """Those of setup.py."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS  # slow, and every test session imports this module

    return ["-O3", "-std=c++17", *COMMON_NVCC_FLAGS, "-Icsrc/cuda/device"]


def _key(source: Path) -> str:
    """Changes with whatever the build could depend on."""
    digest = hashlib.sha256(repr((_compiler(), _flags(), _PARSER)).encode())
    for file in (source, *sorted((ROOT / "csrc/cuda").rglob("*.h")), *sorted((ROOT / "csrc/cuda").rglob("*.cuh"))):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


_PARSER = (
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)"
)


def parsed(report: str) -> list[Build]:
    """The kernels in what ``ptxas -v`` printed."""
    found = re.findall(_PARSER, report, re.S)
    names = subprocess.run(["c++filt"], input="\n".join(f[0] for f in found), capture_output=True, text=True)
    builds = []
    for name, (_, stack, stores, loads, registers, rest) in zip(names.stdout.splitlines(), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        static = int(shared.group(1)) if shared else 0
        builds.append(Build(plain(name), int(registers), int(stores) + int(loads), int(stack), static))
    return builds


def plain(name: str) -> str:
    """A kernel's name without return type, namespaces and parameters, the same from every compiler."""
    name = re.sub(r"\(anonymous namespace\)|_GLOBAL__N__\w+", "", name).removeprefix("void ")
    if name.endswith(")"):
        end, depth = len(name), 0
        while depth or end == len(name):
            end -= 1
            depth += {")": 1, "(": -1}.get(name[end], 0)
        name = name[:end]
    return re.sub(r"\w*::", "", name).replace("> >", ">>")


def report(source: Path, architecture: str, *flags: str) -> str:
    """Builds a source for one architecture and returns what ptxas says of it."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-cubin", target, *_flags(), *flags, "-Xptxas=-v", str(source), "-o", os.devnull]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not build for sm_{architecture}:\n{done.stderr[-2000:]}")
    return done.stderr


def built(source: Path, architecture: str) -> list[Build]:
    """The kernels of a source for one architecture; built again only when something changed, by one process."""
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / f"{source.stem}.sm_{architecture}.json"
    with file.open("a+") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        kept.seek(0)
        key, (kept_key, *builds) = _key(source), json.load(kept) if file.stat().st_size else [None]
        if kept_key != key:
            builds = [asdict(build) for build in parsed(report(source, architecture))]
            kept.truncate(0)
            json.dump([key, *builds], kept, indent=1)
    return [Build(**build) for build in builds]


def lines(builds: list, launches: list) -> list[str]:
    """A line for each kernel, of all its instances, from the two properties of tests."""
    instances, started, of_kernel = defaultdict(list), defaultdict(list), {}
    for architecture, source, own in builds:
        for build in own:
            of_kernel[build["kernel"]] = name = f"{source}: {build['kernel'].partition('<')[0]}"
            instances[name, architecture].append(build)
    for architecture, own in launches:
        for kernel, _, shared, _, occupancy in own:
            started[of_kernel.get(kernel), architecture].append((shared / 1024, occupancy))
    texts = defaultdict(dict)
    for (name, architecture), own in instances.items():
        text = f"sm_{architecture} {max(build['registers'] for build in own)}"
        spilled = max(build["spilled"] for build in own)
        text += f" / spills {spilled}" * (spilled > 0)
        if started[name, architecture]:
            shared, occupancy = zip(*started[name, architecture], strict=True)
            text += f" / {max(shared):.0f} / {min(occupancy):.0%} to {max(occupancy):.0%}"
        texts[name][architecture] = text
    width = max(map(len, texts), default=0)
    return [f"{name:{width}} " + ", ".join(own[a] for a in DEVICES if a in own) for name, own in texts.items()]
