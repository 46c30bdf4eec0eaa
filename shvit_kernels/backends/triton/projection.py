"""The projection inside kernels: tiles of its weight, and bias and batch normalisation behind it.

qkv = factor * (W z) + offset
factor = bn_weight / sqrt(bn_var + eps), offset = (bias - bn_mean) * factor + bn_bias
"""

import triton
import triton.language as tl

from .common import dot


@triton.jit
def load_row(vector, rows, end):
    return tl.load(vector + rows, mask=rows < end, other=0.0).to(tl.float32)


@triton.jit
def weight_tile(weight, rows, end, first, P: tl.constexpr, COLUMNS: tl.constexpr):
    """``weight[rows, first : first + COLUMNS]`` transposed, 0 from row ``end`` and column P on."""
    columns = first + tl.arange(0, COLUMNS)
    within = (rows < end)[None, :] & (columns < P)[:, None]
    return tl.load(weight + rows[None, :] * P + columns[:, None], mask=within, other=0.0)


@triton.jit
def weight_tiles(weight, rows, end, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Rows of the weight as the right-hand sides of :func:`project`."""
    w0 = weight_tile(weight, rows, end, 0, P, P0)
    w1 = w0
    if P1 > 0:
        w1 = weight_tile(weight, rows, end, P0, P, P1)
    return w0, w1


@triton.jit
def affine(rows, end, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps):
    """Factor and offset that stand for bias and batch normalisation behind the product with some rows of the weight."""
    factor = tl.full(rows.shape, 1.0, tl.float32)
    offset = tl.full(rows.shape, 0.0, tl.float32)
    if bias is not None:
        offset = load_row(bias, rows, end)
    if bn_mean is not None:
        factor = tl.rsqrt(load_row(bn_var, rows, end) + bn_eps)
        if bn_weight is not None:
            factor *= load_row(bn_weight, rows, end)
        offset = (offset - load_row(bn_mean, rows, end)) * factor
        if bn_bias is not None:
            offset += load_row(bn_bias, rows, end)
        factor = tl.where(rows < end, factor, 0.0)  # a variance of 0 with eps 0 beyond the end
        offset = tl.where(rows < end, offset, 0.0)
    return factor, offset


@triton.jit
def project(z0, z1, w0, w1, factor, offset, P1: tl.constexpr, PRECISION: tl.constexpr):
    """``factor * (z @ w) + offset`` in float32."""
    product = dot(z0, w0, PRECISION)
    if P1 > 0:
        product = dot(z1, w1, PRECISION, product)
    return product * factor[None, :] + offset[None, :]
