"""Reading of checkpoint files: what fits is loaded whole, what does not is refused whole."""

import argparse
import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shvit_kernels import SHViT, accelerate, create_model, load_checkpoint, shvit_s1
from shvit_kernels._randomise import randomise
from shvit_kernels.bench.timm_import import timm
from shvit_kernels.models.checkpoints import describe
from tests.support.official import official_state_dict

SMALL = {"embed_dim": (16, 24, 40), "partial_dim": (4, 6, 9), "depth": (1, 2, 2), "num_classes": 5}


def small(**arguments) -> SHViT:
    return SHViT(**{**SMALL, **arguments})


@pytest.fixture(scope="module")
def source() -> SHViT:
    return randomise(small(), seed=5).eval()


@pytest.fixture
def weights(source):
    return {name: value.clone() for name, value in source.state_dict().items()}


def assert_loaded(model: nn.Module, source: nn.Module) -> None:
    for result, expected in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def save(content: object, path: os.PathLike) -> os.PathLike:
    torch.save(content, path)
    return path


def training_file(weights: dict) -> dict:
    """What the official repository's ``main.py`` writes."""
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "lr_scheduler": {"base_values": [1e-3]},
        "epoch": 3,
        "model_ema": {name: value * 0 for name, value in weights.items()},
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="shvit_s1", lr=1e-3, opt_betas=None),
    }


FILES = {
    "bare": lambda w: w,
    "official release": lambda w: {"model": official_state_dict(w)},
    "official training": lambda w: training_file(official_state_dict(w)),
    "official, DDP": lambda w: {"model": {f"module.{k}": v for k, v in official_state_dict(w).items()}},
    "timm training": lambda w: {"epoch": 1, "arch": "shvit_s1", "state_dict": w, "args": argparse.Namespace(lr=1.0)},
    "compiled": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    "compiled DDP": lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
    "DDP in compiled": lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()},
    "1x1 convolutions as matrices": lambda w: {k: v.flatten(1) if v.shape[2:] == (1, 1) else v for k, v in w.items()},
    "in another order": lambda w: dict(reversed(w.items())),
    "float64": lambda w: {k: v.double() if v.is_floating_point() else v for k, v in w.items()},
    "parameters": lambda w: {k: nn.Parameter(v, requires_grad=False) for k, v in w.items()},
}


@pytest.mark.parametrize("kind", FILES)
def test_files(tmp_path, source, weights, kind):
    model = small()
    assert load_checkpoint(model, save(FILES[kind](weights), tmp_path / "weights.pth")) is model
    assert_loaded(model, source)
    # The same content as a dict, and a path as a string.
    assert_loaded(load_checkpoint(small(), FILES[kind](weights)), source)
    assert_loaded(load_checkpoint(small(), str(tmp_path / "weights.pth")), source)


def test_safetensors(tmp_path, source, weights):
    save_file(weights, tmp_path / "weights.safetensors")
    assert_loaded(load_checkpoint(small(), tmp_path / "weights.safetensors"), source)
    save_file(official_state_dict(weights), tmp_path / "official.safetensors")
    assert_loaded(load_checkpoint(small(), str(tmp_path / "official.safetensors")), source)


