"""``mixer_train``: a whole layer in training as one operator, against the specification (design section 6)."""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from shvit_kernels import SHSA, functional, use_backend
from shvit_kernels._randomise import randomise
from shvit_kernels.backends import cpu, eager
from tests.support import exact
from tests.support import native as native_tier
from tests.support.cases import CORNERS, Case, covering_set, mixer_train_call, named
from tests.support.numerics import Call, assert_parity, expect, filled_with_nan
from tests.support.operators import operators_called

pytestmark = native_tier.needs_native

BACKEND = "cpu"
FORWARD = torch.ops.shvit_kernels.mixer_train_forward.default
BACKWARD = torch.ops.shvit_kernels.mixer_train_backward.default
NOTHING_RUNNING = (None,) * 8
# Batch statistics of a handful of tokens are a matter of the tests in float64: their rounding knows no bound.
PLAIN = {"autocast": (False,), "relu": (True,), "needs": ("all",), "dtype": (torch.float32, torch.float64)}
COVER = named(covering_set(**PLAIN, P=(48, 7, 66, 75), D=(16, 1, 24), N=(16, 49, 64, 257), B=(2, 0, 1, 17)))
SMALL_COVER = named(
    covering_set(**PLAIN, P=(48, 7, 75), D=(16, 1), N=(16, 49, 257), B=(1, 2), strides=("dense",), norm=("affine",))
)
SOME_CORNERS = {
    name: case
    for name, case in CORNERS.items()
    if 16 <= case.N <= 1050 and not case.autocast and case.dtype != torch.bfloat16 and case.relu and case.P < 130
}
SOME_CORNERS["longest_short_image"] = Case(N=256)
SOME_CORNERS["many_tokens_few_channels"] = Case(N=257, P=5, beyond=7)

each_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])
each_residual = pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])


def by_name(cases: dict[str, Case]) -> list:
    return [pytest.param(case, id=name) for name, case in cases.items()]


def check(case: Case, residual: bool = True) -> None:
    call = mixer_train_call(case, residual)
    expected = expect(call, exact.of_mixer_training(case, residual))
    with torch.no_grad():
        assert_parity(call.run(BACKEND, ()), expected)
    assert_parity(call.run(BACKEND), expected)


@pytest.mark.parametrize("case", by_name(COVER | SOME_CORNERS))
def test_parity(case):
    check(case)


@pytest.mark.parametrize("variant", native_tier.each_variant(native_tier.PAIRED_VARIANTS))
@each_layout
@pytest.mark.parametrize("tokens", [2, 6])
def test_parity_of_gradients_that_a_few_tokens_have(tokens, layout, variant):
    """As in dense prediction: the values of a row or column of a product are of very different sizes."""
    case = Case(N=1024, B=1, layout=layout)
    call = mixer_train_call(case)
    dout = torch.zeros_like(call.upstream["out"])
    dout.flatten(2)[:, :, 300 : 300 + tokens] = 1 + call.upstream["out"].flatten(2)[:, :, :tokens]
    call = replace(call, upstream=call.upstream | {"out": dout})
    with native_tier.instruction_set(variant):
        assert_parity(call.run(BACKEND), expect(call, exact.of_mixer_training(case, True)))


@each_layout
@pytest.mark.parametrize("N", [49, 257])
def test_parity_without_the_residual(N, layout):
    check(Case(N=N, layout=layout), residual=False)


@pytest.mark.parametrize("variant", native_tier.each_variant(native_tier.PROJECTION_VARIANTS))
@pytest.mark.parametrize("case", by_name(SMALL_COVER))
def test_parity_of_every_variant(case, variant):
    with native_tier.instruction_set(variant):
        check(case)


@pytest.mark.parametrize("variant", native_tier.each_variant(native_tier.PROJECTION_VARIANTS))
@each_layout
@each_residual
@pytest.mark.parametrize(
    "N, B, P, beyond", [(1, 17, 7, 0), (1, 2, 5, 13), (2, 1, 1, 36), (130, 3, 5, 27), (49, 5, 33, 1)]
)
def test_float64_is_the_specification(N, B, P, beyond, residual, layout, variant):
    """Few tokens, tokens that end in the middle of a vector or a block, widths that end in the middle of a panel."""
    call = mixer_train_call(Case(N=N, B=B, P=P, D=3, beyond=beyond, dtype=torch.float64, layout=layout), residual)
    with native_tier.instruction_set(variant):
        assert_near_eager(call)


