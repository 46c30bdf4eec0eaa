"""``shsa_train``: moments, fold and attention as one operator, against the specification (design section 6)."""

import pytest
import torch

from tests.support import exact
from tests.support import native as native_tier
from tests.support.cases import CORNERS, Case, covering_set, named, train_call
from tests.support.numerics import assert_parity, expect, filled_with_nan

pytestmark = native_tier.needs_native

BACKEND = "cpu"
# Batch statistics of a handful of tokens are a matter of the layer's tests: their rounding knows no bound.
PLAIN = {"autocast": (False,), "N": (16, 49, 64, 196, 257, 1050)}
COVER = named(covering_set(**PLAIN))
SMALL_COVER = named(covering_set(**PLAIN | {"N": (16, 49, 257), "B": (1, 2), "strides": ("dense",)}))
SOME_CORNERS = {name: case for name, case in CORNERS.items() if 16 <= case.N <= 1050 and not case.autocast}
SOME_CORNERS["longest_short_image"] = Case(N=256)
NEEDED = {"qkv_weight": ("weight",), "qkv_bias": ("bn_weight", "bn_bias")}


def needed(case: Case) -> tuple[str, ...]:
    names = case.needed
    return tuple(name for k in names for name in NEEDED.get(k, (k,)))


def check(case: Case) -> None:
    call = train_call(case)
    expected = expect(call, exact.of_training(case))
    with torch.no_grad():
        forward = call.run(BACKEND, ())
    assert_parity(forward, expected)
    assert_parity(call.run(BACKEND, needed(case)), expected)


def by_name(cases: dict[str, Case]) -> list:
    return [pytest.param(case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize("case", by_name(COVER | SOME_CORNERS))
def test_parity(case):
    check(case)


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("case", by_name(SMALL_COVER | SOME_CORNERS))
def test_parity_of_every_variant(case, variant):
    with native_tier.instruction_set(variant):
        check(case)


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not_affine"])
@pytest.mark.parametrize("N", [6, 257])
def test_gradcheck(N, affine, layout, variant):
    case = Case(P=3, D=2, N=N, beyond=1, dtype=torch.float64, layout=layout, bias=affine, relu=False)
    call = train_call(case)
    leaves = {k: t.requires_grad_() for k, t in call.inputs.items() if t is not None}

    def function(*tensors):
        inputs = call.inputs | dict(zip(leaves, tensors, strict=True))
        return call.function(**inputs, backend=BACKEND)["y"]

    with native_tier.instruction_set(variant):
        assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=N > 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N", [(1, 1050), (5, 49), (17, 16)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_same_bits_for_any_number_of_threads_and_in_every_run(B, N, layout, dtype):
    native_tier.assert_same_bits(train_call(Case(B=B, N=N, layout=layout, dtype=dtype)), BACKEND)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_output_keeps_the_memory_format(layout):
    call = train_call(Case())
    call.inputs["x"] = call.inputs["x"].contiguous(memory_format=layout)
    results = call.run(BACKEND, ("x",))
    assert results["y"].is_contiguous(memory_format=layout) and results["dx"].is_contiguous(memory_format=layout)


def test_fewer_tokens_than_channels_stay_finite():
    for N, B in ((1, 2), (2, 1), (16, 1)):
        results = train_call(Case(P=96, N=N, B=B)).run(BACKEND)
        assert all(t.isfinite().all() for t in results.values())
        assert results["variance"].min() >= 0


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_images_stay_finite(value):
    call = train_call(Case(P=20))
    call.inputs["x"].fill_(value)
    assert all(t.isfinite().all() for t in call.run(BACKEND).values())


def test_channels_beyond_the_partial_ones_do_not_reach_the_statistics():
    call = train_call(Case(P=20, relu=False))
    before = call.run(BACKEND)
    call.inputs["x"][:, 20:] = torch.nan
    after = call.run(BACKEND)
    for name in ("mean", "variance", "dweight", "dnorm_weight", "dbn_weight", "dbn_bias"):
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(before["y"][:, :20], after["y"][:, :20])


def test_no_result_depends_on_uninitialised_memory():
    case = Case(P=75, B=3)
    with filled_with_nan():
        results = train_call(case).run(BACKEND)
    assert_parity(results, expect(train_call(case), exact.of_training(case)))
