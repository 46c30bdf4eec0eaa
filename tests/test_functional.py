"""The public functions: what they refuse, with which words, and which backend they choose."""

import itertools
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import shvit_kernels
from shvit_kernels import backends, functional, use_backend
from shvit_kernels.backends import cpu, eager, native
from tests.support import native as native_tier
from tests.support.numerics import tf32

P, D, C = 10, 3, 14
O = 2 * D + P


def arguments(**changes) -> dict:
    """A valid call of ``shsa``, changed."""
    valid = {
        "x": torch.randn(2, C, 4, 4),
        "qkv_weight": torch.randn(O, P),
        "qkv_bias": torch.randn(O),
        "qk_dim": D,
        "norm_weight": torch.ones(P),
        "norm_bias": torch.zeros(P),
    }
    return valid | changes


def mixer_arguments(**changes) -> dict:
    """A valid call of ``shsa_mixer``, changed."""
    return arguments(proj_weight=torch.randn(C, C), proj_bias=torch.randn(C)) | changes


def moments_arguments(**changes) -> dict:
    valid = {"x": torch.randn(2, C, 4, 4), "norm_weight": torch.ones(P), "norm_bias": torch.zeros(P), "pdim": P}
    return valid | changes


# What is wrong, the error, and the words that it must contain: the argument and both values.
BAD_SHSA = {
    "x_of_rank_3": ({"x": torch.randn(C, 4, 4)}, ValueError, ["x", "4 dimensions", "3", "(14, 4, 4)"]),
    "x_of_rank_5": ({"x": torch.randn(1, 2, C, 4, 4)}, ValueError, ["x", "4 dimensions", "5"]),
    "x_no_tensor": ({"x": [[1.0]]}, TypeError, ["x", "tensor", "list"]),
    "x_of_integers": ({"x": torch.ones(2, C, 4, 4, dtype=torch.int64)}, TypeError, ["x", "float32", "int64"]),
    "x_of_booleans": ({"x": torch.ones(2, C, 4, 4, dtype=torch.bool)}, TypeError, ["x", "float32", "bool"]),
    "x_complex": ({"x": torch.ones(2, C, 4, 4, dtype=torch.complex64)}, TypeError, ["x", "float32", "complex64"]),
    "x_without_tokens": ({"x": torch.randn(2, C, 0, 4)}, ValueError, ["x", "height 0", "width 4"]),
    "pdim_beyond_channels": ({"x": torch.randn(2, P - 1, 4, 4)}, ValueError, ["pdim", "9", "10"]),
    "scale_a_tensor": ({"scale": torch.ones(1)}, TypeError, ["scale", "number", "(1,)"]),
    "weight_no_tensor": ({"qkv_weight": None}, TypeError, ["qkv_weight", "tensor", "NoneType"]),
    "weight_of_a_convolution": (
        {"qkv_weight": torch.randn(O, P, 1, 1)},
        ValueError,
        ["qkv_weight", "2 dimensions", "(16, 10, 1, 1)"],
    ),
    "weight_with_too_few_rows": (
        {"qkv_weight": torch.randn(O - 1, P)},
        ValueError,
        ["qkv_weight", "(16, 10)", "(15, 10)"],
    ),
    "weight_transposed": ({"qkv_weight": torch.randn(P, O)}, ValueError, ["16"]),
    "weight_without_columns": ({"qkv_weight": torch.randn(2 * D, 0)}, ValueError, ["pdim", "14", "0"]),
    "weight_of_integers": (
        {"qkv_weight": torch.ones(O, P, dtype=torch.int32)},
        TypeError,
        ["qkv_weight", "int32", "float32"],
    ),
    "bias_too_long": ({"qkv_bias": torch.randn(O + 1)}, ValueError, ["qkv_bias", "(16,)", "(17,)"]),
    "bias_as_matrix": ({"qkv_bias": torch.randn(O, 1)}, ValueError, ["qkv_bias", "(16,)", "(16, 1)"]),
    "bias_no_tensor": ({"qkv_bias": 0.0}, TypeError, ["qkv_bias", "tensor", "float"]),
    "norm_weight_too_short": ({"norm_weight": torch.ones(P - 1)}, ValueError, ["norm_weight", "(10,)", "(9,)"]),
    "norm_bias_too_long": ({"norm_bias": torch.ones(C)}, ValueError, ["norm_bias", "(10,)", "(14,)"]),
    "norm_bias_alone": ({"norm_weight": None}, ValueError, ["norm_bias", "norm_weight", "None"]),
    "mixed_dtypes": (
        {"qkv_weight": torch.randn(O, P, dtype=torch.float64)},
        TypeError,
        ["qkv_weight", "float64", "float32"],
    ),
    "mixed_dtype_of_x": ({"x": torch.randn(2, C, 4, 4).bfloat16()}, TypeError, ["qkv_weight", "float32", "bfloat16"]),
    "mixed_dtype_of_norm": ({"norm_bias": torch.zeros(P).bfloat16()}, TypeError, ["norm_bias", "bfloat16", "float32"]),
    "mixed_devices": ({"qkv_weight": torch.randn(O, P, device="meta")}, ValueError, ["qkv_weight", "meta", "cpu"]),
    "mixed_device_of_norm": ({"norm_weight": torch.ones(P, device="meta")}, ValueError, ["norm_weight", "meta", "cpu"]),
    "qk_dim_0": ({"qk_dim": 0}, ValueError, ["qk_dim", "at least 1", "0"]),
    "qk_dim_negative": ({"qk_dim": -2}, ValueError, ["qk_dim", "at least 1", "-2"]),
    "qk_dim_float": ({"qk_dim": 3.0}, TypeError, ["qk_dim", "int", "3.0"]),
    "qk_dim_bool": ({"qk_dim": True}, TypeError, ["qk_dim", "int", "True"]),
    "qk_dim_of_another_weight": ({"qk_dim": D + 1}, ValueError, ["qkv_weight", "(18, 10)", "(16, 10)"]),
    "backend_unknown": ({"backend": "eagre"}, ValueError, ["backend", "'eagre'", "'eager'", "'cpu'"]),
}
BAD_MOMENTS = {
    "x_of_rank_3": ({"x": torch.randn(C, 4, 4)}, ValueError, ["x", "4 dimensions", "3"]),
    "x_of_integers": ({"x": torch.ones(2, C, 4, 4, dtype=torch.int64)}, TypeError, ["x", "float32", "int64"]),
    "pdim_beyond_channels": ({"pdim": C + 1}, ValueError, ["pdim", "14", "15"]),
    "pdim_0": ({"pdim": 0}, ValueError, ["pdim", "14", "0"]),
    "pdim_float": ({"pdim": 10.0}, TypeError, ["pdim", "int", "10.0"]),
    "norm_weight_too_short": ({"norm_weight": torch.ones(P - 1)}, ValueError, ["norm_weight", "(10,)", "(9,)"]),
    "norm_bias_alone": ({"norm_weight": None}, ValueError, ["norm_bias", "norm_weight", "None"]),
    "mixed_dtypes": ({"norm_weight": torch.ones(P).double()}, TypeError, ["norm_weight", "float64", "float32"]),
    "mixed_devices": ({"norm_bias": torch.ones(P, device="meta")}, ValueError, ["norm_bias", "meta", "cpu"]),
    "backend_unknown": ({"backend": "cuba"}, ValueError, ["backend", "'cuba'", "known are"]),
}

