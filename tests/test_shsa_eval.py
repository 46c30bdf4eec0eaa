"""``shsa_eval``: fold of the running statistics and attention as one operator, against the specification."""

import itertools

import pytest
import torch

from tests.support import native as native_tier
from tests.support.cases import BATCH_NORMS, CORNERS, Case, covering_set, eval_call, named
from tests.support.numerics import assert_parity, expect

pytestmark = native_tier.needs_native

BACKEND = "cpu"
PLAIN = {"autocast": (False,), "needs": ("all",)}  # autocast folds before the operator
COVER = named(covering_set(**PLAIN))
SMALL_COVER = named(covering_set(**PLAIN, N=(1, 16, 49, 257), B=(0, 1, 2), strides=("dense",)))
SOME_CORNERS = {name: case for name, case in CORNERS.items() if not case.autocast}

each_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
each_batch_norm = pytest.mark.parametrize("batch_norm", BATCH_NORMS, ids="batch_norm_{}".format)


def in_turn(cases: dict[str, Case]) -> list:
    """Every case with one of the batch normalisations, each of them in its turn."""
    turns = zip(cases.items(), itertools.cycle(BATCH_NORMS), strict=False)
    return [pytest.param(case, kind, id=f"{name}-batch_norm_{kind}") for (name, case), kind in turns]


def check(case: Case, batch_norm: str) -> None:
    call = eval_call(case, batch_norm)
    assert_parity(call.run(BACKEND, ()), expect(call))


@pytest.mark.parametrize("case, batch_norm", in_turn(COVER | SOME_CORNERS))
def test_parity(case, batch_norm):
    check(case, batch_norm)


@each_batch_norm
@each_layout
@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("N", [49, 257])
def test_parity_of_every_fold(N, bias, dtype, layout, batch_norm):
    check(Case(N=N, bias=bias, dtype=dtype, layout=layout), batch_norm)


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("case, batch_norm", in_turn(SMALL_COVER))
def test_parity_of_every_variant(case, batch_norm, variant):
    with native_tier.instruction_set(variant):
        check(case, batch_norm)


@each_batch_norm
@each_layout
@each_dtype
@pytest.mark.parametrize("needs", ["all", "x", "weight", "bn_mean"])
def test_gradients_go_through_the_fold_of_eager(needs, dtype, layout, batch_norm):
    call = eval_call(Case(N=16, B=3, dtype=dtype, layout=layout), batch_norm)
    assert_parity(call.run(BACKEND, None if needs == "all" else (needs,)), expect(call))


@each_batch_norm
def test_gradcheck(batch_norm):
    case = Case(P=3, D=2, N=6, beyond=1, dtype=torch.float64, relu=False)
    call = eval_call(case, batch_norm)
    leaves = {k: t.requires_grad_() for k, t in call.inputs.items() if t is not None}

    def function(*tensors):
        inputs = call.inputs | dict(zip(leaves, tensors, strict=True))
        return call.function(**inputs, backend=BACKEND)["y"]

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@each_dtype
@each_layout
@pytest.mark.parametrize("B, N", [(1, 1050), (5, 49), (17, 16)])
def test_same_bits_for_any_number_of_threads_and_in_every_run(B, N, layout, dtype):
    call = eval_call(Case(B=B, N=N, layout=layout, dtype=dtype))
    runs = []
    for count in (1, 1, 2, 2):
        with native_tier.threads(count):
            runs.append(call.run(BACKEND, ())["y"])
    for y in runs[1:]:
        assert torch.equal(y, runs[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_output_keeps_the_memory_format(layout):
    call = eval_call(Case())
    call.inputs["x"] = call.inputs["x"].contiguous(memory_format=layout)
    assert call.run(BACKEND, ())["y"].is_contiguous(memory_format=layout)


def test_a_variance_of_zero_stays_finite():
    call = eval_call(Case())
    call.inputs["bn_var"].zero_()
    assert_parity(call.run(BACKEND, ()), expect(call))
