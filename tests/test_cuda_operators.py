"""The operators of the CUDA kernels: opcheck, what they refuse, their errors, and how many kernels they start.

On a GPU if the library was built for one; otherwise executed on the processor (tests/cuda_host).
"""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from shvit_kernels import ops
from shvit_kernels.backends import cuda as backend
from tests.support import cuda
from tests.support.cases import Case, eval_call, mixer_call, moments_call, shsa_call, train_call
from tests.support.numerics import Call, assert_parity, device_of, expect, moved
from tests.support.operators import NAMES, OF_IMAGES, Arguments

pytestmark = cuda.needs_kernels

DEVICE = device_of(cuda.BACKEND)
PARAMETERS = {"norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias"}
PARAMETERS |= {"weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var"}
PARAMETERS |= {"running_mean", "running_var", "num_batches_tracked", "variance"}
OPTIONS = {"everything": {}, "no_biases": {"norm": "weight", "bias": False}, "plain": {"norm": "none", "bias": False}}

each_operator = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def harness() -> Iterator:
    with cuda.kernels() as harness:
        yield harness


@pytest.fixture(scope="module")
def arguments(harness) -> Arguments:
    return Arguments(cuda.FAMILY, DEVICE)


def small_case(**changes) -> Case:
    return Case(**{"P": 10, "D": 3, "N": 16, "beyond": 4, **changes})


@each_operator
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_opcheck(arguments, layout, options, name):
    for given in arguments.of(name, small_case(layout=layout, **options)):
        torch.library.opcheck(arguments.operators[name], given)


@each_operator
@pytest.mark.parametrize(
    "case", [small_case(B=0), small_case(dtype=torch.float16), small_case(dtype=torch.bfloat16, N=257)], ids=str
)
def test_opcheck_of_other_types_and_sizes(arguments, case, name):
    for given in arguments.of(name, case):
        torch.library.opcheck(arguments.operators[name], given, test_utils=("test_schema", "test_faketensor"))


@each_operator
@pytest.mark.parametrize("rows", [-1, 1], ids=["one_row_too_few", "one_row_too_many"])
def test_parameters_of_another_size_are_refused(arguments, rows, name):
    given = list(arguments.of(name, small_case())[0])
    names = [argument.name for argument in arguments.operators[name]._schema.arguments]
    tried = [(i, parameter) for i, parameter in enumerate(names) if parameter in PARAMETERS]
    assert tried
    for i, parameter in tried:
        wrong = given[i].new_ones(given[i].shape[0] + rows, *given[i].shape[1:])
        message = f"{parameter} must have {given[i].numel()} values, got {wrong.numel()}"
        with pytest.raises(RuntimeError, match=message):
            arguments.operators[name](*given[:i], wrong, *given[i + 1 :])


@each_operator
def test_types_without_kernels_are_refused(arguments, name):
    given = arguments.of(name, small_case())[0]
    images = {"x", "dy", "y", "x1", "running_mean"}
    names = [argument.name for argument in arguments.operators[name]._schema.arguments]
    wide = [t.double() if k in images else t for k, t in zip(names, given, strict=True)]
    with pytest.raises(RuntimeError, match="the cuda kernels take float16, bfloat16 and float32"):
        arguments.operators[name](*wide)


@pytest.mark.parametrize("P, D", [(257, 3), (10, 129)])
def test_sizes_without_kernels_are_refused(arguments, P, D):
    x = torch.zeros(1, P, 1, 1, device=DEVICE)
    weight = torch.zeros(2 * D + P, P, device=DEVICE)
    message = f"the cuda kernels take pdim up to 256 and qk_dim up to 128, got {P} and {D}"
    with pytest.raises(RuntimeError, match=message):
        arguments.operators["shsa_forward"](x, None, None, weight, None, D, 1e-5, 1.0, False, False, False)


@pytest.mark.parametrize("P, D", [(256, 3), (10, 128)])
def test_the_largest_sizes_run(P, D):
    call = shsa_call(Case(P=P, D=D, N=6, beyond=1, B=1))
    assert_parity(call.run(cuda.BACKEND), expect(call))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_that_cannot_be_read_are_refused(arguments, name):
    given = list(arguments.of(name, small_case())[0])
    names = [argument.name for argument in arguments.operators[name]._schema.arguments]
    for i in (i for i, k in enumerate(names) if k in ("x", "x1", "y", "dy")):
        wrong = given[i].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        with pytest.raises(RuntimeError, match="NCHW-contiguous or channels_last"):
            arguments.operators[name](*given[:i], wrong, *given[i + 1 :])


