"""``functional.partial_moments`` of the compiled backend against the specification (design section 6)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shvit_kernels import functional
from tests.support import exact
from tests.support import native as native_tier
from tests.support.cases import CORNERS, Case, covering_set, moments_call, named
from tests.support.numerics import assert_parity, expect, filled_with_nan, largest

pytestmark = native_tier.needs_native

BACKEND = "cpu"
# What moments do not have is held at its plainest value.
PLAIN = {"D": (16,), "bias": (True,), "relu": (True,), "needs": ("all", "x", "parameters")}
COVER = named(covering_set(**PLAIN))
SMALL_COVER = named(
    covering_set(**PLAIN, N=(1, 16, 49, 64, 257), B=(1, 2), dtype=(torch.float32, torch.bfloat16), strides=("dense",))
)


def check(case: Case) -> None:
    call = moments_call(case)
    expected = expect(call, exact.of_moments)
    with torch.no_grad():
        forward = call.run(BACKEND, ())
    trained = call.run(BACKEND, case.needed)
    for results in (forward, trained):
        assert_parity(results, expected)
        assert torch.equal(results["cov"], results["cov"].t())


def by_name(cases: dict[str, Case]) -> list:
    return [pytest.param(case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize("case", by_name(COVER))
def test_parity(case):
    check(case)


@pytest.mark.parametrize("case", by_name(CORNERS))
def test_parity_at_corners(case):
    check(case)


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("case", by_name(SMALL_COVER | CORNERS))
def test_parity_of_every_variant(case, variant):
    with native_tier.instruction_set(variant):
        check(case)


def moments(x: Tensor, *, pdim: int, backend: str = BACKEND) -> tuple[Tensor, Tensor]:
    _, mean, cov = functional.partial_moments(x, None, None, pdim=pdim, backend=backend)
    return mean, cov


def test_count_is_the_number_of_tokens():
    for B, H, W in ((2, 3, 5), (0, 3, 5), (1, 1, 1)):
        count, mean, cov = functional.partial_moments(torch.randn(B, 4, H, W), None, None, pdim=3, backend=BACKEND)
        assert count == B * H * W
        assert mean.shape == (3,) and cov.shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_are_at_least_float32(dtype):
    mean, cov = moments(torch.randn(2, 5, 4, 4, dtype=dtype), pdim=4)
    assert mean.dtype == cov.dtype == torch.promote_types(dtype, torch.float32)


def test_empty_batch_gives_zeros():
    results = moments_call(Case(B=0)).run(BACKEND)
    assert all(not t.any() for t in results.values())


def test_one_token_has_no_covariance():
    for norm in ("affine", "none"):
        results = moments_call(Case(B=1, N=1, norm=norm)).run(BACKEND)
        assert not results["cov"].any()
        assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("N, B", [(1, 2), (16, 2), (1, 17)])
def test_fewer_tokens_than_channels(N, B):
    """The covariance is singular: no direction has a negative variance beyond rounding."""
    case = Case(P=96, N=N, B=B)
    check(case)
    cov = moments_call(case).run(BACKEND, ())["cov"].double()
    assert torch.linalg.eigvalsh(cov).min() >= -1e-5 * largest(cov)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("N", [49, 1050])
@pytest.mark.parametrize("offset", [1e2, 1e4, -3e5])
def test_large_offsets_do_not_cancel(offset, N, layout):
    """Deviations of about 1 around means of thousands, another in every channel."""
    call = moments_call(Case(P=9, B=3, N=N, layout=layout, norm="none"))
    call.inputs["x"] += offset * torch.linspace(1, 2, 46)[:, None, None]
    assert_parity(call.run(BACKEND, ()), expect(call, exact.of_moments))


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_group_norm_of_large_offsets_does_not_cancel(offset):
    case = Case(P=12, N=196)
    call = moments_call(case)
    call.inputs["x"] += offset
    assert_parity(call.run(BACKEND), expect(call, exact.of_moments))


def test_offset_of_one_image():
    """Images around different means: the covariance between images is not lost."""
    for norm in ("none", "affine"):
        call = moments_call(Case(P=12, B=17, N=16, norm=norm))
        call.inputs["x"] += 100 * torch.arange(17.0)[:, None, None, None]
        assert_parity(call.run(BACKEND), expect(call, exact.of_moments))


@pytest.mark.parametrize("norm", ["affine", "none"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gives_the_batch_statistics_of_a_projection(layout, norm):
    """Mean and variance that torch.nn.functional.batch_norm takes of a projection, and the gradients through them."""
    case = Case(P=20, D=8, B=3, dtype=torch.float64, layout=layout, norm=norm)
    inputs = {k: t for k, t in moments_call(case).inputs.items() if t is not None}
    weight = torch.randn(36, 20, dtype=torch.float64)
    target = torch.randn(2, 36, dtype=torch.float64)

    def grads(statistics) -> list[Tensor]:
        leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
        w = weight.detach().requires_grad_()
        mean, variance = statistics(w, **leaves)
        loss = (mean * target[0] + variance * target[1]).sum()
        return [mean, variance, *torch.autograd.grad(loss, [w, *leaves.values()])]

    def from_moments(w, x, norm_weight=None, norm_bias=None):
        _, mean, cov = functional.partial_moments(x, norm_weight, norm_bias, pdim=20, backend=BACKEND)
        return w @ mean, (w @ cov * w).sum(1)

    def from_projection(w, x, norm_weight=None, norm_bias=None):
        z = x[:, :20] if norm_weight is None else F.group_norm(x[:, :20], 1, norm_weight, norm_bias)
        projected = F.conv2d(z, w[:, :, None, None])
        variance, mean = torch.var_mean(projected, (0, 2, 3), correction=0)
        running_mean, running_var = torch.zeros_like(mean), torch.zeros_like(mean)
        with torch.no_grad():
            F.batch_norm(projected, running_mean, running_var, training=True, momentum=1.0)
        count = projected.numel() / projected.shape[1]
        torch.testing.assert_close(mean, running_mean)
        torch.testing.assert_close(variance * count / (count - 1), running_var)
        return mean, variance

    for mine, true in zip(grads(from_moments), grads(from_projection), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def test_gradient_of_one_output_alone():
    for name in ("mean", "cov"):
        call = moments_call(Case(P=20, B=3))
        both = call.map(lambda k, t, name=name: torch.zeros_like(t) if k in {"mean", "cov"} - {name} else t).run(
            BACKEND
        )

        def only(x, name=name, function=call.function, **rest):
            return {name: function(x=x, **rest)[name]}

        alone = replace(call, function=only, upstream={name: call.upstream[name]}).run(BACKEND)
        for k in ("dx", "dnorm_weight", "dnorm_bias"):
            torch.testing.assert_close(alone[k], both[k], rtol=1e-5, atol=1e-6)


def test_expanded_and_transposed_gradients():
    """The gradient of a sum is expanded, that of a transposed covariance transposed."""
    call = moments_call(Case(P=20))
    for change in (lambda d: torch.ones(()).expand(20, 20), lambda d: d.t()):
        call.upstream["cov"] = change(call.upstream["cov"])
        assert_parity(call.run(BACKEND), expect(call, exact.of_moments))


@pytest.mark.parametrize("norm", ["affine", "none"])
def test_operator_computes_what_is_asked_for_and_nothing_else(norm):
    case = Case(P=20, N=16, norm=norm)
    call = moments_call(case)
    expected = expect(call, exact.of_moments)
    x, weight, bias = (call.inputs[k] for k in ("x", "norm_weight", "norm_bias"))
    mean, _, image_mean, image_rstd = torch.ops.shvit_kernels.partial_moments_forward_native(x, weight, bias, 20, 1e-5)
    names = ("dx", "dnorm_weight", "dnorm_bias")
    for needs in itertools.product([False, True], repeat=3):
        grads = torch.ops.shvit_kernels.partial_moments_backward_native(
            call.upstream["mean"],
            call.upstream["cov"],
            x[:, :20].contiguous(),
            mean,
            image_mean,
            image_rstd,
            weight,
            bias,
            x.shape[1],
            list(needs),
        )
        given = {k: g for k, g, need in zip(names, grads, needs, strict=True) if need and k in expected}
        assert all(g.shape == (0,) for k, g in zip(names, grads, strict=True) if k not in given)
        assert_parity(given, expected)


@pytest.mark.parametrize("norm", ["affine", "none"])
def test_non_finite_values_show(norm):
    """As the specification has them: the channel's own moments without norm, all of the image's with it."""
    for value in (math.nan, math.inf, -math.inf):
        call = moments_call(Case(P=20, B=3, norm=norm))
        call.inputs["x"][1, 3, 2, 2] = value
        results, specified = call.run(BACKEND, ()), call.run("eager", ())
        for k in results:
            assert torch.equal(results[k].isfinite(), specified[k].isfinite()), (k, value)


def test_channels_beyond_the_partial_ones_do_not_count():
    call = moments_call(Case(P=20))
    before = call.run(BACKEND)
    call.inputs["x"][:, 20:] = math.nan
    after = call.run(BACKEND)
    for k, t in before.items():
        assert torch.equal(t, after[k]), k
    assert not after["dx"][:, 20:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N", [(1, 1050), (17, 49), (64, 16)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_same_bits_for_any_number_of_threads_and_in_every_run(B, N, layout, dtype):
    native_tier.assert_same_bits(moments_call(Case(B=B, N=N, layout=layout, dtype=dtype)), BACKEND)


@pytest.mark.parametrize("case", by_name(CORNERS))
def test_same_bits_with_and_without_gradients(case):
    call = moments_call(case)
    plain, trained = call.run(BACKEND, ()), call.run(BACKEND, case.needed)
    assert all(torch.equal(trained[name], t) for name, t in plain.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_depends_on_uninitialised_memory(dtype):
    case = Case(P=75, N=49, B=3, dtype=dtype)
    with filled_with_nan():
        results = moments_call(case).run(BACKEND)
    assert_parity(results, expect(moments_call(case), exact.of_moments))
