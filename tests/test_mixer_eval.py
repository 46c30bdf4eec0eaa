"""``mixer_eval``: a whole layer in evaluation as one operator, against the specification (design section 6)."""

import itertools

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from shvit_kernels import SHSA, use_backend
from shvit_kernels._randomise import randomise
from shvit_kernels.backends import cpu, eager
from shvit_kernels.stock import StockSHSA
from tests.support import native as native_tier
from tests.support.cases import BATCH_NORMS, CORNERS, STRIDES, Case, covering_set, mixer_eval_call, named
from tests.support.numerics import Call, assert_parity, assert_same_non_finite, expect
from tests.support.operators import operators_called

pytestmark = native_tier.needs_native

BACKEND = "cpu"
OPERATOR = torch.ops.shvit_kernels.mixer_eval.default
PLAIN = {"autocast": (False,), "relu": (True,), "needs": ("all",), "dtype": (torch.float32, torch.float64)}
COVER = named(covering_set(**PLAIN, P=(48, 7, 66, 75), D=(16, 1, 24), N=(1, 16, 49, 64, 257), B=(2, 0, 1, 17)))
SMALL_COVER = named(covering_set(**PLAIN, P=(48, 7, 75), D=(16, 1), N=(1, 16, 49, 257), B=(1, 2), strides=("dense",)))
SOME_CORNERS = {
    name: case
    for name, case in CORNERS.items()
    if case.N <= 1050 and not case.autocast and case.dtype != torch.bfloat16 and case.relu
}
PAIRS = list(itertools.product(BATCH_NORMS, BATCH_NORMS))

each_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])
each_residual = pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_pair = pytest.mark.parametrize("batch_norm, proj_batch_norm", PAIRS, ids="-".join)


def in_turn(cases: dict[str, Case]) -> list:
    """Every case with one pair of batch normalisations, each of them in its turn."""
    turns = zip(cases.items(), itertools.cycle(PAIRS), strict=False)
    return [pytest.param(case, pair, id=f"{name}-{'-'.join(pair)}") for (name, case), pair in turns]


def check(call: Call) -> None:
    assert_parity(call.run(BACKEND, ()), expect(call))


@pytest.mark.parametrize("case, pair", in_turn(COVER | SOME_CORNERS))
def test_parity(case, pair):
    check(mixer_eval_call(case, *pair))


@each_pair
@each_residual
@each_layout
@each_dtype
@pytest.mark.parametrize("N", [49, 257])
def test_parity_of_every_fold(N, dtype, layout, residual, batch_norm, proj_batch_norm):
    check(mixer_eval_call(Case(N=N, dtype=dtype, layout=layout), batch_norm, proj_batch_norm, residual))


@pytest.mark.parametrize("variant", native_tier.each_variant(native_tier.PROJECTION_VARIANTS))
@pytest.mark.parametrize("case, pair", in_turn(SMALL_COVER))
def test_parity_of_every_variant(case, pair, variant):
    with native_tier.instruction_set(variant):
        check(mixer_eval_call(case, *pair))


@pytest.mark.parametrize("variant", native_tier.each_variant(native_tier.PROJECTION_VARIANTS))
@each_layout
@each_residual
@pytest.mark.parametrize(
    "N, B, P, beyond", [(1, 17, 7, 0), (1, 2, 5, 13), (2, 1, 1, 36), (130, 3, 5, 27), (49, 5, 33, 1), (56, 1, 3, 90)]
)
def test_float64_is_the_specification(N, B, P, beyond, residual, layout, variant):
    """Few tokens, tokens that end in the middle of a vector or a block, widths that end in the middle of a panel; each
    norm with its own eps."""
    case = Case(N=N, B=B, P=P, D=3, beyond=beyond, dtype=torch.float64, layout=layout)
    call = mixer_eval_call(case, residual=residual, epsilons=(0.5, 0.3, 0.1))
    with native_tier.instruction_set(variant):
        y = call.run(BACKEND, ())["y"]
    torch.testing.assert_close(y, call.run("eager", ())["y"], rtol=1e-9, atol=1e-9)


def test_specification_is_the_stock_layer():
    layer = randomise(StockSHSA(24, 4, 10), seed=1).double().eval()
    x = torch.randn(2, 24, 5, 4, dtype=torch.float64)
    qkv, proj, norm = layer.qkv, layer.proj[1], layer.pre_norm
    parameters = [norm.weight, norm.bias]
    for pair in (qkv, proj):
        parameters += [pair.c.weight, None, pair.bn.weight, pair.bn.bias, pair.bn.running_mean, pair.bn.running_var]
    y = eager.mixer_eval(x, *parameters, 4, 1e-5, 1e-5, 1e-5, 0.5, False)
    torch.testing.assert_close(y, layer(x), rtol=1e-10, atol=1e-10)


