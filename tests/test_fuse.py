"""``fuse`` on models of timm, of the official repository's structure, and of this library."""

import copy
import pickle
import warnings
from collections import Counter
from itertools import islice

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shvit_kernels
from shvit_kernels import SHViT, accelerate, fuse
from shvit_kernels._randomise import randomise
from shvit_kernels.backends import cpu, fused
from shvit_kernels.bench.timm_import import timm
from shvit_kernels.fuse import FusedLayers
from shvit_kernels.models.shvit import Residual
from shvit_kernels.ops import CODE, Kind, flatten, layers_of
from shvit_kernels.stock import with_stock_layers
from tests.support import native as native_tier
from tests.support.parity import images

NAMES = ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4")
SMALL = {"embed_dim": (16, 24, 40), "partial_dim": (4, 6, 9), "depth": (1, 2, 2), "num_classes": 5}


def small_timm(**arguments) -> nn.Module:
    settings = {**SMALL, "types": ("i", "s", "s"), **arguments}
    return randomise(timm.models.shvit.SHViT(**settings), seed=6).eval()


def small(**arguments) -> SHViT:
    return randomise(SHViT(**{**SMALL, **arguments}), seed=6).eval()


def count(model: nn.Module) -> dict[Kind, int]:
    return Counter(kind for m in model.modules() if isinstance(m, FusedLayers) for kind in m.kinds)


def assert_near(result: Tensor, expected: Tensor, relative: float) -> None:
    assert result.shape == expected.shape
    difference, size = (result.double() - expected.double()).abs().max(), expected.abs().max()
    assert difference <= relative * size, f"off by {difference:.3g} of {size:.3g}"


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


ALL_OF_SMALL = {
    Kind.CONV3X3: 4,
    Kind.DEPTHWISE: 5 + 4,
    Kind.FFN: 5 + 4,
    Kind.POINTWISE: 1,
    Kind.MIXER: 4,
    Kind.PATCH_MERGING: 2,
}


@native_tier.needs_native
@pytest.mark.parametrize("name", NAMES)
def test_published_models_agree_with_timm(name):
    stock = randomise(timm.create_model(name), seed=1).eval()
    fast = fuse(stock)
    for size, batch in ((224, 2), ((288, 352), 1)):
        x = images(size, batch, dtype=torch.float32)
        assert_near(outputs(fast, x), outputs(stock, x), 1e-5)


@native_tier.needs_native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("size, batch", [(64, 1), (65, 3), ((96, 33), 2), (256, 64), ((1, 1), 2)])
def test_any_size_batch_layout_and_threads(size, batch, layout, threads):
    stock = small_timm()
    x = images(size, batch, dtype=torch.float32)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    with native_tier.threads(threads):
        assert_near(outputs(fuse(stock), x), outputs(stock, x), 1e-5)


