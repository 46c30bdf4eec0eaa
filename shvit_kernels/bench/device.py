"""Timing on a device: CUDA graph against CUDA graph, on buffers that rotate so that no call finds its own in the cache.

Without a GPU the same functions time wall clock on the CPU, for a dry run.
"""

import math
import platform
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .. import _environment, backends
from .cases import CONTENDERS, COPY, EAGER, EVALUATION, TRAINING, Case, Step
from .timing import Spread, interleave

ROTATED_BYTES = 200e6
"""Inputs and outputs together exceed this between two uses of one buffer, several times the largest L2 cache."""
MOST_BUFFERS = {"models": 16}
"""By suite, by default 256. Where images are so small that this many do not suffice, the cache is emptied before every
replay instead."""
CALLS = 128
"""At least, in a graph, where that takes no longer than LONGEST_GRAPH seconds."""
LONGEST_GRAPH = 0.02
ROUNDS = 30
WALL_ROUNDS = 7
MOST_WALL_CALLS, WALL_SAMPLE = 50, 0.005
"""Calls in a sample of wall clock: as many, or as last so many seconds."""
LONGEST_MEASUREMENT = 4.0
"""Seconds for all rounds of a case; slow cases get fewer rounds, at least FEWEST_ROUNDS."""
FEWEST_ROUNDS = 5
_SLEEP_CLOCK = 2e9  # no GPU runs faster, so a sleep of this many cycles lasts a second at least

Sampler = Callable[[], float]
"""Seconds per call."""
Inputs = list[tuple[Tensor, Tensor]]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rotation(case: Case) -> tuple[int, bool]:
    """How many buffers rotate, and whether the cache has to be emptied besides."""
    tensors = 4 if case.mode == TRAINING else 2  # x, y and their gradients
    size = tensors * math.prod(case.shape) * case.dtype.itemsize
    needed = math.ceil(ROTATED_BYTES / size) + 1
    most = MOST_BUFFERS.get(case.suite, 256)
    return min(needed, most), needed > most


def _wall_sampler(step: Step, inputs: Inputs, device: str, calls: int) -> Sampler:
    """Wall clock of a number of calls and the wait for the last: what a program without graphs sees."""

    def sample() -> float:
        _synchronize(device)
        start = time.perf_counter()
        for i in range(calls):
            step(*inputs[i % len(inputs)])
        _synchronize(device)
        return (time.perf_counter() - start) / calls

    return sample


def _graph_sampler(step: Step, inputs: Inputs, seconds: float, empty_cache: Callable[[], object] | None) -> Sampler:
    """Replays of a graph of many calls; each call has an input of its own, and an output that it alone keeps."""
    buffers = len(inputs)
    cycles = max(1, min(math.ceil(CALLS / buffers), int(LONGEST_GRAPH / (seconds * buffers))))
    graph = torch.cuda.CUDAGraph()
    outputs = deque(maxlen=buffers)
    with torch.cuda.graph(graph):
        for x, dy in inputs * cycles:
            outputs.append(step(x, dy))
    graph.replay()
    torch.cuda.synchronize()
    launch = time.perf_counter()
    graph.replay()
    launch = time.perf_counter() - launch
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        if empty_cache is not None:
            empty_cache()
        torch.cuda._sleep(int(2 * launch * _SLEEP_CLOCK))  # the graph is ready before the clock starts
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / (buffers * cycles)

    return sample


class _Prepared:
    """A contender set up: a result to compare, and its samplers with and without a graph."""

    def __init__(self, case: Case, name: str, inputs: Inputs, device: str, empty_cache: Callable[[], object] | None):
        self.contender = CONTENDERS[name]
        with self.contender.context():
            step = case.step(name, device)
            _synchronize(device)
            side = torch.cuda.Stream() if device == "cuda" else None
            with torch.cuda.stream(side):  # as capture wants it; without a GPU it does nothing
                for x, dy in inputs[2::-1]:  # the first calls compile and choose algorithms
                    result = step(x, dy)
            _synchronize(device)
            # Of the first input: y, or the gradient of x.
            self.result = (result if isinstance(result, Tensor) else result[0]).detach().double()
            seconds = min(_wall_sampler(step, inputs, device, 1)() for _ in range(3))
            calls = max(1, min(MOST_WALL_CALLS, int(WALL_SAMPLE / seconds)))
            self.wall = self._in_context(_wall_sampler(step, inputs, device, calls))
            self.graph = self.wall
            if device == "cuda":
                self.graph = _graph_sampler(step, inputs, seconds, empty_cache)

    def _in_context(self, sampler: Sampler) -> Sampler:
        def sample() -> float:
            with self.contender.context():
                return sampler()

        return sample


