"""Running statistics: ``update_running_statistics`` of every backend against ``torch.nn.BatchNorm2d``."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from shvit_kernels import backends, ops
from tests.support import cuda
from tests.support import native as native_tier
from tests.support.numerics import device_of
from tests.support.triton import needs_triton

NAMES = ("running_mean", "running_var", "num_batches_tracked")
CHANNELS = (1, 107, 300)
BACKENDS = [
    "eager",
    pytest.param("cpu", marks=native_tier.needs_native),
    pytest.param("triton", marks=needs_triton),
    pytest.param(cuda.BACKEND, marks=cuda.needs_kernels),
]


@pytest.fixture(params=BACKENDS)
def backend(request) -> Iterator[str]:
    with cuda.kernels() if request.param == cuda.BACKEND else nullcontext():
        yield request.param


def update(backend: str, norm: nn.BatchNorm2d, values: Tensor) -> None:
    """``norm`` after a batch of values ``[tokens, channels]``."""
    buffers = [getattr(norm, name) for name in NAMES]
    wide = values.double()
    mean, variance = (t.to(values.dtype) for t in (wide.mean(0), wide.var(0, correction=0)))
    backends.get(backend).update_running_statistics(*buffers, mean, variance, values.shape[0], norm.momentum)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_as_batch_norm_does(backend, momentum, channels):
    device = device_of(backend)
    ours = nn.BatchNorm2d(channels, momentum=momentum, device=device)
    stock = nn.BatchNorm2d(channels, momentum=momentum, device=device)
    for count in (2, 49, 784):
        values = 3 + 2 * torch.randn(count, channels, device=device)
        update(backend, ours, values)
        stock(values.t()[None, :, :, None])
    assert ours.num_batches_tracked == 3
    for name in NAMES[:2]:
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_need_not_be_counted(backend, momentum):
    device = device_of(backend)
    ours, stock = (nn.BatchNorm2d(5, momentum=momentum, device=device) for _ in range(2))
    ours.num_batches_tracked = stock.num_batches_tracked = None
    values = 3 + 2 * torch.randn(49, 5, device=device)
    update(backend, ours, values)
    stock(values.t()[None, :, :, None])
    for name in NAMES[:2]:
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_are_counted_without_statistics(backend, momentum):
    device = device_of(backend)
    ours, stock = (nn.BatchNorm2d(5, momentum=momentum, device=device) for _ in range(2))
    for norm in (ours, stock):
        norm.running_mean = norm.running_var = None
    values = torch.randn(49, 5, device=device)
    update(backend, ours, values)
    stock(values.t()[None, :, :, None])
    assert ours.num_batches_tracked == stock.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_without_values_is_only_counted(backend, momentum):
    device = device_of(backend)
    norm = nn.BatchNorm2d(5, momentum=momentum, device=device)
    before = [t.clone() for t in (norm.running_mean, norm.running_var)]
    not_a_number = torch.full((5,), float("nan"), device=device)
    buffers = [getattr(norm, name) for name in NAMES]
    backends.get(backend).update_running_statistics(*buffers, not_a_number, not_a_number, 0, momentum)
    assert norm.num_batches_tracked == 1
    assert [norm.running_mean.tolist(), norm.running_var.tolist()] == [t.tolist() for t in before]


@pytest.mark.parametrize("momentum", [1.0, None])
def test_a_share_of_one_leaves_nothing_of_large_values(backend, momentum):
    norm = nn.BatchNorm2d(5, momentum=momentum, device=device_of(backend))
    norm.running_mean.fill_(1e17)
    norm.running_var.fill_(1e17)
    values = 3 + 2 * torch.randn(49, 5, device=device_of(backend))
    update(backend, norm, values)
    torch.testing.assert_close(norm.running_mean, values.mean(0), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(norm.running_var, values.var(0), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_statistics_of_another_type(backend, dtype):
    """A model in half precision keeps its running statistics in it; the batch's are measured in float32."""
    norm = nn.BatchNorm2d(7, device=device_of(backend), dtype=dtype)
    values = torch.randn(64, 7, device=device_of(backend))
    update(backend, norm, values)
    expected = 0.1 * values.double().mean(0)
    torch.testing.assert_close(norm.running_mean.double(), expected, rtol=2**-6, atol=1e-7)
    assert norm.running_mean.dtype == dtype and norm.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("counted_in", [torch.int64, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_other_strides_and_counters_of_another_type(backend, stride, counted_in, momentum):
    device = device_of(backend)
    ours, stock = (nn.BatchNorm2d(5, momentum=momentum, device=device) for _ in range(2))
    for norm in (ours, stock):
        norm.running_mean, norm.running_var = torch.ones(2, 5 * stride, device=device)[:, ::stride]
        norm.num_batches_tracked = norm.num_batches_tracked.to(counted_in)
    for count in (2, 49):
        values = 3 + 2 * torch.randn(count, 5, device=device)
        update(backend, ours, values)
        stock(values.t()[None, :, :, None])
    for name in NAMES:
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name), rtol=2e-6, atol=2e-6)


def test_tensors_of_inference_mode_are_updated_inside_of_it_alone(backend):
    with torch.inference_mode():
        norm = nn.BatchNorm2d(5, device=device_of(backend))
    values = torch.randn(49, 5, device=device_of(backend))
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        update(backend, norm, values)
    assert norm.running_mean.eq(0).all()
    with torch.inference_mode():
        update(backend, norm, values)
    assert norm.running_mean.ne(0).all()


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)  # PyTorch's operators read anything
def test_operators_refuse_what_kernels_cannot_read(backend):
    family = {"cpu": "native", cuda.BACKEND: cuda.FAMILY}.get(backend, backend)
    operator = ops.FAMILIES[family]["update_running_statistics"]
    norm = nn.BatchNorm2d(6, device=device_of(backend))
    every_other = torch.zeros(12, device=device_of(backend))[::2]
    vector = torch.ones(6, device=device_of(backend))
    with pytest.raises(RuntimeError, match="running_mean must be contiguous"):
        operator(every_other, norm.running_var, norm.num_batches_tracked, vector, vector, 4, 0.1)
    assert norm.num_batches_tracked == 0 and every_other.eq(0).all()