@native_tier.needs_native
def test_same_bits_for_any_number_of_threads():
    fast = fuse(small())
    x = images(100, 5, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        with native_tier.threads(threads):
            results.append(outputs(fast, x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("prepare", [copy.copy, accelerate, lambda m: m.fuse(), lambda m: accelerate(m).fuse()])
@pytest.mark.parametrize("make", [small_timm, small], ids=["timm", "ours"])
def test_every_block_is_fused_and_exact(make, prepare):
    stock = make().double()
    fast = fuse(prepare(copy.deepcopy(stock)))
    head = 0 if type(getattr(fast.model, "head", None)) is nn.Linear else 1  # a fused head is a plain linear layer
    assert count(fast) == Counter(ALL_OF_SMALL | {Kind.POINTWISE: head})
    assert not any(isinstance(m, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)) for m in fast.modules())
    x = images(128)
    assert_near(outputs(fast, x), outputs(stock, x), 1e-9)


def test_stages_are_single_operators():
    fast = fuse(small())
    assert fast.model.patch_embed.kinds == [Kind.CONV3X3] * 4
    assert [len(stage.kinds) for stage in fast.model.stages] == [2, 5 + 6, 5 + 6]


def test_stems_are_made_in_squares_where_channels_are_many():
    fast = fuse(shvit_kernels.shvit_s1().eval())
    assert fast.model.patch_embed.code[1::CODE] == [3, 16, 32, 64]
    assert fast.model.patch_embed.code[4::CODE] == [0, 1, 1, 1]


@native_tier.needs_native
def test_sequences_compute_what_their_layers_do():
    fast = fuse(small())
    x = images(64, 3, dtype=torch.float32)
    for sequence in (fast.model.patch_embed, *fast.model.stages):
        with torch.no_grad():
            whole = sequence(x)
            constants = iter(sequence.constants)
            for kind, settings, weights in layers_of(sequence.code, [sequence.weights], x.shape[1]):
                own = list(islice(constants, 2 if kind == Kind.MIXER else 0))
                x = FusedLayers([kind, x.shape[1], *settings], own, flatten(weights))(x)
        assert torch.equal(whole, x)


@native_tier.needs_native
@pytest.mark.parametrize("make", [small_timm, small], ids=["timm", "ours"])
@pytest.mark.parametrize("batch", [1, 2, 19])
def test_a_whole_model_is_one_operator_with_the_same_bits(make, batch, monkeypatch):
    fast = fuse(make())
    x = torch.randn(batch, 3, 70, 90, generator=torch.Generator().manual_seed(batch))
    parts = outputs(fast.model, x)
    calls = []
    monkeypatch.setattr(
        fused, "NATIVE", fused.NATIVE._replace(sequence=lambda *a: calls.append(a) or fused.SPECIFICATION.sequence(*a))
    )
    assert_near(outputs(fast, x), parts, 1e-5)
    assert len(calls) == 1
    monkeypatch.undo()
    assert torch.equal(outputs(fast, x), parts)


@native_tier.needs_native
def test_a_whole_model_keeps_to_its_parts():
    """Hooks and replaced parts of the model take effect, and its errors stay."""
    fast = fuse(small())
    x = images(64, 2, dtype=torch.float32)
    before = outputs(fast, x)
    seen = []
    handle = fast.model.stages[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert torch.equal(outputs(fast, x), before) and len(seen) == 1
    handle.remove()
    assert torch.equal(outputs(fast, x), before) and len(seen) == 1
    fast.model.stages[2].forward = lambda y: seen.append(y.shape) or FusedLayers.forward(fast.model.stages[2], y)
    assert torch.equal(outputs(fast, x), before) and len(seen) == 2
    del fast.model.stages[2].forward
    other = fuse(small(num_classes=3))
    fast.model, model = other.model, fast.model
    assert torch.equal(outputs(fast, x), outputs(other, x))
    fast.model = model
    assert torch.equal(outputs(fast, x), before) and len(seen) == 2
    fast.model.head = nn.Identity()
    pooled = outputs(fast, x)
    assert pooled.shape == (2, SMALL["embed_dim"][-1])
    fast.model.head = nn.Linear(pooled.shape[1], 7)
    assert_near(outputs(fast, x), outputs(fast.model.head, pooled), 1e-5)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3, H, W\], got \(2, 4, 64, 64\)"):
        fast(torch.zeros(2, 4, 64, 64))


def test_the_original_is_untouched():
    stock = small_timm()
    before = {k: v.clone() for k, v in stock.state_dict().items()}
    modules = dict(stock.named_modules())
    fuse(stock)
    assert dict(stock.named_modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in stock.state_dict().items())


# The official repository's structure, under its names


class Conv2d_BN(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=1, stride=1, padding=0, groups=1):
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))


def official() -> nn.Module:
    """Stem, patch merging and head of a small official model."""

    class SqueezeExcite(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.fc1, self.bn, self.act = nn.Conv2d(channels, 16, 1), nn.Identity(), nn.ReLU(inplace=True)
            self.fc2, self.gate = nn.Conv2d(16, channels, 1), nn.Sigmoid()

        def forward(self, x):
            return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))

    class PatchMerging(nn.Module):
        def __init__(self, dim, out_dim):
            super().__init__()
            hidden = 4 * dim
            self.conv1 = Conv2d_BN(dim, hidden)
            self.act = nn.ReLU()
            self.conv2 = Conv2d_BN(hidden, hidden, 3, 2, 1, groups=hidden)
            self.se = SqueezeExcite(hidden)
            self.conv3 = Conv2d_BN(hidden, out_dim)

        def forward(self, x):
            return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))

    class BN_Linear(nn.Sequential):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.add_module("bn", nn.BatchNorm1d(inputs))
            self.add_module("l", nn.Linear(inputs, outputs))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Sequential(Conv2d_BN(3, 8, 3, 2, 1), nn.ReLU(), Conv2d_BN(8, 16, 3, 2, 1))
            self.blocks1 = nn.Sequential(PatchMerging(16, 24))
            self.head = BN_Linear(24, 7)

        def forward(self, x):
            x = self.blocks1(self.patch_embed(x))
            return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return randomise(Model(), seed=3).eval()


