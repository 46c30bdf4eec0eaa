"""The ``gpu`` tier: a quick look at every operator on the device, and what only a device can show.

The tests of the Triton and CUDA kernels, with every branch and ragged shape, run on the device too where there is one.
Where there is none, tests/test_gpu_rehearsal.py runs what these tests consist of on the processor.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from shvit_kernels import SHSA, backends, functional
from shvit_kernels._randomise import randomise
from shvit_kernels.backends import eager
from tests.support import exact
from tests.support.cases import Case, eval_call, moments_call, shsa_call, train_call
from tests.support.numerics import assert_parity, distance, expect, largest, tf32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]

STAGES = {
    f"{C}+{P}x{N}": Case(P=P, beyond=C - P, N=N, B=3)
    for C, P, N in ((224, 48, 49), (320, 68, 16), (308, 66, 49), (448, 96, 16), (352, 75, 49), (336, 72, 64))
}
DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
QK_DIM = 16


def _backends() -> list:
    names = []
    for name in ("cuda", "triton"):
        reason = backends.get(name).why_unavailable()
        names.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=reason or "")))
    return names


each_backend = pytest.mark.parametrize("backend", _backends())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_stage = pytest.mark.parametrize("case", STAGES.values(), ids=STAGES.keys())


@each_stage
@each_dtype
@each_backend
def test_shsa(backend, dtype, case):
    call = shsa_call(replace(case, dtype=dtype))
    assert_parity(call.run(backend), expect(call))


@each_stage
@each_dtype
@each_backend
def test_train(backend, dtype, case):
    case = replace(case, dtype=dtype)
    call = train_call(case)
    assert_parity(call.run(backend), expect(call, exact.of_training(case)))


@each_stage
@each_dtype
@each_backend
def test_eval(backend, dtype, case):
    call = eval_call(replace(case, dtype=dtype))
    assert_parity(call.run(backend, ()), expect(call))


@each_dtype
@each_backend
def test_moments(backend, dtype):
    call = moments_call(replace(STAGES["352+75x49"], dtype=dtype))
    assert_parity(call.run(backend), expect(call, exact.of_moments))


@each_backend
def test_tf32_is_near_and_only_where_asked_for(backend):
    """By PyTorch's settings, of convolutions for the projection and of matrix products for attention."""
    call = shsa_call(replace(STAGES["336+72x64"], relu=False))
    expected = expect(call)["y"]
    results = []
    for settings in itertools.product((False, True), repeat=2):
        with tf32(*settings):
            results.append(call.run(backend, ())["y"])
        bound = 64 * 2.0**-11 * largest(expected.value) if any(settings) else expected.bound
        assert distance(results[-1], expected.value) <= bound, settings
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(results, 2))


