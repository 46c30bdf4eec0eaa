"""Builds the Triton kernels for a device that need not be there, and reports what they use.

    TRITON_INTERPRET=0 python -m tests.support.triton_builds TARGET FILE
    TRITON_INTERPRET=0 python -m tests.support.triton_builds anew FILE

The operators are called on tensors without memory (device "meta"), and what they launch is compiled instead: so that
signatures, launch parameters and the table are those of the real calls. Writes a JSON list of :class:`Build`, or
what :func:`anew` says.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, KernelInterface

from shvit_kernels.backends import triton as backend
from shvit_kernels.backends.triton import table
from tests.support import triton_tier

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
B, QK_DIM, EPS = 256, 16, 1e-5
STAGES = ((224, 48, 7), (320, 68, 4), (308, 66, 7), (448, 96, 4), (352, 75, 7), (336, 72, 8))


@dataclass
class Build:
    operator: str
    case: str
    kernel: str
    error: str = ""
    registers: int = 0
    spilled: int = 0
    """Bytes of local memory a thread, whatever for."""
    shared: int = 0
    """Bytes a block."""
    keeping: int = 0
    """Maxima of floating-point numbers that keep NaN."""
    dropping: int = 0
    """Those that drop it."""
    seconds: float = 0.0


class Device(DriverBase):
    """A device that kernels are compiled for and cannot run on."""

    def __init__(self, target: GPUTarget):
        super().__init__()
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Stopped(Exception):
    """A build that was to go no further; with the shared memory, where that is known."""


@contextmanager
def stopped_after(stage: str) -> Iterator[None]:
    """Inside, builds end with :class:`Stopped`: after "ttir" what the front end refuses is known, in a tenth of the
    time, after "llir" the shared memory too."""

    def stop(_, metadata: dict):
        raise Stopped(metadata.get("shared", 0))

    def shortened(add_stages: Callable) -> Callable:
        def add(self, stages: dict, options, language):
            add_stages(self, stages, options, language)
            names = list(stages)
            stages[names[names.index(stage) + 1]] = stop

        return add

    with ExitStack() as patches:
        for backend in (CUDABackend, HIPBackend):
            patches.enter_context(patch.object(backend, "add_stages", shortened(backend.add_stages)))
        yield


def key_of(function: JITFunction, args: tuple, kwargs: dict) -> str:
    """What Triton tells the builds of a kernel apart by."""
    *_, binder = function.device_caches[0]
    _, specialization, options = binder(*args, **kwargs)
    return f"{function.__name__} {specialization} {sorted(options.items())}"


def usage(kernel) -> dict[str, int]:
    """Registers and local memory of a thread, and the shared memory of a block."""
    if "amdgcn" in kernel.asm:
        found = {k: int(v) for k, v in re.findall(r"\.(\w+): +(\d+)$", kernel.asm["amdgcn"], re.MULTILINE)}
        registers, spilled = found["vgpr_count"], found["private_segment_fixed_size"] + 4 * found["vgpr_spill_count"]
    else:
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [cuobjdump, "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
    return {"registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}


def maxima(kernel) -> dict[str, int]:
    """How many keep NaN and how many drop it; in PTX each is an instruction, elsewhere Triton's own code says so."""
    if "ptx" in kernel.asm:
        found = re.findall(r"\b(?:max|min)\.\S*(?:f16|bf16|f32)\S*", kernel.asm["ptx"])
        keeping = sum(".NaN" in instruction for instruction in found)
        return {"keeping": keeping, "dropping": len(found) - keeping}
    # arith.maximumf, arith.maxnumf
    keeping, dropping = (len(re.findall(rf"arith\.m(?:ax|in){kind}f", kernel.asm["ttir"])) for kind in ("imum", "num"))
    return {"keeping": keeping, "dropping": dropping}