BAD_MIXER = BAD_SHSA | {
    "proj_weight_no_tensor": ({"proj_weight": None}, TypeError, ["proj_weight", "tensor [C, C]", "NoneType"]),
    "proj_weight_of_a_convolution": (
        {"proj_weight": torch.randn(C, C, 1, 1)},
        ValueError,
        ["proj_weight", "(14, 14)", "(14, 14, 1, 1)"],
    ),
    "proj_weight_of_the_partial_channels": (
        {"proj_weight": torch.randn(P, P)},
        ValueError,
        ["proj_weight", "(14, 14)", "(10, 10)"],
    ),
    "proj_bias_too_short": ({"proj_bias": torch.randn(C - 1)}, ValueError, ["proj_bias", "(14,)", "(13,)"]),
    "proj_bias_no_tensor": ({"proj_bias": 1.0}, TypeError, ["proj_bias", "tensor", "float"]),
    "mixed_dtype_of_proj": (
        {"proj_weight": torch.randn(C, C).double()},
        TypeError,
        ["proj_weight", "float64", "float32"],
    ),
    "mixed_device_of_proj": (
        {"proj_bias": torch.randn(C, device="meta")},
        ValueError,
        ["proj_bias", "meta", "cpu"],
    ),
}


def assert_refused(function, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        function()
    assert type(caught.value) is error
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("changes, error, words", BAD_SHSA.values(), ids=BAD_SHSA.keys())
def test_shsa_refuses(changes, error, words):
    assert_refused(lambda: functional.shsa(**arguments(**changes)), error, words)


@pytest.mark.parametrize("changes, error, words", BAD_MOMENTS.values(), ids=BAD_MOMENTS.keys())
def test_partial_moments_refuses(changes, error, words):
    assert_refused(lambda: functional.partial_moments(**moments_arguments(**changes)), error, words)


@pytest.mark.parametrize("changes, error, words", BAD_MIXER.values(), ids=BAD_MIXER.keys())
def test_shsa_mixer_refuses(changes, error, words):
    assert_refused(lambda: functional.shsa_mixer(**mixer_arguments(**changes)), error, words)


LAYER = shvit_kernels.SHSA
BAD_LAYERS = {
    "qk_dim_0": (lambda: LAYER(C, 0, P), ["qk_dim", "0"]),
    "pdim_beyond_dim": (lambda: LAYER(C, D, C + 1), ["pdim", "14", "15"]),
    "pdim_0": (lambda: LAYER(C, D, 0), ["pdim", "14", "0"]),
    "input_of_other_channels": (lambda: LAYER(C, D, P)(torch.randn(2, C + 1, 4, 4)), ["x", "14", "(2, 15, 4, 4)"]),
    "input_of_rank_3": (lambda: LAYER(C, D, P)(torch.randn(C, 4, 4)), ["x", "14", "(14, 4, 4)"]),
    "input_without_tokens": (lambda: LAYER(C, D, P)(torch.randn(2, C, 0, 4)), ["x", "at least 1", "(2, 14, 0, 4)"]),
}


@pytest.mark.parametrize("make, words", BAD_LAYERS.values(), ids=BAD_LAYERS.keys())
def test_layer_refuses(make, words):
    assert_refused(make, ValueError, words)


def test_valid_arguments_are_accepted():
    y = functional.shsa(**arguments())
    assert y.shape == (2, C, 4, 4)
    count, mean, cov = functional.partial_moments(**moments_arguments())
    assert (count, mean.shape, cov.shape) == (32, (P,), (P, P))
    assert functional.shsa_mixer(**mixer_arguments()).shape == (2, C, 4, 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("beyond", [C - P, 0])
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=native_tier.needs_native)])
def test_output_keeps_the_memory_format(backend, beyond, layout):
    x = torch.randn(2, P + beyond, 4, 4).contiguous(memory_format=layout)
    assert functional.shsa(**arguments(x=x, backend=backend)).stride() == x.stride()


