"""Triton: gradients, ``partial_moments`` and ``shsa_train`` against the specification (design section 6).

Interpreted where no GPU is; on one, the same tests run compiled.
"""

import math
from dataclasses import replace

import pytest
import torch

from shvit_kernels.backends import triton
from tests.support import exact, triton_tier
from tests.support.cases import STRIDES, Case, moments_call, named, shsa_call, train_call
from tests.support.numerics import (
    Call,
    Results,
    assert_parity,
    assert_same_non_finite,
    device_of,
    expect,
    filled_with_nan,
    largest,
    moved,
    per_image,
)
from tests.support.triton import needs_triton

pytest.importorskip("shvit_kernels.backends.triton.train", exc_type=ImportError)  # needs triton
from shvit_kernels.backends.triton import backward, moments

pytestmark = needs_triton

BACKEND = "triton"
DEVICE = device_of(BACKEND)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("nchw", "channels_last")
OPERATORS = torch.ops.shvit_kernels
H, BF = torch.float16, torch.bfloat16

SHORT = [
    Case(P=72, N=64, beyond=264, dtype=H),
    Case(P=96, N=16, beyond=5, B=3, dtype=BF, layout="channels_last"),
    Case(P=75, N=49, dtype=H, strides="sliced"),
    Case(P=20, N=49, dtype=BF, norm="none", bias=False, relu=False),
    Case(P=20, D=24, N=9, beyond=0, B=3, dtype=H, norm="weight", layout="channels_last"),
]
"""One program holds an image."""
LONG = [
    Case(P=20, D=8, N=49),
    Case(P=48, N=16, B=3, layout="channels_last", norm="none", relu=False),
    Case(P=20, D=8, N=70, B=1, dtype=H, norm="weight", bias=False),
    Case(P=130, D=40, N=9, B=2, beyond=3, dtype=BF, layout="channels_last"),
    Case(P=7, D=8, N=200, B=1, dtype=BF, relu=False),
]
"""Staged: long images, many channels, or exact products."""
ONE_OF_EACH = [SHORT[2], LONG[0]]


def by_name(cases: list[Case]) -> list:
    return [pytest.param(case, id=name) for name, case in named(cases).items()]


# shsa


@pytest.mark.parametrize(
    "case",
    by_name(
        [
            *SHORT,
            *LONG,
            Case(P=7, D=1, N=1, B=3, dtype=H),
            Case(P=7, D=1, N=1, B=3),
            Case(P=20, D=8, N=16, autocast=True),
            Case(P=20, D=8, N=16, autocast=True, dtype=BF),
            Case(B=0),
            Case(B=0, dtype=H, layout="channels_last"),
        ]
    ),
)
def test_gradients(case):
    call = shsa_call(case)
    assert_parity(call.run(BACKEND), expect(call))


NEEDS = [
    (),
    ("dx",),
    ("dnorm_weight",),
    ("dnorm_bias",),
    ("dqkv_weight",),
    ("dqkv_bias",),
    ("dx", "dqkv_bias"),
    ("dnorm_bias", "dqkv_weight"),
]


