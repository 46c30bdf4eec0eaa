"""Breaks attention on purpose and asserts that the parity tests then fail."""

import types
from functools import partial

import pytest
import torch
from torch import Tensor

from shvit_kernels import backends
from shvit_kernels.backends import eager
from tests import test_partial_moments, test_shsa, test_shsa_eval, test_shsa_layer
from tests.support import exact
from tests.support.cases import Case, moments_call, shsa_call
from tests.support.numerics import assert_parity, expect

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


EVALUATED = ("norm_weight", "norm_bias", "weight", "conv_bias", "bn_weight", "bn_bias", "bn_mean", "bn_var")


def keep(t: Tensor) -> Tensor:
    return t


def attend(knobs, x, norm_weight, norm_bias, qkv_weight, qkv_bias, qk_dim, norm_eps, scale, relu, *_):
    """Attention written out once more, rounded to the type of x at the end only; each knob breaks one thing."""
    wide = knobs.get("wide", torch.promote_types(x.dtype, torch.float32))
    x = knobs.get("input", keep)(x)
    weight, bias, g, b = (t if t is None else t.to(wide) for t in (qkv_weight, qkv_bias, norm_weight, norm_bias))
    P = qkv_weight.shape[1]
    z = x[:, :P].to(wide).contiguous().flatten(2)
    if g is not None:
        variance, mean = torch.var_mean(z, (1, 2), correction=knobs.get("correction", 0), keepdim=True)
        variance, mean = knobs.get("statistics", keep)(variance), knobs.get("statistics", keep)(mean)
        z = (z - mean) * (variance + norm_eps).rsqrt() * g[:, None]
        z = z if b is None else z + knobs.get("norm_bias", keep)(b[:, None])
    qkv = weight @ z
    qkv = qkv if bias is None else qkv + knobs.get("bias", keep)(bias[:, None])
    q, k, v = qkv.split([qk_dim, qk_dim, P], dim=1)
    q, k, v = knobs.get("order", lambda *qkv: qkv)(q, k, v)
    attn = knobs.get("softmax", lambda logits: logits.softmax(-1))(knobs.get("scale", keep)(scale) * (q.mT @ k))
    y1 = knobs.get("attended", keep)(v @ attn.mT)
    x2 = knobs.get("beyond", keep)(x[:, P:].flatten(2))
    y = knobs.get("result", keep)(torch.cat([y1.to(x.dtype), x2], dim=1))
    return (y if knobs.get("no_relu") or not relu else y.relu()).unflatten(2, x.shape[2:])


def moments(knobs, x, norm_weight, norm_bias, pdim, norm_eps):
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x[:, :pdim].to(wide).contiguous()
    if norm_weight is not None:
        variance, mean = torch.var_mean(z, (1, 2, 3), correction=0, keepdim=True)
        variance, mean = knobs.get("statistics", keep)(variance), knobs.get("statistics", keep)(mean)
        z = (z - mean) * (variance + norm_eps).rsqrt() * norm_weight.to(wide)[:, None, None]
        z = z if norm_bias is None else z + norm_bias.to(wide)[:, None, None]
    z = z.transpose(0, 1).flatten(1)
    mean = z.mean(1)
    if knobs.get("uncentred"):
        cov = z @ z.t() / z.shape[1] - mean[:, None] * mean
    else:
        centred = z - mean[:, None]
        cov = centred @ centred.t() / (z.shape[1] - knobs.get("correction", 0))
    cov = knobs.get("cov", keep)(cov)
    return knobs.get("mean", keep)(mean), (cov + cov.t()) / 2


def evaluate(knobs, x, *rest):
    """The specification's fold around the attention above; a knob breaks an argument."""
    given = dict(zip(EVALUATED, rest, strict=False))
    broken = [knobs.get(name, keep)(value) for name, value in given.items()]
    return eager.fold_and(partial(attend, knobs), x, *broken, *rest[len(EVALUATED) :])


