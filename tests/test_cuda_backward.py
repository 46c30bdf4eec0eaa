"""Gradients of ``shsa``, moments and training by the CUDA kernels on short images, against the specification (design
section 6). On a GPU if the library was built for one; otherwise executed on the processor (tests/cuda_host).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.support import cuda, exact
from tests.support.cases import Case, covering_set, moments_call, named, shsa_call, train_call
from tests.support.cuda import BACKEND
from tests.support.numerics import Call, assert_parity, device_of, expect, filled_with_nan, largest, moved

pytestmark = cuda.needs_kernels

DEVICE = device_of(BACKEND)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("nchw", "channels_last")
TURNS = list(zip(DTYPES, itertools.cycle(LAYOUTS), strict=False))

STAGES = [Case(P=P, N=N, beyond=C - P, B=2) for C, P, N in ((224, 48, 49), (320, 68, 16), (308, 66, 49))]
STAGES += [Case(P=P, N=N, beyond=C - P, B=2) for C, P, N in ((448, 96, 16), (352, 75, 49), (336, 72, 64))]
AXES = {
    "P": (48, 1, 7, 66, 75, 96, 130),
    "D": (16, 1, 8, 24),
    "beyond": (37, 0),
    "dtype": DTYPES,
    "strides": ("dense", "sliced"),
    "autocast": (False,),
}
COVER = covering_set(**AXES, N=(49, 1, 16, 64), B=(2, 0, 1))
CORNERS = [
    Case(P=1, D=1, N=1, beyond=0, B=1),
    Case(P=7, N=1, B=17, dtype=torch.bfloat16, layout="channels_last"),
    Case(P=17, D=9, N=11, B=7, dtype=torch.float16),  # several images share a block, and some are alone
    Case(P=17, D=9, N=25, B=3, layout="channels_last"),
    Case(P=33, D=64, N=36, B=1, dtype=torch.float16, norm="none", relu=False),
    Case(P=256, D=16, N=16, B=1, dtype=torch.float16),
    Case(P=3, D=2, N=4, B=1030, beyond=1),  # more images than parts of the sums
    *(Case(autocast=True, dtype=dtype, layout=layout) for dtype, layout in TURNS),
]
SEVERAL = [Case(P=20, D=8, N=16, beyond=17, B=5), Case(P=20, D=8, N=49, beyond=17, B=3)]
"""Several images to a block, and one."""
# Batch statistics of a handful of tokens are a matter of the layer's tests: their rounding knows no bound.
TRAINED = covering_set(**AXES, N=(49, 16, 64), B=(2, 0), needs=("all", "x", "norm", "qkv_weight", "qkv_bias"))
# Blocks of three warps, whose rows of the covariance's gradient (odd: no wide loads) are longer than two of them.
THREE_WARPS = [Case(P=75, N=36), Case(P=65, N=48, layout="channels_last")]
TRAINED += THREE_WARPS
NEEDED = {"qkv_weight": ("weight",), "qkv_bias": ("bn_weight", "bn_bias")}
MEASURED = covering_set(
    **AXES | {"D": (16,)}, N=(49, 1, 16, 64, 196), B=(2, 0, 1), bias=(True,), relu=(True,), needs=("all", "x", "norm")
)
# Tiles of images, many parts, and several tiles to a part.
MEASURED += [Case(P=5, N=130, B=2, dtype=dtype, layout=layout) for dtype in DTYPES for layout in LAYOUTS]
MEASURED += [Case(P=3, N=1, B=2100, beyond=1), Case(P=2, N=65, B=300, beyond=0, norm="none")]
MEASURED += [Case(P=256, N=N, B=1, beyond=0, layout=layout) for N, layout in zip((16, 33), LAYOUTS, strict=True)]
MEASURED += THREE_WARPS


@pytest.fixture(scope="module", autouse=True)
def harness() -> Iterator:
    with cuda.kernels() as harness:
        yield harness


def by_name(cases: list[Case]) -> list:
    return list(named(cases).values())


def needed(case: Case) -> tuple[str, ...]:
    return tuple(name for k in case.needed for name in NEEDED.get(k, (k,)))


def check_training(case: Case) -> None:
    call = train_call(case)
    assert_parity(call.run(BACKEND, needed(case)), expect(call, exact.of_training(case)))


def check_moments(case: Case) -> None:
    call = moments_call(case)
    results = call.run(BACKEND, case.needed)
    assert_parity(results, expect(call, exact.of_moments))
    assert torch.equal(results["cov"], results["cov"].t())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_parity_of_stages(stage, dtype, layout):
    case = replace(stage, dtype=dtype, layout=layout)
    call = shsa_call(case)
    assert_parity(call.run(BACKEND), expect(call))
    check_training(case)


@pytest.mark.parametrize("case", by_name(COVER + CORNERS), ids=str)
def test_parity(case):
    call = shsa_call(case)
    assert_parity(call.run(BACKEND, case.needed), expect(call))


@pytest.mark.parametrize("case", by_name(TRAINED), ids=str)
def test_parity_in_training(case):
    check_training(case)


@pytest.mark.parametrize("case", by_name(MEASURED), ids=str)
def test_parity_of_moments(case):
    check_moments(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_the_type_of_their_parameter(dtype):
    case = Case(P=24, N=16, dtype=dtype)
    wide = train_call(case)
    wide.inputs.update({k: t.float() for k, t in wide.inputs.items() if k != "x"})
    results, plain = wide.run(BACKEND), train_call(case).run(BACKEND)
    for k, t in plain.items():
        assert results[k].dtype == (torch.float32 if k.startswith("d") and k != "dx" else t.dtype), k
        assert torch.equal(results[k].to(t.dtype), t), k


# TF32


def operator(name: str):
    return getattr(torch.ops.shvit_kernels, f"{name}_{cuda.FAMILY}")


def operator_call(case: Case, *tf32: bool) -> tuple[dict, list, list]:
    """The named arguments of the backward operator, its parameters and its settings."""
    call = shsa_call(case)
    x, *parameters = (t if t is None else moved(t, DEVICE) for t in call.inputs.values())
    settings = [case.D, 1e-5, case.D**-0.5, case.relu, *(tf32 or (False, False))]
    y, *saved = operator("shsa_forward")(x, *parameters, *settings)
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    x1 = x[:, : case.P].contiguous(memory_format=memory_format)
    dy = moved(call.upstream["y"], DEVICE).contiguous(memory_format=memory_format)
    return [dy, x1, y, *saved], parameters, settings


GRADIENTS = ("dx", "dnorm_weight", "dnorm_bias", "dqkv_weight", "dqkv_bias")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [16, 49])
def test_tf32_is_near_and_only_where_asked_for(N, layout):
    case = Case(P=68, N=N, layout=layout, relu=False)  # ReLU takes sides, which rounding may change
    expected = expect(shsa_call(case))
    results = []
    for tf32 in itertools.product((False, True), repeat=2):
        saved, parameters, settings = operator_call(case, *tf32)
        grads = operator("shsa_backward")(*saved, *parameters, *settings, [True] * 5)
        for name, grad in zip(GRADIENTS, grads, strict=True):
            truth = expected[name].value
            bound = 64 * 2.0**-11 * largest(truth) if any(tf32) else expected[name].bound
            assert largest(grad.double().cpu() - truth) <= bound, name
        results.append(grads[0])
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


# Gradients asked for


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
@pytest.mark.parametrize("dtype, layout", TURNS)
def test_operator_computes_what_is_asked_for_and_nothing_else(relu, dtype, layout):
    case = Case(P=20, D=8, N=16, dtype=dtype, layout=layout, relu=relu)
    expected = expect(shsa_call(case))
    saved, parameters, settings = operator_call(case)
    for needs in itertools.product([False, True], repeat=5):
        grads = operator("shsa_backward")(*saved, *parameters, *settings, list(needs))
        for name, grad, need in zip(GRADIENTS, grads, needs, strict=True):
            assert need or grad.shape == (0,), f"{name} was not asked for"
        wanted = {k: g.cpu() for k, g, need in zip(GRADIENTS, grads, needs, strict=True) if need}
        assert_parity(wanted, expected)


def test_operator_has_no_gradient_of_an_absent_parameter():
    case = Case(P=20, D=8, N=16, norm="none", bias=False)
    saved, parameters, settings = operator_call(case)
    grads = operator("shsa_backward")(*saved, *parameters, *settings, [True] * 5)
    assert [tuple(g.shape) for g in grads] == [tuple(saved[0].shape), (0,), (0,), tuple(parameters[2].shape), (0,)]


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_moments_compute_what_is_asked_for_and_nothing_else(needs):
    for N in (16, 130):
        case = Case(P=20, N=N)
        call = moments_call(case)
        names = tuple(itertools.compress(("x", "norm_weight", "norm_bias"), needs))
        if names:
            assert_parity(call.run(BACKEND, names), expect(call, exact.of_moments))


def test_images_in_another_order_than_their_gradient_are_refused():
    saved, parameters, settings = operator_call(Case(P=20, D=8, N=16))
    saved[1] = saved[1].contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"shsa_backward.*memory format"):
        operator("shsa_backward")(*saved, *parameters, *settings, [True] * 5)


def test_channels_beyond_the_partial_ones_pass_through():
    for layout, relu in itertools.product(LAYOUTS, (True, False)):
        case = Case(P=7, D=2, N=49, beyond=40, B=3, layout=layout, relu=relu)
        call = shsa_call(case)
        dx, dy = call.run(BACKEND, ("x",))["dx"], call.upstream["y"]
        assert torch.equal(dx[:, 7:], torch.where(call.inputs["x"] > 0, dy, 0)[:, 7:] if relu else dy[:, 7:])


# Non-finite values


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
@pytest.mark.parametrize("channel", [3, 30], ids=["in_attention", "beyond_attention"])
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_non_finite_values_stay_in_their_image(case, channel, relu):
    turns = zip(itertools.product((math.nan, math.inf, -math.inf), LAYOUTS), itertools.cycle(DTYPES), strict=False)
    others = torch.arange(case.B) != 1
    for ((value, layout), dtype), norm in zip(turns, itertools.cycle(("affine", "none")), strict=False):
        case = replace(case, layout=layout, dtype=dtype, norm=norm, relu=relu)
        clean = shsa_call(case).run(BACKEND, ("x",))["dx"]
        in_x, in_dy = shsa_call(case), shsa_call(case)
        in_x.inputs["x"].flatten(2)[1, channel, 5] = value
        in_dy.upstream["y"].flatten(2)[1, channel, 5] = value
        for call in (in_x, in_dy):
            assert torch.equal(clean[others], call.run(BACKEND, ("x",))["dx"][others]), case


def test_relu_passes_the_gradient_where_y_is_nan_and_not_where_it_is_zero():
    call = shsa_call(Case(P=4, D=2, N=16, beyond=3, B=1))
    call.inputs["x"][0, 5] = 0.0
    call.inputs["x"][0, 6, 1, 1] = math.nan
    dx = call.run(BACKEND, ("x",))["dx"]
    assert not dx[0, 5].any()
    assert dx[0, 6, 1, 1] == call.upstream["y"][0, 6, 1, 1] != 0


@pytest.mark.parametrize("norm", ["affine", "none"])
def test_non_finite_values_show_in_the_moments(norm):
    """As the specification has them: the channel's own moments without norm, all of them with it."""
    for value, (dtype, layout) in itertools.product((math.nan, math.inf, -math.inf), TURNS):
        call = moments_call(Case(P=20, B=3, norm=norm, dtype=dtype, layout=layout))
        call.inputs["x"][1, 3, 2, 2] = value
        results, specified = call.run(BACKEND, ()), call.run("eager", ())
        for k in results:
            assert torch.equal(results[k].isfinite(), specified[k].isfinite()), (k, value)


