"""The operators under PyTorch's machinery: opcheck, gradcheck, compile, export, threads, fork."""

import itertools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import shvit_kernels
from shvit_kernels import functional, ops
from tests.support import native as native_tier
from tests.support.cases import Case, moments_call, shsa_call
from tests.support.operators import NAMES, Arguments

pytestmark = native_tier.needs_native

BACKEND = "cpu"
NATIVE = {name: operator for name, operator in ops.FAMILIES["native"].items() if name != "shsa_mixer"}
"""The operators with kernels for CPUs: ``mixer_eval`` is what computes ``shsa_mixer`` there."""
LAYOUTS = ("nchw", "channels_last")
# Norm and biases present or absent, as the operators take them.
OPTIONS = {
    "everything": {"norm": "affine", "bias": True},
    "no_biases": {"norm": "weight", "bias": False},
    "plain": {"norm": "none", "bias": False},
}

with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


# The symbolic tests of opcheck trace the operator anew each time; one type is enough for those.
QUICK = ("test_schema", "test_faketensor")


def small_case(**changes) -> Case:
    return Case(**{"P": 10, "D": 3, "N": 16, "beyond": 4, **changes})


ARGUMENTS = Arguments("native")
each_operator = pytest.mark.parametrize("name", NATIVE)


def check(name: str, case: Case) -> None:
    whole = case.dtype == torch.float32
    for arguments in ARGUMENTS.of(name, case):
        torch.library.opcheck(NATIVE[name], arguments, **({} if whole else {"test_utils": QUICK}))


def test_every_operator_is_checked_below():
    assert set(NAMES) == NATIVE.keys() | {"shsa_mixer"} == ops.FAMILIES["native"].keys()


@each_operator
@with_options
@each_layout
@each_dtype
def test_opcheck(dtype, layout, options, name):
    check(name, small_case(dtype=dtype, layout=layout, **options))


@each_operator
@pytest.mark.parametrize("B, N", [(0, 16), (1, 1), (2, 257)])
def test_opcheck_of_extreme_sizes(B, N, name):
    check(name, small_case(B=B, N=N))


# Kernels read parameters by pointer: what has too few values must never reach them.
PARAMETERS = {"norm_weight", "norm_bias", "qkv_weight", "qkv_bias"}
PARAMETERS |= {"weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var"}
PARAMETERS |= {"running_mean", "running_var", "num_batches_tracked", "variance"}


@each_operator
@pytest.mark.parametrize("rows", [-1, 1], ids=["one_row_too_few", "one_row_too_many"])
def test_parameters_of_another_size_are_refused(rows, name):
    arguments = list(ARGUMENTS.of(name, small_case())[0])
    names = [argument.name for argument in NATIVE[name]._schema.arguments]
    tried = [(i, parameter) for i, parameter in enumerate(names) if parameter in PARAMETERS]
    assert tried
    for i, parameter in tried:
        good = arguments[i]
        wrong = good.new_ones(good.shape[0] + rows, *good.shape[1:])
        message = f"{parameter} must have {good.numel()} values, got {wrong.numel()}"
        with pytest.raises(RuntimeError, match=message):
            NATIVE[name](*arguments[:i], wrong, *arguments[i + 1 :])


# Derivatives, on the compiled kernels themselves


@pytest.mark.parametrize("variant", native_tier.each_variant())
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
@with_options
@each_layout
def test_gradcheck_of_shsa(layout, options, relu, variant):
    for P, D, N in ((1, 1, 4), (5, 2, 6), (4, 3, 1)):
        case = Case(P=P, D=D, N=N, beyond=2, B=2, dtype=torch.float64, layout=layout, relu=relu, **options)
        leaves = {k: t.requires_grad_() for k, t in shsa_call(case).inputs.items() if t is not None}

        def function(*tensors, case=case, names=tuple(leaves)):
            return functional.shsa(
                **dict(zip(names, tensors, strict=True)), qk_dim=case.D, relu=case.relu, backend=BACKEND
            )

        with native_tier.instruction_set(variant):
            assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("variant", native_tier.each_variant())
