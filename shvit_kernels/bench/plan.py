"""What a run on a GPU measures, the most telling first."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..models.shvit import VARIANTS
from .cases import AUTOTUNE, COMPILE, COPY, EAGER, EVALUATION, FUSED, TRAINING, Case, cases

BACKENDS = ("triton", "cuda")
PEERS = (COPY, EAGER, FUSED)
LARGE, SMALL, LONG = 256, (32, 1), (8, 1)
"""Images: of the cases that decide, of the others, and of those with many tokens."""
LONG_SIDES = (25, 42), (64, 64)
"""A detection backbone's feature map for images of 1333 x 800, and 4096 tokens."""
HALF, SINGLE = torch.float16, torch.float32
_FUNCTIONS = ("op", "mixer", "layer", "shsa")
_LONG_VARIANT = "shvit_s4"


@dataclass(frozen=True)
class Entry:
    """One measurement: a case and who takes part in it."""

    case: Case
    contenders: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """About what it takes, for the budget."""
        compilations = (COMPILE in self.contenders) + 3 * (AUTOTUNE in self.contenders)
        return 4 + 25 * compilations * (4 if self.case.suite == "models" else 1)


def _stage_two(found: list[Case]) -> list[Case]:
    return [case for case in found if "stage 2" in case.name]


def _of(suites: tuple[str, ...], batches: tuple[int, ...], dtype: torch.dtype, mode: str | None = None) -> list[Case]:
    found = cases(suites, VARIANTS, batches, (dtype,))
    return [case for case in found if mode in (None, case.mode)]


def _long(dtype: torch.dtype) -> list[Case]:
    return _stage_two(cases(_FUNCTIONS, [_LONG_VARIANT], LONG, (dtype,), LONG_SIDES))


def entries(device: str) -> Iterator[Entry]:
    """The measurements in order; on the CPU a few small ones, for a dry run."""
    contenders = (*PEERS, *BACKENDS)
    if device == "cpu":
        for case in cases(("op",), ["shvit_s1"], (1,)):
            yield Entry(case, contenders)
        return
    decisive = _of(("op",), (LARGE,), HALF)
    mixers = _of(("mixer",), (LARGE,), HALF)
    evaluated = [case for case in decisive if case.mode == EVALUATION]
    trained = [case for case in decisive if case.mode == TRAINING]
    for case in (*evaluated, *trained, *mixers):
        yield Entry(case, contenders)
    # Each compiled case is measured anew with everyone, so that its ratios come from one run.
    for case in evaluated:
        yield Entry(case, (*contenders, COMPILE))
    for case in (*mixers[1::2], *trained[1::2]):
        yield Entry(case, (*contenders, COMPILE))
    for case in _of(("shsa", "layer"), (LARGE,), HALF):
        yield Entry(case, contenders)
    models = cases(("models",), VARIANTS, (LARGE, 1), (HALF,))
    for case in models:
        yield Entry(case, (EAGER, *BACKENDS))
    for case in (*_of(_FUNCTIONS, SMALL, HALF), *_long(HALF)):
        yield Entry(case, contenders)
    for case in (*_of(_FUNCTIONS, (LARGE,), SINGLE), *_of(_FUNCTIONS, SMALL, SINGLE), *_long(SINGLE)):
        yield Entry(case, contenders)
    for case in evaluated[::2]:
        yield Entry(case, (*contenders, COMPILE, AUTOTUNE))
    for case in cases(("models",), VARIANTS, (LARGE, 1), (SINGLE,)):
        yield Entry(case, (EAGER, *BACKENDS))
    for case in models:
        yield Entry(case, (EAGER, *BACKENDS, COMPILE))
