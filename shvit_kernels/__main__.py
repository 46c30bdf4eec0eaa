"""The command line: ``info``, ``demo`` and ``bench``."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from . import __version__, backends
from .models.shvit import VARIANTS

_SUITES = ("op", "layer", "models")
_DTYPES = ("float32", "bfloat16")
_variant = click.option(
    "--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="A model; may be given again."
)
_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Bad input ends in its message, not in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        raise click.ClickException(f'{error.name} is missing: pip install "shvit-kernels[bench]"') from error


def _new_file(_context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that could not be written before anything is measured for it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {path.absolute().parent}")
    return path


_NEW_FILE = {"type": click.Path(dir_okay=False, writable=True, path_type=Path), "callback": _new_file}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """SHViT's single-head self-attention as one operator: what runs here, a demonstration, benchmarks."""


@main.command()
def info() -> None:
    """Versions, processor, and the backends with the reason why one cannot run."""
    from . import _environment

    console = Console()
    facts = Table(show_header=False, box=None)
    for name, version in _environment.versions().items():
        facts.add_row(name, version or "not installed")
    facts.add_row("processor", _environment.cpu())
    facts.add_row("threads", str(torch.get_num_threads()))
    native = backends.native
    if native.why_unavailable() is None:
        facts.add_row("instruction set", f"{native.instruction_set()} (of {', '.join(native.instruction_sets())})")
    named = backends.chosen_name(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table below says what is missing
        try:
            chosen = backends.choose(torch.empty(1, 1, 1, 1), None).name
        except ValueError as error:
            chosen = f"none: {error}"
    facts.add_row(backends.ENVIRONMENT_VARIABLE, named or "not set")
    facts.add_row("backend for CPU tensors", chosen)
    console.print(facts)

    table = Table("backend", "can run here")
    for name, backend in backends.BACKENDS.items():
        reason = backend.why_unavailable()
        table.add_row(name, "yes" if reason is None else f"no: {reason}")
    console.print(table)


@main.command()
@_variant
@click.option("--image", type=_EXISTING, help="A photograph; by default the one that matplotlib ships.")
@click.option("--checkpoint", type=_EXISTING, help="Weights of one model; its top five classes are shown too.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="demo", show_default=True, help="For the plot."
)
def demo(variants: tuple[str, ...], image: Path | None, checkpoint: Path | None, out: Path) -> None:
    """Run stock and accelerated models on a photograph; fails if their outputs differ beyond float32 rounding."""
    with _clear_errors():
        from . import demo as demonstration

        if not demonstration.run(list(variants), image, checkpoint, out, Console()):
            raise SystemExit(1)


@main.command()
@click.argument("what", nargs=-1, type=click.Choice(_SUITES))
@_variant
@click.option("--rounds", type=click.IntRange(min=2), help="Interleaved rounds per case.  [default: 30]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each contender.")
@click.option(
    "--dtype", type=click.Choice(_DTYPES), default=_DTYPES[0], show_default=True, help="Of images and weights."
)
@click.option("--backend", type=click.Choice(list(backends.BACKENDS)), help="By default the best one.")
@click.option("--compile/--no-compile", default=True, show_default=True, help="Measure torch.compile too (slow).")
@click.option("--peers", is_flag=True, help="Compare with other runtimes too, in evaluation (slow).")
@click.option("--json", "json_file", **_NEW_FILE, help="Save every figure.")
@click.option("--plot", "plot_file", **_NEW_FILE, help="Save a plot (.png).")
def bench(
    what: tuple[str, ...],
    variants: tuple[str, ...],
    rounds: int | None,
    threads: int,
    dtype: str,
    backend: str | None,
    compile: bool,
    peers: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure WHAT against the stock implementation: the operator, the layer and the models.

    Without WHAT a quick look at all three: S4 alone, 10 rounds, unless the options say otherwise. With --peers, in
    evaluation, ours against BatchNorm folded, channels_last, ONNX Runtime and OpenVINO, and S4 against MobileViTv2;
    in bfloat16 ONNX Runtime computes in float32.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .bench import report, run
    from .bench.cases import cases

    if not what:
        variants, rounds = variants or ("shvit_s4",), rounds or 10
    rounds = rounds or 30
    chosen = cases(list(what or _SUITES), list(variants or VARIANTS), dtypes=[getattr(torch, dtype)])
    console = Console()
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _clear_errors(), backends.use_backend(backend) if backend else nullcontext():
            if plot_file is not None:  # before anything is measured for it
                report.check_plot(plot_file)
            # Drawing from another thread would disturb the timings: the bar is drawn between rounds.
            with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
                task = progress.add_task("", total=len(chosen) * rounds)

                def before_case(case) -> None:
                    progress.update(task, description=case.id, refresh=True)

                def after_round() -> None:
                    progress.update(task, advance=1, refresh=True)

                results = run(
                    chosen,
                    rounds=rounds,
                    compile=compile,
                    with_peers=peers,
                    before_case=before_case,
                    after_round=after_round,
                )
    finally:
        torch.set_num_threads(before)
    report.show(results, console)
    with _clear_errors():
        if json_file is not None:
            report.save_json(results, json_file)
        if plot_file is not None:
            report.save_plot(results, plot_file)


if __name__ == "__main__":
    main(prog_name="python -m shvit_kernels")