@with_options
@each_layout
def test_gradcheck_of_partial_moments(layout, options, variant):
    for P, N in ((1, 4), (5, 6), (4, 1)):
        case = Case(P=P, N=N, beyond=2, B=3, dtype=torch.float64, layout=layout, **options)
        leaves = {k: t.requires_grad_() for k, t in moments_call(case).inputs.items() if t is not None}

        def function(x, norm_weight=None, norm_bias=None, P=P):
            return functional.partial_moments(x, norm_weight, norm_bias, pdim=P, backend=BACKEND)[1:]

        with native_tier.instruction_set(variant):
            assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_second_derivatives_through_eager():
    case = Case(P=3, D=2, N=4, beyond=1, B=2, dtype=torch.float64, relu=False)
    leaves = {k: t.requires_grad_() for k, t in shsa_call(case).inputs.items()}

    def shsa(*tensors):
        return functional.shsa(**dict(zip(leaves, tensors, strict=True)), qk_dim=2, backend="eager")

    def moments(x, weight, bias):
        return functional.partial_moments(x, weight, bias, pdim=3, backend="eager")[1:]

    assert torch.autograd.gradgradcheck(shsa, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(moments, tuple(leaves.values())[:3])


UNREADABLE = {
    "three_dimensions": (lambda: torch.randn(8, 3, 3), 4, "got 3 dimensions"),
    "no_tokens": (lambda: torch.randn(2, 8, 0, 3), 4, "at least one token"),
    "pdim_beyond_channels": (lambda: torch.randn(2, 8, 3, 3), 9, "pdim must lie between 1 and 8, got 9"),
    "strides": (lambda: torch.randn(2, 8, 6, 4)[:, :, ::2, 1:], 4, "must be NCHW-contiguous or channels_last"),
}


@pytest.mark.parametrize(("make", "pdim", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_kernels_refuse_what_they_cannot_read(make, pdim, message):
    with pytest.raises(RuntimeError, match=message):
        NATIVE["partial_moments_forward"](make(), None, None, pdim, 1e-5)
    weight = torch.randn(2 + pdim, pdim)
    with pytest.raises(RuntimeError, match=message):
        NATIVE["shsa_forward"](make(), None, None, weight, None, 1, 1e-5, 1.0, False, False, False)


@each_layout
@pytest.mark.parametrize("name", ["shsa_backward", "shsa_train_backward"])
def test_gradients_of_another_shape_or_format_are_refused(name, layout):
    dy, *rest = ARGUMENTS.of(name, small_case(layout=layout))[0]
    other = torch.channels_last if layout == "nchw" else torch.contiguous_format
    for wrong in (dy[:1], torch.cat([dy, dy]), dy.contiguous(memory_format=other)):
        with pytest.raises(RuntimeError, match="dy must have the shape and memory format of y"):
            NATIVE[name](wrong, *rest)


def test_a_running_mean_without_variance_is_refused():
    weight, mean = torch.randn(6, 4), torch.zeros(6)
    settings = (1, 1e-5, 1e-5, 1.0, False, False, False)
    with pytest.raises(RuntimeError, match="bn_mean and bn_var must be given together"):
        NATIVE["shsa_eval"](torch.randn(2, 8, 3, 3), None, None, weight, None, None, None, mean, None, *settings)


def test_second_derivatives_of_kernels_are_refused():
    call = shsa_call(small_case())
    for name in ("x", "qkv_weight", "norm_weight"):
        inputs = {k: t.detach().requires_grad_(k == name) for k, t in call.inputs.items()}
        y = functional.shsa(**inputs, qk_dim=3, relu=True, backend=BACKEND)
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[name], create_graph=True)
        with pytest.raises(RuntimeError, match=r"shsa is differentiable once.*eager"):
            grad.square().sum().backward()
    for name in ("x", "norm_weight"):
        inputs = {k: t.detach().requires_grad_(k == name) for k, t in moments_call(small_case()).inputs.items()}
        _, mean, cov = functional.partial_moments(**inputs, pdim=10, backend=BACKEND)
        (grad,) = torch.autograd.grad(mean.sum() + cov.sum(), inputs[name], create_graph=True)
        with pytest.raises(RuntimeError, match=r"partial_moments is differentiable once.*eager"):
            grad.square().sum().backward()


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_gradients"])
def test_forward_mode_derivatives_of_kernels_are_refused(gradients):
    """``no_grad`` does not turn them off, and a bare operator would drop them."""
    call = shsa_call(small_case())
    x = call.inputs.pop("x")
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y = functional.shsa(dual, **call.inputs, qk_dim=3, backend="eager")
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
        with pytest.raises(NotImplementedError, match="forward mode"):
            functional.shsa(dual, **call.inputs, qk_dim=3, backend=BACKEND)


def test_create_graph_gives_the_same_first_derivative():
    call = shsa_call(small_case())
    inputs = {k: t.detach().requires_grad_() for k, t in call.inputs.items()}
    y = functional.shsa(**inputs, qk_dim=3, relu=True, backend=BACKEND)
    once = torch.autograd.grad(y, list(inputs.values()), call.upstream["y"], retain_graph=True)
    graph = torch.autograd.grad(y, list(inputs.values()), call.upstream["y"], create_graph=True)
    for a, b in zip(once, graph, strict=True):
        assert torch.equal(a, b)


def test_backward_twice_over_a_retained_graph():
    call = shsa_call(small_case())
    x = call.inputs["x"].requires_grad_()
    y = functional.shsa(**call.inputs, qk_dim=3, backend=BACKEND)
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * once)


def test_changing_a_saved_parameter_before_the_backward_is_an_error():
    call = shsa_call(small_case())
    weight = call.inputs["qkv_weight"].requires_grad_()
    y = functional.shsa(**call.inputs, qk_dim=3, backend=BACKEND)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_layout
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("make", [shsa_call, moments_call])
def test_input_is_not_kept_for_the_backward(make, B, layout):
    """Only its first channels are, or all of its channels would stay alive."""
    call = make(small_case(B=B, layout=layout))
    x = call.inputs["x"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call.function(**call.inputs, backend=BACKEND)
    assert x.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in kept}
    assert 10 * 16 in {t.numel() // B for t in kept}  # pdim channels


# torch.compile and torch.export


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def statistics_and_attention(x, norm_weight, norm_bias, qkv_weight, qkv_bias):
    """Both operators in one differentiable function."""
    _, mean, cov = functional.partial_moments(x, norm_weight, norm_bias, pdim=10, backend=BACKEND)
    factor = ((qkv_weight @ cov) * qkv_weight).sum(1).add(1e-5).rsqrt()
    bias = qkv_bias - qkv_weight @ mean * factor
    return functional.shsa(
        x,
        factor[:, None] * qkv_weight,
        bias,
        qk_dim=3,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        relu=True,
        backend=BACKEND,
    )


@each_layout
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_function(fresh_dynamo, compiler, layout):
    compiled = torch.compile(statistics_and_attention, fullgraph=True, backend=compiler)
    inputs = shsa_call(small_case(layout=layout)).inputs
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), statistics_and_attention(**inputs))
    results = []
    for function in (statistics_and_attention, compiled):
        leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
        y = function(**leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)
        assert traced.stride() == plain.stride()