def assert_near_eager(call: Call, tolerance: float = 1e-9) -> None:
    """By default in float64."""
    results = call.run(BACKEND)
    for name, expected in call.run("eager").items():
        # The gradient of norm_bias is zero in truth.
        size = max(expected.abs().max(), results["dnorm_weight"].abs().max() if name == "dnorm_bias" else 0)
        assert (results[name] - expected).abs().max() <= tolerance * size, name
        assert results[name].dtype == expected.dtype, name


@each_layout
@pytest.mark.parametrize("N", [49, 257])
def test_each_norm_has_its_own_eps(N, layout):
    case = Case(N=N, P=5, D=3, beyond=3, dtype=torch.float64, layout=layout)
    assert_near_eager(mixer_train_call(case, epsilons=(0.5, 0.3, 0.1)))


@pytest.mark.parametrize("variant", native_tier.each_variant(native_tier.PROJECTION_VARIANTS))
@each_layout
@each_residual
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not_affine"])
@pytest.mark.parametrize("N", [6, 257])
def test_gradcheck(N, affine, residual, layout, variant):
    case = Case(P=3, D=2, N=N, beyond=2, dtype=torch.float64, layout=layout, bias=affine)
    call = mixer_train_call(case, residual)
    leaves = {k: t.requires_grad_() for k, t in call.inputs.items() if t is not None}

    def function(*tensors):
        inputs = call.inputs | dict(zip(leaves, tensors, strict=True))
        return call.function(**inputs, backend=BACKEND)["out"]

    with native_tier.instruction_set(variant):
        assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=N > 6)


def test_specification_is_attention_projection_batch_norm_and_residual():
    case = Case(P=20, D=8, dtype=torch.float64)
    call = mixer_train_call(case)
    t = call.inputs
    y, *_ = eager.shsa_train(*list(t.values())[:6], case.D, 1e-5, 1e-5, case.D**-0.5, True, False, False)
    projected = F.conv2d(y, t["proj_weight"][:, :, None, None])
    out = t["x"] + F.batch_norm(projected, None, None, t["proj_bn_weight"], t["proj_bn_bias"], training=True)
    results = call.run("eager", ())
    torch.testing.assert_close(results["out"], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results["proj_mean"], projected.mean((0, 2, 3)))
    torch.testing.assert_close(results["proj_variance"], projected.var((0, 2, 3), correction=0))


def test_specification_has_second_derivatives():
    case = Case(P=3, D=2, N=4, beyond=1, B=2, dtype=torch.float64)
    call = mixer_train_call(case)
    leaves = {k: t.requires_grad_() for k, t in call.inputs.items()}

    def function(*tensors):
        return call.function(**dict(zip(leaves, tensors, strict=True)), backend="eager")["out"]

    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@each_layout
@pytest.mark.parametrize("N", [49, 257])
def test_statistics_of_a_large_mean_are_centred(N, layout):
    """Uncentred, all of the variance would be lost."""
    case = Case(N=N, B=5, layout=layout)
    call = mixer_train_call(case)
    call.inputs["x"].mul_(1e-3)[:, case.P :] += 1.0
    call.inputs["proj_weight"].abs_()[:, : case.P] *= 1e-3
    results, expected = call.run(BACKEND, ()), call.to(torch.float64).run("eager", ())
    stock = call.run("eager", ())
    assert (expected["proj_mean"] ** 2 > 1e5 * expected["proj_variance"]).all()
    worst = {
        k: ((r["proj_variance"] / expected["proj_variance"]) - 1).abs().max()
        for k, r in (("ours", results), ("stock", stock))
    }
    assert worst["ours"] <= 2 * worst["stock"] + 1e-5, worst


COMBINATIONS = [
    needs for count in (1, 2) for needs in itertools.combinations(mixer_train_call(Case(P=4, N=6)).inputs, count)
]