# Extremes


def test_one_token_attends_to_itself():
    case = Case(N=1, B=17, relu=False)
    for dtype in DTYPES:
        call = shsa_call(replace(case, dtype=dtype))
        results = call.run(BACKEND)
        assert_parity(results, expect(call))
        assert not results["dqkv_weight"][: 2 * case.D].any() and not results["dqkv_bias"][: 2 * case.D].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand_stay_finite(dtype):
    results = shsa_call(Case(P=32, dtype=dtype, relu=False), scale=2e3).run(BACKEND)
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("N", [1, 16, 49, 130])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_images_stay_finite(value, N):
    for make in (train_call, moments_call, shsa_call):
        call = make(Case(P=20, D=4, N=N))
        call.inputs["x"].fill_(value)
        assert all(t.isfinite().all() for t in call.run(BACKEND).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fewer_tokens_than_channels_stay_finite(dtype):
    for N, B in ((1, 2), (2, 1), (16, 1)):
        results = train_call(Case(P=96, N=N, B=B, dtype=dtype)).run(BACKEND)
        assert all(t.isfinite().all() for t in results.values())
        assert results["variance"].min() >= 0


def test_one_token_has_no_covariance():
    for norm in ("affine", "none"):
        results = moments_call(Case(B=1, N=1, norm=norm)).run(BACKEND)
        assert not results["cov"].any()
        assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [16, 49, 130])
