"""The SHViT family against timm itself, and its own methods."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import shvit_kernels
from shvit_kernels import SHSA, SHViT, create_model, use_backend
from shvit_kernels._randomise import randomise
from shvit_kernels.bench.timm_import import timm
from shvit_kernels.stock import StockSHSA, with_stock_layers
from tests.support.parity import MODES, assert_close, break_attention, evaluation, images, training

NATIVE = {"shvit_s1": 224, "shvit_s2": 224, "shvit_s3": 224, "shvit_s4": 256}
CASES = [*NATIVE.items(), ("shvit_s1", 256), ("shvit_s1", (288, 352)), ("shvit_s1", 512)]
SMALL = {"embed_dim": (16, 24, 40), "partial_dim": (4, 6, 9), "depth": (1, 1, 2), "num_classes": 5}


def small(**arguments) -> SHViT:
    return SHViT(**{**SMALL, **arguments})


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def pairs():
    """Ours, randomised, and timm's with the same weights, in float64, by name; kept, as making them takes a while."""
    made = {}

    def pair(name: str) -> tuple[nn.Module, nn.Module]:
        if name not in made:
            ours = randomise(create_model(name, dtype=torch.float64), seed=1)
            theirs = timm.create_model(name).double()
            theirs.load_state_dict(ours.state_dict())
            made[name] = ours, theirs
        return copy.deepcopy(made[name])

    return pair


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_parity_with_timm(pairs, name, size, mode):
    ours, theirs = pairs(name)
    x = images(size)
    assert_close(MODES[mode](ours, x), MODES[mode](theirs, x))


@pytest.mark.parametrize("mode", MODES)
def test_parity_notices_broken_attention(pairs, mode):
    ours, theirs = pairs("shvit_s1")
    break_attention(ours)
    x = images(64)
    with pytest.raises(AssertionError, match="differ"):
        assert_close(MODES[mode](ours, x), MODES[mode](theirs, x))


@pytest.mark.parametrize("name", NATIVE)
def test_evaluation_in_float32_is_as_exact_as_timm(pairs, name):
    ours, theirs = pairs(name)
    x = images(128, dtype=torch.float32)
    truth = evaluation(theirs, x.double())["output"]
    error, stock_error = ((evaluation(m.float(), x)["output"] - truth).abs().max() for m in (ours, theirs))
    assert error <= 2 * stock_error + 8 * 2**-24 * truth.abs().max()


@pytest.mark.parametrize("name", NATIVE)
def test_weights_from_timm(name):
    theirs = randomise(timm.create_model(name), seed=2)
    ours = create_model(name)
    ours.load_state_dict(theirs.state_dict())
    x = images(64, dtype=torch.float32)
    torch.testing.assert_close(evaluation(ours, x), evaluation(theirs, x))


@pytest.mark.parametrize("name", NATIVE)
def test_initialisation_as_in_timm(name):
    ours, theirs = create_model(name).state_dict(), timm.create_model(name).state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        if ".bn." in key:
            assert torch.equal(ours[key], value), key
        elif value.numel() > 1000:
            assert 0.9 < ours[key].std() / value.std() < 1.1, key


@pytest.mark.parametrize("training", [True, False])
def test_fuse(pairs, training):
    ours, theirs = pairs("shvit_s1")
    ours, theirs = ours.train(training).fuse(), theirs.eval().fuse()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(ours.state_dict(), theirs.state_dict())
    assert all(module.training is training for module in ours.modules())
    x = images(96)
    assert_close(evaluation(ours, x), evaluation(theirs, x))
    assert ours.fuse() is ours  # nothing left to fuse
    assert_close(evaluation(ours, x), evaluation(theirs, x))


