"""The results of :func:`shvit_kernels.bench.run` as tables, JSON and a plot."""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .cases import EAGER, FUSE, OURS, RIVALS, SUITES

Results = dict[str, Any]
_COLOURS = {OURS: "#0072b2", FUSE: "#003a5d", EAGER: "#999999"}
_STYLE = {"title_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}  # fits 80 columns
_OTHER_COLOURS = ["#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"]


def _spread(spread: dict[str, float], digits: int) -> str:
    low, median, high = (f"{spread[key]:,.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


def _table(cases: list[dict[str, Any]], with_peers: bool) -> Table:
    """The cases of one suite and one shape: a line per contender."""
    whole = cases[0]["suite"] in ("models", RIVALS)
    key, unit, scale = ("microseconds", "ms", 1e-3) if whole else ("microseconds", "microseconds", 1)
    ratio = "times_eager"
    if with_peers:
        ratio = "times_best_peer"
        if whole:
            key, unit, scale = "images_per_second", "images/s", 1
    table = Table(title=f"{cases[0]['suite']}: {cases[0]['name']}", **_STYLE)
    table.add_column("", no_wrap=True)
    for heading in (unit, ratio.replace("_", " "), "GFLOP/s\n(of peak)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        images = case["shape"][0]
        table.add_row(f"{images} image{'s' if images > 1 else ''}, {case['mode']}")
        for name, figure in case["contenders"].items():
            speed = {quantile: value * scale for quantile, value in figure[key].items()}
            table.add_row(
                f"  {name}",
                _spread(speed, 0 if speed["median"] >= 100 else 1),
                _spread(figure[ratio], 2),
                f"{figure['gflops']:.1f} ({figure['share_of_peak']:.0%})",
                style="bold" if name in (OURS, FUSE) else "",
            )
        table.add_section()
    return table


def _show_peers(results: Results, console: Console) -> None:
    """What a comparison with peers adds."""
    for rivals in results["rivals"]:
        eager, fastest = (_spread(rivals["times"][name], 2) for name in (EAGER, rivals["fastest"]))
        console.print(
            f"{rivals['name']}, {rivals['shape'][0]} image(s): {eager} times as fast as {rivals['rival']} under eager, "
            f"{fastest} times as fast as under {rivals['fastest']}, its fastest"
        )
    if "peak_memory" in results:
        memory = results["peak_memory"]
        grown = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory["bytes"].items())
        console.print(
            f"{memory['name']}, growth of peak resident memory over building it and {memory['batches']} batches of "
            f"{memory['images']} images: {grown}"
        )
    for name, reason in results["skipped"].items():
        console.print(f"{name}: skipped, {reason}", markup=False)


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in results["cases"]:
        tables.setdefault((case["suite"], case["name"]), []).append(case)
    for cases in tables.values():
        console.print(_table(cases, results["with_peers"]))
    _show_peers(results, console)
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
        f"{results['dtype']}, torch {results['versions']['torch']}; "
        f"median (quartiles) of {results['rounds']} interleaved rounds; "
        f"peak: {peak['gflops']:.1f} GFLOP/s, {peak['of']}"
    )


def save_json(results: Results, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def check_plot(path: Path) -> None:
    """``ValueError`` if no plot can be saved under this name."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"a plot must be one of {', '.join('.' + kind for kind in known)}, got {path}")


def save_plot(results: Results, path: Path) -> None:
    """Bars of the ratio to eager with their quartiles, a panel for each suite."""
    from matplotlib.figure import Figure

    titles = SUITES | {RIVALS: "other models"}
    suites = list(dict.fromkeys(case["suite"] for case in results["cases"]))
    counts = [sum(case["suite"] == suite for case in results["cases"]) for suite in suites]
    figure = Figure(figsize=(9, 1.5 + 0.45 * sum(counts) + 0.6 * len(suites)), layout="constrained")
    panels = figure.subplots(len(suites), squeeze=False, height_ratios=counts)[:, 0]
    others = dict.fromkeys(name for case in results["cases"] for name in case["contenders"] if name not in _COLOURS)
    colours = _COLOURS | dict(zip(others, cycle(_OTHER_COLOURS), strict=False))
    legend = {}
    for panel, suite in zip(panels, suites, strict=True):
        cases = [case for case in results["cases"] if case["suite"] == suite]
        here = [name for name in colours if name != EAGER and any(name in case["contenders"] for case in cases)]
        height = 0.8 / len(here)
        for i, name in enumerate(here):
            rows = [row for row, case in enumerate(cases) if name in case["contenders"]]
            ratios = [cases[row]["contenders"][name]["times_eager"] for row in rows]
            legend[name] = panel.barh(
                [row + (i - (len(here) - 1) / 2) * height for row in rows],
                [r["median"] for r in ratios],
                height,
                xerr=[[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]],
                color=colours[name],
            )
        legend[EAGER] = panel.axvline(1, color=_COLOURS[EAGER], linestyle="--")
        panel.set_yticks(
            range(len(cases)), [f"{case['name']}\n{case['mode']}, batch {case['shape'][0]}" for case in cases]
        )
        panel.tick_params(axis="y", labelsize="small")
        panel.invert_yaxis()
        panel.set_title(f"{suite}: {titles[suite]}", loc="left", fontsize="medium")
        panel.set_xlabel("times as fast as eager (median, quartiles)")
    figure.suptitle(
        f"{results['device']}, {results['threads']} thread(s), torch {results['versions']['torch']}, "
        f"{results['date'][:10]}",
        fontsize="medium",
    )
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
