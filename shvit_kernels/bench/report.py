"""The results of :func:`shvit_kernels.bench.run` as tables, JSON and a plot."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .cases import EAGER, OURS, SUITES

Results = dict[str, Any]
_COLOURS = {OURS: "#0072b2", EAGER: "#999999"}
_STYLE = {"title_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}  # fits 80 columns
_OTHER_COLOURS = ["#e69f00", "#009e73", "#cc79a7"]


def _spread(spread: dict[str, float], digits: int) -> str:
    low, median, high = (f"{spread[key]:,.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


def _table(cases: list[dict[str, Any]]) -> Table:
    """The cases of one suite and one shape: a line per contender."""
    unit, scale = ("ms", 1e-3) if cases[0]["suite"] == "models" else ("microseconds", 1)
    table = Table(title=f"{cases[0]['suite']}: {cases[0]['name']}", **_STYLE)
    table.add_column("", no_wrap=True)
    for heading in (unit, "times eager", "GFLOP/s\n(of peak)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        images = case["shape"][0]
        table.add_row(f"{images} image{'s' if images > 1 else ''}, {case['mode']}")
        for name, figure in case["contenders"].items():
            time = {key: value * scale for key, value in figure["microseconds"].items()}
            table.add_row(
                f"  {name}",
                _spread(time, 0 if time["median"] >= 100 else 1),
                _spread(figure["times_eager"], 2),
                f"{figure['gflops']:.1f} ({figure['share_of_peak']:.0%})",
                style="bold" if name == OURS else "",
            )
        table.add_section()
    return table


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    for _, cases in groupby(results["cases"], key=lambda case: (case["suite"], case["name"])):
        console.print(_table(list(cases)))
    if results["kept_activations"]:
        table = Table(
            title="kept for the backward, 16 images, in multiples of x", title_justify="left", box=box.SIMPLE_HEAD
        )
        table.add_column("layer")
        for name in (OURS, EAGER):
            table.add_column(name, justify="right")
        for kept in results["kept_activations"]:
            table.add_row(kept["name"], *(f"{kept[n]:.2f}" for n in (OURS, EAGER)))
        console.print(table)
    if "call_overhead_microseconds" in results:
        spread = _spread(results["call_overhead_microseconds"], 1)
        console.print(f"a call of shsa without gradients, beyond the bare operator: {spread} microseconds (limit 10)")
    else:
        console.print(f"overhead of a call: not measured, backend {results['backend']} has no bare operator")
    peak = results["peak"]
    console.print(
        f"{results['device']}, {results['threads']} thread(s), backend {results['backend']}, "
        f"torch {results['versions']['torch']}; median (quartiles) of {results['rounds']} interleaved rounds; "
        f"peak: {peak['gflops']:.1f} GFLOP/s, {peak['of']}"
    )


def save_json(results: Results, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def save_plot(results: Results, path: Path) -> None:
    """Bars of the ratio to eager with their quartiles, a panel for each suite."""
    from matplotlib.figure import Figure

    suites = list(dict.fromkeys(case["suite"] for case in results["cases"]))
    counts = [sum(case["suite"] == suite for case in results["cases"]) for suite in suites]
    figure = Figure(figsize=(9, 1.5 + 0.45 * sum(counts) + 0.6 * len(suites)), layout="constrained")
    panels = figure.subplots(len(suites), squeeze=False, height_ratios=counts)[:, 0]
    for panel, suite in zip(panels, suites, strict=True):
        cases = [case for case in results["cases"] if case["suite"] == suite]
        names = [name for name in cases[0]["contenders"] if name != EAGER]
        height = 0.8 / len(names)
        others = iter(_OTHER_COLOURS)
        for i, name in enumerate(names):
            ratios = [case["contenders"][name]["times_eager"] for case in cases]
            median = [r["median"] for r in ratios]
            panel.barh(
                [row + (i - (len(names) - 1) / 2) * height for row in range(len(cases))],
                median,
                height,
                xerr=[[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]],
                color=_COLOURS.get(name) or next(others),
                label=name,
            )
        panel.axvline(1, color=_COLOURS[EAGER], linestyle="--", label=EAGER)
        panel.set_yticks(
            range(len(cases)), [f"{case['name']}\n{case['mode']}, batch {case['shape'][0]}" for case in cases]
        )
        panel.tick_params(axis="y", labelsize="small")
        panel.invert_yaxis()
        panel.set_title(f"{suite}: {SUITES[suite]}", loc="left", fontsize="medium")
        panel.set_xlabel("times as fast as eager (median, quartiles)")
    figure.suptitle(
        f"{results['device']}, {results['threads']} thread(s), torch {results['versions']['torch']}, "
        f"{results['date'][:10]}",
        fontsize="medium",
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