def test_fuse_reads_the_eps_of_every_norm():
    model = randomise(small(dtype=torch.float64), seed=1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eps = 0.5
    x = images(64)
    before = evaluation(model, x)
    assert_close(evaluation(model.fuse(), x), before)


def test_fused_by_timm_way_of_hand(pairs):
    """timm's ``fuse`` walks over any module with a ``fuse`` method, ours included."""
    ours, theirs = pairs("shvit_s1")
    timm.models.shvit.SHViT.fuse(ours)
    x = images(96)
    assert_close(evaluation(ours, x), evaluation(theirs, x))


def test_distillation():
    model = randomise(small(distillation=True, dtype=torch.float64))
    x = images(64)
    features = copy.deepcopy(model).train().forward_head(copy.deepcopy(model).train().forward_features(x), True)
    pair = copy.deepcopy(model).train()(x)
    assert isinstance(pair, tuple)
    torch.testing.assert_close(pair, (model.train().head(features), model.head_dist(features)))
    model.eval()
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), (model.head(features) + model.head_dist(features)) / 2)
    assert model.get_classifier() == (model.head.l, model.head_dist.l)
    assert set(training(model, x)) > {"output 0", "output 1"}

    before = evaluation(model, x)
    assert_close(evaluation(model.fuse(), x), before)
    assert {"head.weight", "head_dist.weight"} < set(model.state_dict())
    model.reset_classifier(3)
    assert model.eval()(x).shape == (2, 3)