@each_layout
@pytest.mark.parametrize("needs", COMBINATIONS, ids="-".join)
def test_only_the_gradients_asked_for(needs, layout):
    call = mixer_train_call(Case(P=10, D=3, N=16, beyond=5, B=3, layout=layout))
    every, some = call.run(BACKEND), call.run(BACKEND, needs)
    assert {k for k in some if k.startswith("d")} == {f"d{name}" for name in needs}
    for name, t in some.items():
        assert torch.equal(t, every[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("B, N", [(1, 1050), (5, 49), (17, 16)])
@each_layout
def test_same_bits_for_any_number_of_threads_and_in_every_run(B, N, layout, dtype):
    native_tier.assert_same_bits(mixer_train_call(Case(B=B, N=N, layout=layout, dtype=dtype)), BACKEND)


@each_layout
def test_output_keeps_the_memory_format(layout):
    call = mixer_train_call(Case(layout=layout))
    results = call.run(BACKEND, ("x",))
    assert results["out"].stride() == results["dx"].stride() == call.inputs["x"].stride()


@pytest.mark.parametrize("B, N", [(3, 49), (3, 257), (0, 49)])
def test_no_result_depends_on_uninitialised_memory(B, N):
    case = Case(P=75, B=B, N=N)
    call = mixer_train_call(case)
    with filled_with_nan():
        results = call.run(BACKEND)
    assert_parity(results, expect(call, exact.of_mixer_training(case, True)))


@each_layout
def test_nan_stays_where_the_specification_has_it(layout):
    """Through batch statistics a NaN reaches its channels everywhere, and with attention before them all."""
    call = mixer_train_call(Case(P=10, B=3, N=16, layout=layout))
    call.inputs["x"][1, 12, 2, 3] = torch.nan
    results, expected = call.run(BACKEND, ()), call.run("eager", ())
    for name in ("out", "mean", "variance", "proj_mean", "proj_variance"):
        assert torch.equal(results[name].isnan(), expected[name].isnan()), name


def arguments(case: Case, residual: bool = True) -> tuple[tuple, tuple]:
    """Of the forward but for running statistics, and of the backward without ``needs``."""
    settings = (case.D, 1e-5, 1e-5, 1e-5, 0.5, residual)
    forward = (*mixer_train_call(case).inputs.values(), *settings)
    _, *saved = FORWARD(*forward, *NOTHING_RUNNING)
    return forward, (torch.randn_like(forward[0]), forward[0], *saved, *forward[1:])


def running(width: int, dtype: torch.dtype = torch.float32, momentum: float | None = 0.1) -> tuple:
    """Running mean and variance, number of batches and momentum."""
    return torch.randn(width, dtype=dtype), torch.rand(width, dtype=dtype), torch.tensor(3), momentum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_layout
@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "weight", "bias": False}, {"norm": "none"}, {"B": 0}, {"B": 1, "N": 1}, {"N": 257}],
    ids=["everything", "no_biases", "no_norm", "no_images", "one_token", "long"],
)
def test_opcheck(options, layout, dtype):
    case = Case(**{"P": 10, "D": 3, "N": 16, "beyond": 4, "layout": layout, "dtype": dtype} | options)
    forward, backward = arguments(case)
    torch.library.opcheck(FORWARD, (*forward, *NOTHING_RUNNING))
    torch.library.opcheck(FORWARD, (*forward, *running(16), *running(14, torch.bfloat16, None)))
    for needs in ([True] * 9, [False, True] * 4 + [False]):
        torch.library.opcheck(BACKWARD, (*backward, needs))


