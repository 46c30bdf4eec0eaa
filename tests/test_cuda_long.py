"""The CUDA kernels for any number of tokens against the specification (design section 6): more than 256 tokens, and
shorter images that do not fit on chip. On a GPU if the library was built for one; otherwise executed on the processor.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from shvit_kernels import ops
from tests.support import cuda
from tests.support.cases import Case, covering_set, eval_call, named, shsa_call, train_call
from tests.support.cuda import BACKEND
from tests.support.numerics import (
    Results,
    assert_parity,
    assert_same_non_finite,
    device_of,
    distance,
    expect,
    filled_with_nan,
    largest,
    moved,
    unit_roundoff,
)

pytestmark = cuda.needs_kernels

DEVICE = device_of(BACKEND)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("nchw", "channels_last")

COVER = covering_set(
    P=(48, 7, 75, 130),
    D=(16, 1, 24, 64),
    N=(257,),
    B=(1, 2),
    dtype=DTYPES,
    layout=LAYOUTS,
    strides=("dense", "sliced"),
    autocast=(False,),
)
CORNERS = [
    Case(P=72, N=1050, B=1, beyond=5, dtype=torch.float16),
    Case(P=20, D=8, N=1050, B=1, beyond=5),
    Case(P=96, N=273, B=1, beyond=352, dtype=torch.float16),
    Case(P=1, D=1, N=257, B=8, beyond=0),
    Case(P=97, D=33, N=320, B=1, beyond=3, dtype=torch.float16),  # the last tile is full, and columns are shared
    # Few tokens, but wide.
    Case(P=256, D=128, N=70, B=1, beyond=1),
    Case(P=256, D=16, N=49, B=2, beyond=2, layout="channels_last"),
    Case(P=200, D=128, N=1, B=2),
    Case(P=256, D=128, N=130, B=1, beyond=0, dtype=torch.bfloat16, layout="channels_last"),
]
# So many images that a block takes more than 16 queries: 32, 64 of the backward; and 32, 64 of the forward.
MANY = [Case(P=17, D=3, N=257, B=13, beyond=2, dtype=torch.float16), Case(P=8, D=2, N=257, B=26, beyond=0)]
MANY += [Case(P=100, D=8, N=257, B=13, beyond=0, dtype=torch.bfloat16)]
MANY_FORWARD = [Case(P=100, D=2, N=257, B=26, beyond=0, dtype=torch.float16, layout="channels_last")]
MANY_FORWARD += [Case(P=8, D=2, N=257, B=52, beyond=2, dtype=torch.float16)]
THREADED = [
    Case(P=20, D=8, N=257, B=1, beyond=3),
    Case(P=100, D=20, N=70, B=1, beyond=3),
    Case(P=8, D=2, N=257, B=13, beyond=1),
]


@pytest.fixture(scope="module", autouse=True)
def harness() -> Iterator:
    with cuda.kernels() as harness:
        yield harness


def operator(name: str):
    return ops.FAMILIES[cuda.FAMILY][name]


def check(call, needs=None) -> None:
    assert_parity(call.run(BACKEND, needs), expect(call))


@pytest.mark.parametrize("case", named(COVER + CORNERS + MANY).values(), ids=str)
def test_parity(case):
    check(shsa_call(case), case.needed)


@pytest.mark.parametrize("case", MANY_FORWARD, ids=str)
def test_parity_of_the_forward(case):
    check(shsa_call(case), ())


@pytest.mark.parametrize("dtype, layout", list(zip(DTYPES, (*LAYOUTS, "nchw"), strict=True)), ids=str)
def test_evaluation(dtype, layout):
    check(eval_call(Case(P=66, N=257, B=1, dtype=dtype, layout=layout)), ())


@pytest.mark.parametrize("dtype, layout", list(zip(DTYPES, ("channels_last", *LAYOUTS), strict=True)), ids=str)
def test_training(dtype, layout):
    call = train_call(Case(P=20, D=8, N=257, dtype=dtype, layout=layout))
    assert_parity(call.run(BACKEND), expect(call, exact=_exact_training))


def _exact_training(call) -> tuple[Results, dict[str, float]]:
    """The images share statistics: every result is of the whole batch, and so is its size."""
    results = call.run("eager")
    return results, {k: largest(t) for k, t in results.items()}


@pytest.mark.parametrize("dtype, relu", list(zip(DTYPES, (True, False, True), strict=True)), ids=str)
def test_operator_computes_what_is_asked_for_and_nothing_else(dtype, relu):
    case = Case(P=20, D=8, N=257, B=1, dtype=dtype, relu=relu)
    call = shsa_call(case)
    expected = expect(call)
    x, *parameters = (moved(t, DEVICE) for t in call.inputs.values())
    settings = (case.D, 1e-5, case.D**-0.5, relu, False, False)
    saved = operator("shsa_forward")(x, *parameters, *settings)
    x1, dy = x[:, : case.P].contiguous(), moved(call.upstream["y"], DEVICE)
    names = ("dx", "dnorm_weight", "dnorm_bias", "dqkv_weight", "dqkv_bias")
    for needs in itertools.product([False, True], repeat=5):
        grads = operator("shsa_backward")(dy, x1, *saved, *parameters, *settings, list(needs))
        for name, grad, need in zip(names, grads, needs, strict=True):
            assert need or grad.shape == (0,), f"{name} was not asked for"
        assert_parity({k: g.cpu() for k, g, need in zip(names, grads, needs, strict=True) if need}, expected)


# TF32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tf32_is_near_and_only_where_asked_for(layout):
    case = Case(P=20, D=8, N=257, B=1, layout=layout, relu=False)
    call = shsa_call(case)
    expected = expect(call)
    x, *parameters = (moved(t, DEVICE) for t in call.inputs.values())
    dy = moved(call.upstream["y"], DEVICE).contiguous(memory_format=ops.memory_format(x))
    x1 = x[:, : case.P].contiguous(memory_format=ops.memory_format(x))
    names = ("y", "dx", "dnorm_weight", "dnorm_bias", "dqkv_weight", "dqkv_bias")
    runs = []
    for tf32 in itertools.product((False, True), repeat=2):
        settings = (case.D, 1e-5, case.D**-0.5, case.relu, *tf32)
        saved = operator("shsa_forward")(x, *parameters, *settings)
        grads = operator("shsa_backward")(dy, x1, *saved, *parameters, *settings, [True] * 5)
        results = {k: t.cpu() for k, t in zip(names, (saved[0], *grads), strict=True)}
        if not any(tf32):
            assert_parity(results, expected)
        for name, result in results.items():
            truth = expected[name].value
            assert largest(result.double() - truth) <= 2.0**-11 * 32 * largest(truth), f"{name} with {tf32}"
        runs.append(results)
    for one, other in itertools.combinations(runs, 2):
        assert all(not torch.equal(one[k], other[k]) for k in ("y", "dqkv_weight"))


# Non-finite values


@pytest.mark.parametrize("dtype, layout", list(zip(DTYPES, (*LAYOUTS, "nchw"), strict=True)), ids=str)
@pytest.mark.parametrize("channel", [3, 30], ids=["in_attention", "beyond_attention"])
def test_non_finite_input_stays_in_its_image(channel, dtype, layout):
    values = (math.nan, math.inf, -math.inf)
    for value, norm, relu in zip(values, ("affine", "none", "none"), (True, False, True), strict=True):
        call = shsa_call(Case(P=20, D=8, N=257, beyond=17, B=3, layout=layout, relu=relu, dtype=dtype, norm=norm))
        clean = call.run(BACKEND, ("x",))
        call.inputs["x"].flatten(2)[1, channel, 5] = value
        dirty = call.run(BACKEND, ("x",))
        for name in clean:
            for image in (0, 2):
                assert torch.equal(clean[name][image], dirty[name][image]), f"{name} of image {image}, {value}"
        assert_same_non_finite(dirty["y"], call.run("eager", ())["y"])


def test_non_finite_gradient_stays_in_its_image():
    for value in (math.nan, math.inf, -math.inf):
        call = shsa_call(Case(P=20, D=8, N=257, B=3, relu=False))
        clean = call.run(BACKEND, ("x",))
        call.upstream["y"].flatten(2)[1, 3, 2] = value
        dirty = call.run(BACKEND, ("x",))
        assert not dirty["dx"][1].isfinite().all()
        for image in (0, 2):
            assert torch.equal(clean["dx"][image], dirty["dx"][image])


@pytest.mark.parametrize("parameter", ["norm_weight", "norm_bias", "qkv_weight", "qkv_bias"])
def test_non_finite_parameters_show_where_the_specification_has_them(parameter):
    P, D = 20, 8
    rows = {"query": 0, "key": D, "value": 2 * D} if parameter.startswith("qkv") else {"channel": 2}
    for value, row in itertools.product((math.nan, math.inf, -math.inf), rows.values()):
        call = shsa_call(Case(P=P, D=D, N=257, B=1, relu=row == 0))
        call.inputs[parameter][row] = value
        assert_same_non_finite(call.run(BACKEND, ())["y"], call.run("eager", ())["y"])


def test_keys_of_minus_infinity_count_for_nothing():
    """Keys that overflow float16 while their values do not, in whole tiles at the beginning, in between and nowhere."""
    case = Case(P=4, D=1, N=300, B=1, norm="none", relu=False, beyond=0, dtype=torch.float16)
    for keys in (slice(0, 64), slice(0, 200), slice(100, 260), slice(0, 299)):
        call = shsa_call(case, scale=1.0)
        x, weight, bias = (call.inputs[k] for k in ("x", "qkv_weight", "qkv_bias"))
        weight[:2], bias[:2] = 0.0, torch.tensor([1.0, 0.0])
        weight[1, 0] = 300.0
        weight[2:, 0] = 0.0
        x.flatten(2)[0, 0] = torch.linspace(-0.01, 0.01, case.N)
        x.flatten(2)[0, 0, keys] = -300.0
        y, plain = (call.run(backend, ())["y"] for backend in (BACKEND, "eager"))
        truth = call.to(torch.float64).run("eager", ())["y"]
        bound = 2 * distance(plain, truth) + 8 * unit_roundoff(case.dtype) * largest(truth)
        assert distance(y, truth) <= bound


def test_no_result_depends_on_uninitialised_memory():
    """Fresh memory is filled with NaN, so a padding lane or an unwritten sum would show."""
    with filled_with_nan(DEVICE):
        for case in (Case(P=75, D=24, N=257, B=1, beyond=5), Case(P=130, D=9, N=70, dtype=torch.bfloat16)):
            check(shsa_call(case))


# Extremes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype):
    case = Case(P=20, D=4, N=257, B=8, dtype=dtype, relu=False)
    inputs = shsa_call(case).to(torch.float64).inputs
    z = torch.nn.functional.group_norm(inputs["x"][:, : case.P], 1, inputs["norm_weight"], inputs["norm_bias"])
    q, k, _ = (inputs["qkv_weight"] @ z.flatten(2) + inputs["qkv_bias"][:, None]).split([case.D, case.D, case.P], 1)
    call = shsa_call(case, scale=1e4 / largest(q.mT @ k))
    results = call.run(BACKEND)
    assert all(t.isfinite().all() for t in results.values())
    assert_parity({"y": results["y"]}, expect(call))


def test_one_key_far_above_all_others_in_the_last_block():
    """The row maximum comes last, after other keys were summed."""
    case = Case(P=8, D=1, N=1050, norm="none", relu=False, B=1)
    call = shsa_call(case, scale=1.0)
    x, weight, bias = (call.inputs[k] for k in ("x", "qkv_weight", "qkv_bias"))
    weight[:2], bias[:2] = 0.0, torch.tensor([100.0, 0.0])
    weight[1, 0] = 1.0
    x.flatten(2)[0, 0] = torch.linspace(-100, 100, case.N)
    check(call)


def test_all_logits_far_below_zero():
    """The padding of a tile, whose logits are zero, would then outweigh all keys, which have about -140.

    Not further below: at -280, where eager's error happens to be small, dx would be 2.4 times beyond its bound if
    nothing but the exact logits were rounded to float32.
    """
    case = Case(P=20, D=8, N=257)
    call = shsa_call(case)
    call.inputs["qkv_bias"][: case.D] += 7.0
    call.inputs["qkv_bias"][case.D : 2 * case.D] -= 7.0
    check(call)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale):
    check(shsa_call(Case(P=20, N=257, B=1), scale=scale))


@pytest.mark.parametrize("value", [0.0, -3.7, 1e4])
def test_without_variance(value):
    P, D = 7, 4
    call = shsa_call(Case(P=P, D=D, N=257, beyond=0, bias=False, relu=False))
    call.inputs["x"].fill_(value)
    call.inputs["qkv_weight"][2 * D :] = torch.eye(P)
    results = call.run(BACKEND)
    assert all(t.isfinite().all() for t in results.values())
    x, weight, bias = (call.inputs[k].double() for k in ("x", "norm_weight", "norm_bias"))
    z = torch.nn.functional.group_norm(x, 1, weight, bias)
    bound = 32 * 2.0**-24 * (1 + 1e-5**-0.5 * largest(x)) * largest(weight) + 9 * 2.0**-24 * largest(z)
    assert largest(results["y"].double() - z) <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_large_mean(layout):
    """Parts of an image have different means, far from zero."""
    call = shsa_call(Case(P=30, D=4, N=300, layout=layout))
    call.inputs["x"] += 100.0 * torch.arange(300.0).reshape(call.inputs["x"].shape[2:])
    check(call, ())


def test_empty_batch():
    results = shsa_call(Case(N=257, B=0)).run(BACKEND)
    assert results["y"].shape == (0, 85, 257, 1)
    assert all(not t.any() for t in results.values())


# The same bits


@pytest.mark.parametrize("case", THREADED[:2], ids=str)
def test_same_bits_with_and_without_gradients(case):
    call = shsa_call(case)
    assert torch.equal(call.run(BACKEND, ())["y"], call.run(BACKEND, case.needed)["y"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_same_bits_in_every_run(case, dtype):
    call = shsa_call(replace(case, dtype=dtype))
    first, second = call.run(BACKEND), call.run(BACKEND)
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@cuda.only_hosted
@pytest.mark.parametrize("dtype, layout", list(zip(DTYPES, (*LAYOUTS, "nchw"), strict=True)), ids=str)
@pytest.mark.parametrize("case", THREADED[:2], ids=str)
def test_same_bits_in_every_order_of_threads(harness, case, dtype, layout):
    call = shsa_call(replace(case, dtype=dtype, layout=layout))
    first = call.run(BACKEND)
    for order in harness.thread_orders():
        for name, t in call.run(BACKEND).items():
            assert torch.equal(t, first[name]), f"{name}, {order}"


@cuda.only_hosted
@pytest.mark.parametrize("dtype, layout", [(torch.float16, "nchw"), (torch.float32, "channels_last")], ids=str)
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_barriers_order_all_accesses(harness, case, dtype, layout):
    with harness.finding_races():
        shsa_call(replace(case, dtype=dtype, layout=layout)).run(BACKEND)