def test_mixed_dtypes_are_accepted_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.shsa(**arguments(x=torch.randn(2, C, 4, 4).bfloat16()))
        assert y.dtype == torch.bfloat16
        assert functional.shsa(**arguments()).dtype == torch.float32
        # Integers are no parameters, autocast or not.
        with pytest.raises(TypeError, match=r"qkv_bias.*int64"):
            functional.shsa(**arguments(qkv_bias=torch.ones(O, dtype=torch.int64)))


@pytest.mark.parametrize("of_conv, of_matmul", [("tf32", "ieee"), ("ieee", "tf32")])
def test_tf32_of_the_projection_is_that_of_convolutions(of_conv, of_matmul):
    x = SimpleNamespace(is_cuda=True, dtype=torch.float32)  # there need not be a GPU
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        conv.fp32_precision, matmul.fp32_precision = of_conv, of_matmul
        assert functional.tf32(x) == (of_conv == "tf32", of_matmul == "tf32")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


# Choice of the backend


class Recorder:
    """Stands in for a backend and remembers that it was asked."""

    def __init__(self, name: str, reason: str | None = None):
        self.name, self.reason, self.calls = name, reason, 0
        self.devices, self.most = ("cpu",), P

    def why_unavailable(self) -> str | None:
        return self.reason

    def why_not(self, x: torch.Tensor, pdim: int = 1, qk_dim: int = 1) -> str | None:
        return self.reason if pdim <= self.most and qk_dim <= self.most else f"it takes {self.most} at most"

    def shsa(self, x: torch.Tensor, *_) -> torch.Tensor:
        self.calls += 1
        return x

    shsa_mixer = shsa_eval = shsa

    def partial_moments(self, x: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return x, x


@pytest.fixture
def recorders(monkeypatch):
    """Three backends, of which the first cannot run anything."""
    reasons = {"broken": "it is broken on purpose", "first": None, "second": None}
    made = {name: Recorder(name, reason) for name, reason in reasons.items()}
    monkeypatch.setattr(backends, "BACKENDS", made)
    monkeypatch.setattr(backends._override, "name", None)
    return made


def chosen(recorders: dict[str, Recorder], **changes) -> str:
    before = {name: r.calls for name, r in recorders.items()}
    functional.shsa(**arguments(**changes))
    (name,) = [name for name, r in recorders.items() if r.calls > before[name]]
    return name


def test_first_backend_that_can_run_is_chosen(recorders):
    assert chosen(recorders) == "first"


def test_named_backend_is_chosen(recorders):
    assert chosen(recorders, backend="second") == "second"


def test_named_backend_never_falls_back(recorders):
    with pytest.raises(ValueError, match="backend 'broken' cannot run this call: it is broken on purpose"):
        functional.shsa(**arguments(backend="broken"))
    with (
        use_backend("broken"),
        pytest.raises(ValueError, match="'broken' cannot run this call: it is broken on purpose"),
    ):
        functional.shsa(**arguments())


def test_a_backend_that_refuses_the_sizes_leaves_the_call_to_the_next(recorders):
    calls = {
        "shsa": lambda **named: functional.shsa(**arguments(), **named),
        "partial_moments": lambda **named: functional.partial_moments(**moments_arguments(), **named),
        "shsa_mixer": lambda **named: functional.shsa_mixer(**mixer_arguments(), **named),
    }
    for call in calls.values():
        recorders["first"].most = P - 1
        before = recorders["second"].calls
        call()
        assert recorders["second"].calls == before + 1
        with pytest.raises(ValueError, match="backend 'first' cannot run this call: it takes 9 at most"):
            call(backend="first")
    layer, before = shvit_kernels.SHSA(C, D, P).eval(), recorders["second"].calls
    with torch.no_grad():
        layer(torch.randn(2, C, 4, 4))
    assert recorders["second"].calls == before + 1
    assert recorders["first"].calls == 0


def test_a_backend_is_chosen_for_the_devices_that_it_names(recorders):
    recorders["first"].devices = ("cuda",)
    assert chosen(recorders) == "second"
    assert chosen(recorders, backend="first") == "first"


def test_use_backend_nests_and_ends(recorders):
    with use_backend("second"):
        assert chosen(recorders) == "second"
        with use_backend("first"):
            assert chosen(recorders) == "first"
            assert chosen(recorders, backend="second") == "second"
        assert chosen(recorders) == "second"
    assert chosen(recorders) == "first"


def test_use_backend_ends_with_an_error(recorders):
    with pytest.raises(ZeroDivisionError), use_backend("second"):
        raise ZeroDivisionError
    assert chosen(recorders) == "first"


def test_use_backend_may_be_entered_again(recorders):
    second = use_backend("second")
    for _ in range(2):
        with second:
            assert chosen(recorders) == "second"
        assert chosen(recorders) == "first"
    with second, use_backend("first"), second:
        assert chosen(recorders) == "second"
    assert backends.chosen_name(None) is None


def test_use_backend_is_of_its_thread(recorders):
    inside = threading.Event()
    asked = threading.Event()
    names = {}

    def other():
        inside.wait(10)
        names["other"] = chosen(recorders)
        asked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend("second"):
        inside.set()
        assert asked.wait(10)
    thread.join()
    assert names["other"] == "first"


def test_one_use_backend_in_two_threads(recorders):
    """The block that ends first restores what its own thread had."""
    shared, entered, ended = use_backend("second"), threading.Event(), threading.Event()
    names = []

    def other():
        with use_backend("first"):
            with shared:
                entered.set()
                ended.wait(10)
            names.append(chosen(recorders))

    thread = threading.Thread(target=other)
    with shared:
        thread.start()
        assert entered.wait(10)
    names.append(backends.chosen_name(None))
    ended.set()
    thread.join()
    assert names == [None, "first"]


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(
        ValueError, match=r"unknown backend 'eagr': did you mean 'eager'\? known are 'cuda', 'triton', 'cpu', 'eager'"
    ):
        use_backend("eagr")


def test_unknown_name_without_a_near_one():
    with pytest.raises(ValueError, match="unknown backend 'zzz': known are 'cuda', 'triton', 'cpu', 'eager'"):
        functional.shsa(**arguments(backend="zzz"))


def test_eager_runs_what_no_kernel_runs():
    half = {k: t.half() if isinstance(t, torch.Tensor) else t for k, t in arguments().items()}
    assert functional.shsa(**half).dtype == torch.float16
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this call: .*float16"):
        functional.shsa(**half, backend="cpu")


def test_torch_compile_takes_the_settings_of_tf32(monkeypatch):
    """As it would for a float32 tensor on a GPU."""
    monkeypatch.setattr(functional, "tf32", lambda x: functional._tf32_settings())
    seen = []
    monkeypatch.setattr(eager, "shsa", lambda x, *rest: seen.append(rest[-2:]) or x)
    compiled = torch.compile(lambda **kw: shvit_kernels.shsa(**kw, backend="eager"), fullgraph=True, backend="eager")
    with tf32(False, True):
        compiled(**arguments())
    assert seen == [(False, True)]


def test_meta_tensors():
    meta = {k: t.to("meta") if isinstance(t, torch.Tensor) else t for k, t in arguments().items()}
    assert functional.shsa(**meta).shape == (2, C, 4, 4)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this call: .*(meta|missing)"):
        functional.shsa(**meta, backend="cpu")


def test_every_reason_is_one_sentence():
    """They are printed as they are, after a colon."""
    for backend in backends.BACKENDS.values():
        for x in (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1).half(), torch.ones(1, 1, 1, 1, device="meta")):
            for reason in filter(None, (backend.why_not(x), backend.why_unavailable())):
                assert reason[0].islower() or reason.startswith("PyTorch ")
                assert "\n" not in reason and not reason.endswith(".")