def test_official_structure():
    stock = official().double()
    fast = fuse(stock)
    assert count(fast) == {Kind.CONV3X3: 2, Kind.POINTWISE: 1, Kind.PATCH_MERGING: 1}
    x = images(64)
    assert_near(outputs(fast, x), outputs(stock, x), 1e-9)


def test_a_block_alone():
    block = Residual(shvit_kernels.models.shvit.FFN(16, 32)).double().eval()
    fast = fuse(block)
    assert fast.kinds == [Kind.FFN]
    assert str(fast) == "FusedLayers(ffn)"
    x = images(8, channels=16)
    assert_near(outputs(fast, x), outputs(block, x), 1e-9)


def test_replicas_of_data_parallel():
    layers = fuse(Residual(shvit_kernels.models.shvit.FFN(16, 32)).eval())
    replica = layers._replicate_for_data_parallel()
    replica.weights = layers.weights.clone()
    x = images(8, channels=16, dtype=torch.float32)
    assert torch.equal(outputs(replica, x), outputs(layers, x))


def fused_ffn(seed: int) -> nn.Module:
    block = Residual(shvit_kernels.models.shvit.FFN(16, 32))
    return fuse(randomise(block, seed=seed).double().eval())


def test_changed_weights_are_seen():
    layers, other = fused_ffn(1), fused_ffn(2)
    x = images(8, channels=16)
    first = outputs(layers, x)
    with torch.no_grad():
        layers.weights.mul_(2)
    assert not torch.equal(outputs(layers, x), first)
    layers.load_state_dict(other.state_dict())
    assert torch.equal(outputs(layers, x), outputs(other, x))


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_any_derivative_of_the_input(dtype, rounding):
    layers = fuse(randomise(Residual(shvit_kernels.SHSA(12, 8, 5)), seed=1).to(dtype).eval())
    x = images(2, channels=12, dtype=dtype)
    outputs(layers, x)
    of_sum = lambda t: layers(t).square().sum()  # noqa: E731
    gradient = torch.func.grad(of_sum)(x)
    assert_near(torch.func.jacrev(of_sum)(x), gradient, rounding)
    along = torch.func.jvp(of_sum, (x,), (torch.ones_like(x),))[1]
    assert_near(along, gradient.sum(), 1e3 * rounding)
    if dtype is torch.float64:
        assert torch.autograd.gradgradcheck(layers, (x[:1].clone().requires_grad_(),))
    assert_near(torch.func.vmap(layers)(x[:, None])[:, 0], outputs(layers, x), rounding)


def test_derivatives_of_a_whole_model(fast):
    stock = with_stock_layers(small())
    along = torch.ones_like(X)
    derivatives = [torch.func.jvp(model, (X,), (along,))[1] for model in (fast, stock)]
    assert derivatives[1].abs().max() > 0
    assert_near(*derivatives, 1e-4)
    fast.requires_grad_()
    fast(X).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in fast.parameters())