@dataclass(frozen=True)
class Case:
    """Tensors and settings of the operators' calls."""

    C: int
    P: int
    height: int
    width: int
    dtype: torch.dtype = torch.float16
    D: int = QK_DIM
    layout: torch.memory_format = torch.contiguous_format
    norm: bool = True
    tf32: tuple[bool, bool] = (False, False)
    """Of the projection and of the attention."""
    operators: tuple[str, ...] | None = None
    """By default all."""
    batch: int = B
    device: str = "meta"
    parameters: torch.dtype | None = None
    """The type of the parameters; by default that of x."""
    asked: tuple[int, ...] | None = None
    """The gradients that are asked for: of x, of norm_weight and so on; by default all."""
    last_stage: str | None = None
    """Of the builds, see ``stopped_after``; by default they are finished."""

    def __str__(self) -> str:
        words = [f"{self.C}+{self.P}+{self.D} {self.height}x{self.width}", str(self.dtype).removeprefix("torch.")]
        words += ["channels_last"] * (self.layout == torch.channels_last) + ["no norm"] * (not self.norm)
        words += [f"parameters in {self.parameters}"] * (self.parameters is not None)
        words += [f"gradients {self.asked}"] * (self.asked is not None)
        return " ".join(words + [name for name, on in zip(("tf32_proj", "tf32_attn"), self.tf32, strict=True) if on])


def calls(case: Case, operators: dict) -> Iterator[tuple[str, tuple]]:
    """Arguments of each operator; those of a backward come from its forward, which is called for them."""
    P, D = case.P, case.D
    O = 2 * D + P

    def new(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=case.device)

    def image(channels: int) -> Tensor:
        return new(case.batch, channels, case.height, case.width).contiguous(memory_format=case.layout)

    def parameter(*shape: int) -> Tensor:
        return new(*shape, dtype=case.parameters or case.dtype)

    def like(results: tuple[Tensor, ...]) -> list[Tensor]:
        return [torch.empty_like(t) for t in results]

    def needs(count: int) -> list[bool]:
        return [case.asked is None or i in case.asked for i in range(count)]

    x, x1 = image(case.C), image(P)
    norm = (parameter(P), parameter(P)) if case.norm else (None, None)
    weight, vector = parameter(O, P), parameter(O)
    settings = D**-0.5, True, *case.tf32
    short = D, EPS, *settings
    long = D, EPS, EPS, *settings
    forward = (x, *norm, weight, vector, *short)
    yield "shsa_eval", (x, *norm, weight, None, *(vector,) * 4, *long)
    proj = parameter(case.C, case.C), parameter(case.C)
    yield "shsa_mixer", (x, *norm, weight, vector, *proj, *short[:3], *settings[2:])
    yield "shsa_forward", forward
    if case.operators is not None and set(case.operators) <= {"shsa_eval", "shsa_mixer", "shsa_forward"}:
        return
    y, *saved = operators["shsa_forward"](*forward)
    yield "shsa_backward", (y, x1, y, *saved, *norm, weight, vector, *short, needs(5))
    moments = x, *norm, P, EPS
    yield "partial_moments_forward", moments
    mean, cov, *of_images = like(operators["partial_moments_forward"](*moments))
    yield "partial_moments_backward", (mean, cov, x1, mean, *of_images, *norm, case.C, needs(3))
    train = x, *norm, weight, vector, vector, *long
    yield "shsa_train_forward", train
    results = operators["shsa_train_forward"](*train)
    yield "shsa_train_backward", (y, *results, *norm, weight, vector, vector, *long, needs(6))
    statistics = new(O, dtype=torch.float32)
    batches = new(1, dtype=torch.int64)
    for momentum in (0.1, None):
        yield "update_running_statistics", (vector, vector, batches, statistics, statistics, case.batch, momentum)


def cases(target: str) -> Iterator[Case]:
    """Every entry of the table on every target; every kernel on every target; every type and layout on one."""
    channels = {P: C for C, P, _ in STAGES}
    published = {(P, side * side, 2) for _, P, side in STAGES}
    for P, N, itemsize in sorted(published.union(*table.MEASURED.values())):
        dtype = {2: torch.float16, 4: torch.float32}[itemsize]
        yield Case(channels[P], P, N, 1, dtype, operators=("shsa_eval", "shsa_mixer"))
    yield Case(336, 72, 8, 8)
    yield Case(336, 72, 25, 42)
    yield Case(352, 75, 7, 7, torch.float32)
    yield Case(320, 68, 4, 4, torch.float32, tf32=(True, False))  # several images in a tile, and PyTorch's default
    if triton_tier.SHARED_KIB[target] < 100:
        yield from wide_cases()
    if target == "sm_90":
        yield Case(320, 68, 4, 4, torch.float32)
        yield Case(352, 75, 7, 7, torch.float32, tf32=(True, True))
        yield Case(448, 96, 4, 4, torch.bfloat16, layout=torch.channels_last)
        yield Case(448, 96, 25, 42, torch.bfloat16, layout=torch.channels_last)
        yield Case(200, 130, 16, 16, D=64, norm=False)
        yield from parsed_cases()


