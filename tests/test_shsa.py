"""``functional.shsa`` of the compiled backend against the specification (design section 6)."""

import itertools
import math

import pytest
import torch

from shvit_kernels.backends import native
from tests.support import native as native_tier
from tests.support.cases import CORNERS, Case, covering_set, generator, named, shsa_call
from tests.support.numerics import (
    assert_parity,
    assert_same_non_finite,
    expect,
    filled_with_nan,
    largest,
    unit_roundoff,
)

pytestmark = native_tier.needs_native

BACKEND = "cpu"
COVER = named(covering_set())
# Every variant runs a smaller set: many tokens differ in the number of blocks only.
SHORT_CORNERS = {name: case for name, case in CORNERS.items() if case.N <= 1050}
SMALL_COVER = named(
    covering_set(N=(1, 16, 49, 64, 257), B=(1, 2), layout=("nchw", "channels_last"), strides=("dense",))
)


def by_name(cases: dict[str, Case]) -> list:
    return [pytest.param(case, id=name) for name, case in cases.items()]


def check(case: Case, **changes) -> None:
    """Forward without gradients, then forward and backward for the inputs that the case names."""
    call = shsa_call(case, **changes)
    expected = expect(call)
    with torch.no_grad():
        forward = call.run(BACKEND, ())
    trained = call.run(BACKEND, case.needed)
    assert_parity(forward, expected)
    assert_parity(trained, expected)


def test_covering_set_covers():
    assert 80 <= len(COVER) <= 400
    assert all(case.B * case.N**2 <= 2**25 for case in COVER.values())
    seen = {(case.P, case.D) for case in COVER.values() if case.B}
    assert seen == set(itertools.product((1, 7, 32, 48, 66, 68, 75, 96, 130), (1, 8, 16, 24, 64)))
    assert {(case.strides, case.layout, case.dtype) for case in COVER.values() if case.B} >= {
        ("expanded", "nchw", torch.float32),
        ("sliced", "channels_last", torch.float32),
    }


@pytest.mark.parametrize("case", by_name(COVER))
def test_parity(case):
    check(case)


@pytest.mark.parametrize("case", by_name(CORNERS))
def test_parity_at_corners(case):
    check(case)


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("case", by_name(SMALL_COVER | SHORT_CORNERS))
def test_parity_of_every_variant(case, variant):
    with native_tier.instruction_set(variant):
        check(case)


def test_every_variant_is_known():
    assert set(native.instruction_sets()) <= set(native_tier.ALL_VARIANTS)
    assert native.instruction_set() in native.instruction_sets()


def test_unknown_instruction_set_is_refused():
    before = native.instruction_set()
    with pytest.raises(RuntimeError, match="mmx"):
        torch.ops.shvit_kernels_native.set_instruction_set("mmx")
    assert native.instruction_set() == before


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale(scale, dtype):
    check(Case(dtype=dtype), scale=scale)


@pytest.mark.parametrize("norm_eps", [0.0, 1e-12, 0.1])
def test_norm_eps(norm_eps):
    check(Case(), norm_eps=norm_eps)


def test_default_scale_is_the_root_of_the_query_width():
    call = shsa_call(Case())
    explicit = shsa_call(Case(), scale=16**-0.5)
    assert torch.equal(call.run(BACKEND, ())["y"], explicit.run(BACKEND, ())["y"])