def test_old_format(tmp_path, source, weights):
    torch.save(
        {"model": weights, "args": argparse.Namespace(a=1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    assert_loaded(load_checkpoint(small(), tmp_path / "old.pth"), source)


def test_averaged_weights_by_hand(tmp_path, source, weights):
    content = training_file(weights)
    content["model"], content["model_ema"] = content["model_ema"], content["model"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(save(content, tmp_path / "t.pth"), weights_only=True)
    assert_loaded(load_checkpoint(small(), content["model_ema"]), source)


@pytest.mark.parametrize("name", ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"])
def test_published_models(tmp_path, name):
    theirs = timm.create_model(name)
    path = save({"model": official_state_dict(theirs.state_dict())}, tmp_path / f"{name}.pth")
    assert_loaded(create_model(name, checkpoint=path), theirs)
    described = describe(official_state_dict(theirs.state_dict()))
    assert described == (name, 1000, False, False)
    assert describe(theirs.eval().fuse().state_dict()) == (name, 1000, False, True)


def test_official_names_are_what_the_table_says():
    names = official_state_dict(dict.fromkeys(shvit_s1(device="meta").state_dict()))
    assert {
        "patch_embed.0.c.weight",
        "blocks1.1.ffn.m.pw1.bn.bias",
        "blocks2.0.0.m.c.weight",
        "blocks2.0.1.m.pw2.c.weight",
        "blocks2.1.se.fc1.bias",
        "blocks2.2.0.m.bn.running_mean",
        "blocks3.2.1.m.pw1.c.weight",
        "blocks3.7.mixer.m.proj.1.bn.num_batches_tracked",
        "head.l.weight",
    } <= set(names)


@pytest.mark.parametrize("convert", [lambda w: w, official_state_dict], ids=["timm", "official"])
def test_fused_into_fused(tmp_path, source, convert):
    fused = copy.deepcopy(source).fuse()
    path = save({"model": convert(fused.state_dict())}, tmp_path / "fused.pth")
    assert_loaded(load_checkpoint(small().fuse(), path), fused)
    assert_loaded(load_checkpoint(accelerate(small().fuse()), path), fused)


def test_distillation(tmp_path):
    source = randomise(small(distillation=True))
    path = save({"model": official_state_dict(source.state_dict())}, tmp_path / "distilled.pth")
    assert_loaded(load_checkpoint(small(distillation=True), path), source)
    with pytest.raises(
        ValueError, match=r"distilled.pth .*distillation=True; make the model so.*unexpected \(head_dist"
    ):
        load_checkpoint(small(), path)
    with pytest.raises(ValueError, match=r"distillation=False; make the model so.*missing \(head_dist"):
        load_checkpoint(small(distillation=True), small().state_dict())


class Wrapper(nn.Module):
    """Names as ``DistributedDataParallel`` gives them."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


class OfficialLayout(nn.Module):
    """The official repository's module tree, around the children of ours."""

    def __init__(self, model: SHViT):
        super().__init__()
        self.patch_embed, self.head = model.patch_embed, model.head
        for i, stage in enumerate(model.stages):
            down = stage.downsample
            first = [nn.Sequential(down[0], down[1]), down[2], nn.Sequential(down[3], down[4])] if i else []
            setattr(self, f"blocks{i + 1}", nn.Sequential(*first, *stage.blocks))


@pytest.mark.parametrize(
    "wrap",
    [
        accelerate,
        Wrapper,
        OfficialLayout,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: Wrapper(torch.compile(m)),
    ],
    ids=["accelerated", "DDP", "official", "compiled", "DDP of compiled"],
)
@pytest.mark.parametrize("convert", [lambda w: w, official_state_dict], ids=["timm file", "official file"])
def test_models_of_other_layouts(source, weights, wrap, convert):
    model = small()
    wrapped = wrap(model)
    assert load_checkpoint(wrapped, {"model": convert(weights)}) is wrapped
    assert_loaded(model, source)


def test_timm_model(weights):
    theirs = timm.create_model("shvit_s1")
    ours = randomise(shvit_s1())
    assert_loaded(load_checkpoint(theirs, {"model": official_state_dict(ours.state_dict())}), ours)


def test_parts_that_the_model_lacks_are_left_out(source, weights):
    for arguments in ({"num_classes": 0}, {"features_only": True}, {"features_only": True, "out_indices": (0, 1)}):
        model = load_checkpoint(small(**arguments), weights)
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name


def test_dtype_device_and_flags_stay(weights):
    model = small(dtype=torch.float64).eval().requires_grad_(False)
    before = dict(model.named_parameters())
    load_checkpoint(model, weights)
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and not parameter.requires_grad
        assert torch.equal(parameter, weights[name].double())
    assert not model.training


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def change(**changes):
    def apply(weights: dict) -> dict:
        return {name: value for name, value in {**weights, **changes}.items() if value is not None}

    return apply


def renamed_head(weights: dict) -> dict:
    return {name.replace("head.", "classifier."): value for name, value in weights.items()}


MISFITS = {
    "missing": (lambda w: change(**{"head.l.bias": None, "patch_embed.2.bn.weight": None})(w),
                r"Entries: 2 missing \(patch_embed.2.bn.weight, head.l.bias\)"),
    "unexpected": (lambda w: change(extra=torch.zeros(1))(w), r"Entries: 1 unexpected \(extra\)"),
    "official unexpected": (
        lambda w: official_state_dict(w) | {"blocks2.9.conv.m.c.weight": torch.zeros(1)},
        r"1 unexpected \(blocks2.9.conv.m.c.weight\)",
    ),
    "odd official name": (lambda w: w | {"blocks2.0": torch.zeros(1)}, r"1 unexpected \(blocks2.0\)"),
    "odd official child": (lambda w: w | {"blocks2.0.x": torch.zeros(1)}, r"1 unexpected \(blocks2.0.x\)"),
    "shape": (
        lambda w: w | {"patch_embed.0.c.weight": torch.zeros(2, 1, 3, 3)},
        r"1 of another shape \(patch_embed.0.c.weight: \(2, 1, 3, 3\), not \(2, 3, 3, 3\)\)",
    ),
    "type": (
        lambda w: w | {"head.l.bias": torch.zeros(5, dtype=torch.int64)},
        r"1 of another type \(head.l.bias: torch.int64, not torch.float32\)",
    ),
    "complex": (lambda w: w | {"head.l.bias": torch.zeros(5, dtype=torch.complex64)}, "1 of another type"),
    "head": (
        lambda w: w | {"head.l.weight": torch.zeros(7, 40), "head.l.bias": torch.zeros(7)},
        r"head has 7 classes and the model's has 5; make the model with num_classes=7, load, and call "
        r"reset_classifier\(5\)",
    ),
    "other head names": (renamed_head, r"6 missing \(head.bn.w.*, \.\.\.\); 7 unexpected \(classifier.bn.w"),
    "foreign": (lambda w: nn.Linear(3, 3).state_dict(), r"missing \(patch_embed.*2 unexpected \(weight, bias\)"),
    "doubled": (lambda w: w | {"_orig_mod.head.l.bias": torch.zeros(5)}, "holds head.l.bias twice"),
    "sparse": (lambda w: w | {"head.l.bias": torch.zeros(5).to_sparse()}, "head.l.bias is a torch.sparse_coo tensor"),
    "meta": (lambda w: w | {"head.l.bias": torch.zeros(5, device="meta")}, "head.l.bias is a meta tensor"),
    "no weights": (lambda w: {"epoch": 3}, "holds no weights: 'epoch' is of type int, not a tensor"),
    "empty": (lambda w: {}, "holds no weights"),
    "a list": (lambda w: [torch.zeros(1)], "holds no weights: .* got list"),
    "fused": (lambda w: fused_weights(), r"call model.fuse\(\) before loading"),
}  # fmt: skip


def fused_weights() -> dict:
    return small().fuse().state_dict()


@pytest.mark.parametrize("kind", MISFITS)
def test_misfits_are_refused_whole(tmp_path, weights, kind):
    make, message = MISFITS[kind]
    model = small()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "misfit.pth"
    content = make(weights)
    # A meta tensor in a file becomes one with a device again, so this one is passed as a dict.
    checkpoint = content if kind == "meta" else save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(model, checkpoint)
    assert kind == "meta" or str(path) in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_another_variant_is_named(tmp_path):
    weights = official_state_dict(create_model("shvit_s2").state_dict())
    path = save({"model": weights}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"weights.pth does not fit the model: it holds a shvit_s2 and the model is a shvit_s1"
    ):
        shvit_s1(checkpoint=path)
    with pytest.raises(ValueError, match=r"it holds a shvit_s2\. Entries"):
        load_checkpoint(small(), path)


def test_counts_of_batches_may_be_missing(weights):
    counts = {name for name in weights if name.endswith(".num_batches_tracked")}
    model = small()
    expected = weights | {name: model.state_dict()[name].fill_(3).clone() for name in counts}
    load_checkpoint(model, {name: value for name, value in weights.items() if name not in counts})
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_averaged_model(source):
    averaged = torch.optim.swa_utils.AveragedModel(small())
    averaged.update_parameters(source)
    assert_loaded(load_checkpoint(small(), averaged.state_dict()), averaged.module)


def test_unfused_into_fused(weights):
    with pytest.raises(ValueError, match=r"load it before calling fuse\(\)"):
        load_checkpoint(small().fuse(), weights)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights, "args": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth cannot be read.*posix.mkdir.*only tensors"):
        load_checkpoint(small(), "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"plain.pth cannot be read"):
        load_checkpoint(small(), "plain.pth")
    torch.save({"model": small()}, "module.pth")
    with pytest.raises(ValueError, match=r"module.pth cannot be read.*SHViT.*only tensors"):
        load_checkpoint(small(), "module.pth")
    assert not (tmp_path / "executed").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated(tmp_path, weights, suffix, keep):
    path = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(
        ValueError, match=f"whole{suffix} cannot be read as a checkpoint: it is truncated or of another"
    ):
        load_checkpoint(small(), path)


def test_other_files(tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint\n" * 100)
    for name in ("text.pth", "."):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load_checkpoint(small(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_checkpoint(small(), tmp_path / "nowhere.pth")
    with pytest.raises(TypeError, match="checkpoint must be a path or a dict, got int"):
        load_checkpoint(small(), 3)


def test_model_without_storage(weights):
    with pytest.raises(ValueError, match=r"model must be on a real device.*meta"):
        load_checkpoint(small(device="meta"), weights)