@pytest.mark.parametrize("offset", [1e2, 1e4, -3e5])
def test_large_offsets_do_not_cancel(offset, N, layout):
    """Deviations of about 1 around means of thousands, another in every channel."""
    call = moments_call(Case(P=9, B=9, N=N, layout=layout, norm="none"))
    call.inputs["x"] += offset * torch.linspace(1, 2, 46)[:, None, None]
    assert_parity(call.run(BACKEND, ()), expect(call, exact.of_moments))


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("N", [16, 130])
def test_group_norm_of_large_offsets_does_not_cancel(N, offset):
    call = moments_call(Case(P=12, N=N))
    call.inputs["x"] += offset
    assert_parity(call.run(BACKEND), expect(call, exact.of_moments))


def test_empty_batch_gives_zeros():
    for make in (shsa_call, moments_call, train_call):
        assert not any(t.any() for t in make(Case(B=0)).run(BACKEND).values())


# Nothing else than the arguments decides


def test_channels_beyond_the_partial_ones_do_not_reach_the_statistics():
    for layout in LAYOUTS:
        call = train_call(Case(P=20, relu=False, layout=layout))
        before = call.run(BACKEND)
        call.inputs["x"][:, 20:] = torch.nan
        after = call.run(BACKEND)
        for name in ("mean", "variance", "dweight", "dnorm_weight", "dbn_weight", "dbn_bias"):
            assert torch.equal(before[name], after[name]), name
        assert torch.equal(before["dx"], after["dx"])


