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

pytestmark = native_tier.needs_native

BACKEND = "cpu"
OPERATORS = torch.ops.shvit_kernels
LAYOUTS = ("nchw", "channels_last")
# Norm and biases present or absent, as the operators take them.
OPTIONS = {
    "everything": {"norm": "affine", "bias": True},
    "no_biases": {"norm": "weight", "bias": False},
    "plain": {"norm": "none", "bias": False},
}
EPS, SCALE = 1e-5, 0.5

with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


# The symbolic tests of opcheck trace the operator anew each time; one type is enough for those.
QUICK = ("test_schema", "test_faketensor")


def small_case(**changes) -> Case:
    return Case(**{"P": 10, "D": 3, "N": 16, "beyond": 4, **changes})


def shsa_arguments(case: Case) -> tuple[Tensor, list[Tensor | None], tuple]:
    inputs = shsa_call(case).inputs
    parameters = [inputs[k] for k in ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias")]
    return inputs["x"], parameters, (case.D, EPS, SCALE, case.relu, False, False)


def copy_of_x1(x: Tensor, P: int) -> Tensor:
    return x[:, :P].contiguous(memory_format=ops.memory_format(x))


def check(operator, *arguments) -> None:
    whole = arguments[0].dtype == torch.float32
    torch.library.opcheck(operator, arguments, **({} if whole else {"test_utils": QUICK}))


def test_every_operator_is_checked_below():
    checked = {"shsa_forward", "shsa_backward", "shsa_train_forward", "shsa_train_backward", "fold"}
    checked |= {"partial_moments_forward", "partial_moments_backward"}
    assert all(set(operators) == checked for operators in ops.FAMILIES.values())


@with_options
@each_layout
@each_dtype
def test_opcheck_of_shsa(dtype, layout, options):
    x, parameters, settings = shsa_arguments(small_case(dtype=dtype, layout=layout, **options))
    check(OPERATORS.shsa_forward_native.default, x, *parameters, *settings)
    saved = OPERATORS.shsa_forward_native(x, *parameters, *settings)
    x1, dy = copy_of_x1(x, 10), torch.randn_like(x)
    for needs in ([True] * 5, [True, False, True, False, True]):
        check(OPERATORS.shsa_backward_native.default, dy, x1, *saved, *parameters, *settings, needs)


@with_options
@each_layout
@each_dtype
def test_opcheck_of_partial_moments(dtype, layout, options):
    x, (weight, bias, *_), _ = shsa_arguments(small_case(dtype=dtype, layout=layout, **options))
    check(OPERATORS.partial_moments_forward_native.default, x, weight, bias, 10, EPS)
    mean, cov, image_mean, image_rstd = OPERATORS.partial_moments_forward_native(x, weight, bias, 10, EPS)
    saved = (copy_of_x1(x, 10), mean, image_mean, image_rstd, weight, bias)
    for needs in ([True] * 3, [False, True, False]):
        backward = OPERATORS.partial_moments_backward_native.default
        check(backward, torch.randn_like(mean), torch.randn_like(cov), *saved, x.shape[1], needs)


def train_arguments(case: Case) -> tuple[Tensor, list[Tensor | None], tuple]:
    """Of ``shsa_train_forward``: the projection's bias becomes that of a batch normalisation."""
    x, (norm_weight, norm_bias, weight, bias), settings = shsa_arguments(case)
    bn_weight = None if bias is None else bias + 1
    return x, [norm_weight, norm_bias, weight, bn_weight, bias], (case.D, EPS, EPS, *settings[2:])


@with_options
@each_layout
@each_dtype
def test_opcheck_of_shsa_train(dtype, layout, options):
    x, parameters, settings = train_arguments(small_case(dtype=dtype, layout=layout, **options))
    check(OPERATORS.shsa_train_forward_native.default, x, *parameters, *settings)
    y, *saved = OPERATORS.shsa_train_forward_native(x, *parameters, *settings)
    for needs in ([True] * 6, [False, True, False, True, False, True]):
        backward = OPERATORS.shsa_train_backward_native.default
        check(backward, torch.randn_like(y), y, *saved, *parameters, *settings, needs)


@each_dtype
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not_affine"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_opcheck_of_fold(bias, affine, dtype):
    weight = torch.randn(16, 10, dtype=dtype)
    bias, bn_weight, bn_bias, mean = (torch.randn(16, dtype=dtype) for _ in range(4))
    bn_weight, bn_bias = (bn_weight, bn_bias) if affine else (None, None)
    check(OPERATORS.fold_native.default, weight, bias, bn_weight, bn_bias, mean, torch.rand(16).to(dtype), EPS)


@pytest.mark.parametrize("B, N", [(0, 16), (1, 1), (2, 257)])
def test_opcheck_of_extreme_sizes(B, N):
    x, parameters, settings = shsa_arguments(small_case(B=B, N=N))
    check(OPERATORS.shsa_forward_native.default, x, *parameters, *settings)
    check(OPERATORS.partial_moments_forward_native.default, x, *parameters[:2], 10, EPS)


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


def test_exported_layer():
    shsa = layer().eval()
    x = torch.randn(4, 24, 7, 7, dtype=torch.float64)
    sizes = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}}
    program = torch.export.export(shsa, (x,), dynamic_shapes=sizes)
    called = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("shvit_kernels.shsa") for name in called), called
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
    """The forward operator has no Python kernel on any dispatch key that a call without gradients passes."""
    for name in ("shsa_forward_native", "partial_moments_forward_native"):
        table = torch._C._dispatch_dump(f"shvit_kernels::{name}")
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
