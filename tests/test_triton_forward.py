"""``shsa``, ``shsa_eval`` and ``shsa_mixer`` of the Triton kernels against the specification (design section 6).

Interpreted where no GPU is; on one, the same tests run compiled.
"""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shvit_kernels import backends, functional
from shvit_kernels.backends import triton
from tests.support import triton_tier
from tests.support.cases import Case, eval_call, named, shsa_call
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
from tests.support.triton import needs_triton

kernels = pytest.importorskip("shvit_kernels.backends.triton.forward", exc_type=ImportError)  # needs triton

pytestmark = needs_triton

BACKEND = "triton"
DEVICE = device_of(BACKEND)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("nchw", "channels_last")
OPERATORS = torch.ops.shvit_kernels

STAGES = named(
    [
        Case(P=P, N=N, beyond=C - P, B=B, dtype=dtype, layout=layout)
        for (C, P, N, B), dtype, layout in zip(
            [(224, 48, 49, 1), (320, 68, 16, 3), (308, 66, 49, 2), (448, 96, 16, 5), (352, 75, 49, 2), (336, 72, 64, 2)]
            * 2,
            itertools.cycle(DTYPES),
            itertools.cycle(LAYOUTS * 3 + LAYOUTS[::-1] * 3),
            strict=False,
        )
    ]
)
CORNERS = named(
    [
        Case(P=1, D=1, N=1, beyond=0, B=1),
        Case(P=1, D=1, N=1, beyond=1, B=5, dtype=torch.float16),
        Case(P=7, N=1, B=17, dtype=torch.bfloat16, layout="channels_last"),
        Case(P=32, N=16, beyond=1, B=3, norm="weight", bias=False),
        Case(P=130, D=64, N=16, norm="none", bias=False, relu=False, B=1, beyond=3),
        Case(P=66, D=24, N=36, beyond=0, dtype=torch.bfloat16, norm="none"),
        Case(P=75, D=8, N=25, beyond=6, dtype=torch.float16, layout="channels_last", relu=False),
        Case(strides="expanded"),
        Case(strides="sliced", dtype=torch.float16),
        Case(strides="permuted", layout="channels_last"),
        Case(autocast=True),
        Case(autocast=True, dtype=torch.bfloat16, layout="channels_last"),
        Case(P=48, N=65, B=1, beyond=5, dtype=torch.float16),
        Case(P=66, N=196, B=2, beyond=3, dtype=torch.bfloat16, layout="channels_last"),
        Case(P=72, N=256, B=1, beyond=1, norm="weight", bias=False),
        Case(P=75, N=257, B=2, beyond=3, dtype=torch.float16),
        Case(P=48, N=257, B=2, beyond=3, norm="none", layout="channels_last", relu=False),
        Case(P=66, N=1050, B=1, beyond=2, dtype=torch.bfloat16, layout="channels_last"),
        Case(P=200, D=24, N=36, beyond=3, dtype=torch.float16),
        Case(P=200, D=24, N=260, B=1, beyond=3, dtype=torch.bfloat16),
        Case(B=0),
        Case(B=0, N=257),
        Case(B=0, layout="channels_last", dtype=torch.bfloat16),
    ]
)
SEVERAL = [Case(P=20, D=8, N=N, beyond=17, B=3) for N in (16, 49, 70, 90)]
"""Of every kernel, with ``staged_early``: short; in tiles, keys and values projected in each block; staged."""


@pytest.fixture(autouse=True)
def larger_tiles(request, monkeypatch):
    """Float32 in few large tiles where it is interpreted, because many small ones take minutes; but see
    test_tiles_of_the_table."""
    if triton.INTERPRETED and "own_tiles" not in request.fixturenames:
        rule = kernels.table.tiled

        def tiled(P: int, N: int, itemsize: int):
            return rule(P, N, itemsize)._replace(queries=64, keys=64, channels=64)

        monkeypatch.setattr(kernels.table, "tiled", tiled)


@pytest.fixture
def own_tiles():
    """Tiles as the table has them."""


@pytest.fixture
def staged_early(monkeypatch):
    """Keys and values staged, and moments merged from parts, from fewer tokens on."""
    monkeypatch.setattr(kernels, "UNSTAGED_TOKENS", 80)
    monkeypatch.setattr(kernels, "PART", 32)


@pytest.fixture
def images_per_block(request, monkeypatch):
    """Several short images in a block."""
    rule = kernels.table.short
    monkeypatch.setattr(kernels.table, "short", lambda *shape: rule(*shape)._replace(images=request.param))