@each_dtype
@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES.keys())
def test_strange_strides_of_parameters(change, dtype):
    call = mixer_eval_call(Case(dtype=dtype)).map(lambda k, t: t if k in ("x", "y") else change(t))
    for needs in ((), None):
        assert_parity(call.run(BACKEND, needs), expect(call))


@each_layout
@pytest.mark.parametrize("needs", [None, "x", "proj_weight", "weight", "proj_bn_mean"])
def test_gradients_go_through_eager(needs, layout):
    call = mixer_eval_call(Case(N=16, B=3, dtype=torch.float64, layout=layout))
    results = call.run(BACKEND, None if needs is None else (needs,))
    assert set(results) == {"y", *(f"d{k}" for k in call.inputs if needs in (None, k))}
    assert_parity(results, expect(call))


@each_layout
def test_bfloat16_is_shsa_and_the_projection_of_pytorch(layout):
    call = mixer_eval_call(Case(dtype=torch.bfloat16, layout=layout))
    assert call.run(BACKEND, ())["y"].dtype == torch.bfloat16
    check(call)


@each_dtype
@pytest.mark.parametrize("B, N", [(1, 1050), (1, 49), (5, 49), (17, 16)])
@each_layout
def test_same_bits_for_any_number_of_threads_and_in_every_run(B, N, layout, dtype):
    call = mixer_eval_call(Case(B=B, N=N, layout=layout, dtype=dtype))
    runs = []
    for count in (1, 1, 2, 3, 64):
        with native_tier.threads(count):
            runs.append(call.run(BACKEND, ())["y"])
    for y in runs[1:]:
        assert torch.equal(y, runs[0])


@each_layout
def test_output_keeps_the_memory_format(layout):
    call = mixer_eval_call(Case(layout=layout))
    assert call.run(BACKEND, ())["y"].stride() == call.inputs["x"].stride()


@each_layout
def test_a_nan_stays_in_its_image(layout):
    call = mixer_eval_call(Case(P=10, B=3, N=49, layout=layout))
    for channel, poisoned in ((3, 49), (12, 1)):  # through attention into all tokens of the image, or not
        inputs = {k: t if t is None else t.clone() for k, t in call.inputs.items()}
        inputs["x"][1, channel, 2, 3] = torch.nan
        y = call.function(**inputs, backend=BACKEND)["y"]
        assert y.isnan().sum() == poisoned * y.shape[1] and y[1].isnan().any()


@pytest.mark.parametrize("variant", native_tier.each_variant(native_tier.PAIRED_VARIANTS))
@each_layout
@pytest.mark.parametrize("name, value", [("x", float("inf")), ("x", float("nan")), ("proj_weight", float("nan"))])
def test_what_is_not_finite_stays_where_the_specification_has_it(name, value, layout, variant):
    call = mixer_eval_call(Case(P=10, B=2, N=257, beyond=22, layout=layout))
    poisoned = call.inputs[name]
    if name == "x":
        poisoned[1, 12].view(-1)[130] = value
    else:
        poisoned[12, 5] = value
    with native_tier.instruction_set(variant):
        y = call.run(BACKEND, ())["y"]
    assert_same_non_finite(y, call.run("eager", ())["y"])
    assert 0 < y.isfinite().sum() < y.numel()


def arguments(case: Case, *pair: str) -> tuple:
    return *mixer_eval_call(case, *pair).inputs.values(), case.D, 1e-5, 1e-5, 1e-5, 0.5, True


@each_dtype
@each_layout
@pytest.mark.parametrize(
    "options, batch_norm",
    [
        ({}, "affine"),
        ({"norm": "weight", "bias": False}, "not_affine"),
        ({"norm": "none"}, "none"),
        ({"B": 0}, "affine"),
        ({"B": 1, "N": 1}, "affine"),
        ({"N": 257}, "affine"),
    ],
    ids=["everything", "no_biases", "no_norms", "no_images", "one_token", "long"],
)
def test_opcheck(options, batch_norm, layout, dtype):
    case = Case(**{"P": 10, "D": 3, "N": 16, "beyond": 4, "layout": layout, "dtype": dtype} | options)
    torch.library.opcheck(OPERATOR, arguments(case, batch_norm, batch_norm))