def wide_cases() -> Iterator[Case]:
    """The widest queries of each kernel, by their shared memory."""
    for P, *sides, D in ((128, 8, 8, 64), (128, 8, 8, 65), (128, 8, 8, 256), (128, 25, 42, 256), (300, 14, 14, 256)):
        for operators in (("shsa_eval",), ("shsa_backward",)) if D == 256 else (("shsa_eval",),):
            yield Case(P + 8, P, *sides, D=D, operators=operators, last_stage="llir")


def parsed_cases() -> Iterator[Case]:
    """Each gradient asked for alone, and some together; and parameters of another type than x, as autocast has them."""
    backwards = ("shsa_backward", "partial_moments_backward", "shsa_train_backward")
    for *image, dtype in ((8, 8, torch.float16), (25, 42, torch.float16), (8, 8, torch.float32)):
        for asked in ((0,), (1,), (2,), (3,), (4,), (0, 2, 4), (1, 3, 5)):
            yield Case(336, 72, *image, dtype, asked=asked, operators=backwards, last_stage="ttir")
    for dtype, parameters in triton_tier.MIXED:
        for sides in ((8, 8), (25, 42)):
            yield Case(336, 72, *sides, dtype, parameters=parameters, last_stage="ttir")


@contextmanager
def instead_of_launches(act: Callable) -> Iterator[dict[str, Callable]]:
    """The operators by name; inside, ``act(kernel, grid, *arguments, **options)`` is called where one is launched."""
    modules = [import_module(f"{backend.__name__}.{name}") for name in backend._MODULES]
    with (
        patch.object(KernelInterface, "__getitem__", lambda kernel, grid: partial(act, kernel, grid)),
        patch.object(torch.cuda, "current_device", lambda: None),  # the index of device "meta"
    ):
        yield {name: function for module in modules for name, function in module.OPERATORS.items()}


def build(target: str) -> list[Build]:
    triton.runtime.driver.set_active(Device(TARGETS[target]))
    builds: dict[str, Build] = {}
    what: list[str] = []

    def compiled(function, grid, *args, **kwargs):
        key = f"{key_of(function, args, kwargs)} {case.last_stage}"
        if key in builds:
            return
        start = time.perf_counter()
        try:
            with stopped_after(case.last_stage) if case.last_stage else nullcontext():
                kernel = function.run(*args, grid=grid, warmup=True, **kwargs)
            found = usage(kernel) | maxima(kernel)
        except Stopped as stopped:
            found = {"shared": stopped.args[0]}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        seconds = time.perf_counter() - start
        builds[key] = Build(*what, function.__name__, **found, seconds=seconds)

    with instead_of_launches(compiled) as operators:
        for case in cases(target):
            for name, arguments in calls(case, operators):
                if name in operators and (case.operators is None or name in case.operators):
                    what[:] = name, str(case)
                    operators[name](*arguments)
    return list(builds.values())


SIZES = {
    "batches": [Case(336, 72, 8, 8, batch=batch) for batch in (2, 1, 3, 16, 31, 128)],
    "long images": [Case(336, 72, *sides, batch=2) for sides in ((20, 20), (20, 24), (16, 27), (32, 16))],
    "long images whose tokens are odd": [Case(336, 72, *sides, batch=2) for sides in ((21, 21), (25, 17), (19, 23))],
}
"""Cases that one set of builds does for."""


def anew() -> list[tuple[str, str, str]]:
    """What all cases but the first of each kind build anew: the kind, the case and the kernel."""
    triton.runtime.driver.set_active(Device(TARGETS["sm_90"]))
    found = []
    for kind, (first, *others) in SIZES.items():
        known: set[str] = set()
        for case in (first, *others):

            def note(function, grid, *args, case=case, kind=kind, known=known, **kwargs):
                key = key_of(function, args, kwargs)
                if key not in known and case is not SIZES[kind][0]:
                    found.append((kind, str(case), function.__name__))
                known.add(key)

            with instead_of_launches(note) as operators:
                for name, arguments in calls(case, operators):
                    operators[name](*arguments)
    return found


if __name__ == "__main__":
    results = anew() if sys.argv[1] == "anew" else [asdict(b) for b in build(sys.argv[1])]
    Path(sys.argv[2]).write_text(json.dumps(results))