@pytest.mark.parametrize("case", [Case(P=20, D=8, N=16, dtype=H), Case(P=20, D=8, N=40)], ids=str)
def test_operator_computes_what_is_asked_for_and_nothing_else(case):
    call = shsa_call(case)
    expected = expect(call)
    x, *parameters = (moved(t, DEVICE) for t in call.inputs.values())
    settings = (case.D, 1e-5, case.D**-0.5, True, False, False)
    saved = OPERATORS.shsa_forward_triton(x, *parameters, *settings)
    x1 = x[:, : case.P].contiguous()
    names = ("dx", "dnorm_weight", "dnorm_bias", "dqkv_weight", "dqkv_bias")
    for asked in NEEDS:
        needs = [name in asked for name in names]
        dy = moved(call.upstream["y"], DEVICE)
        grads = OPERATORS.shsa_backward_triton(dy, x1, *saved, *parameters, *settings, needs)
        for name, grad, need in zip(names, grads, needs, strict=True):
            assert need or grad.shape == (0,), f"{name} was not asked for"
        assert_parity({k: g.cpu() for k, g, need in zip(names, grads, needs, strict=True) if need}, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_other_channels_pass(dtype, layout):
    """Runs of every alignment, shorter and longer than a vector."""
    for P, beyond, N in ((1, 1, 1), (1, 2, 3), (3, 2, 7), (3, 8, 9), (7, 1000, 16)):
        call = shsa_call(Case(P=P, D=2, N=N, beyond=beyond, B=2, layout=layout, dtype=dtype, norm="none"))
        results = call.run(BACKEND, ("x",))
        passed = torch.where(results["y"] > 0, call.upstream["y"], 0)
        assert torch.equal(results["dx"][:, P:], passed[:, P:])


def test_relu_keeps_the_gradient_of_nan_and_stops_that_of_zero():
    call = shsa_call(Case(P=4, D=2, N=16, beyond=3, B=1, dtype=H))
    call.inputs["x"][0, 5] = 0.0
    call.inputs["x"][0, 6, 1, 1] = math.nan
    dx = call.run(BACKEND, ("x",))["dx"]
    assert not dx[0, 5].any() and dx[0, 6, 1, 1] == call.upstream["y"][0, 6, 1, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_gradient_of_any_strides(case, layout):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for change in (
        lambda dy: torch.ones((), dtype=dy.dtype).expand(dy.shape),
        lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        call = shsa_call(replace(case, P=7, D=4, layout=layout, strides="dense"))
        call.upstream["y"] = change(call.upstream["y"])
        results = call.run(BACKEND)
        assert_parity(results, expect(call))
        assert results["dx"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("norm", ["affine", "none"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_non_finite_values_stay_in_their_image(case, norm):
    case = replace(case, P=7, D=4, N=36, B=3, norm=norm, relu=False, strides="dense")
    for value, place in ((math.nan, "x"), (math.inf, "y")):
        call = shsa_call(case)
        tensors = call.inputs if place == "x" else call.upstream
        clean = call.run(BACKEND, ("x",))["dx"]
        tensors[place].flatten(2)[1, 3, 5] = value
        dirty = call.run(BACKEND, ("x",))["dx"]
        assert not dirty[1].isfinite().all()
        assert torch.equal(clean[0::2], dirty[0::2])


@pytest.mark.parametrize("case", [*ONE_OF_EACH, Case(P=20, D=8, N=70, B=1, dtype=H)], ids=str)
def test_logits_of_ten_thousand_have_finite_gradients(case):
    call = shsa_call(replace(case, P=20, D=8, relu=False), scale=300.0)
    assert all(t.isfinite().all() for t in call.run(BACKEND).values())


@pytest.mark.parametrize("value", [0.0, -3.7, 1e4])
@pytest.mark.parametrize("case", [Case(P=7, D=4, N=16, dtype=H), Case(P=7, D=4, N=40)], ids=str)
def test_without_variance_gradients_stay_finite(case, value):
    call = shsa_call(replace(case, bias=False))
    call.inputs["x"].fill_(value)
    assert all(t.isfinite().all() for t in call.run(BACKEND).values())


# partial_moments


MOMENTS = [
    Case(P=72, N=64, dtype=H),
    Case(P=40, N=16, B=6, dtype=BF, layout="channels_last"),
    Case(P=20, N=300, B=1),
    Case(P=20, N=130, norm="none", layout="channels_last"),
    Case(P=130, N=9, B=5, norm="weight"),
    Case(P=20, N=49, norm="none", strides="sliced"),
    Case(P=40, N=1, B=17),
    Case(P=7, N=1, B=1),
    Case(P=1, N=1, B=1),
    Case(P=20, N=16, autocast=True),
    Case(B=0),
]


@pytest.mark.parametrize("case", by_name(MOMENTS))
def test_moments(case):
    call = moments_call(case)
    results = call.run(BACKEND)
    assert_parity(results, expect(call, exact.of_moments))
    assert torch.equal(results["cov"], results["cov"].t())


@pytest.mark.parametrize("norm", ["affine", "none"])
def test_parts_of_several_tiles(norm, monkeypatch):
    monkeypatch.setattr(moments, "PARTS", 2)
    monkeypatch.setattr(backward, "PARTS", 2)
    case = Case(P=7, D=2, N=36, B=5, norm=norm, dtype=H)
    check_training(train_call(case), case)


@pytest.mark.parametrize("norm", ["affine", "none"])
@pytest.mark.parametrize("B, N", [(2, 49), (1, 130)])
def test_large_offsets_do_not_cancel(B, N, norm):
    """Deviations of about 1 around means of thousands, another in every channel."""
    call = moments_call(Case(P=9, B=B, N=N, norm=norm))
    call.inputs["x"] += 1e4 * torch.linspace(1, 2, 46)[:, None, None] if norm == "none" else 1e3
    assert_parity(call.run(BACKEND, ()), expect(call, exact.of_moments))


def test_offset_of_one_image():
    for norm in ("none", "affine"):
        call = moments_call(Case(P=12, B=9, N=16, norm=norm))
        call.inputs["x"] += 100 * torch.arange(9.0)[:, None, None, None]
        assert_parity(call.run(BACKEND), expect(call, exact.of_moments))


@pytest.mark.parametrize("norm", ["affine", "none"])
def test_moments_of_non_finite_values(norm):
    for value in (math.nan, -math.inf):
        call = moments_call(Case(P=20, B=3, N=16, norm=norm))
        call.inputs["x"][1, 3, 2, 2] = value
        results, specified = call.run(BACKEND, ()), call.run("eager", ())
        for k in results:
            assert torch.equal(results[k].isfinite(), specified[k].isfinite()), (k, value)


@pytest.mark.parametrize("N", [16, 70])
def test_moments_gradients_that_are_asked_for(N):
    case = Case(P=20, N=N)
    call = moments_call(case)
    expected = expect(call, exact.of_moments)
    x, *norm = (moved(t, DEVICE) for t in call.inputs.values())
    mean, _, *of_images = OPERATORS.partial_moments_forward_triton(x, *norm, 20, 1e-5)
    upstream = [moved(t, DEVICE) for t in call.upstream.values()]
    names = ("dx", "dnorm_weight", "dnorm_bias")
    for asked in ((), ("dx",), ("dnorm_weight",), ("dnorm_bias",)):
        needs = [name in asked for name in names]
        grads = OPERATORS.partial_moments_backward_triton(
            *upstream, x[:, :20].contiguous(), mean, *of_images, *norm, x.shape[1], needs
        )
        assert all(g.shape == (0,) for g, need in zip(grads, needs, strict=True) if not need)
        assert_parity({k: g.cpu() for k, g, need in zip(names, grads, needs, strict=True) if need}, expected)


# shsa_train


def check_training(call: Call, case: Case) -> Results:
    results = call.run(BACKEND)
    assert_parity(results, expect(call, exact.of_training(case)))
    return results


@pytest.mark.parametrize(
    "case", by_name([*SHORT, *LONG, Case(P=48, N=49, B=1, dtype=H), Case(P=66, N=16, B=6, dtype=BF), Case(B=0)])
)
def test_training(case):
    check_training(train_call(case), case)


@pytest.mark.parametrize("case", [Case(P=20, D=8, N=16, dtype=H), Case(P=20, D=8, N=40)], ids=str)
def test_training_computes_what_is_asked_for(case):
    call = train_call(case)
    expected = expect(call, exact.of_training(case))
    for asked in ("x", "norm_weight", "norm_bias", "weight", "bn_weight", "bn_bias"):
        results = call.run(BACKEND, (asked,))
        assert_parity(results, expected)


@pytest.mark.parametrize("dtype, parameters", triton_tier.MIXED)
def test_training_with_parameters_of_another_type(dtype, parameters):
    case = Case(P=20, D=8, N=16, dtype=dtype)
    check_training(train_call(case).map(lambda k, t: t if k in ("x", "y") else t.to(parameters)), case)


def test_channels_beyond_the_partial_ones_do_not_reach_the_statistics():
    call = train_call(Case(P=20, N=16, relu=False, dtype=H))
    before = call.run(BACKEND)
    call.inputs["x"][:, 20:] = torch.nan
    after = call.run(BACKEND)
    for name in ("mean", "variance", "dweight", "dnorm_weight", "dbn_weight", "dbn_bias"):
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(before["y"][:, :20], after["y"][:, :20])


@pytest.mark.parametrize("B, N", [(2, 1), (1, 2), (1, 16)])
def test_fewer_tokens_than_channels_stay_finite(B, N):
    results = train_call(Case(P=96, N=N, B=B, dtype=H)).run(BACKEND)
    assert all(t.isfinite().all() for t in results.values())
    assert results["variance"].min() >= 0


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_images_stay_finite(value):
    call = train_call(Case(P=20, N=16))
    call.inputs["x"].fill_(value)
    assert all(t.isfinite().all() for t in call.run(BACKEND).values())


def test_non_finite_values_reach_the_whole_batch():
    case = Case(P=20, D=8, N=16, B=3, dtype=H)
    call = train_call(case)
    call.inputs["x"].flatten(2)[1, 3, 5] = math.nan
    results, specified = call.run(BACKEND, ()), call.run("eager", ())
    for name in results:
        assert_same_non_finite(results[name], specified[name])


# All


@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES.keys())
@pytest.mark.parametrize("case", [Case(P=20, D=8, N=16, B=2, dtype=H), Case(P=7, D=8, N=40, B=2)], ids=str)
def test_parameters_of_any_strides(case, change):
    for make, truth in (
        (shsa_call, per_image),
        (train_call, exact.of_training(case)),
        (moments_call, exact.of_moments),
    ):
        call = make(case)
        call.inputs.update({k: change(t) for k, t in call.inputs.items() if k != "x"})
        results = call.run(BACKEND)
        assert_parity(results, expect(call, truth))
        assert all(t.is_contiguous() for t in results.values())


CALLS = [
    pytest.param(call, case, id=f"{call.__name__}-{case}")
    for call in (shsa_call, train_call, moments_call)
    for case in (Case(P=20, D=8, N=49, B=2, dtype=H), Case(P=7, D=8, N=40, B=2))
]


@pytest.mark.parametrize("make, case", CALLS)
def test_same_bits_in_every_run(make, case):
    call = make(case)
    first, second = call.run(BACKEND), call.run(BACKEND)
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("make, case", CALLS)
def test_no_result_depends_on_uninitialised_memory(make, case):
    """Fresh memory is filled with NaN, so a padding lane or an unwritten sum would show."""
    call = make(case)
    with filled_with_nan(DEVICE):
        results = call.run(BACKEND)
    assert all(t.isfinite().all() for t in results.values())
    plain = make(case).run(BACKEND)
    assert all(torch.equal(t, plain[name]) for name, t in results.items())


@pytest.mark.skipif(triton.INTERPRETED, reason="needs a GPU")
def test_calls_are_captured_in_a_graph():
    case = Case(P=72, N=64, B=4, dtype=H)
    call = train_call(case)
    x, *parameters = (moved(t, DEVICE) for t in call.inputs.values())
    settings = (case.D, 1e-5, 1e-5, case.D**-0.5, True, False, False)
    dy = moved(call.upstream["y"], DEVICE)

    def step() -> tuple[torch.Tensor, ...]:
        results = OPERATORS.shsa_train_forward_triton(x, *parameters, *settings)
        return *results, *OPERATORS.shsa_train_backward_triton(dy, *results, *parameters, *settings, [True] * 6)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for t in results:
        t.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(t, e) for t, e in zip(results, expected, strict=True))


def test_tf32_is_near():
    case = Case(P=72, N=16)
    call = shsa_call(case)
    x, *parameters = (moved(t, DEVICE) for t in call.inputs.values())
    settings = (case.D, 1e-5, case.D**-0.5, True, True, True)
    saved = OPERATORS.shsa_forward_triton(x, *parameters, *settings)
    x1, dy = x[:, : case.P].contiguous(), moved(call.upstream["y"], DEVICE)
    grads = OPERATORS.shsa_backward_triton(dy, x1, *saved, *parameters, *settings, [True] * 5)
    expected = list(expect(call).values())[1:]
    for grad, e in zip(grads, expected, strict=True):
        assert largest(grad.double().cpu() - e.value) <= 32 * 2.0**-11 * largest(e.value)