def test_compiled_once_for_all_sizes(fresh_dynamo):
    compiled = torch.compile(statistics_and_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, N in ((2, 16), (3, 49), (5, 64), (2, 196)):
        inputs = shsa_call(small_case(B=B, N=N)).inputs
        leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(**leaves)
        torch.testing.assert_close(y, statistics_and_attention(**inputs))
        grads = torch.autograd.grad(y.sum(), list(leaves.values()))
        assert [g.shape for g in grads] == [t.shape for t in leaves.values()]


def layer() -> shvit_kernels.SHSA:
    torch.manual_seed(0)
    shsa = shvit_kernels.SHSA(24, 4, 10, dtype=torch.float64)
    for parameter in shsa.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return shsa


def test_compiled_layer_without_gradients(fresh_dynamo):
    plain, traced = layer().eval(), layer().eval()
    compiled = torch.compile(traced, fullgraph=True, dynamic=True, backend="inductor")
    with torch.no_grad():
        for shape in ((4, 24, 7, 7), (2, 24, 9, 5)):
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize(
    "training, compiler", [(True, "inductor"), (False, "aot_eager")], ids=["training", "evaluation"]
)
def test_compiled_layer(fresh_dynamo, compiler, training):
    plain, traced = layer().train(training), layer().train(training)
    compiled = torch.compile(traced, fullgraph=True, backend=compiler)
    x = torch.randn(4, 24, 7, 7, dtype=torch.float64)
    results = []
    for module in (plain, compiled):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)
    for (name, a), b in zip(plain.named_parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), traced.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_gradients"])
def test_exported_layer(gradients):
    shsa = layer().eval()
    x = torch.randn(4, 24, 7, 7, dtype=torch.float64)
    sizes = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}}
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(shsa, (x,), dynamic_shapes=sizes)
    called = {str(node.target) for node in program.graph.nodes}
    # One of those that GPUs have too.
    assert f"shvit_kernels.shsa_{'forward' if gradients else 'eval'}_native.default" in called, called
    for shape in ((4, 24, 7, 7), (2, 24, 9, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), shsa(x))


