"""``shsa``, ``shsa_eval`` and ``shsa_mixer`` of the CUDA kernels on short images, against the specification (design
section 6). On a GPU if the library was built for one; otherwise executed on the processor (tests/cuda_host).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.support import cuda
from tests.support.cases import Case, covering_set, eval_call, mixer_call, named, shsa_call
from tests.support.cuda import BACKEND
from tests.support.numerics import (
    Call,
    assert_parity,
    assert_same_non_finite,
    device_of,
    expect,
    largest,
    moved,
    unit_roundoff,
)

pytestmark = cuda.needs_kernels

DEVICE = device_of(BACKEND)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("nchw", "channels_last")

STAGES = [Case(P=P, N=N, beyond=C - P, B=2) for C, P, N in ((224, 48, 49), (320, 68, 16), (308, 66, 49))]
STAGES += [Case(P=P, N=N, beyond=C - P, B=2) for C, P, N in ((448, 96, 16), (352, 75, 49), (336, 72, 64))]
COVER = covering_set(
    N=(49, 1, 16, 64, 196),
    B=(2, 0, 1),
    dtype=DTYPES,
    needs=("all",),
    D=(16, 1, 8, 24),
    P=(48, 1, 7, 66, 68, 75, 96),
)
CORNERS = [
    Case(P=1, D=1, N=1, beyond=0, B=1),
    Case(P=7, N=1, B=17, dtype=torch.bfloat16, layout="channels_last"),
    Case(P=48, N=256, B=1, dtype=torch.float16),
    Case(P=256, D=16, N=16, B=1, dtype=torch.float16),
    Case(P=130, D=64, N=64, beyond=0, B=1, dtype=torch.bfloat16, layout="channels_last"),
    Case(P=48, D=128, N=36, B=1, dtype=torch.float16),
    Case(P=33, D=16, N=65, B=2, norm="none", relu=False),
    Case(P=17, D=9, N=11, B=129, dtype=torch.float16),  # several images share a block, and one is alone
    Case(P=16, D=8, N=16, B=129, beyond=1, layout="channels_last"),
]
SEVERAL = [Case(P=20, D=8, N=16, beyond=17, B=129), Case(P=20, D=8, N=49, beyond=17, B=3)]
"""Short images, several and one to a block."""


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with cuda.kernels():
        yield


def forward(call: Call) -> torch.Tensor:
    with torch.no_grad():
        return call.run(BACKEND, ())["y"]


def check(call: Call) -> None:
    assert_parity({"y": forward(call)}, expect(call))


def operator(name: str):
    return getattr(torch.ops.shvit_kernels, f"{name}_{cuda.FAMILY}")


def settings(case: Case) -> tuple:
    return case.D, 1e-5, case.D**-0.5, case.relu, False, False


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_parity_of_stages(stage, dtype, layout):
    check(shsa_call(replace(stage, dtype=dtype, layout=layout)))


@pytest.mark.parametrize("case", named(COVER + CORNERS).values(), ids=str)
def test_parity(case):
    check(shsa_call(case))


# Evaluation


@pytest.mark.parametrize("batch_norm", ["affine", "not_affine", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype, layout", list(zip(DTYPES, (*LAYOUTS, "nchw"), strict=True)))
def test_evaluation(dtype, layout, bias, batch_norm):
    check(eval_call(Case(P=66, N=49, dtype=dtype, layout=layout, bias=bias), batch_norm))


def test_statistics_of_another_type_are_read_as_they_are():
    call = eval_call(Case(dtype=torch.float16))
    check(call.map(lambda k, t: t.float() if k in ("bn_mean", "bn_var") else t))


def test_a_variance_of_zero_stays_finite():
    call = eval_call(Case())
    call.inputs["bn_var"].zero_()
    check(call)


# The residual layer

RESIDUAL = [
    *(replace(stage, B=1) for stage in STAGES),
    Case(P=96, N=16, beyond=352, B=5),  # several images share a block, and one is alone
    Case(P=1, D=1, N=1, beyond=0, B=1),
    Case(P=33, D=8, N=7, beyond=0, B=3, norm="none"),
    Case(P=20, D=8, N=33, beyond=17, B=3, bias=False),  # three tiles of tokens to an image
    Case(P=48, D=24, N=196, beyond=13, B=1),  # attention and projection are two launches
    Case(P=48, N=50, beyond=2000, B=1),  # too many channels to keep on chip
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RESIDUAL, ids=str)
def test_residual_layer(case, dtype, layout):
    check(mixer_call(replace(case, dtype=dtype, layout=layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_enough_for_two_to_a_block(layout):
    check(mixer_call(Case(P=4, D=2, N=33, beyond=3, B=177, dtype=torch.float16, layout=layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [16, 49])
def test_non_finite_input_of_the_residual_layer_stays_in_its_image(N, dtype, layout):
    for channel in (3, 30):
        call = mixer_call(Case(P=20, D=8, N=N, beyond=17, B=5, dtype=dtype, layout=layout))
        clean = forward(call)
        call.inputs["x"].flatten(2)[1, channel, 5] = math.nan
        dirty = forward(call)
        assert torch.equal(clean[[0, 2, 3, 4]], dirty[[0, 2, 3, 4]])
        assert_same_non_finite(dirty, call.run("eager", ())["y"])


# What the backward reads


@pytest.mark.parametrize("norm", ["affine", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SEVERAL, Case(P=75, N=196, layout="channels_last")], ids=str)
def test_saved_statistics(case, dtype, norm):
    case = replace(case, dtype=dtype, norm=norm)
    inputs = [t if t is None else moved(t, DEVICE) for t in shsa_call(case).inputs.values()]
    _, *saved = operator("shsa_forward")(*inputs, *settings(case))
    x, norm_weight, norm_bias, weight, bias = (t if t is None else t.double().cpu() for t in inputs)
    x1 = x[:, : case.P].flatten(2)
    mean, rstd = torch.zeros(case.B).double(), torch.ones(case.B).double()
    if norm_weight is not None:
        variance, mean = torch.var_mean(x1, (1, 2), correction=0)
        rstd = (variance + 1e-5).rsqrt()
        x1 = torch.group_norm(x1, 1, norm_weight, norm_bias, 1e-5)
    q, k, _ = (weight @ x1 + bias[:, None]).split([case.D, case.D, case.P], 1)
    logits = q.mT @ k * case.D**-0.5
    row_max = logits.amax(-1)
    row_sum = (logits - row_max[:, :, None]).exp().sum(-1)
    for result, expected, rounding in zip(
        saved, (mean, rstd, row_max, row_sum), (2.0**-24, 2.0**-24, *[unit_roundoff(dtype)] * 2), strict=True
    ):
        assert result.dtype == torch.float32 and result.shape == expected.shape
        tolerance = 64 * rounding * largest(expected if rounding == 2.0**-24 else logits)
        torch.testing.assert_close(result.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_same_bits_with_and_without_gradients(case):
    call = shsa_call(case)
    inputs = [moved(t, DEVICE) for t in call.inputs.values()]
    no_batch_norm = (None,) * 4
    evaluated = operator("shsa_eval")(*inputs, *no_batch_norm, case.D, 1e-5, 1e-5, *settings(case)[2:])
    assert torch.equal(operator("shsa_forward")(*inputs, *settings(case))[0], evaluated)


# TF32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [16, 49, 64, 130])
def test_tf32_is_near_and_only_where_asked_for(N, layout):
    case = Case(P=68, N=N, layout=layout)
    call = shsa_call(case)
    inputs = [moved(t, DEVICE) for t in call.inputs.values()]
    expected = expect(call)
    truth = expected["y"].value
    results = []
    for tf32 in itertools.product((False, True), repeat=2):
        y = operator("shsa_forward")(*inputs, *settings(case)[:4], *tf32)[0].cpu()
        if any(tf32):
            assert largest(y.double() - truth) <= 16 * 2.0**-11 * largest(truth)
        else:
            assert_parity({"y": y}, expected)
        results.append(y)
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


# Channels beyond P


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_beyond_the_partial_ones_pass_through(dtype, layout):
    """Runs of every alignment, shorter and longer than a vector, in images that start anywhere."""
    for P, beyond, N in ((1, 1, 1), (1, 2, 3), (3, 1, 5), (3, 2, 7), (5, 1, 16), (3, 8, 9), (7, 40, 49), (7, 999, 49)):
        for relu in (False, True):
            call = shsa_call(Case(P=P, D=2, N=N, beyond=beyond, B=4, layout=layout, dtype=dtype, relu=relu))
            call.inputs["x"] = call.inputs["x"][1:]
            x2 = call.inputs["x"][:, P:]
            assert torch.equal(forward(call)[:, P:], x2.relu() if relu else x2)


# Layouts and strides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_of_any_alignment(dtype, layout):
    """Nothing but x itself may be as badly aligned as its type allows: parameters too."""
    for offset in (1, 2, 4):
        call = shsa_call(Case(P=24, N=16, beyond=8, dtype=dtype, layout=layout))

        def shifted(_, t, offset=offset):
            flat = torch.zeros(t.numel() + offset, dtype=t.dtype)
            return flat[offset:].as_strided(t.shape, t.stride()).copy_(t)

        check(call.map(shifted))


@pytest.mark.parametrize("strides", ["dense", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_keeps_the_memory_format(layout, strides):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert forward(shsa_call(Case(layout=layout, strides=strides))).is_contiguous(memory_format=memory_format)


def test_input_is_left_as_it_was():
    call = shsa_call(Case())
    before = {k: t.clone() for k, t in call.inputs.items()}
    forward(call)
    assert all(torch.equal(t, before[k]) for k, t in call.inputs.items())


# Non-finite values


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
@pytest.mark.parametrize("channel", [3, 30], ids=["in_attention", "beyond_attention"])
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_non_finite_input_stays_in_its_image(case, channel, relu):
    turns = zip(itertools.product((math.nan, math.inf, -math.inf), LAYOUTS), itertools.cycle(DTYPES), strict=False)
    for ((value, layout), dtype), norm in zip(turns, itertools.cycle(("affine", "none")), strict=False):
        call = shsa_call(replace(case, layout=layout, dtype=dtype, norm=norm, relu=relu))
        clean = forward(call)
        call.inputs["x"].flatten(2)[1, channel, 5] = value
        dirty = forward(call)
        others = torch.arange(case.B) != 1
        assert torch.equal(clean[others], dirty[others]), f"{value} in image 1, {dtype}, {layout}, {norm}"
        assert_same_non_finite(dirty, call.run("eager", ())["y"])


@pytest.mark.parametrize("parameter", ["norm_weight", "norm_bias", "qkv_weight", "qkv_bias"])
def test_non_finite_parameters_show_where_the_specification_has_them(parameter):
    P, D = 20, 8
    rows = {"query": 0, "key": D, "value": 2 * D} if parameter.startswith("qkv") else {"channel": 2}
    values = itertools.cycle((math.nan, math.inf, -math.inf))
    for value, row, N in zip(values, itertools.cycle(rows.values()), (1, 16, 49) * 3, strict=False):
        call = shsa_call(Case(P=P, D=D, N=N, relu=N == 16))
        call.inputs[parameter][row] = value
        assert_same_non_finite(forward(call), call.run("eager", ())["y"])


# Extremes


@pytest.mark.parametrize("N", [49, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype, N):
    case = Case(P=32, N=N, dtype=dtype, relu=False, B=8)
    inputs = shsa_call(case).to(torch.float64).inputs
    z = torch.nn.functional.group_norm(inputs["x"][:, : case.P], 1, inputs["norm_weight"], inputs["norm_bias"])
    q, k, _ = (inputs["qkv_weight"] @ z.flatten(2) + inputs["qkv_bias"][:, None]).split([case.D, case.D, case.P], 1)
    check(shsa_call(case, scale=1e4 / largest(q.mT @ k)))


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale):
    check(shsa_call(Case(P=32), scale=scale))


@pytest.mark.parametrize("norm_eps", [0.0, 0.1])
def test_norm_eps(norm_eps):
    check(shsa_call(Case(P=32), norm_eps=norm_eps))


@pytest.mark.parametrize("N", [1, 16, 49])
@pytest.mark.parametrize("value", [0.0, -3.7, 1e4])
def test_without_variance(value, N):
    P, D = 7, 4
    call = shsa_call(Case(P=P, D=D, N=N, beyond=0, bias=False, relu=False))
    call.inputs["x"].fill_(value)
    call.inputs["qkv_weight"][2 * D :] = torch.eye(P)
    y = forward(call)
    x, weight, bias = (call.inputs[k].double() for k in ("x", "norm_weight", "norm_bias"))
    z = torch.nn.functional.group_norm(x, 1, weight, bias)
    bound = 32 * 2.0**-24 * (1 + 1e-5**-0.5 * largest(x)) * largest(weight) + 9 * 2.0**-24 * largest(z)
    assert largest(y.double() - z) <= bound


# The same bits; test_cuda_memory.py has the order of threads


@pytest.mark.parametrize("make_call", [shsa_call, mixer_call], ids=["shsa", "mixer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SEVERAL, Case(P=20, D=8, N=130)], ids=str)
def test_same_bits_in_every_run(case, dtype, make_call):
    call = make_call(replace(case, dtype=dtype))
    y = forward(call)
    for _ in range(3):
        assert torch.equal(y, forward(call))