def test_statistics_are_those_of_batch_norm():
    case = Case(P=20, B=3)
    call = train_call(case)
    results = call.run(BACKEND, ())
    inputs = call.to(torch.float64).inputs
    z = F.group_norm(inputs["x"][:, :20], 1, inputs["norm_weight"], inputs["norm_bias"])
    projected = inputs["weight"] @ z.flatten(2)
    variance, mean = torch.var_mean(projected, (0, 2), correction=0)
    torch.testing.assert_close(results["mean"].double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(results["variance"].double(), variance, rtol=1e-6, atol=1e-6)


def calls(case: Case) -> dict[str, Call]:
    return {"shsa": shsa_call(case), "train": train_call(case), "moments": moments_call(case)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(P=7, D=1, N=1, B=1), Case(P=66, B=3), Case(P=5, N=130)], ids=str)
def test_no_result_depends_on_uninitialised_memory(case, dtype):
    """Fresh memory is filled with NaN, so an unwritten part of a sum would show."""
    case = replace(case, dtype=dtype)
    with filled_with_nan(DEVICE):
        filled = {name: call.run(BACKEND) for name, call in calls(case).items()}
    for name, call in calls(case).items():
        for k, t in call.run(BACKEND).items():
            assert torch.equal(t, filled[name][k]), (name, k)
            assert t.isfinite().all(), (name, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SEVERAL, Case(P=20, D=8, N=130, B=1)], ids=str)
def test_same_bits_in_every_run(case, dtype):
    for name, call in calls(replace(case, dtype=dtype)).items():
        first = call.run(BACKEND)
        for _ in range(2):
            assert all(torch.equal(t, first[k]) for k, t in call.run(BACKEND).items()), name


@cuda.only_hosted
def test_blocks_with_several_groups_of_images(harness):
    """The smallest batches that have them; tests/test_cuda_memory.py looks at everything else."""
    for call in (shsa_call(Case(P=2, D=1, N=33, B=258, beyond=0)), moments_call(Case(P=2, N=33, B=514, beyond=0))):
        first = call.run(BACKEND)
        for order in itertools.islice(harness.thread_orders(), 1, 4):
            assert all(torch.equal(t, first[k]) for k, t in call.run(BACKEND).items()), order
        with harness.finding_races():
            call.run(BACKEND)