@pytest.fixture
def stand_in(monkeypatch):
    """Puts the functions above in the place of the ``cpu`` backend, broken as told."""

    def put(**knobs) -> None:
        backend = types.SimpleNamespace(
            name="cpu",
            devices=("cpu",),
            why_not=lambda *_: None,
            shsa=partial(attend, knobs),
            partial_moments=partial(moments, knobs),
            shsa_eval=partial(evaluate, knobs),
        )
        monkeypatch.setattr(backends, "BACKENDS", {"cpu": backend, "eager": backends.BACKENDS["eager"]})

    return put


@each_dtype
def test_right_attention_passes(stand_in, dtype):
    stand_in()
    for norm in ("affine", "weight", "none"):
        test_shsa.check(Case(dtype=dtype, norm=norm))
        for batch_norm in test_shsa_eval.BATCH_NORMS:
            test_shsa_eval.check(Case(dtype=dtype, norm=norm), batch_norm)
        test_partial_moments.check(Case(dtype=dtype, norm=norm))


def one_wrong(t: Tensor) -> Tensor:
    """The largest of many values off by a thousandth."""
    wrong = torch.ones_like(t)
    wrong.view(-1)[t.detach().argmax()] = 1.001
    return t * wrong


def one_nan(t: Tensor) -> Tensor:
    nan = torch.zeros_like(t)
    nan.view(-1)[t.numel() // 2] = torch.nan
    return t + nan


# Wrong in every type.
GROSS = {
    "scale_left_out": {"scale": lambda scale: 1.0},
    "scale_squared": {"scale": lambda scale: scale**2},
    "softmax_replaced_by_the_mean": {"softmax": lambda a: torch.full_like(a, 1 / a.shape[-1]) + 0 * a},
    "softmax_replaced_by_sigmoid": {"softmax": torch.sigmoid},
    "softmax_over_queries": {"softmax": lambda a: a.softmax(-2)},
    "relu_left_out": {"no_relu": True},
    "relu_before_the_concatenation": {"no_relu": True, "attended": torch.relu},
    "other_channels_zeroed": {"beyond": lambda x2: x2 * 0},
    "other_channels_shifted": {"beyond": lambda x2: x2.roll(1, 1)},
    "query_and_key_swapped": {"order": lambda q, k, v: (k, q, v)},
    "norm_bias_left_out": {"norm_bias": lambda b: b * 0},
    "bias_left_out": {"bias": lambda b: b * 0},
    "tokens_shifted": {"attended": lambda y1: y1.roll(1, 2)},
    "not_a_number": {"result": one_nan},
    "no_gradient_through_queries": {"order": lambda q, k, v: (q.detach(), k, v)},
    "no_gradient_through_keys": {"order": lambda q, k, v: (q, k.detach(), v)},
    "no_gradient_through_values": {"order": lambda q, k, v: (q, k, v.detach())},
    "no_gradient_of_other_channels": {"beyond": Tensor.detach},
}
# Wrong by less than bfloat16 shows.
SUBTLE = {
    "scale_a_little_off": {"scale": lambda scale: 1.001 * scale},
    "unbiased_variance": {"correction": 1},
    "statistics_taken_as_constants": {"statistics": Tensor.detach},
    "one_value_a_little_off": {"result": one_wrong},
    "rounded_in_between": {"attended": lambda y1: y1.bfloat16().to(y1.dtype)},
    "probabilities_rounded": {"softmax": lambda a: a.softmax(-1).bfloat16().to(a.dtype)},
    "input_rounded": {"input": lambda x: x.bfloat16().to(x.dtype)},
}
BREAKS = [pytest.param(knobs, dtype, id=f"{name}-{dtype}") for name, knobs in GROSS.items() for dtype in DTYPES]
BREAKS += [pytest.param(knobs, dtype, id=f"{name}-{dtype}") for name, knobs in SUBTLE.items() for dtype in DTYPES[:2]]


@pytest.mark.parametrize("knobs, dtype", BREAKS)
def test_broken_attention_fails(stand_in, knobs, dtype):
    stand_in(**knobs)
    with pytest.raises(AssertionError, match="from the truth"):
        test_shsa.check(Case(dtype=dtype))


def test_float32_inside_float64_fails(stand_in):
    stand_in(wide=torch.float32)
    with pytest.raises(AssertionError, match="from the truth"):
        test_shsa.check(Case(dtype=torch.float64))


EVAL_BREAKS = {
    "scale_left_out": {"scale": lambda scale: 1.0},
    "convolution_bias_left_out": {"conv_bias": torch.zeros_like},
    "weight_left_out": {"bn_weight": torch.ones_like},
    "bias_left_out": {"bn_bias": torch.zeros_like},
    "mean_left_out": {"bn_mean": torch.zeros_like},
    "standard_deviation_as_variance": {"bn_var": torch.sqrt},
}


@each_dtype
@pytest.mark.parametrize("knobs", EVAL_BREAKS.values(), ids=EVAL_BREAKS.keys())
def test_broken_evaluation_fails(stand_in, knobs, dtype):
    stand_in(**knobs)
    with pytest.raises(AssertionError, match="from the truth"):
        test_shsa_eval.check(Case(dtype=dtype), "affine")


MOMENTS_BREAKS = {
    "unbiased_covariance": {"correction": 1},
    "statistics_taken_as_constants": {"statistics": Tensor.detach},
    "mean_a_little_off": {"mean": lambda mean: mean + 1e-5},
    "covariance_a_little_off": {"cov": one_wrong},
    "variances_only": {"cov": lambda cov: cov.diag().diag()},
    "no_gradient_of_the_mean": {"mean": lambda mean: mean.detach() + 0 * mean},
    "no_gradient_of_the_covariance": {"cov": lambda cov: cov.detach() + 0 * cov},
}


@each_dtype
@pytest.mark.parametrize("knobs", MOMENTS_BREAKS.values(), ids=MOMENTS_BREAKS.keys())
def test_broken_moments_fail(stand_in, knobs, dtype):
    stand_in(**knobs)
    with pytest.raises(AssertionError):
        test_partial_moments.check(Case(dtype=dtype))


def test_uncentred_moments_fail(stand_in):
    stand_in(uncentred=True)
    with pytest.raises(AssertionError):
        test_partial_moments.test_large_offsets_do_not_cancel(1e4, 49, "nchw")


LAYER_BREAKS = {
    "scale": lambda layer: setattr(layer, "scale", 1.001 * layer.scale),
    "norm_eps": lambda layer: setattr(layer.pre_norm, "eps", 2e-5),
    "batch_norm_eps": lambda layer: setattr(layer.qkv.bn, "eps", 2e-5),
    "momentum": lambda layer: setattr(layer.qkv.bn, "momentum", 0.1001),
    "weight": lambda layer: layer.qkv.c.weight.data.mul_(1.0001),
    "norm_bias": lambda layer: layer.pre_norm.bias.data.zero_(),
    "running_mean": lambda layer: layer.qkv.bn.running_mean.add_(1e-6),
    "frozen": lambda layer: layer.qkv.bn.requires_grad_(False),
}


@pytest.mark.parametrize("change", LAYER_BREAKS.values(), ids=LAYER_BREAKS.keys())
def test_changed_layer_fails(change):
    ours, theirs = test_shsa_layer.pair()
    change(ours)
    with pytest.raises((AssertionError, AttributeError)):
        test_shsa_layer.assert_same(ours, theirs)


def test_helper_refuses_other_shapes_and_types():
    call = shsa_call(Case())
    results, expected = call.run("eager"), expect(call)
    assert_parity(results, expected)
    for name in results:
        with pytest.raises(AssertionError, match=f"{name} has shape"):
            assert_parity(results | {name: results[name][None]}, expected)
        with pytest.raises(AssertionError, match=f"{name} is torch.float64"):
            assert_parity(results | {name: results[name].double()}, expected)


def test_eager_itself_is_within_its_bound():
    for dtype in DTYPES:
        for call in (shsa_call(Case(dtype=dtype)), shsa_call(Case(dtype=dtype, B=0))):
            assert_parity(call.run("eager"), expect(call))
        call = moments_call(Case(dtype=dtype))
        assert_parity(call.run("eager"), expect(call, exact.of_moments))