@pytest.mark.parametrize("rows", [-1, 1], ids=["one_row_too_few", "one_row_too_many"])
def test_parameters_of_another_size_are_refused(rows):
    forward, backward = arguments(Case(P=10, D=3, N=16, beyond=4))
    names = (
        "norm_weight",
        "norm_bias",
        "weight",
        "bn_weight",
        "bn_bias",
        "proj_weight",
        "proj_bn_weight",
        "proj_bn_bias",
    )
    for operator, given, more in ((FORWARD, forward, NOTHING_RUNNING), (BACKWARD, backward, ([True] * 9,))):
        at = {argument.name: i for i, argument in enumerate(operator._schema.arguments)}
        for name in names:
            good = given[at[name]]
            wrong = good.new_ones(good.shape[0] + rows, *good.shape[1:])
            message = f"{name} must have {good.numel()} values, got {wrong.numel()}"
            with pytest.raises(RuntimeError, match=message):
                operator(*given[: at[name]], wrong, *given[at[name] + 1 :], *more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kept_in", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("absent", [(), (2, 6), (0, 1, 4, 5)], ids=["everything", "not_counted", "only_counted"])
def test_running_statistics_become_those_of_the_specification(absent, momentum, kept_in, dtype):
    call = mixer_train_call(Case(P=10, D=3, N=16, beyond=4, dtype=dtype))
    settings = (3, 1e-5, 1e-5, 1e-5, 0.5, True)
    given = [*running(16, kept_in, momentum), *running(14, kept_in, momentum)]
    for i in absent:
        given[i] = None
    ours, expected = ([t.clone() if isinstance(t, torch.Tensor) else t for t in given] for _ in range(2))
    cpu.mixer_train(*call.inputs.values(), *settings, *ours)
    eager.mixer_train(*call.inputs.values(), *settings, *expected)
    precision = max(torch.finfo(kept_in).eps, torch.finfo(dtype).eps)
    for i in (0, 1, 4, 5):
        torch.testing.assert_close(ours[i], expected[i], rtol=4 * precision, atol=20 * precision)
    for i in (2, 6):
        assert ours[i] == expected[i] == (None if i in absent else 4)


REFUSED = {
    "running_mean": (torch.zeros(15), r"running_mean must have 16 values, got 15"),
    "running_var": (torch.zeros(32)[::2], r"running_var must be contiguous"),
    "num_batches_tracked": (torch.zeros(1), r"num_batches_tracked must be .* of the type"),
    "proj_running_mean": (torch.zeros(14, dtype=torch.int64), r"proj_running_mean must be float16, .* or float64"),
    "proj_running_var": (None, r"proj_running_mean and proj_running_var must be given together"),
    "proj_num_batches_tracked": (torch.zeros(2, dtype=torch.int64), r"proj_num_batches_tracked must have 1 values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_running_statistics_that_cannot_be_updated_are_refused_before_any_is(name):
    wrong, message = REFUSED[name]
    forward, _ = arguments(Case(P=10, D=3, N=16, beyond=4))
    given = [*forward, *running(16), *running(14)]
    at = [argument.name for argument in FORWARD._schema.arguments].index(name)
    given[at] = wrong
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    with pytest.raises(RuntimeError, match=message):
        FORWARD(*given)
    assert_equal(given, before)


def assert_equal(given: Iterable, before: Iterable) -> None:
    for t, old in zip(given, before, strict=True):
        assert (t is None and old is None) or torch.equal(torch.as_tensor(t), torch.as_tensor(old))


@pytest.mark.parametrize("change", ["too_few", "of_another_type"])
def test_statistics_of_another_call_are_refused(change):
    _, backward = arguments(Case(P=10, D=3, N=16, beyond=4))
    dout, x, projected, statistics, *rest = backward
    wrong = statistics[1:] if change == "too_few" else statistics.double()
    with pytest.raises(RuntimeError, match="statistics must be contiguous, of the type of x, with"):
        BACKWARD(dout, x, projected, wrong, *rest, [True] * 9)


def test_other_types_are_refused():
    forward, _ = arguments(Case(P=10, D=3, N=16, beyond=4))
    with pytest.raises(RuntimeError, match="float32 and float64"):
        FORWARD(forward[0].bfloat16(), *forward[1:], *NOTHING_RUNNING)


def test_second_derivatives_are_refused():
    call = mixer_train_call(Case(P=10, D=3, N=16, beyond=4))
    inputs = {k: t.detach().requires_grad_(k == "x") for k, t in call.inputs.items()}
    out = call.function(**inputs, backend=BACKEND)["out"]
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"mixer_train is differentiable once.*eager"):
        grad.square().sum().backward()


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_gradients"])
@pytest.mark.parametrize("name", ["x", "proj_bn_weight"])
def test_forward_mode_is_refused_before_anything_is_updated(name, gradients):
    call = mixer_train_call(Case(P=10, D=3, N=16, beyond=4))
    settings, statistics = (3, 1e-5, 1e-5, 1e-5, 0.5, True), (*running(16), *running(14))
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in statistics]
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        t = call.inputs[name]
        call.inputs[name] = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
        with pytest.raises(NotImplementedError, match=r"mixer_train .* forward mode .*eager"):
            cpu.mixer_train(*call.inputs.values(), *settings, *statistics)
    assert_equal(statistics, before)


def test_transforms_are_refused_before_anything_is_updated():
    layer = SHSA(24, 4, 10)
    before = [t.clone() for t in layer.buffers()]
    with use_backend("cpu"), pytest.raises(NotImplementedError, match=r"mixer_train .* torch.func .*eager"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(2, 24, 5, 5))
    assert_equal(layer.buffers(), before)


@each_layout
def test_bfloat16_is_shsa_and_the_projection_of_pytorch(layout):
    call = mixer_train_call(Case(dtype=torch.bfloat16, bias=False, layout=layout, P=8, D=4, N=16, B=1, beyond=3))
    settings = (4, 1e-5, 1e-5, 1e-5, 0.5, True)
    result = cpu.mixer_train(*call.inputs.values(), *settings, *NOTHING_RUNNING)
    expected = eager.mixer_train(*call.inputs.values(), *settings, *NOTHING_RUNNING)
    assert result.dtype == torch.bfloat16 and result.stride() == call.inputs["x"].stride()
    torch.testing.assert_close(result, expected, rtol=0.1, atol=0.1)


@each_layout
def test_parameters_of_another_type(layout):
    """They are read in the type of x, and their gradients come in their own."""
    call = mixer_train_call(Case(P=8, D=4, N=16, B=3, beyond=3, layout=layout))
    for name in call.inputs.keys() - {"x"}:
        call.inputs[name] = call.inputs[name].bfloat16()
    assert_near_eager(call, tolerance=2**-7)


# The layer


CHANGES = {
    "plain": (lambda layer: None, True),
    "channels_last": (lambda layer: layer.to(memory_format=torch.channels_last), True),
    "float64": (lambda layer: layer.double(), True),
    "untracked": (lambda layer: setattr(layer.proj[1].bn, "track_running_stats", False), True),
    "momentum_none": (lambda layer: setattr(layer.proj[1].bn, "momentum", None), True),
    "evaluation": (lambda layer: layer.eval(), False),
    "frozen_last_norm": (lambda layer: layer.proj[1].bn.eval(), False),
    "frozen_first_norm": (lambda layer: layer.qkv.bn.eval(), False),
    "bfloat16": (lambda layer: layer.bfloat16(), False),
    "hook": (lambda layer: layer.proj[1].c.register_forward_hook(lambda *_: None), False),
    "more_modules": (lambda layer: layer.proj.append(torch.nn.Tanh()), False),
    "other_activation": (lambda layer: layer.proj.__setitem__(0, torch.nn.GELU()), False),
    "bias": (lambda layer: setattr(layer.proj[1].c, "bias", torch.nn.Parameter(torch.zeros(24))), False),
    "other_width": (lambda layer: layer.proj.__setitem__(1, type(layer.proj[1])(24, 8)), False),
}


@pytest.mark.parametrize("change, taken", CHANGES.values(), ids=CHANGES)
def test_layer_takes_it_where_everything_is_stock(change, taken):
    layer = SHSA(24, 4, 10)
    change(layer)
    x = torch.randn(2, 24, 5, 5, dtype=layer.proj[1].c.weight.dtype)
    assert ("shvit_kernels::mixer_train_forward" in operators_called(layer, x)) == taken


def test_layer_leaves_autocast_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.is_autocast(torch.randn(1))
        assert "shvit_kernels::mixer_train_forward" not in operators_called(SHSA(24, 4, 10), torch.randn(2, 24, 5, 5))


@each_layout
def test_residual_of_the_layer(layout):
    torch.manual_seed(0)
    layer = SHSA(24, 4, 10, dtype=torch.float64)
    torch.nn.init.uniform_(layer.proj[1].bn.weight, 0.5, 1.5)
    x = mixer_train_call(Case(P=10, beyond=14, N=16, B=3, dtype=torch.float64, layout=layout)).inputs["x"]
    torch.testing.assert_close(layer.with_residual(x), x + layer(x), rtol=1e-12, atol=1e-12)
    handle = layer.register_forward_hook(lambda *arguments: 2 * arguments[-1])
    doubled = layer.with_residual(x)
    handle.remove()
    torch.testing.assert_close(doubled, x + 2 * layer(x), rtol=1e-12, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(layer.with_residual(x), x + layer(x), rtol=1e-12, atol=1e-12)


@each_layout
@each_residual
def test_the_result_can_be_modified_in_place(residual, layout):
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(2, 20, 3, 3).contiguous(memory_format=format).requires_grad_()
    layer = randomise(SHSA(20, 3, 7), seed=1).train()
    run = layer.with_residual if residual else layer
    (expected,) = torch.autograd.grad(run(x).relu().square().sum(), x)
    (dx,) = torch.autograd.grad(run(x).relu_().square().sum(), x)
    assert torch.equal(dx, expected)