def by_name(cases: dict[str, Case]) -> list:
    return [pytest.param(case, id=name) for name, case in cases.items()]


def forward(call: Call) -> torch.Tensor:
    with torch.no_grad():
        return call.run(BACKEND, ())["y"]


def check(call: Call) -> None:
    assert_parity({"y": forward(call)}, expect(call))


@pytest.mark.parametrize("case", by_name(STAGES | CORNERS))
def test_parity(case):
    check(shsa_call(case))


@pytest.mark.parametrize("case", [Case(P=72, N=64), Case(P=20, D=8, N=270, beyond=1)], ids=str)
def test_tiles_of_the_table(case, own_tiles):
    check(shsa_call(case))


@pytest.mark.parametrize("images_per_block", [2, 4], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [1, 9, 16, 49])
def test_several_images_in_a_block(N, layout, images_per_block):
    call = shsa_call(Case(P=66, N=N, B=5, beyond=3, dtype=torch.float16, layout=layout))
    check(call)
    clean = forward(call)
    call.inputs["x"][1] = math.nan
    dirty = forward(call)
    assert dirty[1].isnan().all()
    assert torch.equal(clean[[0, 2, 3, 4]], dirty[[0, 2, 3, 4]])


@pytest.mark.parametrize("batch_norm", ["affine", "not_affine", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("case", [Case(dtype=torch.float16), Case(N=16, P=68, B=3, layout="channels_last")], ids=str)
def test_evaluation(case, bias, batch_norm):
    check(eval_call(replace(case, bias=bias), batch_norm))


@pytest.mark.parametrize("case", by_name(STAGES))
def test_evaluation_of_stages(case):
    check(eval_call(replace(case, bias=False)))


def test_statistics_of_another_type_are_read_as_they_are():
    call = eval_call(Case(dtype=torch.float16))
    widened = call.map(lambda k, t: t.float() if k.startswith("bn") else t)
    check(widened)


def test_a_variance_of_zero_stays_finite():
    call = eval_call(Case())
    call.inputs["bn_var"].zero_()
    check(call)


def settings(case: Case) -> tuple:
    return case.D, 1e-5, case.D**-0.5, case.relu, False, False


@pytest.mark.parametrize(
    "case",
    [
        *SEVERAL,
        Case(P=48, N=49, dtype=torch.float16),
        Case(P=75, N=64, norm="none", dtype=torch.bfloat16),
        Case(P=200, N=90, norm="none", dtype=torch.float16, B=1),
    ],
    ids=str,
)
def test_what_the_backward_reads(case, staged_early):
    call = shsa_call(case)
    inputs = [t if t is None else moved(t, DEVICE) for t in call.inputs.values()]
    _, *saved = OPERATORS.shsa_forward_triton(*inputs, *settings(case))
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
    tolerance = 64 * unit_roundoff(case.dtype) * largest(logits)
    for result, expected in zip(saved, (mean, rstd, row_max, row_sum), strict=True):
        assert result.dtype == torch.float32 and result.shape == expected.shape
        torch.testing.assert_close(result.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", [*SEVERAL, Case(N=64, dtype=torch.float16)], ids=str)
def test_statistics_that_are_given_are_read(case, staged_early):
    inputs = [t if t is None else moved(t, DEVICE) for t in shsa_call(case).inputs.values()]
    no_batch_norm = (None, None, None, None, 0.0)
    y, mean, rstd, *_ = kernels.attend(*inputs, *no_batch_norm, *settings(case), True)
    again, *saved = kernels.attend(*inputs, *no_batch_norm, *settings(case), True, mean, rstd)
    assert torch.equal(y, again)
    assert saved[0] is mean and saved[1] is rstd
    other = kernels.attend(*inputs, *no_batch_norm, *settings(case), False, mean + 1, rstd)
    assert not torch.equal(y, other[0]) and other[3] is None and other[4] is None


@pytest.mark.parametrize("tf32", [(True, False), (False, True), (True, True)])
def test_tf32_is_near(tf32):
    case = Case(P=72, N=64)
    call = shsa_call(case)
    inputs = [moved(t, DEVICE) for t in call.inputs.values()]
    y, *_ = OPERATORS.shsa_forward_triton(*inputs, *settings(case)[:4], *tf32)
    expected = expect(call)["y"].value
    assert largest(y.double().cpu() - expected) <= 16 * 2.0**-11 * largest(expected)


# Channels beyond P


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_beyond_the_partial_ones_pass_through(dtype, layout):
    """Runs of every alignment, shorter and longer than a vector, in images that start anywhere."""
    for P, beyond, N in ((1, 1, 1), (1, 2, 3), (3, 1, 5), (3, 2, 7), (5, 1, 16), (3, 8, 9), (7, 40, 49)):
        case = Case(P=P, D=2, N=N, beyond=beyond, B=4, layout=layout, dtype=dtype, relu=False)
        call = shsa_call(case)
        call.inputs["x"] = call.inputs["x"][1:]
        assert torch.equal(forward(call)[:, P:], call.inputs["x"][:, P:]), case


def test_channels_of_many_blocks_pass_through():
    for layout in LAYOUTS:
        call = shsa_call(Case(P=7, beyond=1000, N=49, layout=layout))
        assert torch.equal(forward(call)[:, 7:], call.inputs["x"][:, 7:].relu())


@pytest.mark.skipif(triton.INTERPRETED, reason="needs 9 GB of a GPU's memory")
def test_offsets_beyond_32_bits():
    B, C, P, side = 34000, 1024, 16, 8
    x = torch.zeros(B, C, side, side, dtype=torch.float16, device=DEVICE)
    x[-1] = torch.randn(C, side, side, device=DEVICE)
    weight = torch.randn(48, P, device=DEVICE, dtype=torch.float16)
    y = functional.shsa(x, weight, qk_dim=16, backend=BACKEND)[-1:]
    alone = functional.shsa(x[-1:], weight, qk_dim=16, backend=BACKEND)
    assert torch.equal(y, alone)


# The residual layer


def mixer_call(case: Case) -> Call:
    """``functional.shsa_mixer`` on the tensors of the case."""
    plain = shsa_call(case)
    C = case.P + case.beyond
    source = torch.Generator().manual_seed(1)
    projection = {
        "proj_weight": torch.randn(C, C, generator=source) / C**0.5,
        "proj_bias": torch.randn(C, generator=source) if case.bias else None,
    }
    inputs = plain.inputs | {k: t if t is None else t.to(case.parameter_dtype) for k, t in projection.items()}

    def function(**inputs) -> dict[str, torch.Tensor]:
        return {"y": functional.shsa_mixer(qk_dim=case.D, **inputs)}

    return replace(plain, function=function, inputs=inputs)


@pytest.mark.parametrize(
    "case",
    by_name(
        STAGES
        | named(
            [
                Case(P=1, D=1, N=1, beyond=0, B=3),
                Case(P=66, beyond=70, N=25, B=7, dtype=torch.float16, bias=False, norm="none"),
                Case(P=48, beyond=85, N=100, dtype=torch.bfloat16, layout="channels_last"),
                Case(P=20, D=8, N=257, beyond=17, layout="channels_last", strides="sliced"),
                Case(P=20, D=8, N=300, beyond=17, dtype=torch.float16, autocast=True),
                Case(B=0),
            ]
        )
    ),
)
def test_mixer(case):
    check(mixer_call(case))


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_non_finite_input_of_the_mixer_stays_in_its_image(case, staged_early):
    for dtype, value, channel in zip(DTYPES, (math.nan, math.inf, -math.inf), (3, 30, 3), strict=True):
        call = mixer_call(replace(case, dtype=dtype))
        clean = forward(call)
        call.inputs["x"].flatten(2)[1, channel, 5] = value
        dirty = forward(call)
        assert torch.equal(clean[0::2], dirty[0::2])
        assert_same_non_finite(dirty, call.run("eager", ())["y"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixer_keeps_the_memory_format_and_its_bits(layout):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    call = mixer_call(Case(layout=layout, dtype=torch.float16))
    y = forward(call)
    assert y.is_contiguous(memory_format=memory_format) and torch.equal(y, forward(call))


# Parameters of another type than x


def mixed(make, case: Case, dtype: torch.dtype) -> Call:
    """A call of the backend itself: ``functional`` takes parameters of another type under autocast only."""
    return make(case).map(lambda k, t: t if k in ("x", "y") else t.to(dtype))


def mixer_of_backend(case: Case) -> Call:
    settings = (case.D, 1e-5, case.D**-0.5, False, False)

    def function(backend: str, **inputs) -> dict[str, torch.Tensor]:
        return {"y": backends.get(backend).shsa_mixer(*inputs.values(), *settings)}

    return replace(mixer_call(case), function=function)


@pytest.mark.parametrize("make", [eval_call, mixer_of_backend])
@pytest.mark.parametrize("N", [16, 90])
@pytest.mark.parametrize("dtype, parameters", triton_tier.MIXED)
def test_parameters_of_another_type(dtype, parameters, N, make, staged_early):
    check(mixed(make, Case(P=20, D=8, N=N, beyond=17, dtype=dtype), parameters))


@pytest.mark.parametrize("N", [16, 90])
def test_weights_that_are_infinite_in_the_type_of_x(N, staged_early):
    """Products are in the type of x, as the specification has them."""
    case = Case(P=20, D=8, N=N, beyond=17, dtype=torch.float16, relu=False)
    for make, name in ((eval_call, "weight"), (mixer_of_backend, "proj_weight")):
        call = mixed(make, case, torch.bfloat16)
        call.inputs[name][25] = 1e5
        specified = call.run("eager", ())["y"]
        assert not specified.isfinite().all()
        assert_same_non_finite(forward(call), specified)


# Layouts and strides


@pytest.mark.parametrize("strides", ["dense", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_keeps_the_memory_format(layout, strides):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert forward(shsa_call(Case(layout=layout, strides=strides))).is_contiguous(memory_format=memory_format)


def test_input_is_left_as_it_was():
    call = shsa_call(Case())
    inputs = {k: moved(t, DEVICE) for k, t in call.inputs.items()}
    before = {k: t.clone() for k, t in inputs.items()}
    functional.shsa(**inputs, qk_dim=16, backend=BACKEND)
    assert all(torch.equal(t, before[k]) for k, t in inputs.items())


# Non-finite values


@pytest.mark.parametrize(
    "channel, relu", [(3, True), (3, False), (30, True)], ids=["in_attention", "without_relu", "beyond_attention"]
)
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_non_finite_input_stays_in_its_image(case, channel, relu, staged_early):
    turns = zip(
        (math.nan, math.inf, -math.inf), itertools.cycle(LAYOUTS), DTYPES, ("affine", "none", "none"), strict=False
    )
    for value, layout, dtype, norm in turns:
        call = shsa_call(replace(case, layout=layout, dtype=dtype, norm=norm, relu=relu))
        clean = forward(call)
        call.inputs["x"].flatten(2)[1, channel, 5] = value
        dirty = forward(call)
        assert torch.equal(clean[0::2], dirty[0::2]), f"{value} in image 1, {dtype}, {layout}, {norm}"
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


def test_relu_keeps_nan():
    call = shsa_call(Case(P=4, D=2, N=16, beyond=3, B=1))
    call.inputs["x"][0, 6, 1, 1] = math.nan
    y = forward(call)
    assert y[0, 6, 1, 1].isnan() and y.isnan().sum() == 1


# Extremes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype):
    case = Case(P=32, N=49, dtype=dtype, relu=False, B=8)
    call = shsa_call(case)
    inputs = call.to(torch.float64).inputs
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


# The same bits


@pytest.mark.parametrize("case", SEVERAL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_run_and_in_any_batch(dtype, case, staged_early):
    call = shsa_call(replace(case, dtype=dtype))
    y = forward(call)
    assert torch.equal(y, forward(call))
    for b in range(case.B):
        alone = call.map(lambda k, t, b=b: t[b : b + 1] if k in ("x", "y") else t)
        assert torch.equal(y[b : b + 1], forward(alone))


# The backend and its operators


@pytest.mark.parametrize(
    "architecture, known", [("gfx942:sramecc+:xnack-", "tf32"), ("gfx90a:sramecc+:xnack-", "ieee"), ("gfx1100", "ieee")]
)
def test_tf32_where_triton_knows_it(architecture, known, monkeypatch):
    monkeypatch.setattr(kernels.common, "_has_tf32", kernels.common._has_tf32.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=architecture))
    x = torch.empty(1)
    assert [kernels.common.precision(tf32, x) for tf32 in (True, False)] == ["tf32", "ieee"]  # of NVIDIA
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert [kernels.common.precision(tf32, x) for tf32 in (True, False)] == [known, "ieee"]


def test_wide_queries_are_refused_in_words():
    x = torch.empty(1, 8, 2, 2, device=DEVICE)
    assert triton.why_not(x, 4, 256) is None
    assert triton.why_not(x, 4, 257) == "it has kernels for qk_dim up to 256, not 257"


@pytest.mark.parametrize("qk_dim", [64, 65, 130])
def test_queries_of_any_width(qk_dim):
    check(shsa_call(Case(P=20, D=qk_dim, N=16, beyond=3, dtype=torch.float16)))


def test_a_broken_triton_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('no libtriton')")
    code = "import shvit_kernels.backends.triton as t; print(t.why_unavailable())"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "the package triton cannot be imported (ImportError: no libtriton)"

    def import_module(name):
        raise AttributeError("half a package")

    monkeypatch.setattr(triton, "import_module", import_module)
    assert triton._why_not_imported() == "the package triton cannot be imported (AttributeError: half a package)"


def test_operators_pass_opcheck():
    case = Case(P=5, D=2, N=4, beyond=3)
    inputs = [moved(t, DEVICE) for t in shsa_call(case).inputs.values()]
    torch.library.opcheck(OPERATORS.shsa_forward_triton.default, (*inputs, *settings(case)))
    inputs = [moved(t, DEVICE) for t in eval_call(case).inputs.values()]
    arguments = (*inputs, case.D, 1e-5, 1e-5, 0.5, True, False, False)
    torch.library.opcheck(OPERATORS.shsa_eval_triton.default, arguments)
    inputs = [moved(t, DEVICE) for t in mixer_call(case).inputs.values()]
    torch.library.opcheck(OPERATORS.shsa_mixer_triton.default, (*inputs, case.D, 1e-5, 0.5, False, False))


REFUSED = {
    "three_dimensions": ({"x": torch.randn(8, 3, 3)}, "got 3 dimensions"),
    "no_tokens": ({"x": torch.randn(2, 8, 0, 3)}, "at least one token"),
    "pdim_beyond_channels": ({"x": torch.randn(2, 4, 2, 2)}, "pdim must lie between 1 and 4, got 5"),
    "strided": ({"x": torch.randn(2, 8, 2, 4)[..., ::2]}, "NCHW-contiguous or channels_last"),
    "norm_weight": ({"norm_weight": torch.ones(4)}, "norm_weight must have 5 values, got 4"),
    "norm_bias": ({"norm_bias": torch.ones(6)}, "norm_bias must have 5 values, got 6"),
    "weight": ({"qkv_weight": torch.ones(8, 5)}, "weight must have 45 values, got 40"),
    "bias": ({"qkv_bias": torch.ones(8)}, "bias must have 9 values, got 8"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_operators_refuse_what_kernels_cannot_read(changes, message):
    case = Case(P=5, D=2, N=4, beyond=3)
    inputs = {k: moved(t, DEVICE) for k, t in (shsa_call(case).inputs | changes).items()}
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.shsa_forward_triton(*inputs.values(), *settings(case))
    projection = [torch.ones(8, 8, device=DEVICE), None]
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.shsa_mixer_triton(*inputs.values(), *projection, case.D, 1e-5, 0.5, False, False)


def test_evaluation_refuses_statistics_that_kernels_cannot_read():
    case = Case(P=5, D=2, N=4, beyond=3)
    inputs = {k: moved(t, DEVICE) for k, t in eval_call(case).inputs.items()}
    for changes, message in (
        ({"bn_var": None}, "bn_mean and bn_var must be given together"),
        ({"bn_mean": inputs["bn_mean"][1:]}, "bn_mean must have 9 values, got 8"),
        ({"bn_weight": inputs["bn_weight"][1:]}, "bn_weight must have 9 values, got 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPERATORS.shsa_eval_triton(*(inputs | changes).values(), case.D, 1e-5, 1e-5, 0.5, True, False, False)


def test_parameters_of_any_strides():
    call = mixer_call(Case(P=20, D=8, N=16, beyond=17, dtype=torch.float16))
    expected = forward(call)
    for name, t in call.inputs.items():
        if name != "x":
            call.inputs[name] = torch.stack([t, t], -1)[..., 0]
    assert torch.equal(forward(call), expected)


def test_types_that_it_has_no_kernels_for_are_refused_in_words():
    with pytest.raises(ValueError, match=r"backend 'triton' .* float16, bfloat16 and float32 and x is torch.float64"):
        shsa_call(Case(dtype=torch.float64)).run(BACKEND)


def test_other_devices_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    assert triton.why_not(torch.empty(1, 1, 1, 1)) == "it runs on cuda tensors and x is on cpu"


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(triton, "_missing", "the package triton is not installed")
    assert triton.why_unavailable() == triton.why_not(torch.empty(1, 1, 1, 1)) == "the package triton is not installed"


def test_old_devices_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    assert triton._why_not_on.__wrapped__(0) == "Triton needs compute capability 8.0 and Turing has 7.5"


@pytest.mark.skipif(not triton.INTERPRETED, reason="only interpreted kernels are left out of the automatic choice")
def test_interpreted_kernels_run_by_name_only(monkeypatch):
    call = shsa_call(Case(P=5, D=2, N=4, beyond=3, B=1))
    monkeypatch.setattr(kernels, "attend", None)
    with pytest.raises(TypeError):
        call.run(BACKEND, ())
    assert call.run(None, ())["y"].isfinite().all()