@cuda.only_hosted
@pytest.mark.parametrize("name", OF_IMAGES)  # the other has no shared memory
@pytest.mark.parametrize("N", [16, 300])
def test_an_error_of_a_launch_names_the_operator(arguments, harness, N, name):
    given = arguments.of(name, small_case(N=N))[0]
    with harness.shared_memory_limit(8), pytest.raises(RuntimeError, match=f"{name}: invalid argument"):
        arguments.operators[name](*given)


@cuda.only_hosted
@pytest.mark.parametrize("P", [80, 96, 112, 128, 144, 256])
def test_every_size_fits_the_smallest_device(harness, P):
    """A block of sm_86, sm_89 or sm_120 has 99 KiB of shared memory."""
    axes = ((16, 128), (1, 16, 49, 64, 256, 300), ("nchw", "channels_last"), (torch.float16, torch.float32))
    for D, N, layout, dtype in itertools.product(*axes):
        case = Case(P=P, D=D, N=N, beyond=80, layout=layout, dtype=dtype)
        with harness.shared_memory_limit(99 << 10), harness.noted_launches() as launches:
            for make, needs in ((shsa_call, None), (train_call, None), (moments_call, None), (mixer_call, ())):
                make(case).run(cuda.BACKEND, needs)
        assert launches


def single_statistics(case: Case) -> Call:
    """The evaluation with running statistics in float32, as beside a half-precision convolution."""
    call = eval_call(case)
    call.inputs.update({k: call.inputs[k].float() for k in ("bn_mean", "bn_var")})
    return call


@cuda.only_hosted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_short_images_take_few_launches(harness, dtype):
    """Each costs about two microseconds."""
    case = Case(P=72, N=64, dtype=dtype, B=1)

    def launches(call: Call, needs: tuple[str, ...] | None) -> int:
        with harness.noted_launches() as noted:
            call.run(cuda.BACKEND, needs)
        return len(noted)

    assert launches(shsa_call(case), ()) == launches(eval_call(case), ()) == launches(single_statistics(case), ()) == 1
    assert launches(shsa_call(case), None) <= 1 + 3
    assert launches(train_call(case), ()) <= 4
    assert launches(train_call(case), None) <= 4 + 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_parameters_are_not_converted(dtype):
    """Which would be a launch each too; running statistics are read in either type."""
    case = Case(P=20, D=8, N=16, dtype=dtype, B=1)
    for call, needs in ((shsa_call(case), None), (eval_call(case), ()), (single_statistics(case), ())):
        call = call.map(lambda _, t: moved(t, DEVICE))
        call.run(cuda.BACKEND, needs)
        with torch.profiler.profile() as profile:
            call.run(cuda.BACKEND, needs)
        assert "aten::_to_copy" not in {event.name for event in profile.events()}


def test_what_the_backend_refuses(monkeypatch):
    """Without a device: the words for tensors that look as if they were on one."""
    monkeypatch.setattr(backend, "_BUILT_FOR", [80, 90])
    monkeypatch.setattr(backend.native, "_missing", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (9, 0), 1: (8, 6), 2: (10, 0)}[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Blackwell")
    backend._why_not_on.cache_clear()

    def on(device: int, dtype: torch.dtype = torch.float16) -> SimpleNamespace:
        return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", device))

    assert backend.why_not(on(0), 256, 128) is None
    assert backend.why_not(on(1)) is None
    assert backend.why_not(on(2)) == "it was built for sm_80, sm_90 and Blackwell is sm_100"
    assert backend.why_not(on(0), 257, 16) == "it has kernels for pdim up to 256 and qk_dim up to 128, not 257 and 16"
    assert backend.why_not(on(0), 16, 129) == "it has kernels for pdim up to 256 and qk_dim up to 128, not 16 and 129"
    float64 = "it has kernels for float16, bfloat16 and float32 and x is torch.float64"
    assert backend.why_not(on(0, torch.float64)) == float64
    assert backend.why_not(torch.ones(1)) == "it runs on cuda tensors and x is on cpu"
    monkeypatch.setattr(backend, "_BUILT_FOR", [])
    assert "has no CUDA kernels" in backend.why_not(on(0))
    backend._why_not_on.cache_clear()


@pytest.mark.skipif(not cuda.ON_GPU, reason="every tensor of the hosted kernels is on the processor")
def test_tensors_on_another_device_are_refused(arguments):
    given = list(arguments.of("shsa_eval", small_case())[0])
    names = [argument.name for argument in arguments.operators["shsa_eval"]._schema.arguments]
    for i in (i for i, k in enumerate(names) if k in PARAMETERS):
        with pytest.raises(RuntimeError, match="shsa_eval: all tensors must be on one device"):
            arguments.operators["shsa_eval"](*given[:i], given[i].cpu(), *given[i + 1 :])


def test_every_operator_is_there(arguments):
    assert set(NAMES) == arguments.operators.keys() == ops.FAMILIES["native"].keys()