def test_a_gradient_after_inference_mode():
    layers = fused_ffn(1)
    x = images(8, channels=16)
    with torch.inference_mode():
        expected = layers(x)
    assert torch.equal(outputs(layers, x), expected)
    x.requires_grad_()
    layers(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_ask_for_gradients_get_them(dtype):
    layers = fused_ffn(1).to(dtype)
    x = images(8, channels=16, dtype=dtype)
    outputs(layers, x)
    layers.weights.requires_grad_()
    layers(x).sum().backward()
    assert layers.weights.grad.abs().sum() > 0


def test_fused_parts_stay_fused():
    fast = fuse(small())
    x = images(64, 2, dtype=torch.float32)
    expected = outputs(fast, x)
    for again in (fuse(fast), fuse(fast.model)):
        assert torch.equal(outputs(again, x), expected)
    more = fuse(nn.Sequential(fast, nn.Softmax(1)).eval())
    assert torch.equal(outputs(more, x), expected.softmax(1))
    mine, original = ({p.data_ptr() for p in model.parameters()} for model in (more, fast))
    assert len(mine) == len(original) and not mine & original


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_another_width_are_refused(dtype):
    fast = fuse(official()).to(dtype)
    with pytest.raises((RuntimeError, ValueError), match=r"x must have 3 channels at .*, got 1"):
        fast(torch.zeros(2, 1, 64, 64, dtype=dtype))


# What is not stock stays as it is


def _hook(model):
    model.stages[1].blocks[0].mixer.m.register_forward_hook(lambda module, inputs, output: output * 2)


def _activation(model):
    model.stages[0].blocks[0].ffn.m.act = nn.GELU()


def _gate(model):
    model.stages[1].downsample[2].se.gate = nn.Hardsigmoid()


def _norm(model):
    model.stages[2].blocks[1].mixer.m.pre_norm = nn.GroupNorm(1, 9, affine=False)


def _inner_hook(model):
    model.stages[1].blocks[0].mixer.m.pre_norm.register_forward_hook(lambda module, inputs, output: output * 2)


def _maximum(model):
    model.stages[1].downsample[2].se.add_maxpool = True


def _reflected(model):
    model.patch_embed[2].c.padding_mode = "reflect"


def _untracked(model):
    bn = model.stages[0].blocks[0].conv.m.bn
    bn.running_mean = bn.running_var = None


def _activated(model):
    model.stages[1].blocks[0].mixer.m.qkv.bn = timm.layers.BatchNormAct2d(38, act_layer=nn.SiLU, dtype=torch.float64)


def _scaled(model):
    torch.nn.utils.parametrizations.weight_norm(model.stages[2].blocks[0].conv.m.c)


@pytest.mark.parametrize(
    "change, missing",
    [
        (_hook, Kind.MIXER),
        (_inner_hook, Kind.MIXER),
        (_activated, Kind.MIXER),
        (_maximum, Kind.PATCH_MERGING),
        (_reflected, Kind.CONV3X3),
        (_activation, Kind.FFN),
        (_gate, Kind.PATCH_MERGING),
        (_scaled, Kind.DEPTHWISE),
        (_norm, Kind.MIXER),
    ],
)
def test_changed_blocks_keep_their_own_forward(change, missing):
    stock = small_timm().double()
    change(stock)
    fast = fuse(stock.eval())
    changed = ALL_OF_SMALL[missing] if missing is Kind.CONV3X3 else 1  # the stem is one
    assert count(fast)[missing] == ALL_OF_SMALL[missing] - changed
    assert sum(count(fast).values()) == sum(ALL_OF_SMALL.values()) - changed
    x = images(128)
    assert_near(outputs(fast, x), outputs(stock, x), 1e-9)


def _derived(stock: type[nn.Module], forward) -> type[nn.Module]:
    return type(stock.__name__, (stock,), {"forward": forward})


def _vendored(stock: type[nn.Module], forward) -> type[nn.Module]:
    """A class that shares nothing with the stock one but its name, and methods that it calls."""
    methods = {name: method for name, method in vars(stock).items() if name.startswith("forward_")}
    return type(stock.__name__, (nn.Module,), {**methods, "forward": forward})


T = timm.models.shvit


@pytest.mark.parametrize("remake", [_derived, _vendored])
@pytest.mark.parametrize(
    "stock, forward",
    [
        (T.Residual, lambda self, x: x + 0.5 * self.m(x)),
        (T.FFN, lambda self, x: self.pw2(F.gelu(self.pw1(x)))),
        (T.SHSA, lambda self, x: T.SHSA.forward(self, x) * 2),
        (T.PatchMerging, lambda self, x: T.PatchMerging.forward(self, x).relu()),
        (T.BasicBlock, lambda self, x: self.mixer(self.ffn(self.conv(x)))),
        (T.StageBlock, lambda self, x: self.blocks(self.downsample(x)) * 2),
        (T.SHViT, lambda self, x: self.forward_head(self.forward_features(x).amax((2, 3), keepdim=True))),
        (T.SHViT, lambda self, x, scale=2: self.forward_head(self.forward_features(x) * scale)),
    ],
)
def test_classes_of_a_stock_name_that_compute_something_else(stock, forward, remake):
    model, changed = small_timm(), remake(stock, forward)
    if stock is T.SHSA and remake is _vendored:
        changed.forward = lambda self, x: T.SHSA.forward(self, x) * 2
    for module in model.modules():
        if type(module) is stock:
            module.__class__ = changed
    fast, x = fuse(model), images(128, 2, dtype=torch.float32)
    assert count(fast)[Kind.CONV3X3] == 4  # what did not change is fused
    assert_near(outputs(fast, x), outputs(model, x), 1e-5)


def _pooled(model):
    model.global_pool = timm.layers.SelectAdaptivePool2d(pool_type="max")


def _with_more_arguments(model):
    block = model.stages[1].blocks[0]
    block.__class__ = _vendored(T.BasicBlock, lambda self, x, gain: gain * self.ffn(self.mixer(self.conv(x))))
    model.stages[1].blocks.__class__ = type(
        "Blocks", (nn.Sequential,), {"forward": lambda self, x: self[1](self[0](x, 2))}
    )


def _with_two_results(model):
    block = model.stages[1].blocks[0]
    block.__class__ = _vendored(T.BasicBlock, lambda self, x: (self.ffn(self.mixer(self.conv(x))), x))
    model.stages[1].blocks.__class__ = type(
        "Blocks", (nn.Sequential,), {"forward": lambda self, x: self[1](self[0](x)[0])}
    )


def _replaced(model):
    model.forward_head = lambda x: x.amax((2, 3))


@pytest.mark.parametrize("change", [_untracked, _pooled, _with_more_arguments, _with_two_results, _replaced])
def test_changed_models_run_as_they_are(change):
    model = small_timm()
    change(model)
    x = images(128, 2, dtype=torch.float32)
    assert_near(outputs(fuse(model), x), outputs(model, x), 1e-5)


def test_hooks_on_all_modules_see_the_parts(fast):
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module)):
        fast(X)
    assert set(fast.model.stages) <= set(seen)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_constants_are_those_of_each_layer(dtype, rounding):
    model = small_timm()
    for i, module in enumerate(model.modules()):
        if hasattr(module, "eps"):
            module.eps = 0.01 * (1 + i % 7)
        if hasattr(module, "scale"):
            module.scale = 0.1 * (1 + i % 3)
    model, x = model.to(dtype), images(128, 2, dtype=dtype)
    assert_near(outputs(fuse(model), x), outputs(model, x), rounding)


