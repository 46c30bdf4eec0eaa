"""``functional.shsa_mixer``: the whole residual layer for inference, against the specification (design section 6)."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from shvit_kernels import functional
from tests.support import native as native_tier
from tests.support.cases import CORNERS, STRIDES, Case, covering_set, mixer_call, named
from tests.support.numerics import assert_parity, expect

BACKEND = "cpu"
PLAIN = {"relu": (True,), "needs": ("all",), "P": (48, 7, 75), "D": (16, 1), "B": (2, 0, 1)}
COVER = named(covering_set(**PLAIN, N=(1, 16, 49, 257)))
SOME_CORNERS = {name: case for name, case in CORNERS.items() if case.N <= 1050 and case.relu}

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
each_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


@native_tier.needs_native
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in (COVER | SOME_CORNERS).items()])
def test_parity(case):
    call = mixer_call(case)
    expected = expect(call)
    with torch.no_grad():
        assert_parity(call.run(BACKEND, ()), expected)


@native_tier.needs_native
@each_dtype
@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES.keys())
def test_strange_strides_of_parameters(change, dtype):
    call = mixer_call(Case(dtype=dtype)).map(lambda k, t: t if k in ("x", "y") else change(t))
    for needs in ((), None):
        assert_parity(call.run(BACKEND, needs), expect(call))


@native_tier.needs_native
@each_layout
@each_dtype
@pytest.mark.parametrize("needs", [None, "x", "proj_weight", "qkv_weight"])
def test_gradients_go_through_shsa_and_the_projection(needs, dtype, layout):
    call = mixer_call(Case(N=16, B=3, dtype=dtype, layout=layout))
    results = call.run(BACKEND, None if needs is None else (needs,))
    assert set(results) == {"y", *(f"d{k}" for k in call.inputs if needs in (None, k))}
    assert_parity(results, expect(call))


@each_layout
@pytest.mark.parametrize("norm", ["affine", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_specification_is_attention_relu_projection_and_residual(bias, norm, layout):
    case = Case(P=20, D=8, dtype=torch.float64, layout=layout, bias=bias, norm=norm)
    call = mixer_call(case)
    inputs = dict(call.inputs)
    projection = [inputs.pop(name) for name in ("proj_weight", "proj_bias")]
    attended = functional.shsa(**inputs, qk_dim=case.D, relu=False, backend="eager")
    expected = inputs["x"] + F.conv2d(attended.clamp_min(0), projection[0][:, :, None, None], projection[1])
    torch.testing.assert_close(call.run("eager", ())["y"], expected, rtol=1e-12, atol=1e-12)


@native_tier.needs_native
@each_layout
@pytest.mark.parametrize("backend", ["eager", BACKEND])
def test_output_keeps_the_memory_format(backend, layout):
    call = mixer_call(Case(layout=layout))
    assert call.run(backend, ())["y"].stride() == call.inputs["x"].stride()


@native_tier.needs_native
def test_norm_eps():
    call = mixer_call(Case())
    call = replace(call, function=partial(call.function, norm_eps=0.5))
    assert_parity(call.run(BACKEND, ()), expect(call))


@native_tier.needs_native
def test_scale():
    call = mixer_call(Case())
    inputs = {**call.inputs, "qk_dim": 16, "backend": BACKEND}
    default, given, other = (functional.shsa_mixer(**inputs, scale=scale) for scale in (None, 16**-0.5, 1.0))
    assert torch.equal(default, given)
    assert not torch.equal(default, other)
