"""Peers in the benchmark: ``bench --peers``."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from shvit_kernels import SHViT, bench
from shvit_kernels.__main__ import main
from shvit_kernels.bench import cases as definitions
from shvit_kernels.bench import memory, peers
from shvit_kernels.bench.cases import (
    COMPILE,
    COMPILE_LAST,
    CONTENDERS,
    EAGER,
    EVALUATION,
    FOLDED,
    FUSE,
    ONNX_RUNTIME,
    OPENVINO,
    OURS,
    PEERS,
    RIVALS,
    TRAINING,
    Case,
    cases,
    contenders,
)

needs_runtimes = pytest.mark.skipif(
    peers.why_missing(*peers.ONNX_RUNTIME_NEEDS, *peers.OPENVINO_NEEDS) is not None, reason="needs both runtimes"
)
needs_timm = pytest.mark.skipif(peers.why_missing(peers.TIMM) is not None, reason="needs timm")


def tiny(name: str = "tiny", dtype: torch.dtype = torch.float32) -> Case:
    build = partial(SHViT, embed_dim=(16, 24, 32), partial_dim=(8, 8, 12), depth=(1, 1, 1), num_classes=10)
    return next(definitions._of_module("models", name, build, (3, 64, 64), [2], [dtype]))


@pytest.fixture
def without_runtimes(monkeypatch):
    for module in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)


@needs_runtimes
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("suite", ["op", "layer", "models"])
def test_peers_compute_the_same(suite, dtype, rounding):
    whole = suite == "models"
    case = tiny(dtype=dtype) if whole else cases([suite], ["shvit_s1"], batches=[2], dtypes=[dtype])[0]
    assert case.mode == EVALUATION
    expected = case.call(EAGER)().float()
    for name in contenders(case, compile=False, with_peers=True):
        call = case.call(name)
        for _ in range(2):  # the first call of a runtime exports
            torch.testing.assert_close(call().float(), expected, rtol=rounding, atol=rounding)


@needs_runtimes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runtimes_get_rounded_weights_and_the_type_to_compute_in(dtype):
    case = tiny(dtype=dtype)
    with torch.no_grad():
        expected = case.module().to(dtype).float().eval()(case.inputs()[0][0].float())
    torch.testing.assert_close(case.call(ONNX_RUNTIME)(), expected, rtol=1e-4, atol=1e-4)
    assert CONTENDERS[OPENVINO].make(case.module().to(dtype), EVALUATION).dtype == dtype


def test_who_takes_part():
    whole = tiny()
    evaluation, training = (
        next(case for case in cases(["layer"], ["shvit_s1"]) if case.mode == mode) for mode in (EVALUATION, TRAINING)
    )
    assert contenders(whole, compile=True) == [OURS, FUSE, EAGER, COMPILE]
    assert contenders(evaluation, compile=True) == [OURS, EAGER, COMPILE]
    assert contenders(training, compile=True, with_peers=True) == [OURS, EAGER, COMPILE]
    for case in (whole, evaluation):
        names = contenders(case, compile=True, with_peers=True)
        assert names[0] == FUSE and {EAGER, FOLDED, ONNX_RUNTIME, OPENVINO} < set(names)
        assert not {COMPILE, COMPILE_LAST} & set(contenders(case, compile=False, with_peers=True))
    assert all(set(names) <= set(CONTENDERS) for names in PEERS.values())


def test_the_ratio_to_the_best_peer_is_paired():
    samples = {FUSE: [1.0, 1.0, 2.0], EAGER: [4.0, 4.0, 4.0], ONNX_RUNTIME: [2.0, 3.0, 2.0]}
    summary = bench._summary(tiny(), samples, peak_flops=1e9)
    assert summary["best_peer"] == ONNX_RUNTIME
    ratios = {name: figures["times_best_peer"] for name, figures in summary["contenders"].items()}
    assert ratios[FUSE] == {"low": 1.5, "median": 2.0, "high": 2.5}  # of 2, 3 and 1
    assert set(ratios[ONNX_RUNTIME].values()) == {1.0}
    assert summary["contenders"][FUSE]["images_per_second"]["median"] == 2.0


def test_what_does_not_import_is_skipped_with_the_reason(without_runtimes, monkeypatch):
    monkeypatch.setitem(sys.modules, peers.TIMM, None)
    monkeypatch.setattr(bench, "RIVAL_OF", {"tiny": "mobilevitv2_050"})
    results = bench.run([tiny()], rounds=2, compile=False, with_peers=True)
    assert set(results["skipped"]) == {ONNX_RUNTIME, OPENVINO, "mobilevitv2_050"}
    assert "onnxruntime" in results["skipped"][ONNX_RUNTIME]
    assert [case["name"] for case in results["cases"]] == ["tiny"]
    assert {FUSE, EAGER, FOLDED} < results["cases"][0]["contenders"].keys()
    assert results["rivals"] == [] and "peak_memory" not in results


@needs_timm
def test_a_rival_shares_the_rounds(monkeypatch, without_runtimes):
    rivals = {"tiny": "mobilevitv2_050"}
    monkeypatch.setattr(bench, "RIVAL_OF", rivals)
    monkeypatch.setattr(definitions, "RIVAL_OF", rivals)
    results = bench.run([tiny()], rounds=3, compile=False, with_peers=True)
    ours, theirs = results["cases"]
    assert theirs["suite"] == RIVALS and theirs["shape"] == ours["shape"] and list(theirs["contenders"]) == [EAGER]
    (ratio,) = results["rivals"]
    assert (ratio["name"], ratio["rival"], ratio["fastest"]) == ("tiny", "mobilevitv2_050", EAGER)
    assert 0 < ratio["times"][EAGER]["low"] <= ratio["times"][EAGER]["median"]


def test_command_line_shows_and_saves_peers(tmp_path: Path, monkeypatch, without_runtimes):
    grown = {"name": "tiny", "batches": 10, "images": 16, "bytes": {FUSE: 3 * 2**20}}
    monkeypatch.setattr(memory, "VARIANT", "tiny")
    monkeypatch.setattr(memory, "growth", lambda variant, names: grown | {"asked": [variant, names]})
    layers = cases(["layer"], ["shvit_s1"], batches=[1])[:2]  # in evaluation and in training
    monkeypatch.setattr(definitions, "cases", lambda suites, variants, dtypes: [tiny(), *layers])
    files = tmp_path / "results.json", tmp_path / "plot.png"
    arguments = ["bench", "--peers", "--no-compile", "--rounds", 2, "--json", files[0], "--plot", files[1]]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    for words in ("times best peer", "images/s", "3 MiB", f"{OPENVINO}: skipped, ModuleNotFoundError", EVALUATION):
        assert words in output
    results = json.loads(files[0].read_text())
    assert results["peak_memory"] == grown | {"asked": ["tiny", [FUSE]]}
    assert [case["mode"] for case in results["cases"]] == [EVALUATION, EVALUATION, TRAINING]
    with Image.open(files[1]) as plot:
        assert plot.width > 500


@needs_runtimes
def test_memory_grows_by_the_parameters_at_least():
    found = memory.growth("shvit_s1", [EAGER, ONNX_RUNTIME], batches=1, batch=1)["bytes"]
    parameters = 6.3e6 * 4
    assert all(parameters < size < 20 * parameters for size in found.values())