STRANGE_STRIDES = {
    "expanded_channels": lambda: torch.randn(2, 1, 7, 7).expand(2, 20, 7, 7),
    "expanded_tokens": lambda: torch.randn(2, 20, 1, 1).expand(2, 20, 7, 7),
    "every_second_channel": lambda: torch.randn(2, 40, 7, 7)[:, ::2],
    "every_second_row": lambda: torch.randn(2, 20, 14, 7)[:, :, ::2],
    "width_before_height": lambda: torch.randn(2, 20, 5, 7).transpose(2, 3),
    "offset_storage": lambda: torch.randn(3, 20, 7, 7)[1:],
    "one_image_of_channels_last": lambda: torch.randn(3, 7, 7, 20).permute(0, 3, 1, 2)[1:2],
    "unit_stride_of_one_channel": lambda: torch.randn(2, 1, 7, 7).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("make", STRANGE_STRIDES.values(), ids=STRANGE_STRIDES.keys())
def test_strange_strides(make):
    torch.manual_seed(0)
    x = make()
    P = min(12, x.shape[1])
    call = shsa_call(Case(P=P, D=4, N=x.shape[2] * x.shape[3], beyond=x.shape[1] - P))
    call.inputs["x"] = x
    call.upstream["y"] = torch.randn(x.shape)
    assert_parity(call.run(BACKEND), expect(call))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradient_of_any_strides(layout):
    """The gradient that arrives may be expanded (from a sum) or of the other memory format."""
    for change in (
        lambda dy: torch.ones(()).expand(dy.shape),
        lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        call = shsa_call(Case(layout=layout))
        call.upstream["y"] = change(call.upstream["y"])
        assert_parity(call.run(BACKEND), expect(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
def test_output_keeps_the_memory_format(dtype, relu):
    for layout, memory_format in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        for strides in ("dense", "sliced"):
            case = Case(layout=layout, strides=strides, dtype=dtype, relu=relu)
            for name, t in shsa_call(case).run(BACKEND, ("x",)).items():
                assert t.is_contiguous(memory_format=memory_format), f"{name} of {case}"


def test_input_is_left_as_it_was():
    call = shsa_call(Case())
    before = {k: t.clone() for k, t in call.inputs.items()} | {"dy": call.upstream["y"].clone()}
    call.run(BACKEND)
    for k, t in (call.inputs | {"dy": call.upstream["y"]}).items():
        assert torch.equal(t, before[k]), k


def test_channels_beyond_the_partial_ones_pass_through():
    case = Case(relu=False)
    results, call = shsa_call(case).run(BACKEND), shsa_call(case)
    assert torch.equal(results["y"][:, case.P :], call.inputs["x"][:, case.P :])
    assert torch.equal(results["dx"][:, case.P :], call.upstream["y"][:, case.P :])


# Gradients asked for


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_operator_computes_what_is_asked_for_and_nothing_else(relu, dtype):
    case = Case(P=20, D=8, N=16, dtype=dtype, relu=relu)
    call = shsa_call(case)
    expected = expect(call)
    x = call.inputs["x"]
    parameters = [call.inputs[k] for k in ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias")]
    settings = (case.D, 1e-5, case.D**-0.5, relu, False, False)
    saved = torch.ops.shvit_kernels.shsa_forward_native(x, *parameters, *settings)
    x1 = x[:, : case.P].contiguous()
    names = ("dx", "dnorm_weight", "dnorm_bias", "dqkv_weight", "dqkv_bias")
    for needs in itertools.product([False, True], repeat=5):
        grads = torch.ops.shvit_kernels.shsa_backward_native(
            call.upstream["y"], x1, *saved, *parameters, *settings, list(needs)
        )
        for name, grad, need in zip(names, grads, needs, strict=True):
            assert need or grad.shape == (0,), f"{name} was not asked for"
        assert_parity({k: g for k, g, need in zip(names, grads, needs, strict=True) if need}, expected)


def test_operator_has_no_gradient_of_an_absent_parameter():
    case = Case(P=20, D=8, N=16, norm="none", bias=False)
    call = shsa_call(case)
    x, weight = call.inputs["x"], call.inputs["qkv_weight"]
    settings = (case.D, 1e-5, case.D**-0.5, True, False, False)
    saved = torch.ops.shvit_kernels.shsa_forward_native(x, None, None, weight, None, *settings)
    grads = torch.ops.shvit_kernels.shsa_backward_native(
        call.upstream["y"], x[:, :20].contiguous(), *saved, None, None, weight, None, *settings, [True] * 5
    )
    assert [tuple(g.shape) for g in grads] == [tuple(x.shape), (0,), (0,), tuple(weight.shape), (0,)]


# Non-finite values

NON_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
@pytest.mark.parametrize("channel", [3, 30], ids=["in_attention", "beyond_attention"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_non_finite_input_stays_in_its_image(layout, channel, relu, variant):
    for value, dtype, norm, N in itertools.product(
        NON_FINITE, (torch.float32, torch.float64, torch.bfloat16), ("affine", "none"), (49, 257)
    ):
        case = Case(P=20, D=8, N=N, beyond=17, B=3, layout=layout, relu=relu, dtype=dtype, norm=norm)
        call = shsa_call(case)
        with native_tier.instruction_set(variant):
            clean = call.run(BACKEND, ("x",))
            call.inputs["x"].flatten(2)[1, channel, 5] = value
            dirty = call.run(BACKEND, ("x",))
        for name in clean:
            for image in (0, 2):
                assert torch.equal(clean[name][image], dirty[name][image]), f"{name} of image {image}, {case}, {value}"
        assert_same_non_finite(dirty["y"], call.run("eager", ())["y"])


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
@pytest.mark.parametrize("parameter", ["norm_weight", "norm_bias", "qkv_weight", "qkv_bias"])
def test_non_finite_parameters_show_where_the_specification_has_them(parameter, relu):
    P, D = 20, 8
    rows = {"query": 0, "key": D, "value": 2 * D} if parameter.startswith("qkv") else {"channel": 2}
    for value, (kind, row), N in itertools.product(NON_FINITE, rows.items(), (1, 49, 257)):
        call = shsa_call(Case(P=P, D=D, N=N, relu=relu))
        call.inputs[parameter][row] = value
        result, specified = call.run(BACKEND, ())["y"], call.run("eager", ())["y"]
        assert specified.isfinite().any(), f"{kind} {value} proves nothing"  # the channels beyond P at least
        assert_same_non_finite(result, specified)


def test_non_finite_gradient_stays_in_its_image():
    for value in NON_FINITE:
        call = shsa_call(Case(P=20, D=8, B=3, relu=False))
        clean = call.run(BACKEND, ("x",))
        call.upstream["y"][1, 3, 2, 2] = value
        dirty = call.run(BACKEND, ("x",))
        assert not dirty["dx"][1].isfinite().all()
        for image in (0, 2):
            assert torch.equal(clean["dx"][image], dirty["dx"][image])


def test_relu_keeps_nan_and_its_gradient_at_zero_is_zero():
    call = shsa_call(Case(P=4, D=2, N=16, beyond=3, B=1))
    call.inputs["x"][0, 5] = 0.0
    call.inputs["x"][0, 6, 1, 1] = math.nan
    results = call.run(BACKEND, ("x",))
    assert results["y"][0, 6, 1, 1].isnan() and results["y"].isnan().sum() == 1
    assert not results["dx"][0, 5].any()


@pytest.mark.parametrize(
    "case", [Case(P=7, D=1, N=1, B=1), Case(P=75, D=24, N=257, beyond=5), Case(P=66, N=49, B=3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_depends_on_uninitialised_memory(case, dtype):
    """Fresh tensors are filled with NaN, and under `make sanitize` the kernels' scratch is too: a padding lane or an
    unwritten sum would show."""
    case = Case(**{**vars(case), "dtype": dtype})
    with filled_with_nan():
        results = shsa_call(case).run(BACKEND)
    assert_parity(results, expect(shsa_call(case)))


# Rounding


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("P", [7, 48])
@pytest.mark.parametrize("N", [1, 16])
def test_bfloat16_is_rounded_to_nearest_even(N, P, layout, variant):
    """All tokens of an image are alike, so that y before it is rounded is known: often a tie."""
    call = shsa_call(Case(P=P, D=1, N=N, B=9, norm="none", bias=False, relu=False, layout=layout, dtype=torch.bfloat16))
    x, weight = call.inputs["x"], call.inputs["qkv_weight"]
    x.copy_(x[:, :, :1, :1].clone())
    weight.copy_(torch.cat([torch.zeros(2, P), 1.5 * torch.eye(P)]))
    with native_tier.instruction_set(variant):
        y = call.run(BACKEND, ())["y"]
    exact = 1.5 * x[:, :P].float()
    assert (exact.view(torch.int32) % 2**16 == 2**15).any()
    assert torch.equal(y[:, :P], exact.bfloat16())


# Extremes


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("N", [49, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand(N, dtype, variant):
    # Many images: otherwise the rounding of one near tie between two keys decides the error of eager or of the kernel.
    case = Case(N=N, dtype=dtype, relu=False, B=8)
    call = shsa_call(case, scale=1e4 / _largest_logit(case))
    with native_tier.instruction_set(variant):
        results = call.run(BACKEND)
    assert all(t.isfinite().all() for t in results.values())
    # The gradients are those near ties times a scale in the hundreds: rounding, in eager too.
    assert_parity({"y": results["y"]}, expect(call))


def _largest_logit(case: Case) -> float:
    """The largest absolute product of a query and a key, unscaled."""
    inputs = shsa_call(case).to(torch.float64).inputs
    x1 = inputs["x"][:, : case.P]
    z = torch.nn.functional.group_norm(x1, 1, inputs["norm_weight"], inputs["norm_bias"])
    qkv = torch.einsum("op,bphw->bohw", inputs["qkv_weight"], z) + inputs["qkv_bias"][:, None, None]
    q, k = qkv.flatten(2)[:, : case.D], qkv.flatten(2)[:, case.D : 2 * case.D]
    return largest(q.transpose(1, 2) @ k)


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [(0, 128), (0, 256), (128, 300), (5, 290), (0, 300)], ids=str)
def test_keys_whose_logits_overflow_count_for_nothing(keys, dtype, variant):
    """-inf as logit, of finite queries and keys: in whole blocks of keys, which come first or later, and everywhere."""
    case = Case(P=4, D=2, N=300, B=1, norm="none", relu=False, beyond=0, dtype=dtype)
    call = shsa_call(case)
    x, weight, bias = (call.inputs[k] for k in ("x", "qkv_weight", "qkv_bias"))
    x.flatten(2)[0, 0] = 0.0
    x.flatten(2)[0, 0, slice(*keys)] = -1e20
    weight[0], bias[0], bias[2], weight[2] = 0.0, 1e20, 0.0, torch.tensor([1.0, 0.0, 0.0, 0.0])
    weight[[1, 3, 4, 5, 6, 7], 0] = 0.0
    needs = ("x", "qkv_weight")  # the bias of the first key has none but noise
    with native_tier.instruction_set(variant):
        results = call.run(BACKEND, needs)
    if keys == (0, case.N):
        for name, specified in call.run("eager", needs).items():
            assert specified.isnan().any()
            assert_same_non_finite(results[name], specified)
    else:
        assert_parity(results, expect(call))


def test_one_key_far_above_all_others_in_the_last_block():
    """The row maximum comes last, after other keys were summed."""
    case = Case(P=8, D=1, N=1050, norm="none", relu=False, B=1)
    call = shsa_call(case, scale=1.0)
    x, weight, bias = (call.inputs[k] for k in ("x", "qkv_weight", "qkv_bias"))
    weight[:2], bias[:2] = 0.0, torch.tensor([100.0, 0.0])
    weight[1, 0] = 1.0
    x.flatten(2)[0, 0] = torch.linspace(-100, 100, case.N)
    assert_parity(call.run(BACKEND), expect(call))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e4])
@pytest.mark.parametrize("N", [1, 16, 257])
@pytest.mark.parametrize("P", [1, 7, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_variance(P, N, value, dtype):
    """Constant images: y shows z, which stays within its stated bound, and every gradient is finite."""
    D = 4
    call = shsa_call(Case(P=P, D=D, N=N, beyond=0, bias=False, relu=False, dtype=dtype))
    call.inputs["x"].fill_(value)
    call.inputs["qkv_weight"][2 * D :] = torch.eye(P)
    results = call.run(BACKEND)
    assert all(t.isfinite().all() for t in results.values())
    x, weight, bias = (call.inputs[k].double() for k in ("x", "norm_weight", "norm_bias"))
    z = torch.nn.functional.group_norm(x, 1, weight, bias)
    bound = 32 * 2.0**-24 * (1 + 1e-5**-0.5 * largest(x)) * largest(weight)
    bound += (8 * 2.0**-24 + unit_roundoff(dtype)) * largest(z)  # the mean over the keys, and y's own rounding
    assert largest(results["y"].double() - z) <= bound


def test_one_token_attends_to_itself():
    case = Case(N=1, B=17, relu=False)
    call = shsa_call(case)
    results = call.run(BACKEND)
    assert_parity(results, expect(call))
    assert not results["dqkv_weight"][: 2 * case.D].any() and not results["dqkv_bias"][: 2 * case.D].any()


def test_empty_batch_gives_zero_gradients():
    results = shsa_call(Case(B=0)).run(BACKEND)
    assert results["y"].shape == (0, 85, 7, 7)
    assert all(not t.any() for t in results.values())


# The same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N", [(1, 257), (1, 1050), (5, 49), (17, 16)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_same_bits_for_any_number_of_threads_and_in_every_run(B, N, layout, dtype):
    native_tier.assert_same_bits(shsa_call(Case(B=B, N=N, layout=layout, dtype=dtype)), BACKEND)


@pytest.mark.parametrize("case", by_name(CORNERS))
def test_same_bits_with_and_without_gradients(case):
    call = shsa_call(case)
    assert torch.equal(call.run(BACKEND, ())["y"], call.run(BACKEND, case.needed)["y"])


def test_an_image_has_the_same_bits_in_any_batch():
    """Images are independent, so the batch around one cannot change it."""
    call = shsa_call(Case(B=5))
    whole = call.run(BACKEND, ("x",))
    for b in range(5):
        alone = call.map(lambda k, t, b=b: t[b : b + 1] if k in ("x", "y") else t).run(BACKEND, ("x",))
        for name, t in alone.items():
            assert torch.equal(t[0], whole[name][b]), name


def test_sixteen_thousand_tokens():
    """The forward against the specification on a few queries; all of them would not fit in memory."""
    case = Case(P=16, D=8, N=16384, B=1, beyond=1, relu=False, norm="none")
    call = shsa_call(case)
    y = call.run(BACKEND, ())["y"].flatten(2)[0]
    inputs = call.to(torch.float64).inputs
    qkv = inputs["qkv_weight"] @ inputs["x"].flatten(2)[0, : case.P] + inputs["qkv_bias"][:, None]
    q, k, v = qkv.split([case.D, case.D, case.P])
    queries = torch.randperm(case.N, generator=generator(case))[:64]
    attn = (q[:, queries].t() @ k * case.D**-0.5).softmax(-1)
    assert largest(y[: case.P, queries].double() - v @ attn.t()) <= 64 * 2.0**-24 * largest(v)