def mixer(C: int, P: int, B: int, side: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """``x`` and the parameters of ``shsa_mixer`` by name, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    O = 2 * QK_DIM + P

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    parameters = {
        "qkv_weight": random(O, P) / P**0.5,
        "qkv_bias": 0.2 * random(O),
        "proj_weight": random(C, C) / C**0.5,
        "proj_bias": 0.2 * random(C),
        "norm_weight": random(P),
        "norm_bias": 0.2 * random(P),
    }
    return random(B, C, side, side), parameters


@pytest.mark.parametrize("B", [1, 3])
@each_stage
@each_dtype
@each_backend
def test_mixer(backend, dtype, case, B):
    side = int(case.N**0.5)
    x, parameters = mixer(case.P + case.beyond, case.P, B, side, dtype)
    truth, plain = (
        functional.shsa_mixer(
            x.to(kind), **{k: t.to(kind) for k, t in parameters.items()}, qk_dim=QK_DIM, backend="eager"
        )
        for kind in (torch.float64, dtype)
    )
    on_device = {k: t.to(DEVICE) for k, t in parameters.items()}
    y = functional.shsa_mixer(x.to(DEVICE), **on_device, qk_dim=QK_DIM, backend=backend).cpu()
    bound = 2 * (plain.double() - truth).abs().max() + 8 * torch.finfo(dtype).eps / 2 * truth.abs().max()
    assert (y.double() - truth).abs().max() <= bound


def layer(dtype: torch.dtype) -> SHSA:
    """Without the projection, whose gradients need not be the same in every run."""
    module = SHSA(336, QK_DIM, 72)
    module.proj = nn.Sequential(nn.ReLU())
    return randomise(module).to(DEVICE, dtype)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Every synchronisation that PyTorch knows of is an error; ``torch.cuda.synchronize`` is none of them."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(module: SHSA, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Output, and the gradients of a training step."""
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@each_dtype
@each_backend
def test_a_graph_gives_the_bits_of_the_calls(backend, dtype, train):
    """Captured and replayed on other values than it was captured with, and nothing waits for the device."""
    module = layer(dtype).train(train)
    x, dy, new_x, new_dy = (torch.randn(5, 336, 8, 8, device=DEVICE, dtype=dtype) for _ in range(4))
    x.requires_grad_()
    with backends.use_backend(backend), no_synchronisation():
        before = {k: t.clone() for k, t in module.state_dict().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(module, x, dy)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(module, x, dy)
        module.load_state_dict(before)
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        graph.replay()
        replayed = [t.clone() for t in results] + [t.clone() for t in module.buffers()]
        module.load_state_dict(before)
        called = [*step(module, x, dy), *module.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(replayed, called, strict=True))


@each_backend
def test_runs_on_the_current_stream(backend):
    """Work queued before it on that stream is waited for."""
    module = layer(torch.float16).eval()
    x = torch.randn(64, 336, 8, 8, device=DEVICE, dtype=torch.float16)
    stream = torch.cuda.Stream()
    with torch.no_grad(), backends.use_backend(backend):
        expected = module(x)
        late = torch.full_like(x, float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some milliseconds
            late.copy_(x)
            y = module(late)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@each_dtype
@each_backend
def test_same_bits_in_every_run(backend, dtype):
    """Also when other work shares the device."""
    module = layer(dtype)
    x, dy = (torch.randn(256, 336, 8, 8, device=DEVICE, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    with backends.use_backend(backend):
        first = step(module, x, dy)
        noise, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
        for _ in range(5):
            with torch.cuda.stream(noise):
                a @ a
            again = step(module, x, dy)
            assert all(torch.equal(s, t) for s, t in zip(first, again, strict=True))


@each_backend
def test_more_elements_than_32_bits_count(backend):
    C, side = 48, 16
    images = 2**31 // (C * side * side) + 3
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("the device has too little free memory")
    x, parameters = mixer(C, 32, 2, side, torch.float16)
    few = x.to(DEVICE)
    many = few.repeat(-(-images // 2), 1, 1, 1)
    names = ("qkv_weight", "qkv_bias", "norm_weight", "norm_bias")
    parameters = {k: parameters[k].to(DEVICE) for k in names}
    expected = functional.shsa(few, **parameters, qk_dim=QK_DIM, backend=backend)
    y = functional.shsa(many, **parameters, qk_dim=QK_DIM, backend=backend)
    assert torch.equal(y[:2], expected)
    assert torch.equal(y[-2:], expected)


def test_the_fastest_backend_is_chosen():
    x = torch.randn(2, 336, 8, 8, device=DEVICE, dtype=torch.float16)
    available = [name for name, b in backends.BACKENDS.items() if b is not eager and b.why_not(x) is None]
    assert backends.choose(x, None).name == (available or ["eager"])[0]


def test_a_device_other_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    module = layer(torch.float16).eval()
    x = torch.randn(2, 336, 8, 8, device="cuda:0", dtype=torch.float16)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(module.to("cuda:1")(x.to("cuda:1")).to("cuda:0"), expected)