def sentence(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _difference(result: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value; NaN where only one of the two has a NaN."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


def measure(
    case: Case, names: list[str], device: str, before: Callable[[str], object] = lambda name: None
) -> dict[str, Any]:
    """Every figure of a case: a dict that :mod:`json` can write.

    A contender that cannot run is kept with the reason (``skipped``) or its error (``error``). An error that leaves
    the device unusable is raised, after which the process is of no more use; ``before`` is told which contender is
    about to be set up.
    """
    started = time.perf_counter()
    buffers, cold = rotation(case) if device == "cuda" else (2, False)
    inputs = case.inputs(buffers, device)
    empty_cache = torch.empty(2**28, dtype=torch.uint8, device=device).max if cold else None
    prepared: dict[str, _Prepared] = {}
    contenders: dict[str, dict[str, Any]] = {}
    for name in names:
        before(name)
        contenders[name] = {}
        reason = CONTENDERS[name].why_not(inputs[0][0])
        if reason is not None:
            contenders[name]["skipped"] = reason
            continue
        try:
            prepared[name] = _Prepared(case, name, inputs, device, empty_cache)
        except Exception as error:
            contenders[name]["error"] = sentence(error)
            _synchronize(device)  # raises what cannot be recovered from
    before("all")
    graphs = {name: p.graph for name, p in prepared.items()}
    walls = {name: p.wall for name, p in prepared.items()}
    start = time.perf_counter()
    interleave(graphs, 1)
    one_round = time.perf_counter() - start
    rounds = max(FEWEST_ROUNDS, min(ROUNDS, int(LONGEST_MEASUREMENT / one_round)))
    samples = interleave(graphs, rounds)
    wall_samples = interleave(walls, WALL_ROUNDS if device == "cuda" else 1)
    moved = 2 * math.prod(case.shape) * case.dtype.itemsize
    for name, seconds in samples.items():
        spread = Spread.of(seconds)
        figures = contenders[name]
        figures["microseconds"] = asdict(Spread.of([1e6 * t for t in seconds]))
        figures["wall_microseconds"] = asdict(Spread.of([1e6 * t for t in wall_samples[name]]))
        for other in (EAGER, COPY):
            if other in samples:
                ratios = [o / t for o, t in zip(samples[other], seconds, strict=True)]
                figures[f"times_{other}"] = asdict(Spread.of(ratios))
        if name != COPY:
            figures["gflops"] = case.flops / spread.median / 1e9
            if EAGER in prepared:
                figures["difference_from_eager"] = _difference(prepared[name].result, prepared[EAGER].result)
        if case.mode == EVALUATION and case.suite != "models":
            figures["gbytes_per_second"] = moved / spread.median / 1e9
    return {
        "id": case.id,
        "suite": case.suite,
        "name": case.name,
        "mode": case.mode,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "flops": case.flops,
        "buffers": buffers,
        "cache_emptied": cold,
        "rounds": rounds,
        "seconds": time.perf_counter() - started,
        "contenders": contenders,
    }


def _graph_microseconds(call: Callable[[], object], calls: int) -> float:
    sampler = _graph_sampler(lambda x, dy: call(), [(torch.empty(0), torch.empty(0))] * calls, 1e-6, None)
    return 1e6 * Spread.of([sampler() for _ in range(11)]).median


def ceilings() -> dict[str, float]:
    """What the device reaches at best: a large copy, a large matrix product, and the least that a kernel costs."""
    x = torch.empty(2**29, device="cuda", dtype=torch.float16).normal_()
    y = torch.empty_like(x)
    copy = _graph_microseconds(lambda: y.copy_(x), 5)
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    product = _graph_microseconds(lambda: torch.mm(a, b, out=out), 10)
    one = torch.zeros(1, device="cuda")
    return {
        "copy_gbytes_per_second": 2 * x.nbytes / copy / 1e3,
        "float16_matmul_gflops": 2 * n**3 / product / 1e3,
        "smallest_kernel_in_a_graph_microseconds": _graph_microseconds(lambda: one.add_(1), 1000),
    }


def facts(device: str) -> dict[str, Any]:
    """Device, driver and versions, and why a backend cannot run."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _environment.cpu(),
        "versions": _environment.versions() | {"cuda": torch.version.cuda},
        "backends": {name: backend.why_unavailable() for name, backend in backends.BACKENDS.items()},
        "device": "none",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None
