"""Benchmarks of the operator, the layer and the models against the stock implementation.

``cases`` says what is measured, ``timing`` how, ``costs`` what else a call costs, and ``memory`` what a model takes;
``peers`` are the runtimes to compare with; ``report`` shows and keeps the results.
"""

import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from .. import _environment, backends
from ..stock import with_stock_layers
from . import memory, peers
from .cases import (
    BATCHES,
    CONTENDERS,
    EAGER,
    FUSE,
    OURS,
    RIVAL_OF,
    TRAINING,
    Case,
    contenders,
    rival,
)
from .costs import call_overhead, kept_activations
from .timing import Spread, measure, peak


def _ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times as long the one took as the other, over paired rounds."""
    return asdict(Spread.of([a / b for a, b in zip(slower, faster, strict=True)]))


def _summary(case: Case, samples: dict[str, list[float]], peak_flops: float) -> dict[str, Any]:
    medians = {name: Spread.of(seconds).median for name, seconds in samples.items()}
    best_peer = min(samples.keys() - {OURS, FUSE}, key=medians.get)
    figures = {}
    for name, seconds in samples.items():
        figures[name] = {
            "microseconds": asdict(Spread.of([1e6 * t for t in seconds])),
            "images_per_second": asdict(Spread.of([case.shape[0] / t for t in seconds])),
            "times_eager": _ratio(samples[EAGER], seconds),
            "times_best_peer": _ratio(samples[best_peer], seconds),
            "gflops": case.flops / medians[name] / 1e9,
            "share_of_peak": case.flops / medians[name] / peak_flops,
        }
    return {
        "suite": case.suite,
        "name": case.name,
        "mode": case.mode,
        "shape": list(case.shape),
        "flops": case.flops,
        "best_peer": best_peer,
        "contenders": figures,
    }


def _kept(case: Case) -> dict[str, Any]:
    x = torch.randn(case.shape, requires_grad=True)
    return {
        "name": case.name,
        "shape": list(case.shape),
        OURS: kept_activations(case.module(), x),
        EAGER: kept_activations(with_stock_layers(case.module()), x),
    }


def _against(
    case: Case, samples: dict[str, list[float]], other: Case, of_other: dict[str, list[float]]
) -> dict[str, Any]:
    """How many times as fast ``case`` runs, fused, as another model under each of its contenders."""
    times = {name: _ratio(seconds, samples[FUSE]) for name, seconds in of_other.items()}
    fastest = min(times, key=lambda name: times[name]["median"])
    return {"name": case.name, "rival": other.name, "shape": list(case.shape), "fastest": fastest, "times": times}


def run(
    cases: list[Case],
    *,
    rounds: int,
    compile: bool,
    with_peers: bool = False,
    after_round: Callable[[], object] = lambda: None,
    before_case: Callable[[Case], object] = lambda case: None,
) -> dict[str, Any]:
    """Measure ``cases``, all of one type, with the number of threads and the backend in force.

    ``with_peers`` sets the runtimes that a user could pick instead beside ours, in evaluation, and a rival beside the
    model that has one; who cannot run here is ``skipped``, with the reason.

    Returns:
        A dict that :mod:`json` can write: the machine, the settings, the measured peak and every figure.
    """
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _environment.cpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": _environment.instruction_set(),
        "versions": _environment.versions() | (peers.versions() if with_peers else {}),
        "backend": backends.choose(torch.empty(1, 1, 1, 1), None).name,
        "threads": torch.get_num_threads(),
        "dtype": str(cases[0].dtype).removeprefix("torch."),
        "rounds": rounds,
        "with_peers": with_peers,
        "skipped": {},
        "rivals": [],
    }
    skipped = results["skipped"]
    peaks, samples = [], []
    for case in cases:
        before_case(case)
        peak_of, flops = peak(results["threads"], case.dtype)
        peaks.append(flops)
        together = [case]
        if with_peers and case.suite == "models" and case.name in RIVAL_OF:
            reason = peers.why_missing(peers.TIMM)
            if reason is None:
                together.append(rival(case))
            else:
                skipped[RIVAL_OF[case.name]] = reason
        calls = {}
        for one in together:
            for name in contenders(one, compile=compile, with_peers=with_peers):
                reason = CONTENDERS[name].why_missing()
                if reason is None:
                    calls[one, name] = one.call(name)
                else:
                    skipped[name] = reason
        measured = measure(calls, rounds, after_round)
        by_case = [{name: values for (c, name), values in measured.items() if c is one} for one in together]
        samples += zip(together, by_case, strict=True)
        if len(together) > 1:
            results["rivals"].append(_against(case, by_case[0], together[1], by_case[1]))
    results["peak"] = {"of": peak_of, "gflops": max(peaks) / 1e9}
    results["cases"] = [_summary(*pair, max(peaks)) for pair in samples]
    results["kept_activations"] = [
        _kept(c) for c in cases if c.suite == "layer" and c.mode == TRAINING and c.shape[0] == max(BATCHES)
    ]
    if results["backend"] == "cpu":
        results["call_overhead_microseconds"] = {
            key: 1e6 * value for key, value in asdict(call_overhead(rounds)).items()
        }
    of_memory = [c for c in cases if (c.suite, c.name, c.dtype) == ("models", memory.VARIANT, torch.float32)]
    if with_peers and of_memory:
        names = [name for name in memory.MEASURED if name not in skipped]
        results["peak_memory"] = memory.growth(memory.VARIANT, names)
    return results