def test_weights_that_are_not_set_yet():
    """Whatever is in their memory: the structure alone decides."""
    with torch.device("meta"):
        model = SHViT(**SMALL).eval()
    assert count(fuse(model)) == ALL_OF_SMALL
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
    assert count(fuse(model)) == ALL_OF_SMALL


def test_shared_blocks_stay_shared():
    shared = Residual(shvit_kernels.models.shvit.FFN(16, 32))
    fast = fuse(nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared]), "c": nn.Sequential(shared, shared)}).eval())
    assert fast.model["a"] is fast.model["b"][0]
    assert fast.model["c"].kinds == [Kind.FFN] * 2
    x = images(8, channels=16, dtype=torch.float32)
    with torch.no_grad():
        assert_near(fast.model["c"](x), shared.eval()(shared(x)), 1e-5)


# Habits of a module


@pytest.fixture
def fast() -> nn.Module:
    return fuse(small())


X = images(64, dtype=torch.float32)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), fuse])
def test_copies(fast, change):
    assert torch.equal(outputs(change(fast), X), outputs(fast, X))


def test_state_dict(fast):
    other = fuse(randomise(SHViT(**SMALL), seed=9).eval())
    assert not torch.equal(outputs(other, X), outputs(fast, X))
    other.load_state_dict(fast.state_dict())
    assert torch.equal(outputs(other, X), outputs(fast, X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(fast, dtype):
    expected = outputs(fast, X)
    moved = fast.to(dtype)
    result = outputs(moved, X.to(dtype))
    assert result.dtype == dtype
    assert_near(result, expected, 1e-5 if dtype == torch.float64 else 0.1)
    assert_near(outputs(moved.float(), X), expected, 1e-6 if dtype == torch.float64 else 0.1)


def _with_another_norm() -> nn.Module:
    model = small_timm()
    _norm(model)
    return model


def _to_bfloat16_but_for_norms(model: nn.Module) -> nn.Module:
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
            module.float()
    return model


@pytest.mark.parametrize("rounding", [nn.Module.bfloat16, _to_bfloat16_but_for_norms], ids=["all", "mixed"])
@pytest.mark.parametrize(
    "make",
    [small_timm, small, _with_another_norm, official, lambda: randomise(shvit_kernels.shvit_s1(), seed=1).eval()],
    ids=["timm", "ours", "another_norm", "official", "shvit_s1"],
)
def test_models_in_bfloat16(make, rounding):
    stock = make()
    expected = outputs(stock, X)
    rounded = rounding(copy.deepcopy(stock))
    fast = fuse(rounded)
    assert count(fast) == count(fuse(stock))
    result = outputs(fast, X.bfloat16())
    assert result.dtype == torch.bfloat16
    # As near to the model in float32 as the stock model in bfloat16 is.
    ours, stocks = ((y.float() - expected).abs().max() for y in (result, outputs(rounded, X.bfloat16())))
    assert ours <= 2 * stocks + 2**-8 * expected.abs().max()


def test_training_is_refused(fast):
    for module in (fast, fast.model.stages[0], fast.model.head):
        with pytest.raises(RuntimeError, match="a fused model is for inference alone"):
            module.train()
    assert not any(module.training for module in fast.modules())
    assert fast.eval() is fast


def test_attributes_are_those_of_the_model(fast):
    stock = small()
    assert fast.feature_info.channels() == stock.feature_info.channels()
    with torch.no_grad():
        assert_near(fast.forward_features(X), stock.forward_features(X), 1e-5)
        for one, other in zip(
            fast.forward_intermediates(X, intermediates_only=True),
            stock.forward_intermediates(X, intermediates_only=True),
            strict=True,
        ):
            assert_near(one, other, 1e-5)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing
    assert not any(p.requires_grad for p in fast.parameters())


def test_attributes_of_the_model_can_be_set(fast):
    fast.head = nn.Identity()
    assert fast.model.head is fast.head and set(fast._modules) == {"model"}
    assert outputs(fast, X).shape == (2, SMALL["embed_dim"][-1])
    fast.head = nn.Linear(SMALL["embed_dim"][-1], 3)
    assert outputs(fast, X).shape == (2, 3)
    fast.note = "of the wrapper"
    assert not hasattr(fast.model, "note")
    del fast.note, fast.head
    assert not hasattr(fast.model, "head") and not hasattr(fast, "note")


@pytest.mark.parametrize("settings", [{"num_classes": 0}, {"distillation": True}, {"features_only": True}])
def test_variants_of_the_model(settings):
    stock = small(**settings)
    result, expected = outputs(fuse(stock), X), outputs(stock, X)
    for one, other in zip(result, expected, strict=True):
        assert_near(one, other, 1e-5)


def test_gradients_of_the_input(fast):
    stock = small()
    gradients = []
    for model in (fast, stock):
        x = X.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(x).square().sum(), x)[0])
    assert_near(*gradients, 1e-4)


