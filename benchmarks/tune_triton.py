"""Measures the launch parameters of the Triton kernels on the GPU at hand: ``shvit_kernels/backends/triton/table.py``.

    python -m benchmarks.tune_triton [--kernels short,...] [--write] [--out DIRECTORY]

For every kernel and published shape, all candidates are compiled first, in one process per core, and then timed in this
process as CUDA graphs on rotating buffers, interleaved. Prints the medians and the new table; ``--write`` puts it into
table.py. With ``--out``, every figure goes to tune.json there, and the new table.py beside it.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from shvit_kernels.backends import triton as backend
from shvit_kernels.backends.triton import table

BATCH = 256
QK_DIM = 16
STAGES = ((224, 48, 7), (320, 68, 4), (308, 66, 7), (448, 96, 4), (352, 75, 7), (336, 72, 8))
"""Channels, partial channels and side of each published attention stage."""
ROTATED_BYTES = 200e6
ROUNDS = 15
REGION = re.compile(r"(?<=written by benchmarks/tune_triton.py\.\n).*?(?=\n    # Until here)", re.DOTALL)


class Job(NamedTuple):
    kernel: str
    stage: tuple[int, int, int]
    dtype: torch.dtype
    candidate: NamedTuple

    @property
    def shape(self) -> table.Shape:
        _, P, side = self.stage
        return P, side * side, self.dtype.itemsize


@dataclass(frozen=True)
class Kernel:
    dtypes: tuple[torch.dtype, ...]
    """That it is the choice for at the published shapes; bfloat16 shares the entries of float16."""
    candidates: Callable[[table.Shape], Iterator[NamedTuple]]
    step: Callable[[Job], Callable[[Tensor], object]]
    """Makes the call to be timed."""


def _short_candidates(shape: table.Shape) -> Iterator[table.Short]:
    _, N, _ = shape
    images = (1, 2, 4) if N <= 16 else (1,)
    warps = (1, 2, 4) if N <= 16 else (2, 4, 8)
    return itertools.starmap(table.Short, itertools.product(images, warps, (4096, 8192, 16384)))


def _tiled_candidates(shape: table.Shape) -> Iterator[table.Tiled]:
    _, N, _ = shape
    tiles = [(16, 16, 16, 2), (16, 16, 16, 4)]
    if N > 16:
        tiles += [(32, 16, 16, 8), (32, 32, 16, 8), (64, 32, 16, 8), (64, 64, 16, 8)]
    return itertools.starmap(table.Tiled, ((*t, stages, c) for t in tiles for stages in (1, 2) for c in (4096, 8192)))


def _mixer_candidates(shape: table.Shape) -> Iterator[table.Mixer]:
    *_, itemsize = shape
    if itemsize == 4:
        tiles = ((64, 64, 16, 4), (64, 64, 16, 8), (64, 128, 16, 8), (128, 64, 32, 8))
    else:
        tiles = ((64, 64, 32, 4), (64, 64, 64, 4), (64, 128, 32, 4), (64, 128, 32, 8), (64, 128, 64, 8))
        tiles += ((128, 64, 32, 4), (128, 64, 64, 8), (128, 128, 32, 8), (128, 128, 64, 8), (128, 256, 32, 8))
    return itertools.starmap(table.Mixer, ((*tile, stages) for tile in tiles for stages in (3, 4)))


def _values(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.rand(shape, device="cuda", dtype=dtype) + 0.5


def _evaluation(job: Job) -> Callable[[Tensor], Tensor]:
    _, P, _ = job.stage
    O = 2 * QK_DIM + P
    norm, batch_norm = ([_values(job.dtype, size) for _ in range(count)] for size, count in ((P, 2), (O, 4)))
    weight = _values(job.dtype, O, P) / P

    def step(x: Tensor) -> Tensor:
        return torch.ops.shvit_kernels.shsa_eval_triton(
            x, *norm, weight, None, *batch_norm, QK_DIM, 1e-5, 1e-5, QK_DIM**-0.5, True, True, False
        )

    return step


def _residual_layer(job: Job) -> Callable[[Tensor], Tensor]:
    C, P, _ = job.stage
    O = 2 * QK_DIM + P
    norm, weight = [_values(job.dtype, P) for _ in range(2)], _values(job.dtype, O, P) / P
    projection = _values(job.dtype, C, C) / C, _values(job.dtype, C)

    def step(x: Tensor) -> Tensor:
        return torch.ops.shvit_kernels.shsa_mixer_triton(
            x, *norm, weight, None, *projection, QK_DIM, 1e-5, QK_DIM**-0.5, True, False
        )

    return step


KERNELS = {
    "short": Kernel((torch.float16,), _short_candidates, _evaluation),
    "tiled": Kernel((torch.float32,), _tiled_candidates, _evaluation),
    "mixer": Kernel((torch.float16, torch.float32), _mixer_candidates, _residual_layer),
}


def _use(job: Job) -> None:
    table.MEASURED[job.kernel][job.shape] = job.candidate


def _inputs(job: Job, copies: int) -> list[Tensor]:
    C, _, side = job.stage
    return list(torch.randn(copies, BATCH, C, side, side, device="cuda", dtype=job.dtype).unbind())


def compile_job(job: Job) -> str | None:
    """Compile into Triton's cache on disk; the error in a line where a candidate does not run."""
    _use(job)
    try:
        KERNELS[job.kernel].step(job)(*_inputs(job, 1))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def sampler(job: Job, inputs: list[Tensor]) -> Callable[[], float]:
    """Seconds per call of a replayed graph, whose calls have inputs and outputs of their own."""
    _use(job)
    step = KERNELS[job.kernel].step(job)
    step(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [step(x) for x in inputs]  # alive, so that each has memory of its own
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(outputs)

    return sample


def measure(jobs: list[Job]) -> dict[NamedTuple, float]:
    """Median seconds of each candidate of one kernel and shape."""
    C, _, side = jobs[0].stage
    copies = max(32, math.ceil(ROTATED_BYTES / (2 * BATCH * C * side * side * jobs[0].dtype.itemsize)))
    inputs = _inputs(jobs[0], copies)
    samplers = {job.candidate: sampler(job, inputs) for job in jobs}
    samples = {candidate: [] for candidate in samplers}
    for _ in range(ROUNDS):
        for candidate, sample in samplers.items():
            samples[candidate].append(sample())
    return {candidate: median(values) for candidate, values in samples.items()}


def written(best: dict[str, dict[table.Shape, NamedTuple]]) -> str:
    """The region of table.py between its two markers."""
    lines = []
    for kernel, entries in best.items():
        lines.append(f'    "{kernel}": {{')
        lines += [f"        {shape}: {candidate}," for shape, candidate in sorted(entries.items())]
        lines.append("    },")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if backend.INTERPRETED or backend.why_unavailable() is not None:
        sys.exit(f"nothing to measure: {backend.why_unavailable() or 'Triton interprets its kernels'}")

    best = {kernel: dict(entries) for kernel, entries in table.MEASURED.items()}
    groups = [
        [Job(kernel, stage, dtype, candidate) for candidate in KERNELS[kernel].candidates(shape)]
        for kernel in options.kernels.split(",")
        for dtype in KERNELS[kernel].dtypes
        for stage in STAGES
        for shape in [Job(kernel, stage, dtype, None).shape]
    ]
    jobs = [job for group in groups for job in group]
    start = time.perf_counter()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = dict(zip(jobs, pool.map(compile_job, jobs), strict=True))
    print(f"{len(jobs)} candidates compiled in {time.perf_counter() - start:.0f} s")
    figures = []
    for group in groups:
        for job in group:
            if errors[job] is not None:
                print(f"{job.kernel} {job.shape} {job.candidate}: {errors[job]}")
        runnable = [job for job in group if errors[job] is None]
        if not runnable:
            continue
        seconds = measure(runnable)
        ranked = sorted(seconds, key=seconds.get)
        job = group[0]
        best[job.kernel][job.shape] = ranked[0]
        print(job.kernel, job.stage, job.dtype, flush=True)
        for candidate in ranked[:4] + ranked[-1:]:
            print(f"    {1e6 * seconds[candidate]:7.2f} us  {candidate}", flush=True)
        figures += [
            {"kernel": job.kernel, "shape": job.shape, "candidate": candidate._asdict(), "seconds": value}
            for candidate, value in seconds.items()
        ]
    path = Path(table.__file__)
    text = REGION.sub(lambda _: written(best), path.read_text())
    print(written(best))
    if options.write:
        path.write_text(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "table.py").write_text(text)
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "figures": figures}
        (options.out / "tune.json").write_text(json.dumps(facts, indent=1))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main(sys.argv[1:])