@pytest.mark.parametrize("rows", [-1, 1], ids=["one_row_too_few", "one_row_too_many"])
def test_parameters_of_another_size_are_refused(rows):
    given = arguments(Case(P=10, D=3, N=16, beyond=4))
    for i, argument in enumerate(OPERATOR._schema.arguments):
        if not isinstance(given[i], torch.Tensor) or argument.name == "x":
            continue
        wrong = given[i].new_ones(given[i].shape[0] + rows, *given[i].shape[1:])
        message = f"{argument.name} must have {given[i].numel()} values, got {wrong.numel()}"
        with pytest.raises(RuntimeError, match=message):
            OPERATOR(*given[:i], wrong, *given[i + 1 :])


@pytest.mark.parametrize("prefix", ["", "proj_"])
def test_half_of_the_statistics_is_refused(prefix):
    given = list(arguments(Case(P=10, D=3, N=16, beyond=4)))
    given[[argument.name for argument in OPERATOR._schema.arguments].index(f"{prefix}bn_var")] = None
    with pytest.raises(RuntimeError, match=f"{prefix}bn_mean and {prefix}bn_var must be given together"):
        OPERATOR(*given)


def test_other_types_are_refused():
    given = arguments(Case(P=10, D=3, N=16, beyond=4))
    with pytest.raises(RuntimeError, match="float32 and float64"):
        OPERATOR(given[0].bfloat16(), *given[1:])


# The layer


def fuse_convolutions(layer: torch.nn.Module, qkv: bool) -> None:
    layer.proj[1] = layer.proj[1].fuse()
    if qkv:
        layer.qkv = layer.qkv.fuse()


CHANGES = {
    "plain": (lambda layer: None, True),
    "channels_last": (lambda layer: layer.to(memory_format=torch.channels_last), True),
    "float64": (lambda layer: layer.double(), True),
    "fused": (lambda layer: fuse_convolutions(layer, qkv=True), True),
    "fused_projection": (lambda layer: fuse_convolutions(layer, qkv=False), True),
    "training_with_frozen_norms": (lambda layer: [layer.train(), layer.qkv.bn.eval(), layer.proj[1].bn.eval()], True),
    "not_affine": (lambda layer: [setattr(layer.proj[1].bn, k, None) for k in ("weight", "bias")], True),
    "batch_statistics": (lambda layer: layer.qkv.bn.train(), False),
    "batch_statistics_of_the_last": (lambda layer: layer.proj[1].bn.train(), False),
    "bfloat16": (lambda layer: layer.bfloat16(), False),
    "hook": (lambda layer: layer.proj[1].c.register_forward_hook(lambda *_: None), False),
    "more_modules": (lambda layer: layer.proj.append(torch.nn.Tanh()), False),
    "other_activation": (lambda layer: layer.proj.__setitem__(0, torch.nn.GELU()), False),
    "other_width": (lambda layer: layer.proj.__setitem__(1, type(layer.proj[1])(24, 8).eval()), False),
}


@pytest.mark.parametrize("change, taken", CHANGES.values(), ids=CHANGES)
def test_layer_takes_it_where_everything_is_stock(change, taken):
    layer, stock = (randomise(cls(24, 4, 10), seed=1).eval() for cls in (SHSA, StockSHSA))
    change(layer)
    change(stock)
    stock.load_state_dict(layer.state_dict())
    x = torch.randn(2, 24, 5, 5, dtype=layer.pre_norm.weight.dtype)
    with torch.no_grad():
        assert ("shvit_kernels::mixer_eval" in operators_called(layer, x)) == taken
        tolerance = 0.1 if x.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(layer(x), stock(x), rtol=tolerance, atol=tolerance)


def both_layers() -> tuple[SHSA, StockSHSA]:
    return tuple(randomise(cls(24, 4, 10), seed=1).eval().requires_grad_(False) for cls in (SHSA, StockSHSA))


