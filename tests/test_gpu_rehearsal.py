"""What the tests of the ``gpu`` tier consist of, run on the processor, so that they work once there is a GPU."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests import test_gpu
from tests.support import native as native_tier
from tests.support.numerics import Call

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves run"),
    native_tier.needs_native,
]

OPERATORS = [test_gpu.test_shsa, test_gpu.test_train, test_gpu.test_eval, test_gpu.test_moments, test_gpu.test_mixer]
SMALL = "320+68x16"


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")


@pytest.fixture
def streams(monkeypatch):
    """Work on a stream is done at once; a graph does the step again whose results it captured."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    steps: list[Callable] = []
    step = test_gpu.step

    def recorded(*arguments):
        results = step(*arguments)
        steps.append(lambda: [old.copy_(new) for old, new in zip(results, step(*arguments), strict=True)])
        return results

    @contextmanager
    def capture(graph) -> Iterator[None]:
        yield
        graph.replay = steps[-1]

    monkeypatch.setattr(test_gpu, "step", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for name in ("synchronize", "set_sync_debug_mode", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)


def rehearse(test: Callable, dtype: torch.dtype, train: bool = False) -> None:
    backend = "eager" if dtype == torch.float16 else "cpu"
    arguments = {"backend": backend, "dtype": dtype, "case": test_gpu.STAGES[SMALL], "B": 3, "train": train}
    test(**{name: arguments[name] for name in inspect.signature(test).parameters})


@pytest.mark.parametrize("dtype", test_gpu.DTYPES, ids=str)
@pytest.mark.parametrize("test", OPERATORS)
def test_operators_can_pass(test, dtype):
    rehearse(test, dtype)


@pytest.mark.parametrize("test", OPERATORS[:-1])
def test_operators_without_gradients_or_results_fail(test, monkeypatch):
    run = Call.run

    def zeros(call: Call, backend: str, *needs):
        results = run(call, backend, *needs)
        return {k: torch.zeros_like(t) for k, t in results.items()} if backend == "cpu" else results

    monkeypatch.setattr(Call, "run", zeros)
    with pytest.raises(AssertionError, match="from the truth"):
        rehearse(test, torch.float32)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_a_graph_can_pass(streams, train):
    rehearse(test_gpu.test_a_graph_gives_the_bits_of_the_calls, torch.float32, train)


def test_a_graph_that_does_nothing_fails(streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    with pytest.raises(AssertionError):
        rehearse(test_gpu.test_a_graph_gives_the_bits_of_the_calls, torch.float32, train=True)


def test_streams_can_pass(streams):
    rehearse(test_gpu.test_runs_on_the_current_stream, torch.float16)
    rehearse(test_gpu.test_same_bits_in_every_run, torch.float16)