def test_no_head():
    model = small(num_classes=0).eval()
    assert not any(key.startswith("head") for key in model.state_dict())
    x = images(64, dtype=torch.float32)
    assert model(x).shape == (2, 40)
    assert small(num_classes=0, global_pool="").eval()(x).shape == (2, 40, 1, 1)
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("size", [(1, 1), (65, 100), (224, 224)])
def test_features_only(pairs, size):
    theirs = timm.create_model("shvit_s1", features_only=True)
    ours = create_model("shvit_s1", features_only=True).eval()
    assert ours.feature_info.channels() == theirs.feature_info.channels() == [128, 224, 320]
    assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [16, 32, 64]
    x = images(size, dtype=torch.float32)
    outputs = ours(x)
    assert [o.shape for o in outputs] == [o.shape for o in theirs.eval()(x)]
    strides = ours.feature_info.reduction()
    assert [o.shape[2:] for o in outputs] == [tuple(-(-side // s) for side in size) for s in strides]


@pytest.mark.parametrize("out_indices", [(0,), (1,), (0, 2), (-2,), 2])
def test_out_indices(out_indices):
    full = small().eval()
    model = small(features_only=True, out_indices=out_indices).eval()
    missing = model.load_state_dict(full.state_dict(), strict=False).missing_keys
    assert not missing
    x = images(96, dtype=torch.float32)
    _, stages = full.forward_intermediates(x)
    taken = {(0,): [0], (1,): [1], (0, 2): [0, 2], (-2,): [1], 2: [1, 2]}[out_indices]
    torch.testing.assert_close(model(x), [stages[i] for i in taken])
    assert model.feature_info.module_name() == [f"stages.{i}" for i in taken]
    assert model.feature_info.get_dicts() == [model.feature_info[i] for i in taken]
    assert len(model.stages) == max(taken) + 1


@pytest.mark.parametrize("indices", [None, 1, 2, [0], [0, -1]], ids=str)
@pytest.mark.parametrize("stop_early", [False, True])
def test_forward_intermediates_as_in_timm(pairs, indices, stop_early):
    ours, theirs = (model.eval() for model in pairs("shvit_s1"))
    x = images(64)
    results = [m.forward_intermediates(x, indices=indices, stop_early=stop_early) for m in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    only = ours.forward_intermediates(x, indices=indices, intermediates_only=True)
    torch.testing.assert_close(only, results[0][1])


@pytest.mark.parametrize("indices", [1, [0], [0, 1], 3], ids=str)
@pytest.mark.parametrize("prune_head", [False, True])
def test_prune_intermediate_layers_as_in_timm(pairs, indices, prune_head):
    models = pairs("shvit_s1")
    taken = [model.prune_intermediate_layers(indices, prune_head=prune_head) for model in models]
    assert taken[0] == taken[1]
    ours, theirs = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.num_features == theirs.num_features
    x = images(64)
    assert_close(evaluation(ours, x), evaluation(theirs, x))


def test_pruned_models_return_the_features_that_are_left():
    model = small(features_only=True)
    x = images(64, dtype=torch.float32)
    expected = evaluation(model, x)["output"][:2]
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    torch.testing.assert_close(evaluation(model, x)["output"], expected, rtol=0, atol=0)
    assert model.feature_info.channels() == [16, 24]


def test_methods_and_attributes_as_in_timm(pairs):
    ours, theirs = pairs("shvit_s1")
    assert ours.num_features == theirs.num_features == ours.head_hidden_size == theirs.head_hidden_size
    assert ours.num_classes == theirs.num_classes and ours.no_weight_decay() == theirs.no_weight_decay()
    for mine, other in zip(ours.feature_info, theirs.feature_info, strict=True):
        assert {key: mine[key] for key in other} == other
    assert ours.get_classifier() is ours.head.l
    x = images(64)
    features = ours.eval().forward_features(x)
    torch.testing.assert_close(features, theirs.eval().forward_features(x), rtol=1e-9, atol=1e-9)
    for pre_logits in (False, True):
        head = ours.forward_head(features, pre_logits=pre_logits)
        torch.testing.assert_close(head, theirs.forward_head(features, pre_logits=pre_logits), rtol=1e-9, atol=1e-9)
    ours.reset_classifier(7)
    assert ours.num_classes == 7 and ours(x).shape == (2, 7) and ours.head.l.weight.dtype == torch.float64


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_as_in_timm(pairs, coarse):
    groups = [timm.models.group_parameters(model, model.group_matcher(coarse)) for model in pairs("shvit_s1")]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("name", NATIVE)
def test_pretrained_cfg_serves_timm(name):
    ours, theirs = create_model(name, device="meta"), timm.create_model(name, device="meta")
    assert timm.data.resolve_data_config({}, model=ours) == timm.data.resolve_data_config({}, model=theirs)
    shared = ("architecture", "num_classes", "first_conv", "classifier", "pool_size")
    assert {k: ours.pretrained_cfg[k] for k in shared} == {k: theirs.pretrained_cfg[k] for k in shared}
    assert ours.default_cfg is ours.pretrained_cfg


def test_drop_rate():
    model = small(drop_rate=0.5).train()
    pooled = model.forward_head(torch.ones(2, 40, 3, 3), pre_logits=True)
    assert set(pooled.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(torch.ones(2, 40, 3, 3), pre_logits=True), torch.ones(2, 40))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_gradient_checkpointing_changes_nothing_but_memory(momentum):
    model = randomise(small(dtype=torch.float64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    x = images(128)
    saved = {}
    for name, m in (("plain", model), ("checkpointed", checkpointed)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            m.train().forward_features(x.clone().requires_grad_())
        saved[name] = sum(sizes)
    assert saved["checkpointed"] < saved["plain"]
    # One step each after that: outputs, gradients, running statistics and their counters.
    assert_close(training(checkpointed, x), training(model, x))
    assert all(m.momentum == momentum for m in checkpointed.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("outside", ["forward", "backward"])
def test_gradient_checkpointing_keeps_the_backend_of_the_forward(outside):
    model = randomise(small()).train()
    model.set_grad_checkpointing()
    inside, outer = use_backend("eager"), nullcontext()
    forward, backward = (outer, inside) if outside == "forward" else (inside, outer)
    with forward:
        loss = model(images(64, dtype=torch.float32)).square().sum()
    with backward:
        loss.backward()
    assert model.patch_embed[0].c.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_survives_a_second_backward():
    model = randomise(small())
    model.train().set_grad_checkpointing()
    loss = model(images(64, dtype=torch.float32)).sum()
    loss.backward(retain_graph=True)
    count = model.stages[0].blocks[0].ffn.m.pw1.bn.num_batches_tracked.item()
    loss.backward()
    assert model.stages[0].blocks[0].ffn.m.pw1.bn.num_batches_tracked.item() == count


def test_device_and_dtype():
    model = create_model("shvit_s1", device="meta", dtype=torch.bfloat16, in_chans=1, num_classes=10)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.patch_embed[0].c.weight.shape[1] == 1 and model.head.l.weight.shape == (10, 320)


def test_channels_last():
    model = randomise(small()).eval()
    x = images(96, dtype=torch.float32)
    last = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, model(x))


def test_variants():
    assert shvit_kernels.list_models() == list(NATIVE)
    for name in NATIVE:
        made = getattr(shvit_kernels, name)(device="meta")
        theirs = timm.create_model(name, device="meta")
        assert shapes(made) == shapes(theirs)
    widths = {"embed_dim": (24, 33, 33), "partial_dim": (4, 6, 9), "types": ("s", "i", "s"), "device": "meta"}
    assert shapes(SHViT(**widths, depth=(1, 1, 2))) == shapes(timm.models.shvit.SHViT(**widths, depth=(1, 1, 2)))


def test_compiles_whole():
    model = randomise(small()).eval()
    x = images(64, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_exports():
    model = randomise(small()).eval()
    x = images(64, dtype=torch.float32)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_stock_layers():
    model = randomise(small(dtype=torch.float64))
    stock = with_stock_layers(model)
    assert sum(type(m) is StockSHSA for m in stock.modules()) == 3
    assert sum(type(m) is SHSA for m in model.modules()) == 3
    assert not any(isinstance(m, SHSA) for m in stock.modules())
    x = images(96)
    for mode in MODES.values():
        assert_close(mode(stock, x), mode(model, x))
    assert_close(evaluation(with_stock_layers(model.eval().fuse()), x), evaluation(model, x))


def test_stock_layer_alone():
    stock, theirs = StockSHSA(20, 8, 6), timm.models.shvit.SHSA(20, 8, 6)
    stock.load_state_dict(randomise(theirs).state_dict())
    x = images(5, channels=20, dtype=torch.float32)
    torch.testing.assert_close(evaluation(stock, x), evaluation(theirs, x))


def test_randomise_depends_on_the_seed_alone():
    first, second, other = (randomise(small(), seed) for seed in (3, 3, 4))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.head.l.weight, other.head.l.weight)
    assert first.training and not randomise(small().eval()).training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"num_classes": None}, "num_classes must be at least 0, got None"),
        ({"depth": (1, -2, 1)}, r"depth must be at least 0, got \(1, -2, 1\)"),
        ({"embed_dim": (16, 24, 0)}, r"embed_dim must be at least 1, got \(16, 24, 0\)"),
        ({"features_only": True, "out_indices": True}, "out_indices must hold stage numbers from -3 to 2, got True"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ({"embed_dim": (12, 24, 40)}, "embed_dim.*multiple of 8.*12"),
        ({"embed_dim": (16, 24)}, r"embed_dim must hold one value for each of the 3 stages, got \(16, 24\)"),
        ({"partial_dim": (4, 25, 9)}, r"pdim must lie between 1 and dim \(24\), got 25"),
        ({"qk_dim": (16, 0, 16)}, "qk_dim must be at least 1, got 0"),
        ({"types": ("i", "s", "x")}, "types must be 's' or 'i'.*'x'"),
        ({"drop_rate": 1.5}, "drop_rate must lie between 0 and 1, got 1.5"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or '', got 'max'"),
        ({"global_pool": ""}, "global_pool '' needs num_classes 0, got num_classes 5"),
        ({"out_indices": (0,)}, "out_indices needs features_only=True"),
        ({"features_only": True, "out_indices": (3,)}, r"out_indices.*-3 to 2, got \(3,\)"),
        ({"features_only": True, "out_indices": 4}, "out_indices.*between 1 and 3, got 4"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_bad_input():
    model = small()
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3, H, W\], got \(2, 1, 64, 64\)"):
        model(torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(torch.zeros(2, 3, 64, 64), output_fmt="NLC")
    with pytest.raises(ValueError, match="indices"):
        model.forward_intermediates(torch.zeros(2, 3, 64, 64), indices=[5])


def test_unknown_model():
    with pytest.raises(ValueError, match=r"unknown model 'shvit_s5': did you mean .*shvit_s"):
        create_model("shvit_s5")
