"""The command line: ``info``, ``demo`` and ``bench``."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import shvit_kernels
from shvit_kernels import backends, demo
from shvit_kernels.__main__ import main
from shvit_kernels._randomise import randomise
from shvit_kernels.bench.cases import EAGER, EVALUATION, FUSED, OURS, SUITES, TRAINING, cases
from shvit_kernels.bench.costs import kept_activations
from shvit_kernels.bench.timing import Spread, measure


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "photograph.png"
    values = torch.randint(0, 256, (300, 400, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(path)
    return path


def test_info_gives_versions_and_a_reason_per_backend():
    result = run("info")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    assert shvit_kernels.__version__ in result.output
    for name, backend in backends.BACKENDS.items():
        assert name in result.output
        reason = backend.why_unavailable()
        assert reason is None or reason.split()[-1] in result.output


def test_info_where_the_named_backend_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "_from_environment", "cuda")
    result = run("info")
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "none: backend 'cuda'" in output and "can run here" in output


def test_demo_compares_and_plots(photograph, tmp_path):
    result = run("demo", "--variant", "shvit_s1", "--image", photograph, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "weights are random" in result.output
    assert "agree" in result.output
    with Image.open(tmp_path / "out" / "stock_and_accelerated.png") as plot:
        assert plot.width > 500


@pytest.mark.parametrize("distillation", [False, True])
def test_demo_of_a_checkpoint_finds_the_variant_and_shows_classes(photograph, tmp_path, distillation):
    model = randomise(shvit_kernels.shvit_s1(num_classes=7, distillation=distillation), seed=1)
    torch.save({"model": model.state_dict()}, tmp_path / "s1.pth")
    result = run("demo", "--image", photograph, "--checkpoint", tmp_path / "s1.pth", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "top five of 7 classes" in result.output
    assert "random" not in result.output


def test_demo_of_a_checkpoint_without_a_head(photograph, tmp_path):
    torch.save(randomise(shvit_kernels.shvit_s1(num_classes=0), seed=1).state_dict(), tmp_path / "s1.pth")
    result = run("demo", "--image", photograph, "--checkpoint", tmp_path / "s1.pth", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "pooled features" in result.output and "classes" not in result.output


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_images_of_16_bits(tmp_path, dtype):
    values = torch.randint(0, 256, (30, 40), generator=torch.Generator().manual_seed(0))
    Image.fromarray(values.to(torch.uint8).numpy()).save(tmp_path / "narrow.png")
    Image.fromarray((values * 257).numpy().astype(dtype)).save(tmp_path / "wide.tiff")
    narrow, wide = (demo.pixels(demo.read_image(tmp_path / name)) for name in ("narrow.png", "wide.tiff"))
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("wide", [torch.rand(30, 40), torch.full((30, 40), 1 << 20).int()], ids=["fractions", "large"])
def test_images_of_other_values_are_refused(tmp_path, wide):
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.tiff")
    with pytest.raises(ValueError, match=r"wide.tiff cannot be read: its values of type"):
        demo.read_image(tmp_path / "wide.tiff")


def test_demo_of_a_fused_checkpoint(photograph, tmp_path):
    model = randomise(shvit_kernels.shvit_s1(num_classes=7), seed=1).eval()
    torch.save(model.fuse().state_dict(), tmp_path / "s1.pth")
    result = run("demo", "--image", photograph, "--checkpoint", tmp_path / "s1.pth", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "top five of 7 classes" in result.output


def test_demo_fails_where_outputs_differ(photograph, tmp_path, monkeypatch):
    class Wrong(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) + 0.01

    monkeypatch.setattr(demo, "accelerate", Wrong)
    result = run("demo", "--variant", "shvit_s1", "--image", photograph, "--out", tmp_path)
    assert result.exit_code == 1
    assert "shvit_s1 differ" in result.output


def test_demo_names_what_it_cannot_use(photograph, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photograph.read_bytes()[:200])
    for arguments, message in [
        (["--image", broken], "broken.jpg cannot be read"),
        (["--image", tmp_path / "absent.jpg"], "absent.jpg"),
        (["--checkpoint", tmp_path / "absent.pth"], "absent.pth"),
        (["--checkpoint", broken], "broken.jpg cannot be read as a checkpoint"),
        (["--variant", "shvit_s5"], "shvit_s5"),
        (["--variant", "shvit_s1", "--variant", "shvit_s2", "--checkpoint", broken], "one model"),
    ]:
        result = run("demo", "--out", tmp_path, *arguments)
        assert result.exit_code != 0
        assert not isinstance(result.exception, (ValueError, OSError)), "a message, not a traceback"
        assert message in " ".join(result.output.split())


def test_demo_names_a_checkpoint_of_another_variant(photograph, tmp_path):
    torch.save(shvit_kernels.shvit_s1().state_dict(), tmp_path / "s1.pth")
    result = run("demo", "--image", photograph, "--checkpoint", tmp_path / "s1.pth", "--variant", "shvit_s2")
    assert result.exit_code != 0
    assert "shvit_s1" in result.output


def test_preprocessing_crops_the_centre():
    image = Image.new("RGB", (600, 300))
    image.paste((255, 0, 0), (150, 0, 450, 300))
    cropped = demo.crop(image, 224)
    assert cropped.size == (224, 224)
    x = demo.pixels(cropped)
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(demo.MEAN)) / torch.tensor(demo.DEVIATION)
    torch.testing.assert_close(x, red[None, :, None, None].expand(1, 3, 224, 224))


def test_preprocessing_is_timms():
    pytest.importorskip("shvit_kernels.bench.timm_import")
    from timm.data import create_transform

    values = torch.randint(0, 256, (333, 517, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(values.numpy())
    for side in (224, 256):
        theirs = create_transform((3, side, side), crop_pct=0.875, interpolation="bicubic")(image)
        torch.testing.assert_close(demo.pixels(demo.crop(image, side))[0], theirs)


def test_bench_prints_and_saves_every_figure(tmp_path):
    files = tmp_path / "results.json", tmp_path / "plot.png"
    options = ["--variant", "shvit_s1", "--rounds", 2, "--no-compile", "--json", files[0], "--plot", files[1]]
    threads = torch.get_num_threads()
    result = run("bench", "op", "layer", *options)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    assert "times eager" in result.output and "kept for the backward" in result.output

    results = json.loads(files[0].read_text())
    assert results["versions"]["torch"] == torch.__version__
    assert results["threads"] == 1 and results["rounds"] == 2
    assert results["device"] and results["date"]
    assert results["peak"]["gflops"] > 0
    assert ("call_overhead_microseconds" in results) == (results["backend"] == "cpu")
    assert len(results["cases"]) == 2 * 2 * 2 * 2  # suites, stages, modes, batches
    for case in results["cases"]:
        assert list(case["contenders"]) == ["shvit_kernels", "eager"]
        for figures in case["contenders"].values():
            for spread in (figures["microseconds"], figures["times_eager"]):
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]
            assert figures["gflops"] > 0 and figures["share_of_peak"] > 0
    for kept in results["kept_activations"]:
        assert kept["eager"] > 1 and kept["shvit_kernels"] > 1
    with Image.open(files[1]) as plot:
        assert plot.width > 500


def test_bench_honours_the_backend(tmp_path):
    options = ["--variant", "shvit_s1", "--rounds", 2, "--no-compile", "--json", tmp_path / "results.json"]
    assert run("bench", "op", "--backend", "eager", *options).exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text())["backend"] == "eager"


def test_bench_refuses_bad_options(tmp_path):
    for arguments, message in [
        (["operator"], "operator"),
        (["--backend", "gpu"], "gpu"),
        (["--rounds", "1"], "1"),
        (["--threads", "0"], "0"),
        (["--json", tmp_path / "absent" / "results.json"], "absent"),
        (["--variant", "s4"], "s4"),
        (["--plot", tmp_path / "plot.foo"], ".foo"),
    ]:
        result = run("bench", *arguments)
        assert result.exit_code in (1, 2) and not isinstance(result.exception, ValueError)
        assert message in result.output


def test_contenders_of_a_case_compute_the_same():
    for case in cases(SUITES, ["shvit_s1"], batches=[1]):
        ours, eager, fused = (case.call(name)() for name in (OURS, EAGER, FUSED))
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-3)


def test_flops_are_those_published():
    macs = {case.name: case.flops / case.shape[0] / 2e6 for case in cases(["models"], ["shvit_s1", "shvit_s4"])}
    assert macs == pytest.approx({"shvit_s1": 241, "shvit_s4": 986}, rel=0.002)


def test_a_training_step_takes_three_times_the_flops_of_evaluation():
    of_mode = {mode: [] for mode in (EVALUATION, TRAINING)}
    for case in cases(["op", "layer"], ["shvit_s1"]):
        of_mode[case.mode].append(case.flops)
    assert of_mode[TRAINING] == [3 * flops for flops in of_mode[EVALUATION]]


def test_a_shape_that_occurs_twice_is_measured_once():
    names = {case.name for case in cases(["op"], ["shvit_s2", "shvit_s3"])}
    assert len(names) == 3  # both end with 448 channels


def test_measure_interleaves_its_contenders():
    calls = []
    samples = measure({name: lambda n=name: calls.append(n) for name in "ab"}, rounds=3)
    assert [len(values) for values in samples.values()] == [3, 3]
    assert min(map(min, samples.values())) > 0
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order == list("ababab")  # warm-up ab, then the rounds ab, ba and ab


def test_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(2.0, 3.0, 4.0)


def test_kept_activations_counts_storages_once_and_no_parameters():
    x = torch.randn(4, 8, requires_grad=True)
    linear = torch.nn.Linear(8, 8, bias=False)  # keeps x and its weight
    assert kept_activations(linear, x) == 1
    twice = torch.nn.Sequential(linear, torch.nn.Linear(8, 8))
    assert kept_activations(twice, x) == 2
