"""Interleaved timing: every round times every contender, so that a drift of the machine meets all of them alike."""

import math
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import TypeVar

import torch

from ..backends import native

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

SHORTEST_SAMPLE = 5e-3
"""Seconds; faster calls are repeated until a sample lasts this long."""

PAUSE = 0.05
"""Seconds before a sample where there are several threads: those of the contender before it spin for a while."""

PEAK_REPEATS = 10_000_000  # about 50 ms


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(*quantiles(values, n=4, method="inclusive")) if len(values) > 1 else cls(*(values * 3))


def _seconds(call: Call, repeats: int) -> float:
    if torch.get_num_threads() > 1:
        time.sleep(PAUSE)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(
    samplers: dict[Name, Callable[[], float]], rounds: int, after_round: Call = lambda: None
) -> dict[Name, list[float]]:
    """What each sampler gives in each round. The order within a round moves on by one every round."""
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    for _ in range(rounds):
        for name in names:
            samples[name].append(samplers[name]())
        names.append(names.pop(0))
        after_round()
    return samples


def measure(calls: dict[Name, Call], rounds: int, after_round: Call = lambda: None) -> dict[Name, list[float]]:
    """Seconds per call of each contender in each round."""
    samplers = {}
    for name, call in calls.items():
        call()  # the first call allocates, compiles and chooses algorithms
        call()
        samplers[name] = partial(_seconds, call, math.ceil(SHORTEST_SAMPLE / _seconds(call, 1)))
    return interleave(samplers, rounds, after_round)


def peak(threads: int, dtype: torch.dtype) -> tuple[str, float]:
    """What was measured, and the floating-point operations per second that it reached: the best of a few samples.

    In bfloat16 it is what the kernels of fused models multiply with, where that is compiled.
    """
    if native.why_unavailable() is None:
        with ThreadPoolExecutor(threads) as pool:
            samples = [_product_flops(pool, threads, dtype) for _ in range(3)]
        return f"a loop of multiply-adds in {str(dtype).removeprefix('torch.')}", max(samples)
    n = 1024
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    seconds = measure({"mm": lambda: torch.mm(a, b, out=out)}, rounds=5)["mm"]
    return f"torch.mm of two {n}x{n} float32 matrices", 2 * n**3 / min(seconds)


def _product_flops(pool: ThreadPoolExecutor, threads: int, dtype: torch.dtype) -> float:
    loop = partial(torch.ops.shvit_kernels_native.product_flops, dtype)
    start = time.perf_counter()
    operations = sum(pool.map(loop, [PEAK_REPEATS] * threads))
    return operations / (time.perf_counter() - start)
