"""``shvit_kernels.SHSA`` against timm's layer: results, gradients, statistics, and what users do to layers."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from shvit_kernels import SHSA, functional, use_backend
from shvit_kernels._randomise import randomise
from shvit_kernels.bench.timm_import import timm
from tests.support import native as native_tier
from tests.support.numerics import distance, largest, unit_roundoff
from tests.support.parity import MODES, assert_close, evaluation, training

StockSHSA = timm.models.shvit.SHSA

DIM, QK_DIM, PDIM = 24, 4, 10

# Name, C, P, side of the attention stages of the published models (models.md).
STAGES = {
    "s1_second": (224, 48, 7),
    "s1_third": (320, 68, 4),
    "s2_second": (308, 66, 7),
    "s2_third": (448, 96, 4),
    "s3_second": (352, 75, 7),
    "s4_second": (336, 72, 8),
}


def pair(
    dim: int = DIM,
    qk_dim: int = QK_DIM,
    pdim: int = PDIM,
    dtype: torch.dtype = torch.float64,
    change: Callable[[nn.Module], object] | None = None,
    **arguments,
) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's layer with the same random weights, both changed in the same way."""
    theirs = StockSHSA(dim, qk_dim, pdim, dtype=torch.float64, **arguments)
    randomise_norms = all(hasattr(m, "weight") for m in (theirs.pre_norm, theirs.qkv.bn))
    if randomise_norms and theirs.pre_norm.weight is not None:
        randomise(theirs)
    ours = SHSA(dim, qk_dim, pdim, dtype=torch.float64, **arguments)
    ours.load_state_dict(theirs.state_dict())
    for layer in (ours, theirs):
        if change is not None:
            change(layer)
        layer.to(dtype)
    return ours, theirs


def features(batch: int = 3, dim: int = DIM, height: int = 5, width: int | None = None, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, dim, height, width or height, generator=generator, dtype=torch.float64).to(dtype) + 0.5


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor | None = None) -> None:
    """Two training steps, the second on the statistics that the first left, and an evaluation."""
    x = features() if x is None else x
    for _ in range(2):
        assert_close(training(ours, x), training(theirs, x))
    assert_close(evaluation(ours, x), evaluation(theirs, x))


# The same results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("stage", STAGES)
def test_parity_at_the_stages(stage, layout, mode):
    dim, pdim, side = STAGES[stage]
    ours, theirs = pair(dim, 16, pdim)
    x = features(4, dim, side).contiguous(memory_format=layout)
    results = MODES[mode](ours, x)
    assert_close(results, MODES[mode](theirs, x))
    assert results["output"].is_contiguous(memory_format=layout)