def under_transforms(layer: torch.nn.Module, name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """Of a layer whose parameter of this name is transformed."""
    parameter = dict(layer.named_parameters())[name]
    several = torch.stack([parameter, 2 * parameter])

    def of(p: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, {name: p}, (x,))

    return [
        vmap(of)(several),
        grad(lambda p: vmap(of)(p).sin().sum())(several),
        grad(lambda a: grad(lambda b: (of(parameter * a) * b).sum())(torch.tensor(2.0)))(torch.tensor(1.3)),
        jvp(of, (parameter,), (parameter.flip(0),))[1],
        torch.autograd.grad(vmap(of)(leaf := several.clone().requires_grad_()).sin().sum(), leaf)[0],
    ]


@pytest.mark.parametrize("name", ["pre_norm.weight", "qkv.c.weight", "proj.1.c.weight", "proj.1.bn.bias"])
def test_transforms_of_torch_func(name):
    x = torch.randn(2, 24, 5, 5)
    ours, stock = (under_transforms(layer, name, x) for layer in both_layers())
    for result, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", [lambda f: f, lambda f: lambda x: grad(lambda x: f(x).sum())(x)])
def test_a_named_backend_refuses_the_transforms_of_torch_func(transform):
    layer, _ = both_layers()
    with use_backend(BACKEND), pytest.raises(RuntimeError, match="setup_context"):
        transform(vmap(layer))(torch.randn(3, 2, 24, 5, 5))


class Scaled(torch.Tensor):
    """A weight that convolutions see doubled."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.nn.functional.conv2d or function is torch.conv2d:
                args = (args[0], 2 * args[1].as_subclass(torch.Tensor), *args[2:])
            return function(*args, **(kwargs or {}))


def statistics_no_buffers(layer: torch.nn.Module) -> None:
    for bn in (layer.qkv.bn, layer.proj[1].bn):
        mean = bn.running_mean
        del bn.running_mean
        bn.running_mean = mean


def scaled_weight(layer: torch.nn.Module) -> None:
    conv = layer.proj[1].c
    del conv.weight
    conv.weight = torch.randn(24, 24, 1, 1, generator=torch.Generator().manual_seed(1)).as_subclass(Scaled)


@pytest.mark.parametrize("change", [statistics_no_buffers, scaled_weight])
def test_changed_layers_stay_the_stock_ones(change):
    ours, stock = both_layers()
    change(ours)
    change(stock)
    x = torch.randn(2, 24, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)


REFUSED = {
    "float64_norm": lambda pair: pair.bn.double(),
    "short_norm": lambda pair: setattr(pair.bn, "running_mean", torch.zeros(5)),
    "square_norm": lambda pair: setattr(pair.bn, "running_var", torch.ones(24, 24)),
    "no_variance": lambda pair: setattr(pair.bn, "running_var", None),
    "negative_eps": lambda pair: setattr(pair.bn, "eps", -10.0),
    "float64_bias": lambda pair: setattr(pair.c, "bias", torch.nn.Parameter(torch.zeros(24, dtype=torch.float64))),
    "square_bias": lambda pair: setattr(pair.c, "bias", torch.nn.Parameter(torch.zeros(4, 6))),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_pytorch_refuses_of_the_last_projection_gives_its_error(change):
    errors = []
    for layer in both_layers():
        change(layer.proj[1])
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as caught:
            layer(torch.randn(2, 24, 5, 5))
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "shvit" not in errors[0]


def test_layer_leaves_gradients_and_autocast_alone():
    layer, x = SHSA(24, 4, 10).eval(), torch.randn(2, 24, 5, 5)
    assert "shvit_kernels::mixer_eval" not in operators_called(layer, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert "shvit_kernels::mixer_eval" not in operators_called(layer, x)
    layer.requires_grad_(False)
    assert "shvit_kernels::mixer_eval" in operators_called(layer, x)
    assert "shvit_kernels::mixer_eval" not in operators_called(layer, x.requires_grad_())


@each_layout
def test_residual_of_the_layer(layout):
    layer = randomise(SHSA(24, 4, 10), seed=1).double().eval()
    x = mixer_eval_call(Case(P=10, beyond=14, N=16, B=3, dtype=torch.float64, layout=layout)).inputs["x"]
    with torch.no_grad():
        assert "shvit_kernels::mixer_eval" in operators_called(layer.with_residual, x)
        torch.testing.assert_close(layer.with_residual(x), x + layer(x), rtol=1e-12, atol=1e-12)


def test_shsa_mixer_is_the_same_operator():
    given = arguments(Case(), "none", "none")
    x, norm_weight, norm_bias, weight, bias = given[:5]
    proj_weight, proj_bias = given[9:11]
    y = cpu.shsa_mixer(x, norm_weight, norm_bias, weight, bias, proj_weight, proj_bias, 16, 1e-5, 0.5, False, False)
    assert torch.equal(y, OPERATOR(*given))
