"""``accelerate`` on models of timm, of the official repository's layout, and of this library."""

import copy
import pickle
import subprocess
import sys

import onnxruntime
import pytest
import torch
from torch import nn

import shvit_kernels
from shvit_kernels import SHSA, SHViT, accelerate
from shvit_kernels._randomise import randomise
from shvit_kernels.bench.timm_import import timm
from shvit_kernels.stock import StockSHSA, with_stock_layers
from tests.support.parity import MODES, assert_close, break_attention, evaluation, images, training

StockTimm = timm.models.shvit.SHSA
NAMES = ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4")
LAYERS = {"shvit_s1": 9, "shvit_s2": 9, "shvit_s3": 10, "shvit_s4": 13}


def small_timm(**arguments) -> nn.Module:
    """A timm model with four SHSA layers."""
    settings = {"embed_dim": (16, 24, 40), "partial_dim": (4, 6, 9), "depth": (1, 2, 2), "types": ("i", "s", "s")}
    return timm.models.shvit.SHViT(**{**settings, "num_classes": 5, **arguments})


def layers(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is kind]


@pytest.fixture
def stock() -> nn.Module:
    return randomise(small_timm(dtype=torch.float64), seed=6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_timm(name, mode):
    stock = randomise(timm.create_model(name).double(), seed=1)
    fast = accelerate(copy.deepcopy(stock))
    assert len(layers(fast, SHSA)) == LAYERS[name] and not layers(fast, StockTimm)
    x = images(128)
    assert_close(MODES[mode](fast, x), MODES[mode](stock, x))


@pytest.mark.parametrize("mode", MODES)
def test_parity_notices_broken_attention(stock, mode):
    fast = accelerate(copy.deepcopy(stock))
    break_attention(fast)
    x = images(128)
    with pytest.raises(AssertionError, match="differ"):
        assert_close(MODES[mode](fast, x), MODES[mode](stock, x))


@pytest.mark.parametrize("first", ["fuse", "accelerate"])
def test_fused(stock, first):
    x = images(128)
    stock.eval()
    fast = copy.deepcopy(stock)
    fast = accelerate(fast.fuse()) if first == "fuse" else accelerate(fast).fuse()
    assert len(layers(fast, SHSA)) == 4
    assert all(type(layer.qkv) is nn.Conv2d for layer in layers(fast, SHSA))
    assert_close(evaluation(fast, x), evaluation(stock, x))


def test_everything_around_the_layers_stays(stock):
    stock.stages[1].blocks[0].requires_grad_(False)
    stock.stages[2].blocks[1].eval()
    modules, flags = dict(stock.named_modules()), {name: m.training for name, m in stock.named_modules()}
    parameters = {name: (p, p.requires_grad) for name, p in stock.named_parameters()}
    keys = list(stock.state_dict())
    assert accelerate(stock) is stock
    assert all(stock.get_submodule(name) is module for name, module in modules.items())
    assert {name: m.training for name, m in stock.named_modules()} == flags
    assert list(stock.state_dict()) == keys
    for name, p in stock.named_parameters():
        before, requires_grad = parameters[name]
        assert p is before and p.requires_grad is requires_grad and p.dtype == torch.float64


def test_an_optimizer_made_before_still_trains(stock):
    fast = copy.deepcopy(stock)
    x = images(128)
    trained = []
    for model in (stock, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        if model is fast:
            accelerate(model)
        for _ in range(2):
            training(model, x)
            optimizer.step()
        trained.append(evaluation(model, x))
    assert_close(trained[1], trained[0])


def test_idempotent(stock):
    x = images(64)
    accelerate(stock)
    before = layers(stock, SHSA)
    expected = evaluation(stock, x)
    assert accelerate(accelerate(stock)) is stock
    assert layers(stock, SHSA) == before
    assert_close(evaluation(stock, x), expected)


def test_own_models():
    model = SHViT(embed_dim=(16, 24, 40), partial_dim=(4, 6, 9), depth=(1, 1, 1), num_classes=5)
    assert accelerate(model) is model
    fast = accelerate(with_stock_layers(model))
    assert len(layers(fast, SHSA)) == 2 and not layers(fast, StockSHSA)


def test_official_class():
    """A class of the same name and attributes from anywhere, with a norm class of its own."""

    class GroupNorm(nn.GroupNorm):
        def __init__(self, channels):
            super().__init__(1, channels)

    official = type("SHSA", (nn.Module,), {"forward": StockTimm.forward})
    layer, theirs = official(), randomise(StockTimm(20, 8, 6).double())
    layer.__dict__.update(copy.deepcopy(theirs).__dict__)
    layer.pre_norm = GroupNorm(6).double()
    layer.pre_norm.load_state_dict(theirs.pre_norm.state_dict())
    model = nn.Sequential(layer)
    accelerate(model)
    assert type(model[0]) is SHSA
    x = images(7, channels=20)
    for mode in MODES.values():
        results, expected = mode(model, x), mode(theirs, x)
        assert_close({name.replace("0.", "", 1): value for name, value in results.items()}, expected)


def test_layer_alone():
    layer = randomise(StockTimm(20, 8, 6))
    x = images(7, channels=20, dtype=torch.float32)
    expected = evaluation(layer, x)
    fast = accelerate(layer)
    assert type(fast) is SHSA
    torch.testing.assert_close(evaluation(fast, x), expected)


def test_scale_is_kept(stock):
    for layer in layers(stock, StockTimm):
        layer.scale = 0.1
    fast = accelerate(copy.deepcopy(stock))
    assert {layer.scale for layer in layers(fast, SHSA)} == {0.1}
    x = images(128)
    assert_close(evaluation(fast, x), evaluation(stock, x))


def test_hooks_are_kept(stock):
    calls = []
    first, second = layers(stock, StockTimm)[:2]
    handle = first.register_forward_hook(lambda module, inputs, output: calls.append("layer") or output * 2)
    first.register_full_backward_hook(lambda *_: calls.append("backward"))
    second.qkv.c.register_forward_hook(lambda *_: calls.append("submodule"))
    x = images(64)
    expected = evaluation(stock, x)
    calls.clear()
    accelerate(stock)
    assert_close(evaluation(stock, x), expected)
    assert calls == ["layer", "submodule"]
    training(stock, x)
    assert calls[2:] == ["layer", "submodule", "backward"]
    handle.remove()
    calls.clear()
    evaluation(stock, x)
    assert calls == ["submodule"]


def test_shared_layers_stay_shared(stock):
    stock.stages[1].blocks[1].mixer.m = stock.stages[1].blocks[0].mixer.m
    fast = accelerate(copy.deepcopy(stock))
    blocks = fast.stages[1].blocks
    assert blocks[0].mixer.m is blocks[1].mixer.m and type(blocks[0].mixer.m) is SHSA
    x = images(128)  # smaller ones leave the last stage one token: of 2 values, batch statistics have no gradient
    for mode in MODES.values():
        assert_close(mode(fast, x), mode(stock, x))


def test_copies_and_pickles(stock):
    fast = accelerate(copy.deepcopy(stock)).eval()
    x = images(64)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert len(layers(copied, SHSA)) == 4
        assert_close(evaluation(copied, x), evaluation(stock, x))


@pytest.mark.parametrize("part", ["block", "layer"])
def test_compiled_before(stock, part):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    block = stock.stages[1].blocks[0]
    compiled = torch.compile(block if part == "block" else block.mixer.m, backend=backend)
    x = images(8, channels=24)
    expected = evaluation(compiled, x)
    before = len(graphs)
    assert accelerate(compiled) is compiled
    assert_close(evaluation(compiled, x), expected)
    assert len(graphs) > before and type(block.mixer.m) is SHSA


def test_compiled_after(stock):
    block = stock.stages[1].blocks[0]
    x = images(8, channels=24)
    expected = evaluation(block, x)
    compiled = torch.compile(accelerate(block), backend="eager", fullgraph=True)
    assert_close(evaluation(compiled, x), expected)


@pytest.mark.parametrize(
    ("part", "replacement", "reason"),
    [
        ("pre_norm", nn.GroupNorm(2, 6), "another norm"),
        ("pre_norm", nn.Identity(), "another norm"),
        ("pre_norm", nn.BatchNorm2d(6), "another norm"),
        ("proj.0", nn.GELU(), "another activation"),
        ("proj.0", nn.ReLU6(), "another activation"),
        ("qkv.bn", nn.Identity(), "another projection"),
        ("qkv", nn.Conv2d(6, 38, 3, padding=1), "another projection"),
        ("proj.1", nn.Conv2d(24, 24, 3, padding=1), "another projection"),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(part, replacement, reason):
    model = small_timm()
    odd = model.stages[1].blocks[0].mixer.m
    parent, _, name = part.rpartition(".")
    odd.get_submodule(parent)._modules[name] = replacement
    where = r"\(the first is stages.1.blocks.0.mixer.m\)"
    with pytest.warns(UserWarning, match=f"left 1 of 4 SHSA layers alone: 1 with {reason} {where}"):
        accelerate(model)
    assert type(odd) is StockTimm and len(layers(model, SHSA)) == 3


def test_layers_with_additions_are_left_alone():
    model = small_timm()
    first, second, third, fourth = layers(model, StockTimm)
    first.temperature = nn.Parameter(torch.ones(1))
    second.forward = lambda x: x
    third.dropout = nn.Dropout()  # another structure altogether
    fourth.register_buffer("mask", torch.ones(1))
    with pytest.warns(UserWarning, match="left 3 of 3 SHSA layers alone: 3 with additions of their own"):
        accelerate(model)
    assert [type(layer) for layer in (first, second, third, fourth)] == [StockTimm] * 4


def test_all_left_alone():
    model = small_timm(act_layer=nn.GELU)
    with pytest.warns(UserWarning, match="left 4 of 4 SHSA layers alone: 4 with another activation"):
        assert accelerate(model) is model


def test_accepted_silently(stock, recwarn):
    accelerate(nn.SyncBatchNorm.convert_sync_batchnorm(stock))
    assert len(layers(stock, SHSA)) == 4
    assert not [w for w in recwarn if "accelerate" in str(w.message)]


def test_nothing_found():
    with pytest.raises(ValueError, match="model must have at least one SHSA layer, and this Linear has none"):
        accelerate(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        accelerate("shvit_s1")

    class SHSA(nn.Module):  # the name alone does not make one
        pass

    with pytest.raises(ValueError, match="at least one SHSA"):
        accelerate(SHSA())


def test_onnx(tmp_path):
    model = randomise(accelerate(timm.create_model("shvit_s1"))).eval()
    x = images(224, dtype=torch.float32)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), evaluation(model, x)["output"], rtol=1e-4, atol=1e-4)


def test_timm_is_never_imported():
    code = (
        "import sys, shvit_kernels as s; from shvit_kernels.stock import with_stock_layers; "
        "s.accelerate(with_stock_layers(s.shvit_s1(device='meta'))); assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_sorted():
    assert shvit_kernels.__all__ == sorted(shvit_kernels.__all__)