SHAPES = {
    "all_channels": {"dim": 10, "pdim": 10},
    "one_channel_of_attention": {"dim": 5, "pdim": 1},
    "narrowest_query": {"qk_dim": 1},
    "query_wider_than_the_channels": {"qk_dim": 24, "pdim": 7},
    "odd": {"dim": 131, "qk_dim": 5, "pdim": 75},
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("height, width, batch", [(5, 7, 2), (1, 1, 2), (1, 2, 1), (17, 19, 1)])
def test_parity_of_other_shapes(sizes, height, width, batch):
    ours, theirs = pair(**sizes)
    assert_same(ours, theirs, features(batch, ours.dim, height, width))


def test_parity_with_the_specification_as_backend():
    with use_backend("eager"):
        assert_same(*pair())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", ["s1_third", "s4_second"])
def test_as_exact_as_timm_in_lower_precision(stage, dtype, mode):
    """Error against the stock layer in float64 at most twice that of the stock layer in the same type."""
    dim, pdim, side = STAGES[stage]
    ours, theirs = pair(dim, 16, pdim, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    x = features(16, dim, side, dtype=dtype)
    true = MODES[mode](exact, x.double())
    mine, stock = MODES[mode](ours, x), MODES[mode](theirs, x)
    assert_as_exact(mine, stock, true, dtype)


def assert_as_exact(mine: dict, stock: dict, true: dict, dtype: torch.dtype) -> None:
    wrong = []
    for name, value in true.items():
        assert mine[name].dtype == stock[name].dtype, name
        error, stock_error = distance(mine[name], value), distance(stock[name], value)
        size = largest(value)
        if name == "gradient of pre_norm.bias":  # zero in truth, as the batch's mean takes it away again
            size = max(size, largest(true["gradient of pre_norm.weight"]))
        if not error <= 2 * stock_error + 8 * unit_roundoff(dtype) * size:
            wrong.append(f"{name} is off by {error:.3g}, timm by {stock_error:.3g}")
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_timm_under_autocast(dtype, mode):
    dim, pdim, side = STAGES["s4_second"]
    ours, theirs = pair(dim, 16, pdim, dtype=torch.float32)
    exact = copy.deepcopy(theirs).double()
    x = features(16, dim, side, dtype=dtype)
    true = MODES[mode](exact, x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, stock = MODES[mode](ours, x), MODES[mode](theirs, x)
    assert_as_exact(mine, stock, true, torch.bfloat16)


# Batch normalisation in every state


def freeze(layer: nn.Module) -> None:
    """Evaluation mode that ``layer.train()`` does not undo."""
    layer.qkv.bn.train = lambda mode=True: layer.qkv.bn
    layer.qkv.bn.eval()
    layer.qkv.bn.training = False


def replace_norm(layer: nn.Module, **arguments) -> None:
    torch.manual_seed(5)
    layer.qkv.bn = nn.BatchNorm2d(layer.qkv.c.out_channels, dtype=torch.float64, **arguments)


def with_bias(layer: nn.Module) -> None:
    torch.manual_seed(5)
    layer.qkv.c.bias = nn.Parameter(torch.randn(layer.qkv.c.out_channels, dtype=torch.float64))


def stop_tracking(layer: nn.Module) -> None:
    layer.qkv.bn.track_running_stats = False


BATCH_NORMS = {
    "frozen": freeze,
    "momentum_none": lambda layer: setattr(layer.qkv.bn, "momentum", None),
    "momentum_one": lambda layer: setattr(layer.qkv.bn, "momentum", 1.0),
    "momentum_zero": lambda layer: setattr(layer.qkv.bn, "momentum", 0.0),
    "untracked": partial(replace_norm, track_running_stats=False),
    "tracking_stopped": stop_tracking,
    "not_affine": partial(replace_norm, affine=False),
    "not_affine_untracked": partial(replace_norm, affine=False, track_running_stats=False),
    "large_eps": lambda layer: setattr(layer.qkv.bn, "eps", 0.5),
    "convolution_with_bias": with_bias,
    "convolution_with_bias_frozen": lambda layer: (with_bias(layer), freeze(layer)),
    "convolution_with_bias_momentum_none": lambda layer: (with_bias(layer), setattr(layer.qkv.bn, "momentum", None)),
    "no_norm": lambda layer: setattr(layer.qkv, "bn", nn.Identity()),
    "other_norm": lambda layer: setattr(layer.qkv, "bn", nn.GroupNorm(2, layer.qkv.c.out_channels).double()),
    "large_group_norm_eps": lambda layer: setattr(layer.pre_norm, "eps", 0.5),
}


@pytest.mark.parametrize("change", BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
def test_parity_of_batch_norms(change):
    assert_same(*pair(change=change))


MISSING = {
    "not_counted": {"num_batches_tracked"},
    "only_counted": {"running_mean", "running_var"},
    "nothing": {"running_mean", "running_var", "num_batches_tracked"},
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING.keys())
@pytest.mark.parametrize("more", [False, True], ids=["one_operator", "two_modules"])
def test_parity_without_some_buffers(more, missing, momentum):
    def change(layer: nn.Module) -> None:
        for norm in (layer.qkv.bn, layer.proj[1].bn):
            norm.momentum = momentum
            for name in missing:
                setattr(norm, name, None)
        if more:
            layer.proj.append(nn.Tanh())

    assert_same(*pair(change=change))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("norm", ["qkv.bn", "proj.1.bn"])
@pytest.mark.parametrize("counted_in", [torch.int64, torch.int32, torch.float64], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_parity_of_other_strides_and_counters(stride, counted_in, norm, momentum):
    def change(layer: nn.Module) -> None:
        bn = layer.get_submodule(norm)
        bn.momentum = momentum
        bn.running_mean, bn.running_var = torch.rand(2, stride * bn.num_features, dtype=torch.float64)[:, ::stride]
        bn.num_batches_tracked = bn.num_batches_tracked.to(counted_in)

    torch.manual_seed(0)
    ours, theirs = pair(change=change)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs)


def test_running_statistics_of_inference_mode_are_refused_outside_of_it():
    for layer in pair():
        with torch.inference_mode():
            for bn in (layer.qkv.bn, layer.proj[1].bn):
                bn._buffers.update((name, t.clone()) for name, t in bn._buffers.items())
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            layer.train()(features())
        with torch.inference_mode():
            layer(features())


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("norm", ["qkv.bn", "proj.1.bn"])
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_gradients"])
def test_running_mean_and_variance_only_come_together(gradients, norm, name, mode):
    for layer in pair(change=lambda layer: setattr(layer.get_submodule(norm), name, None)):
        with torch.set_grad_enabled(gradients), pytest.raises((ValueError, RuntimeError), match="running_"):
            layer.train(mode)(features())


def test_fewer_tokens_than_channels():
    """The covariance is singular; the variance of the projection stays non-negative and its root finite."""
    assert_same(*pair(96, 16, 96), features(2, 96, 1, 1))
    ours, _ = pair(96, 16, 96, dtype=torch.float32)
    results = training(ours, features(1, 96, 1, 2, dtype=torch.float32))
    assert all(t.isfinite().all() for t in results.values())


def test_constant_input_stays_finite():
    ours, _ = pair(dtype=torch.float32)
    results = training(ours, torch.full((2, DIM, 5, 5), 3.0))
    assert all(t.isfinite().all() for t in results.values())


def test_one_value_per_channel_is_refused_in_training():
    x = features(1, height=1)
    for layer in pair():
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            layer.train()(x)
    ours, theirs = pair()
    assert_close(evaluation(ours, x), evaluation(theirs, x))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_empty_batch(mode):
    ours, _ = pair()
    before = {k: t.clone() for k, t in ours.qkv.state_dict().items() if "num_batches" not in k}
    x = features(0).requires_grad_()
    y = ours.train(mode)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert all(not p.grad.any() for p in ours.parameters())
    for k, t in before.items():
        assert torch.equal(ours.qkv.state_dict()[k], t), k


# What training does to a layer


def test_frozen_parameters_have_no_gradient():
    for frozen in ("pre_norm.weight", "pre_norm.bias", "qkv.c.weight", "qkv.bn.weight", "qkv.bn.bias"):
        ours, theirs = pair(change=lambda layer, name=frozen: layer.get_parameter(name).requires_grad_(False))
        for mode in (True, False):
            for layer in (ours, theirs):
                layer.train(mode).zero_grad()
                layer(features()).square().sum().backward()
            for (name, mine), true in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                if name == frozen:
                    assert mine.grad is None and true.grad is None
                else:
                    size = max(largest(true.grad), 1.0)
                    assert largest(mine.grad - true.grad) <= 1e-9 * size, (name, frozen)


def test_only_the_input_needs_a_gradient():
    ours, theirs = pair(change=lambda layer: layer.requires_grad_(False))
    grads = []
    for layer in (ours.train(), theirs.train()):
        x = features().requires_grad_()
        layer(x).square().sum().backward()
        grads.append(x.grad)
    assert_close({"dx": grads[0]}, {"dx": grads[1]})


class Residual(nn.Module):
    """The input feeds several consumers, as in a residual block."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + self.layer(x) + self.layer(x.flip(0)) + x.relu()


def test_parity_inside_residuals():
    ours, theirs = pair()
    assert_same(Residual(ours), Residual(theirs))


def test_parity_of_stacked_layers():
    first, second = pair(), pair()
    ours, theirs = (nn.Sequential(a, b) for a, b in zip(first, second, strict=True))
    assert_same(ours, theirs)


def test_parity_under_gradient_checkpointing():
    ours, theirs = pair()

    class Checkpointed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)

    assert_same(Checkpointed(ours), Checkpointed(theirs))


def test_training_steps_follow_timm():
    ours, theirs = pair()
    for layer in (ours.train(), theirs.train()):
        optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        for step in range(5):
            optimiser.zero_grad()
            layer(features() + step).square().mean().backward()
            optimiser.step()
    for (name, mine), true in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-8, msg=name)


def test_inference_mode():
    ours, theirs = pair()
    with torch.inference_mode():
        assert_close({"y": ours.eval()(features())}, {"y": theirs.eval()(features())})


def test_functional_call_with_other_parameters():
    ours, theirs = pair()
    other = {k: t * 1.5 for k, t in theirs.named_parameters()}
    results = [torch.func.functional_call(layer.eval(), other, features()) for layer in (ours, theirs)]
    assert_close({"y": results[0]}, {"y": results[1]})


# What users do to layers


def test_fused_by_timm():
    ours, theirs = pair()
    x = features()
    expected = evaluation(theirs, x)
    for layer in (ours, theirs):
        timm.models.shvit.SHViT.fuse(layer)  # replaces every child that can fuse itself
    assert type(ours.qkv) is nn.Conv2d and type(ours.proj[1]) is nn.Conv2d
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_close(evaluation(ours, x), expected)
    assert_close(evaluation(ours, x), evaluation(theirs, x))
    assert_close(training(ours, x), training(theirs, x))


def test_state_dict_is_that_of_timm():
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    fresh = StockSHSA(DIM, QK_DIM, PDIM, dtype=torch.float64)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    ours(features())  # nothing that a call may leave behind is in the state
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_initialisation_is_that_of_timm():
    """From the same seed the same weights, the last norm's zeros included."""
    made = []
    for cls in (SHSA, StockSHSA):
        torch.manual_seed(0)
        made.append(cls(DIM, QK_DIM, PDIM).state_dict())
    for (name, mine), true in zip(made[0].items(), made[1].values(), strict=True):
        assert torch.equal(mine, true), name


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies(duplicate):
    ours, _ = pair()
    x = features()
    training(ours, x)  # whatever a call leaves behind must not stop or reach a copy
    twin = duplicate(ours)
    first, second = training(twin, x), training(ours, x)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    with torch.no_grad():
        twin.qkv.c.weight.mul_(2)
    assert not torch.equal(twin.qkv.c.weight, ours.qkv.c.weight)


def test_weights_are_read_at_each_call():
    ours, theirs = pair()
    for change in (
        lambda layer: layer.qkv.c.weight.data.mul_(1.5),
        lambda layer: layer.qkv.bn.running_var.mul_(2.0),
        lambda layer: setattr(layer.pre_norm, "weight", nn.Parameter(torch.full((PDIM,), 0.7, dtype=torch.float64))),
        lambda layer: layer.load_state_dict({k: t * 1.1 for k, t in layer.state_dict().items()}),
    ):
        for layer in (ours, theirs):
            change(layer)
        assert_close(evaluation(ours, features()), evaluation(theirs, features()))


PARAMETRISATIONS = {
    "weight_norm": lambda layer: nn.utils.parametrizations.weight_norm(layer.qkv.c),
    "orthogonal": lambda layer: nn.utils.parametrizations.orthogonal(layer.proj[1].c),
    "orthogonal_projection": lambda layer: nn.utils.parametrizations.orthogonal(layer.qkv.c),
    "old_weight_norm": lambda layer: torch.nn.utils.weight_norm(layer.qkv.c),
    "pruned": lambda layer: nn.utils.prune.ln_structured(layer.qkv.c, "weight", amount=0.3, n=2, dim=0),
    "parametrised_batch_norm": lambda layer: nn.utils.parametrize.register_parametrization(
        layer.qkv.bn, "weight", nn.Softplus()
    ),
    "parametrised_group_norm": lambda layer: nn.utils.parametrize.register_parametrization(
        layer.pre_norm, "weight", nn.Softplus()
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("change", PARAMETRISATIONS.values(), ids=PARAMETRISATIONS.keys())
def test_parity_of_parametrisations(change):
    ours, theirs = pair(change=change)
    assert ours.get_parameter("pre_norm.bias").requires_grad
    x, dy = features(), features().sin()
    for mode in (True, False):
        results = []
        for layer in (ours, theirs):
            layer.train(mode).zero_grad()
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            results.append({"y": y.detach(), "dx": leaf.grad})
        assert_close(*results)
        for (name, mine), true in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert largest(mine.grad - true.grad) <= 1e-9 * max(largest(true.grad), 1.0), name


NORMS = {
    "batch_norm": nn.BatchNorm2d,
    "two_groups": partial(nn.GroupNorm, 2),
    "not_affine": lambda channels, **to: nn.GroupNorm(1, channels, affine=False, **to),
    "nothing": nn.Identity,
    "one_group_of_torch": lambda channels, **to: nn.GroupNorm(1, channels, **to),
}
ACTIVATIONS = {
    "gelu": nn.GELU,
    "relu6": nn.ReLU6,
    "leaky": nn.LeakyReLU,
    "in_place": lambda: nn.ReLU(inplace=True),
    "nothing": nn.Identity,
    "learnt": partial(nn.PReLU, dtype=torch.float64),
}


@pytest.mark.parametrize("norm_layer", NORMS.values(), ids=NORMS.keys())
def test_parity_of_other_norms(norm_layer):
    assert_same(*pair(norm_layer=norm_layer))


@pytest.mark.parametrize("act_layer", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_parity_of_other_activations(act_layer):
    assert_same(*pair(act_layer=act_layer))


def test_in_place_activation_leaves_the_input_alone():
    ours, _ = pair(act_layer=lambda: nn.ReLU(inplace=True))
    x = features()
    before = x.clone()
    ours.eval()(x)
    assert torch.equal(x, before)


HOOKED = ("pre_norm", "qkv", "qkv.c", "qkv.bn", "proj", "proj.0", "proj.1", "proj.1.bn", "")


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
def test_hooks_run_and_may_change_what_they_see(kind, name):
    calls = {}

    def hook(layer: nn.Module) -> None:
        def count(*arguments):
            calls[layer] = calls.get(layer, 0) + 1
            last = arguments[-1]
            if kind == "backward":  # the module's gradients: input, then output
                return tuple(g if g is None else g * 1.5 for g in arguments[1])
            return last * 1.5 if isinstance(last, Tensor) else tuple(t * 1.5 for t in last)

        register = {
            "forward": "register_forward_hook",
            "forward_pre": "register_forward_pre_hook",
            "backward": "register_full_backward_hook",
            "backward_pre": "register_full_backward_pre_hook",
        }[kind]
        getattr(layer.get_submodule(name), register)(count)

    ours, theirs = pair()
    for layer in (ours, theirs):
        hook(layer)
    assert_close(training(ours, features()), training(theirs, features()))
    assert calls == {ours: 1, theirs: 1}


GLOBAL_HOOKS = {
    "forward": nn.modules.module.register_module_forward_hook,
    "forward_pre": nn.modules.module.register_module_forward_pre_hook,
    "backward": nn.modules.module.register_module_full_backward_hook,
    "backward_pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("register", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS.keys())
def test_hooks_on_all_modules_see_every_module(register):
    """As profilers and counters of operations register them."""
    seen = []

    def record(module: nn.Module, *_) -> None:
        seen.append(type(module).__name__)

    counts = []
    for layer in pair():
        seen.clear()
        handle = register(record)
        try:
            training(layer, features())
        finally:
            handle.remove()
        counts.append(sorted(seen))
    assert counts[0] == counts[1]


def test_subclass_of_a_submodule_is_called():
    class Doubling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def change(layer: nn.Module) -> None:
        doubling = Doubling(PDIM, 2 * QK_DIM + PDIM, 1, bias=False, dtype=torch.float64)
        doubling.load_state_dict(layer.qkv.c.state_dict())
        layer.qkv.c = doubling

    assert_same(*pair(change=change))


def test_forward_set_on_an_instance_is_called():
    def change(layer: nn.Module) -> None:
        stock_forward = layer.qkv.c.forward
        layer.qkv.c.forward = lambda x: 2 * stock_forward(x)

    assert_same(*pair(change=change))


def by_property(layer: nn.Module, name: str, module: nn.Module) -> None:
    layer.__class__ = type("Overriding", (type(layer),), {name: property(lambda self: module)})


def by_attribute(layer: nn.Module, name: str, module: nn.Module) -> None:
    layer.__dict__[name] = module


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["pre_norm", "qkv", "proj"])
@pytest.mark.parametrize("override", [by_property, by_attribute])
def test_submodules_that_a_subclass_or_an_instance_overrides(override, name, mode):
    results = []
    for layer in pair():
        other = copy.deepcopy(layer._modules[name])
        for parameter in other.parameters():
            parameter.data.mul_(2).add_(0.1)
        override(layer, name, other)
        results.append({"y": layer.train(mode)(features()).detach()})
    assert_close(*results)


def test_parameters_that_a_subclass_overrides():
    class AroundOne(nn.GroupNorm):
        weight = property(lambda self: self._parameters["weight"] + 1)

    assert_same(
        *pair(norm_layer=partial(nn.GroupNorm, 1), change=lambda layer: setattr(layer.pre_norm, "__class__", AroundOne))
    )


def test_more_modules_in_the_projection():
    def change(layer: nn.Module) -> None:
        layer.proj.append(nn.Tanh())
        layer.qkv.append(nn.Tanh())

    assert_same(*pair(change=change))


@native_tier.needs_native
def test_forward_mode_is_refused_before_running_statistics_are_updated_under_autocast():
    layer = SHSA(DIM, QK_DIM, PDIM)
    before = {k: t.clone() for k, t in layer.named_buffers()}
    weight = layer.qkv.bn.weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.forward_ad.dual_level():
        parameters = {"qkv.bn.weight": torch.autograd.forward_ad.make_dual(weight, weight)}
        with use_backend("cpu"), pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.functional_call(layer, parameters, features(dtype=torch.float32))
    for name, statistic in layer.named_buffers():
        assert torch.equal(statistic, before[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_a_learnable_scale_gets_its_gradient(mode):
    layers = pair(change=lambda layer: setattr(layer, "scale", nn.Parameter(torch.tensor(0.3).double())))
    gradients = []
    for layer in layers:
        layer.train(mode == "training")(features()).square().sum().backward()
        gradients.append(layer.scale.grad)
    torch.testing.assert_close(*gradients)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


# Nothing that has other shapes, or no values at all, may reach a kernel or be broadcast.
UNFITTING = {
    "group_norm": lambda layer: setattr(layer, "pre_norm", nn.GroupNorm(1, 9).double()),
    "group_norm_weight": lambda layer: setattr(layer.pre_norm, "weight", parameter(9)),
    "group_norm_bias": lambda layer: setattr(layer.pre_norm, "bias", parameter(1)),
    "group_norm_on_meta": lambda layer: setattr(layer, "pre_norm", nn.GroupNorm(1, PDIM, device="meta").double()),
    "inputs_of_convolution": lambda layer: setattr(layer.qkv, "c", nn.Conv2d(9, 18, 1).double()),
    "stride_of_convolution": lambda layer: setattr(layer.qkv.c, "stride", (2, 2)),
    "padding_of_convolution": lambda layer: setattr(layer.qkv.c, "padding", (1, 1)),
    "outputs_of_convolution": lambda layer: setattr(layer.qkv, "c", nn.Conv2d(10, 17, 1).double()),
    "fused_convolution": lambda layer: setattr(layer, "qkv", nn.Conv2d(10, 17, 1).double()),
    "weight_of_convolution": lambda layer: setattr(layer.qkv.c, "weight", parameter(17, 10, 1, 1)),
    "bias_of_convolution": lambda layer: setattr(layer.qkv.c, "bias", parameter(1)),
    "batch_norm_of_one": lambda layer: setattr(layer.qkv, "bn", nn.BatchNorm2d(1).double()),
    "batch_norm_of_17": lambda layer: setattr(layer.qkv, "bn", nn.BatchNorm2d(17).double()),
    "batch_norm_untracked": lambda layer: setattr(
        layer.qkv, "bn", nn.BatchNorm2d(1, track_running_stats=False).double()
    ),
    "batch_norm_not_affine": lambda layer: setattr(layer.qkv, "bn", nn.BatchNorm2d(1, affine=False).double()),
    "batch_norm_weight": lambda layer: setattr(layer.qkv.bn, "weight", parameter(1)),
    "batch_norm_bias": lambda layer: setattr(layer.qkv.bn, "bias", parameter(1)),
    "running_mean": lambda layer: setattr(layer.qkv.bn, "running_mean", torch.zeros(1).double()),
    "running_variance": lambda layer: setattr(layer.qkv.bn, "running_var", torch.ones(1).double()),
    "batch_norm_on_meta": lambda layer: setattr(layer.qkv, "bn", nn.BatchNorm2d(18, device="meta").double()),
    "qk_dim": lambda layer: setattr(layer, "qk_dim", 5),
    "pdim": lambda layer: setattr(layer, "pdim", 11),
}


@pytest.mark.parametrize("change", UNFITTING.values(), ids=UNFITTING.keys())
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=native_tier.needs_native)])
@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
def test_unfitting_submodules_are_refused(mode, backend, change):
    for layer in pair(change=change):
        layer.train(mode == "training")
        with (
            torch.set_grad_enabled(mode != "inference"),
            use_backend(backend),
            pytest.raises((RuntimeError, ValueError), match=r"\d|device"),  # says which values or devices
        ):
            layer(features())


# Memory


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("stage", STAGES)
@native_tier.needs_native
def test_activations_kept_for_the_backward(stage, layout):
    """At most 2.1 times the input, parameters left out."""
    dim, pdim, side = STAGES[stage]
    layer = SHSA(dim, 16, pdim).train()
    x = torch.randn(16, dim, side, side).contiguous(memory_format=layout).requires_grad_()
    parameters = {t.untyped_storage().data_ptr() for t in layer.parameters()}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    with use_backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    y.sum().backward()
    assert 1.0 <= sum(storage.nbytes() for storage in kept.values()) / (x.numel() * x.element_size()) <= 2.1


# Export


@pytest.mark.parametrize("fused", [False, True], ids=["with_norms", "fused"])
def test_onnx_export_runs_in_onnx_runtime(fused, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, _ = pair(dtype=torch.float32)
    ours.eval()
    if fused:
        timm.models.shvit.SHViT.fuse(ours)
    x = features(2, dtype=torch.float32)
    program = torch.onnx.export(
        ours, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    program.save(tmp_path / "shsa.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "shsa.onnx", providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        x = features(batch, dtype=torch.float32)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), ours(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_jit_trace_is_plain_aten():
    ours, _ = pair()
    traced = torch.jit.trace(ours.eval(), features())
    kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert kinds <= {"aten", "prim"}, kinds
    assert_close({"y": traced(features(5)).detach()}, {"y": ours(features(5)).detach()})


# SyncBatchNorm: two processes against one on the joined batch


def synchronised_layer() -> SHSA:
    """``qkv.bn`` synchronised; the projection's own norm frozen, as stock SyncBatchNorm refuses CPU tensors."""
    ours, _ = pair()
    ours.qkv = nn.SyncBatchNorm.convert_sync_batchnorm(ours.qkv)
    ours.train()
    ours.proj[1].bn.eval()
    return ours


def joint_batch() -> tuple[Tensor, Tensor]:
    x = features(5)
    return x, features(5).flip(0).sin()


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    gradients = {k: p.grad for k, p in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "statistics": dict(layer.qkv.bn.named_buffers())}


# Images of the first rank, and where those of the second end.
SPLITS = {"three_and_two": (3, 5), "one_and_four": (1, 5), "five_and_none": (5, 5), "none_and_none": (0, 0)}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    x, dy = joint_batch()
    for name, (middle, end) in SPLITS.items():
        mine = slice(0, middle) if rank == 0 else slice(middle, end)
        torch.save(step(synchronised_layer(), x[mine], dy[mine]), f"{folder}/{name}_{rank}.pt")
        torch.distributed.barrier()
    layer = synchronised_layer()
    layer.proj[1].bn.train()
    torch.save(step(layer, x[rank::2], dy[rank::2]), f"{folder}/last_norm_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_of_each_split(tmp_path_factory) -> dict[str, list]:
    """What both processes computed of each split; starting them is most of the work."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=2)
    names = [*SPLITS, "last_norm"]
    return {name: [torch.load(folder / f"{name}_{rank}.pt") for rank in range(2)] for name in names}


@pytest.mark.xdist_group("synchronised_batch_norm")
@pytest.mark.parametrize("split", [name for name, (_, end) in SPLITS.items() if end])
def test_synchronised_batch_norm(ranks_of_each_split, split):
    ranks = ranks_of_each_split[split]
    single, _ = pair()
    single.train()
    single.proj[1].bn.eval()
    joined = step(single, *joint_batch())
    for name in ("y", "dx"):
        assert_close({name: torch.cat([rank[name] for rank in ranks])}, {name: joined[name]})
    for name, true in joined["gradients"].items():
        total = sum(rank["gradients"][name] for rank in ranks)
        assert largest(total - true) <= 1e-9 * max(largest(true), 1.0), name
    for rank in ranks:
        assert_close(rank["statistics"], joined["statistics"])


@pytest.mark.xdist_group("synchronised_batch_norm")
def test_synchronised_batch_norm_before_one_of_the_rank(ranks_of_each_split):
    """The last norm is each rank's own, and what is synchronised still is."""
    single, _ = pair()
    joined = step(single.train(), *joint_batch())
    for rank in ranks_of_each_split["last_norm"]:
        assert_close(rank["statistics"], joined["statistics"])


@pytest.mark.xdist_group("synchronised_batch_norm")
def test_synchronised_batch_norm_without_images(ranks_of_each_split):
    before = synchronised_layer().qkv.bn
    for rank in ranks_of_each_split["none_and_none"]:
        assert all(not t.any() for t in rank["gradients"].values())
        for name in ("running_mean", "running_var"):
            assert torch.equal(rank["statistics"][name], getattr(before, name)), name


def test_synchronised_batch_norm_in_one_process():
    """Without a process group it is an ordinary batch normalisation, on every device."""
    ours, theirs = pair()
    ours.qkv = nn.SyncBatchNorm.convert_sync_batchnorm(ours.qkv)
    assert_close(training(ours, features()), training(theirs, features()))
    assert_close(evaluation(ours, features()), evaluation(theirs, features()))


# The layer is the function


def test_layer_is_the_operator_and_a_projection():
    """In evaluation: one call of ``shsa`` on the folded weights, then the projection."""
    ours, _ = pair()
    ours.eval()
    fused = ours.qkv.fuse()
    norm = ours.pre_norm
    y = functional.shsa(
        features(),
        fused.weight.flatten(1),
        fused.bias,
        qk_dim=QK_DIM,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        norm_eps=norm.eps,
        relu=True,
    )
    assert_close({"y": ours.proj[1](y).detach()}, {"y": ours(features()).detach()})
    assert torch.equal(F.relu(y), y)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_tensors_in_place_of_parameters(training):
    """As in the replicas of ``torch.nn.DataParallel``, which keeps them among the attributes."""
    layer = randomise(SHSA(20, 3, 7), seed=1).train(training)
    x = torch.randn(2, 20, 3, 3)
    expected = layer(x).detach()
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                setattr(module, name, parameter.detach())
    assert not list(layer.parameters())
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_attributes_in_place_of_running_statistics(training):
    layers = [randomise(SHSA(20, 3, 7), seed=1).train(training) for _ in range(2)]
    norms = [(layer.qkv.bn, layer.proj[1].bn) for layer in layers]
    for norm in norms[1]:
        for name, statistic in list(norm._buffers.items()):
            del norm._buffers[name]
            setattr(norm, name, statistic)
    x = torch.randn(2, 20, 3, 3)
    expected, result = (layer(x) for layer in layers)
    assert torch.equal(result, expected)
    for stock, changed in zip(*norms, strict=True):
        for name, statistic in stock._buffers.items():
            assert torch.equal(getattr(changed, name), statistic), name