def test_a_missing_library_is_said_once_and_eager_runs(monkeypatch):
    monkeypatch.setattr(native, "_missing", "the native library is missing: this test says so")
    backends._warn_of_missing_native.cache_clear()
    with pytest.warns(UserWarning, match="runs without its compiled kernels: the native library is missing") as caught:
        for _ in range(3):
            y = functional.shsa(**(call := arguments()))
    assert len(caught) == 1
    assert torch.equal(y, functional.shsa(**call, backend="eager"))
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: the native library is missing"):
        functional.shsa(**call, backend="cpu")


@native_tier.needs_native
def test_kernels_are_the_first_choice_on_a_cpu():
    x = torch.ones(1, 1, 1, 1)
    assert backends.choose(x, None) is cpu
    with use_backend("eager"):
        assert backends.choose(x, None) is eager


def in_environment(value: str, code: str) -> subprocess.CompletedProcess:
    code = (
        f"import torch; from shvit_kernels import backends, functional, use_backend; x = torch.ones(1, 2, 1, 1); {code}"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {backends.ENVIRONMENT_VARIABLE: value},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )


@native_tier.needs_native
def test_tf32_follows_the_settings_of_pytorch():
    """Those of convolutions and of matrix products, for float32 on a GPU; tests begin without."""
    on_gpu = {"is_cuda": True, "dtype": torch.float32}
    assert functional.tf32(SimpleNamespace(**on_gpu)) == (False, False)
    for settings in itertools.product((False, True), repeat=2):
        with tf32(*settings):
            assert functional.tf32(SimpleNamespace(**on_gpu)) == settings
            for other in ({"is_cuda": False}, {"dtype": torch.float16}):
                assert functional.tf32(SimpleNamespace(**on_gpu | other)) == (False, False)


def test_environment_variable():
    """It names the backend, below ``use_backend`` and ``backend=``."""
    done = in_environment(
        "eager",
        "print(backends.choose(x, None).name, backends.choose(x, 'cpu').name)\n"
        "with use_backend('cpu'): print(backends.choose(x, None).name)",
    )
    assert done.stdout.split() == ["eager", "cpu", "cpu"], done.stderr


def test_unknown_name_in_the_environment_variable():
    done = in_environment("egaer", "functional.shsa(x, torch.ones(4, 2), qk_dim=1)")
    assert done.returncode != 0
    assert "SHVIT_KERNELS_BACKEND" in done.stderr and "'egaer'" in done.stderr and "'eager'" in done.stderr


def test_empty_environment_variable_is_none():
    done = in_environment("", "print(backends.chosen_name(None))")
    assert done.stdout.strip() == "None", done.stderr