@native_tier.needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_compile(fast, dtype):
    fast, x = fast.to(dtype), X.to(dtype)
    compiled = torch.compile(fast, fullgraph=True)
    assert_near(outputs(compiled, x), outputs(fast, x), 1e-5)


@native_tier.needs_native
def test_export(fast, tmp_path):
    program = torch.export.export(fast, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    torch.export.save(program, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2").module()
    assert any("fused_sequence" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(outputs(loaded, X), outputs(fast, X))
    assert torch.equal(outputs(loaded, X[:1]), outputs(fast, X[:1]))


def test_jit_trace_and_onnx_see_plain_operators(fast, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fast, X)
        torch.onnx.export(fast, (X,), tmp_path / "fused.onnx", dynamo=True, verbose=False)
    assert "shvit_kernels::" not in str(traced.inlined_graph)
    assert_near(outputs(traced, X), outputs(fast, X), 1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "fused.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert_near(torch.from_numpy(result), outputs(fast, X), 1e-5)


@native_tier.needs_native
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_backends_can_be_named(fast, dtype, rounding):
    fast, x = fast.to(dtype), X.to(dtype)
    with shvit_kernels.use_backend("eager"):
        by_specification = outputs(fast, x)
    assert not torch.equal(by_specification, outputs(fast, x))  # it was another computation
    assert_near(by_specification, outputs(fast, x), rounding)


@native_tier.needs_native
def test_mixers_run_on_the_backend_for_their_input(fast, monkeypatch):
    calls, mix = [], cpu.shsa_mixer
    monkeypatch.setattr(cpu, "shsa_mixer", lambda *a: calls.append(a[0].dtype) or mix(*a))
    result = outputs(fast.double(), X.double())
    assert calls == [torch.float64] * ALL_OF_SMALL[Kind.MIXER]
    with shvit_kernels.use_backend("eager"):
        assert_near(outputs(fast, X.double()), result, 1e-12)
    assert len(calls) == ALL_OF_SMALL[Kind.MIXER]


# Bad input


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        fuse({})
    with pytest.raises(ValueError, match=r"model must be in evaluation mode.*the model itself is in training mode"):
        fuse(small().train())
    partly = small()
    partly.stages[1].train()
    with pytest.raises(ValueError, match=r"stages\.1\.downsample\.0\.m\.bn is in training mode"):
        fuse(partly)
    with pytest.raises(ValueError, match="must have at least one block of SHViT, and this Linear has none"):
        fuse(nn.Linear(2, 2).eval())
