"""Products in pairs (csrc/cpu/pairs.h): what their rounding may depend on, by a pointwise layer."""

import pytest
import torch
from torch import Tensor

from shvit_kernels.ops import pack
from tests.support import native as native_tier
from tests.support.numerics import unit_roundoff

pytestmark = native_tier.needs_native
each_variant = pytest.mark.parametrize("variant", native_tier.each_variant(native_tier.PAIRED_VARIANTS))

ROWS = 130
SIZES = [(6, 16), (7, 33), (50, 20), (97, 72), (336, 48)]
"""Inputs and outputs: with and without a rest behind the last pair, vector and panel."""
each_size = pytest.mark.parametrize("inputs, outputs", SIZES)


def product(x: Tensor, weight: Tensor, variant: str, bias: Tensor | None = None) -> Tensor:
    """``x weight^T`` of rows, as images of one pixel."""
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    with native_tier.instruction_set(variant):
        images = x[:, :, None, None].contiguous(memory_format=torch.channels_last)
        return torch.ops.shvit_kernels.fused_pointwise(images, None, pack(weight), bias, False).flatten(1)


def drawn(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    return torch.randn(ROWS, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)


def powers(count: int, most: int) -> Tensor:
    return 2.0 ** torch.randint(-most, most + 1, (count, 1), generator=torch.Generator().manual_seed(count))


def assert_accurate(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Each value is within rounding of the sizes of its own row and its own column, whatever the others are."""
    truth = x.double() @ weight.double().t()
    normal = torch.finfo(torch.float32).tiny * x.shape[1] ** 0.5  # values below it have fewer digits
    sizes = x.double().norm(dim=1).clamp_min(normal)[:, None] * weight.double().norm(dim=1)
    assert ((y - truth).abs() <= 16 * unit_roundoff(torch.float32) * sizes).all()


@each_variant
@each_size
def test_powers_of_two_change_no_other_bit(inputs, outputs, variant):
    x, weight = drawn(inputs, outputs)
    rows, columns = powers(ROWS, 60), powers(outputs, 12)
    y = product(x, weight, variant)
    assert torch.equal(product(x * rows, weight * columns, variant), y * rows * columns.t())


@each_variant
@each_size
def test_values_of_any_size(inputs, outputs, variant):
    x, weight = drawn(inputs, outputs)
    outliers = torch.where(torch.rand(1, inputs, generator=torch.Generator().manual_seed(0)) < 0.1, 1000.0, 1.0)
    apart = inputs // 6 * 2
    two_of_a_pair = (torch.arange(inputs) % apart == 1) & (torch.arange(inputs) < 2 * apart)
    for left, right in (
        (x, weight),
        (x.relu(), weight),
        (x + 5, weight),
        (x * outliers, weight),
        (x * outliers, weight / outliers),
        (x * 1e30, weight * 1e-3),
        (x * 1e-30, weight * 1e3),
        (x * powers(ROWS, 40) * outliers, weight * powers(outputs, 12)),
        (x * (torch.arange(inputs) == inputs // 2), weight),
        (x * two_of_a_pair, weight),
        (x, weight * two_of_a_pair),
        (x * 1e-40, weight),
        (x, weight * 1e-12),
        (x, weight * 1e12),
    ):
        assert_accurate(product(left, right, variant), left, right)


@each_variant
@each_size
def test_zeros_leave_no_rounding(inputs, outputs, variant):
    x, weight = drawn(inputs, outputs)
    x[3], weight[5] = 0, 0
    y = product(x, weight, variant)
    assert not y[3].any() and not y[:, 5].any() and y.any()


@each_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_row_knows_nothing_of_the_others(value, variant):
    x, weight = drawn(50, 20)
    y = product(x, weight, variant)
    for row in (0, 8, 31, ROWS - 1):
        poisoned = x.clone()
        poisoned[row, 11] = value
        result = product(poisoned, weight, variant)
        others = torch.arange(ROWS) != row
        assert torch.equal(result[others], y[others])
        expected = poisoned[row] @ weight.t()
        torch.testing.assert_close(result[row], expected, rtol=1e-5, atol=0, equal_nan=True)


@each_variant
def test_a_column_knows_nothing_of_the_others(variant):
    x, weight = drawn(50, 20)
    y = product(x, weight, variant)
    for column in (0, 15, 16, 19):
        poisoned = weight.clone()
        poisoned[column, 11] = torch.nan
        result = product(x, poisoned, variant)
        others = torch.arange(20) != column
        assert torch.equal(result[:, others], y[:, others]) and result[:, column].isnan().all()


@each_variant
def test_results_do_not_depend_on_the_rows_beside(variant):
    x, weight = drawn(97, 72)
    bias = torch.randn(72)
    y = product(x, weight, variant, bias)
    for count in (16, 17, 23, 64, 65, 100):
        assert torch.equal(product(x[:count], weight, variant, bias), y[:count])


@each_variant
def test_errors_of_many_rows_do_not_add_up(variant):
    """Rows share what is corrected for a column; its error must vanish beside their own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 336, generator=generator)
    x = torch.randn(4096, 336, generator=generator)
    errors = product(x, weight, variant) - x.double() @ weight.double().t()
    assert errors.mean(0).norm() < 0.1 * errors.std(0).norm()
