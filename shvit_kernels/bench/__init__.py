"""Benchmarks of the operator, the layer and the models against the stock implementation.

``cases`` says what is measured, ``timing`` how, and ``costs`` what else a call costs; ``report`` shows and keeps the
results.
"""

import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from .. import _environment, backends
from ..stock import with_stock_layers
from .cases import BATCHES, COMPILE, EAGER, OURS, TRAINING, Case
from .costs import call_overhead, kept_activations
from .timing import Spread, measure, peak


def _summary(case: Case, samples: dict[str, list[float]], peak_flops: float) -> dict[str, Any]:
    contenders = {}
    for name, seconds in samples.items():
        spread = Spread.of(seconds)
        times_eager = [e / t for e, t in zip(samples[EAGER], seconds, strict=True)]
        contenders[name] = {
            "microseconds": asdict(Spread.of([1e6 * t for t in seconds])),
            "times_eager": asdict(Spread.of(times_eager)),
            "gflops": case.flops / spread.median / 1e9,
            "share_of_peak": case.flops / spread.median / peak_flops,
        }
    return {
        "suite": case.suite,
        "name": case.name,
        "mode": case.mode,
        "shape": list(case.shape),
        "flops": case.flops,
        "contenders": contenders,
    }


def _kept(case: Case) -> dict[str, Any]:
    x = torch.randn(case.shape, requires_grad=True)
    return {
        "name": case.name,
        "shape": list(case.shape),
        OURS: kept_activations(case.module(), x),
        EAGER: kept_activations(with_stock_layers(case.module()), x),
    }


def run(
    cases: list[Case],
    *,
    rounds: int,
    compile: bool,
    after_round: Callable[[], object] = lambda: None,
    before_case: Callable[[Case], object] = lambda case: None,
) -> dict[str, Any]:
    """Measure ``cases`` with the number of threads and the backend in force.

    Returns:
        A dict that :mod:`json` can write: the machine, the settings, the measured peak and every figure.
    """
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _environment.cpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": _environment.instruction_set(),
        "versions": _environment.versions(),
        "backend": backends.choose(torch.empty(1, 1, 1, 1), None).name,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    peaks, samples = [], []
    for case in cases:
        before_case(case)
        peak_of, flops = peak(results["threads"])
        peaks.append(flops)
        calls = {name: case.call(name) for name in (OURS, EAGER, COMPILE) if compile or name != COMPILE}
        samples.append(measure(calls, rounds, after_round))
    results["peak"] = {"of": peak_of, "gflops": max(peaks) / 1e9}
    results["cases"] = [_summary(*pair, max(peaks)) for pair in zip(cases, samples, strict=True)]
    results["kept_activations"] = [
        _kept(c) for c in cases if c.suite == "layer" and c.mode == TRAINING and c.shape[0] == max(BATCHES)
    ]
    if results["backend"] == "cpu":
        results["call_overhead_microseconds"] = {
            key: 1e6 * value for key, value in asdict(call_overhead(rounds)).items()
        }
    return results