def test_exported_program_survives_a_file(tmp_path):
    shsa = layer().eval()
    x = torch.randn(4, 24, 7, 7, dtype=torch.float64)
    torch.export.save(torch.export.export(shsa, (x,)), tmp_path / "shsa.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "shsa.pt2").module()(x), shsa(x))


def test_exported_for_training():
    shsa = layer().train()
    x = torch.randn(4, 24, 7, 7, dtype=torch.float64)
    exported = torch.export.export(shsa, (x,)).module()
    torch.testing.assert_close(exported(x), shsa(x))


def test_functional_transforms_see_ordinary_operators():
    """FakeTensor and meta: shapes without data."""
    with torch._subclasses.FakeTensorMode() as mode:
        inputs = {k: mode.from_tensor(t) for k, t in shsa_call(small_case(layout="channels_last")).inputs.items()}
        y = functional.shsa(**inputs, qk_dim=3, backend=BACKEND)
    assert y.shape == inputs["x"].shape and y.is_contiguous(memory_format=torch.channels_last)


def test_no_python_runs_without_gradients():
    """No operator has a Python kernel on any dispatch key that a call without gradients passes."""
    for operator in NATIVE.values():
        table = torch._C._dispatch_dump(operator.name().removesuffix(".default"))
        keys = [line.partition(":")[0] for line in table.splitlines() if "registered at" in line]
        assert "CPU" in keys, table
        assert not {"CompositeExplicitAutograd", "CompositeImplicitAutograd", "Autograd", "AutogradCPU"} & set(keys)
    call = shsa_call(small_case())
    inputs = {k: t.requires_grad_() for k, t in call.inputs.items()}
    with torch.no_grad():
        y = functional.shsa(**inputs, qk_dim=3, backend=BACKEND)
    assert not y.requires_grad


# Threads and processes


def test_python_threads_at_once():
    cases = [
        small_case(P=P, N=N, dtype=dtype)
        for P, N in ((10, 49), (66, 64), (32, 257))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    calls = [call for case in cases for call in (shsa_call(case), moments_call(case))]
    serial = [call.run(BACKEND) for call in calls]
    jobs = [i for _ in range(20) for i in range(len(calls))]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: calls[i].run(BACKEND), jobs))
    for i, result in zip(jobs, results, strict=True):
        for name, t in result.items():
            assert torch.equal(t, serial[i][name]), name


def run_python(code: str, **environment: str) -> str:
    """Run a program in a fresh interpreter; its output, or its error as a failure."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
    import os, signal, torch
    from shvit_kernels import functional

    torch.set_num_threads(2)
    torch.manual_seed(0)
    x, weight = torch.randn(8, 20, 7, 7), torch.randn(18, 10)

    def attend():
        leaf = x.clone().requires_grad_()
        y = functional.shsa(leaf, weight, qk_dim=4, backend="cpu")
        y.square().sum().backward()
        return y.detach(), leaf.grad

    {parent}
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs ends with an error
        {child}
        y, grad = attend()
        os._exit(0 if y.isfinite().all() and grad.isfinite().all() and {same} else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_child_of_fork_with_one_thread():
    """The parent ran parallel regions; the child sets one thread, as a DataLoader worker does."""
    run_python(
        FORK.format(
            parent="expected = attend()",
            child="torch.set_num_threads(1)",
            same="torch.equal(y, expected[0]) and torch.equal(grad, expected[1])",
        )
    )


def test_child_of_fork_before_any_parallel_region():
    run_python(FORK.format(parent="pass", child="pass", same="True"))


class _AttendedImages(torch.utils.data.Dataset):
    """Runs the layer inside the worker of a DataLoader."""

    def __init__(self):
        self.shsa = layer().eval()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        x = torch.randn(24, 7, 7, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        with torch.no_grad():
            return self.shsa(x[None])[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_a_dataloader_worker(context):
    images = _AttendedImages()
    loader = torch.utils.data.DataLoader(
        images, batch_size=2, num_workers=1, multiprocessing_context=context, timeout=60
    )
    for batch, i in zip(loader, itertools.count(step=2), strict=False):
        assert torch.equal(batch, torch.stack([images[i], images[i + 1]]))


def test_first_call_may_come_from_any_thread():
    """A fresh process whose first call runs outside the main thread."""
    run_python(
        """
        import threading, torch
        from shvit_kernels import functional

        results = []
        x, weight = torch.ones(1, 4, 2, 2), torch.ones(6, 4)
        call = lambda: results.append(functional.shsa(x, weight, qk_dim=1, backend="cpu"))
        threads = [threading.Thread(target=call) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(results) == 4 and all(torch.equal(r, results[0]) for r in results)
        """
    )
