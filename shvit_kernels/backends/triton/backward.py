"""Gradients of shsa, from x1 and saved statistics.

With S = scale q k^T, A = softmax(S), O = A v (tokens in rows) and dO the gradient of O (under ReLU: where y > 0):

    dv = A^T dO       dA = dO v^T      dS = A * (dA - delta), delta the mean of dA under A
    dq = scale dS k   dk = scale dS^T q

Three steps, each one launch for short images: the attention's gradient ``dqkv``, rows of tokens; from it dz = dqkv W
and through the norm dx, beside dW = dqkv^T z in parts; and the sum of all parts in a fixed order.

In training the projection is batch-normalised, qkv = bn_weight * hat + bn_bias. Its gradient is classical,

    bn_weight / sqrt(var + eps) * (dqkv - mean(dqkv) - hat * mean(dqkv * hat))

with means over all tokens of the batch: the first step leaves their parts and ``hat``, one more launch adds them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from .common import channels_last, dot, launched, on_device_of, padded, precision, row_maximum, split
from .forward import check
from .norm_backward import (
    InputGradient,
    Rest,
    add_to_sums,
    leave_sums,
    reduce_parts,
    store_input_gradient,
    sums_of_images,
)
from .projection import affine, load_row, project, weight_tiles
from .tiles import Tiles, affine_tile, both, element, normal_tile, sum_of_image, tile_tokens
from .tokens import before_relu, load_tokens, normalised

MOST_SHORT_TOKENS = 64
MOST_SHORT_CHANNELS = 128
MOST_SHORT_WIDTH = 32
PROJECTION_TOKENS = 64
"""Rows of a tile whose gradient goes through the projection."""
MOST_WHOLE = 128
"""Columns of the projection's gradient up to which a program keeps all."""
PARTS = 32
"""Parts of the weight's gradient, at most."""


class BatchNorm(NamedTuple):
    """Batch normalisation behind the projection, with its batch statistics."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float


class Settings(NamedTuple):
    qk_dim: int
    scale: float
    relu: bool
    tf32_proj: bool
    tf32_attn: bool


# What both kinds of attention share


@triton.jit
def _output_gradient(dy, y, offsets, mask, RELU: tl.constexpr):
    values = tl.load(dy + offsets, mask, 0.0)
    if RELU:
        values = before_relu(values, y, offsets, mask)
    return values


@triton.jit
def _before_norm(hat, o, end, bn_weight, bn_bias):
    """qkv of its normalised projection."""
    if bn_weight is not None:
        hat = hat * load_row(bn_weight, o, end)[None, :]
    if bn_bias is not None:
        hat = hat + load_row(bn_bias, o, end)[None, :]
    return hat


@triton.jit
def _leave(value, hat, dqkv, hats, sums, rows, o, end, valid, ld, O, BATCH_NORM: tl.constexpr):
    """Store some columns of dqkv and of hats, if given, and what the tile adds to their means: ``sums`` [kinds, O]."""
    offsets = rows[:, None] * ld + o[None, :]
    mask = both(valid, o, end)
    tl.store(dqkv + offsets, value.to(dqkv.dtype.element_ty), mask)
    tl.store(sums + o, tl.sum(value, 0), o < end)
    if BATCH_NORM:
        tl.store(sums + O + o, tl.sum(value * hat, 0), o < end)
        if hats is not None:
            tl.store(hats + offsets, hat.to(hats.dtype.element_ty), mask)


# Short images: one program takes one image


@launched
def _attend_short(
    dy, y, x1, mean, rstd, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps,
    dqkv, hats, sums, scale, ld,
    C: tl.constexpr, P: tl.constexpr, D: tl.constexpr, N: tl.constexpr, X1_LAST: tl.constexpr, LAST: tl.constexpr,
    RELU: tl.constexpr, TOKENS: tl.constexpr, DP: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    BP: tl.constexpr, PROJ: tl.constexpr, ATTN: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    BATCH_NORM: tl.constexpr = bn_mean is not None
    O: tl.constexpr = 2 * D + P
    dtype = x1.dtype.element_ty
    images = image + tl.arange(0, 1)
    n = tl.arange(0, TOKENS)
    valid = n < N
    within = valid[None, :, None]

    z0 = load_tokens(x1, images, n, 0, N, P, P, P0, X1_LAST, within).to(tl.float32)
    z1 = z0
    if P1 > 0:
        z1 = load_tokens(x1, images, n, P0, N, P, P, P1, X1_LAST, within).to(tl.float32)
    if norm_weight is not None:
        m = tl.load(mean + images)
        r = tl.load(rstd + images)
        z0 = normalised(z0, m, r, norm_weight, norm_bias, 0, P, P0, within)
        if P1 > 0:
            z1 = normalised(z1, m, r, norm_weight, norm_bias, P0, P, P1, within)
    z0 = z0.to(dtype).reshape(TOKENS, P0)
    if P1 > 0:
        z1 = z1.to(dtype).reshape(TOKENS, P1)

    oq = tl.arange(0, DP)
    ok = D + tl.arange(0, DP)
    hq = _normalised_projection(z0, z1, weight, oq, D, bias, bn_mean, bn_var, bn_eps, P, P0, P1, PROJ)
    hk = _normalised_projection(z0, z1, weight, ok, 2 * D, bias, bn_mean, bn_var, bn_eps, P, P0, P1, PROJ)
    q = _before_norm(hq, oq, D, bn_weight, bn_bias).to(dtype)
    k = _before_norm(hk, ok, 2 * D, bn_weight, bn_bias).to(dtype)
    hq = hq.to(dtype)  # for want of registers
    hk = hk.to(dtype)
    logits = tl.where(valid[None, :], dot(q, k.trans(), ATTN) * scale, float("-inf"))
    p = tl.exp(logits - row_maximum(logits, 1)[:, None])
    pairs = valid[:, None] & valid[None, :]
    p = tl.where(pairs, p / tl.sum(p, 1)[:, None], 0.0).to(dtype)

    to = sums + image.to(tl.int64) * (2 if BATCH_NORM else 1) * O
    rows = image.to(tl.int64) * N + n
    own = image.to(tl.int64) * C * N
    dp = tl.zeros([TOKENS, TOKENS], tl.float32)
    for start in range(0, P, BP):  # in blocks, for want of registers
        c = start + tl.arange(0, BP)
        dout = _output_gradient(dy + own, y + own, element(n * 0, c, n, C, N, LAST), both(valid, c, P), RELU)
        hv = _normalised_projection(z0, z1, weight, 2 * D + c, O, bias, bn_mean, bn_var, bn_eps, P, P0, P1, PROJ)
        v = _before_norm(hv, 2 * D + c, O, bn_weight, bn_bias).to(dtype)
        dp = dot(dout, v.trans(), ATTN, dp)
        dv = dot(p.trans(), dout, ATTN)
        _leave(dv, hv, dqkv, hats, to, rows, 2 * D + c, O, valid, ld, O, BATCH_NORM)

    # Divided by the sum of p, which is 1 but for rounding: one key alone then leaves exactly nothing.
    dp = tl.where(pairs, dp, 0.0)
    p = p.to(tl.float32)
    delta = tl.sum(p * dp, 1) / tl.where(valid, tl.sum(p, 1), 1.0)
    dlogits = tl.where(pairs, p * (dp - delta[:, None]), 0.0).to(dtype)
    dq = dot(dlogits, k, ATTN) * scale
    _leave(dq, hq, dqkv, hats, to, rows, oq, D, valid, ld, O, BATCH_NORM)
    dk = dot(dlogits.trans(), q, ATTN) * scale
    _leave(dk, hk, dqkv, hats, to, rows, ok, 2 * D, valid, ld, O, BATCH_NORM)


@triton.jit
def _normalised_projection(
    z0, z1, weight, o, end, bias, bn_mean, bn_var, bn_eps, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    PROJ: tl.constexpr,
):  # fmt: skip
    """Some columns of the projection, less its batch mean and over its deviation, or with its bias."""
    w0, w1 = weight_tiles(weight, o, end, P, P0, P1)
    factor, offset = affine(o, end, bias, None, None, bn_mean, bn_var, bn_eps)
    return project(z0, z1, w0, w1, factor, offset, P1, PROJ)


# Any images: the projection is staged, and dq, dk and dv are made by programs of their own


@launched
def _stage(
    dy, y, x1, mean, rstd, norm_weight, norm_bias, weight, bias, bn_mean, bn_var, bn_eps, hats, dout, delta,
    B, C, P, N, O, ld, dout_ld, blocks, X1_LAST: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr,
    IMAGES: tl.constexpr, PITCH: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, PROJ: tl.constexpr,
):  # fmt: skip
    """Some columns of the projection; by the last programs of a tile the attention's gradient and delta."""
    first, image, n, valid = tile_tokens(tl.program_id(0), B, N, blocks, IMAGES, PITCH)
    rows = first * N + image * N + n
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    dtype = x1.dtype.element_ty
    if tl.program_id(1) < tl.cdiv(O, BO):
        product = tl.zeros([IMAGES * PITCH, BO], tl.float32)
        for start in range(0, P, BK):
            c = start + tl.arange(0, BK)
            z = normal_tile(x1, mean, rstd, first, image, c, n, valid, P, N, X1_LAST)
            z = affine_tile(z, norm_weight, norm_bias, valid, c, P)
            w = tl.load(weight + o[None, :] * P + c[:, None], both(c < P, o, O), 0.0)
            product = dot(z.to(dtype), w, PROJ, product)
        factor, offset = affine(o, O, bias, None, None, bn_mean, bn_var, bn_eps)
        hat = (product * factor[None, :] + offset[None, :]).to(hats.dtype.element_ty)
        tl.store(hats + rows[:, None] * ld + o[None, :], hat, both(valid, o, O))
    else:
        total = tl.zeros([IMAGES * PITCH], tl.float32)
        for start in range(0, P, BK):
            c = start + tl.arange(0, BK)
            offsets = first * C * N + element(image, c, n, C, N, LAST)
            values = _output_gradient(dy, y, offsets, both(valid, c, P), RELU)
            tl.store(dout + rows[:, None] * dout_ld + c[None, :], values, both(valid, c, P))
            total += tl.sum(values.to(tl.float32) * tl.load(y + offsets, both(valid, c, P), 0.0).to(tl.float32), 1)
        tl.store(delta + rows, total, valid)


@triton.jit
def _staged(hats, rows, o, end, valid, ld, bn_weight, bn_bias):
    """Some columns of qkv."""
    hat = tl.load(hats + rows[:, None] * ld + o[None, :], both(valid, o, end), 0.0)
    return _before_norm(hat.to(tl.float32), o, end, bn_weight, bn_bias).to(hats.dtype.element_ty)


@triton.jit
def _probabilities(q, k, row_max, row_sum, scale, pairs, ATTN: tl.constexpr):
    above = dot(q, k.trans(), ATTN) * scale - row_max[:, None]
    above = tl.where(above > 0.0, 0.0, above)  # by rounding only; keeps NaN
    return tl.where(pairs, tl.exp(above) / row_sum[:, None], 0.0)


@triton.jit
def _dlogits(
    p, dout, hats, bn_weight, bn_bias, delta, query_rows, key_rows, query, key, pairs, D, P, ld, dout_ld,
    BP: tl.constexpr, ONE_BLOCK: tl.constexpr, ATTN: tl.constexpr,
):  # fmt: skip
    dp = tl.zeros(p.shape, tl.float32)
    for start in range(0, P, BP):
        c = start + tl.arange(0, BP)
        d = tl.load(dout + query_rows[:, None] * dout_ld + c[None, :], both(query, c, P), 0.0)
        v = _staged(hats, key_rows, 2 * D + c, 2 * D + P, key, ld, bn_weight, bn_bias)
        dp = dot(d, v.trans(), ATTN, dp)
    if ONE_BLOCK:  # as for short images
        dp = tl.where(pairs, dp, 0.0)
        delta = tl.sum(p * dp, 1) / tl.where(query, tl.sum(p, 1), 1.0)
    return tl.where(pairs, p * (dp - delta[:, None]), 0.0).to(dout.dtype.element_ty)


@triton.jit
def _query_gradient(
    hats, dout, delta, row_max, row_sum, bn_weight, bn_bias, dqkv, sums, scale, start, own_n, P, D, N, ld, dout_ld,
    blocks, TOKENS: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BATCH_NORM: tl.constexpr, ATTN: tl.constexpr,
):  # fmt: skip
    own = own_n < N
    own_rows = start + own_n
    oq = tl.arange(0, DP)
    q = _staged(hats, own_rows, oq, D, own, ld, bn_weight, bn_bias)
    highest = tl.load(row_max + own_rows, own, 0.0)
    total = tl.load(row_sum + own_rows, own, 1.0)
    d = tl.load(delta + own_rows, own, 0.0)
    dq = tl.zeros([TOKENS, DP], tl.float32)
    for block in range(blocks):
        n = block * TOKENS + tl.arange(0, TOKENS)
        pairs = own[:, None] & (n < N)[None, :]
        k = _staged(hats, start + n, D + oq, 2 * D, n < N, ld, bn_weight, bn_bias)
        p = _probabilities(q, k, highest, total, scale, pairs, ATTN)
        dlogits = _dlogits(
            p, dout, hats, bn_weight, bn_bias, d, own_rows, start + n, own, n < N, pairs, D, P, ld, dout_ld,
            BP, ONE_BLOCK, ATTN,
        )  # fmt: skip
        dq = dot(dlogits, k, ATTN, dq)
    _leave_staged(dq * scale, hats, dqkv, sums, own_rows, oq, D, own, ld, 2 * D + P, BATCH_NORM)


@triton.jit
def _key_gradient(
    hats, dout, delta, row_max, row_sum, bn_weight, bn_bias, dqkv, sums, scale, start, own_n, P, D, N, ld, dout_ld,
    blocks, TOKENS: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BATCH_NORM: tl.constexpr, ATTN: tl.constexpr,
):  # fmt: skip
    own = own_n < N
    own_rows = start + own_n
    ok = D + tl.arange(0, DP)
    k = _staged(hats, own_rows, ok, 2 * D, own, ld, bn_weight, bn_bias)
    dk = tl.zeros([TOKENS, DP], tl.float32)
    for block in range(blocks):
        n = block * TOKENS + tl.arange(0, TOKENS)
        rows = start + n
        query = n < N
        pairs = query[:, None] & own[None, :]
        q = _staged(hats, rows, tl.arange(0, DP), D, query, ld, bn_weight, bn_bias)
        highest = tl.load(row_max + rows, query, 0.0)
        p = _probabilities(q, k, highest, tl.load(row_sum + rows, query, 1.0), scale, pairs, ATTN)
        d = tl.load(delta + rows, query, 0.0)
        dlogits = _dlogits(
            p, dout, hats, bn_weight, bn_bias, d, rows, own_rows, query, own, pairs, D, P, ld, dout_ld,
            BP, ONE_BLOCK, ATTN,
        )  # fmt: skip
        dk = dot(dlogits.trans(), q, ATTN, dk)
    _leave_staged(dk * scale, hats, dqkv, sums, own_rows, ok, 2 * D, own, ld, 2 * D + P, BATCH_NORM)


@triton.jit
def _value_gradient(
    hats, dout, row_max, row_sum, bn_weight, bn_bias, dqkv, sums, scale, start, own_n, first, P, D, N, ld, dout_ld,
    blocks, TOKENS: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, BATCH_NORM: tl.constexpr, ATTN: tl.constexpr,
):  # fmt: skip
    own = own_n < N
    own_rows = start + own_n
    c = first + tl.arange(0, BP)
    k = _staged(hats, own_rows, D + tl.arange(0, DP), 2 * D, own, ld, bn_weight, bn_bias)
    dv = tl.zeros([TOKENS, BP], tl.float32)
    for block in range(blocks):
        n = block * TOKENS + tl.arange(0, TOKENS)
        rows = start + n
        query = n < N
        pairs = query[:, None] & own[None, :]
        q = _staged(hats, rows, tl.arange(0, DP), D, query, ld, bn_weight, bn_bias)
        highest = tl.load(row_max + rows, query, 0.0)
        p = _probabilities(q, k, highest, tl.load(row_sum + rows, query, 1.0), scale, pairs, ATTN)
        d = tl.load(dout + rows[:, None] * dout_ld + c[None, :], both(query, c, P), 0.0)
        dv = dot(p.to(d.dtype).trans(), d, ATTN, dv)
    _leave_staged(dv, hats, dqkv, sums, own_rows, 2 * D + c, 2 * D + P, own, ld, 2 * D + P, BATCH_NORM)


@launched
def _attend_long(
    hats, dout, delta, row_max, row_sum, bn_weight, bn_bias, dqkv, sums, scale, P, D, N, ld, dout_ld, blocks,
    TOKENS: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, ONE_BLOCK: tl.constexpr, BATCH_NORM: tl.constexpr,
    ATTN: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, dk of a block of keys, or some columns of its dv."""
    tile = tl.program_id(0)
    role = tl.program_id(1)
    start = (tile // blocks).to(tl.int64) * N
    n = tile % blocks * TOKENS + tl.arange(0, TOKENS)
    to = sums + tile.to(tl.int64) * (2 if BATCH_NORM else 1) * (2 * D + P)
    if role == 0:
        _query_gradient(
            hats, dout, delta, row_max, row_sum, bn_weight, bn_bias, dqkv, to, scale, start, n, P, D, N, ld, dout_ld,
            blocks, TOKENS, DP, BP, ONE_BLOCK, BATCH_NORM, ATTN,
        )  # fmt: skip
    elif role == 1:
        _key_gradient(
            hats, dout, delta, row_max, row_sum, bn_weight, bn_bias, dqkv, to, scale, start, n, P, D, N, ld, dout_ld,
            blocks, TOKENS, DP, BP, ONE_BLOCK, BATCH_NORM, ATTN,
        )  # fmt: skip
    else:
        _value_gradient(
            hats, dout, row_max, row_sum, bn_weight, bn_bias, dqkv, to, scale, start, n, (role - 2) * BP, P, D, N, ld,
            dout_ld, blocks, TOKENS, DP, BP, BATCH_NORM, ATTN,
        )  # fmt: skip


@triton.jit
def _leave_staged(value, hats, dqkv, sums, rows, o, end, valid, ld, O, BATCH_NORM: tl.constexpr):
    hat = value
    if BATCH_NORM:
        hat = tl.load(hats + rows[:, None] * ld + o[None, :], both(valid, o, end), 0.0).to(tl.float32)
    _leave(value, hat, dqkv, None, sums, rows, o, end, valid, ld, O, BATCH_NORM)


# Through the projection


@triton.jit
def _gradient_rows(dqkv, hats, means, bn_weight, bn_var, bn_eps, first, image, n, valid, o, N, O, ld):
    """Some columns of the projection's gradient, before batch normalisation, 0 where there is none."""
    mask = both(valid, o, O)
    offsets = first * N * ld + ((image * N + n) * ld)[:, None] + o[None, :]
    gradient = tl.load(dqkv + offsets, mask, 0.0)
    if means is not None:
        hat = tl.load(hats + offsets, mask, 0.0).to(tl.float32)
        factor = tl.rsqrt(load_row(bn_var, o, O) + bn_eps)
        if bn_weight is not None:
            factor *= load_row(bn_weight, o, O)
        centred = gradient.to(tl.float32) - load_row(means, o, O)[None, :] - hat * load_row(means + O, o, O)[None, :]
        gradient = tl.where(mask, factor[None, :] * centred, 0.0).to(dqkv.dtype.element_ty)
    return gradient


@triton.jit
def _weight_part(
    program, dqkv, hats, means, bn_weight, bn_var, bn_eps, x1, mean, rstd, norm_weight, norm_bias, dweight_parts,
    B, P, N, O, ld, blocks, tiles, steps, X1_LAST: tl.constexpr, IMAGES: tl.constexpr, PITCH: tl.constexpr,
    BO: tl.constexpr, BP: tl.constexpr, PROJ: tl.constexpr,
):  # fmt: skip
    """What ``steps`` tiles add to a block of the weight's gradient."""
    o_blocks = tl.cdiv(O, BO)
    p_blocks = tl.cdiv(P, BP)
    part = program // (o_blocks * p_blocks)
    o = program // p_blocks % o_blocks * BO + tl.arange(0, BO)
    c = program % p_blocks * BP + tl.arange(0, BP)
    dweight = tl.zeros([BO, BP], tl.float32)
    for tile in range(part * steps, tl.minimum((part + 1) * steps, tiles)):
        first, image, n, valid = tile_tokens(tile, B, N, blocks, IMAGES, PITCH)
        d = _gradient_rows(dqkv, hats, means, bn_weight, bn_var, bn_eps, first, image, n, valid, o, N, O, ld)
        z = normal_tile(x1, mean, rstd, first, image, c, n, valid, P, N, X1_LAST)
        z = affine_tile(z, norm_weight, norm_bias, valid, c, P)
        dweight = dot(d.trans(), z, PROJ, dweight)
    to = dweight_parts + part.to(tl.int64) * O * P + o[:, None] * P + c[None, :]
    tl.store(to, dweight, both(o < O, c, P))


@triton.jit
def _dz(
    whole, dqkv, hats, means, bn_weight, bn_var, bn_eps, weight, first, image, n, valid, c, P, N, O, ld,
    BO: tl.constexpr, PROJ: tl.constexpr,
):  # fmt: skip
    """A block of channels of the gradient of z, 0 outside; from all columns of the projection's, if they are given."""
    dz = tl.zeros([valid.shape[0], c.shape[0]], tl.float32)
    for start in range(0, O, BO):
        o = start + tl.arange(0, BO)
        d = whole
        if whole is None:
            d = _gradient_rows(dqkv, hats, means, bn_weight, bn_var, bn_eps, first, image, n, valid, o, N, O, ld)
        w = tl.load(weight + o[:, None] * P + c[None, :], both(o < O, c, P), 0.0)
        dz = dot(d, w, PROJ, dz)
    return tl.where(both(valid, c, P), dz, 0.0)


@triton.jit
def _input_tile(
    tile, dqkv, hats, means, bn_weight, bn_var, bn_eps, x1, dx, mean, rstd, norm_weight, weight, tile_sums, dnorm_parts,
    B, C, P, N, O, ld, blocks, X1_LAST: tl.constexpr, DX_LAST: tl.constexpr, IMAGES: tl.constexpr, PITCH: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, WHOLE: tl.constexpr, STAGE: tl.constexpr, PROJ: tl.constexpr,
):  # fmt: skip
    """``WHOLE``: BO columns are all of the projection."""
    first, image, n, valid = tile_tokens(tile, B, N, blocks, IMAGES, PITCH)
    whole = None
    if WHOLE:
        o = tl.arange(0, BO)
        whole = _gradient_rows(dqkv, hats, means, bn_weight, bn_var, bn_eps, first, image, n, valid, o, N, O, ld)
    total = tl.zeros([IMAGES * PITCH], tl.float32)
    projected = tl.zeros([IMAGES * PITCH], tl.float32)
    if norm_weight is not None:
        if STAGE == "store":
            total, projected = sums_of_images(tile_sums, first, image, valid, blocks)
        else:
            for start in range(0, P, BP):
                c = start + tl.arange(0, BP)
                dz = _dz(
                    whole, dqkv, hats, means, bn_weight, bn_var, bn_eps, weight, first, image, n, valid, c, P, N, O, ld,
                    BO, PROJ,
                )  # fmt: skip
                normal = normal_tile(x1, mean, rstd, first, image, c, n, valid, P, N, X1_LAST)
                total, projected = add_to_sums(dz, normal, norm_weight, total, projected, dnorm_parts, tile, c, P)
            total = sum_of_image(total, IMAGES, PITCH)
            projected = sum_of_image(projected, IMAGES, PITCH)
            if STAGE == "sums":
                leave_sums(total, projected, tile_sums, tile, first, image, n, valid, blocks, PITCH)
    if STAGE != "sums" and dx is not None:
        for start in range(0, P, BP):
            c = start + tl.arange(0, BP)
            dz = _dz(
                whole, dqkv, hats, means, bn_weight, bn_var, bn_eps, weight, first, image, n, valid, c, P, N, O, ld, BO,
                PROJ,
            )  # fmt: skip
            normal = normal_tile(x1, mean, rstd, first, image, c, n, valid, P, N, X1_LAST)
            store_input_gradient(
                dz, normal, rstd, norm_weight, total, projected, dx, first, image, n, valid, c, C, P, N, DX_LAST
            )  # fmt: skip


@launched
def _through_projection(
    dqkv, hats, means, bn_weight, bn_var, bn_eps, x1, dx, mean, rstd, norm_weight, norm_bias, weight, dweight_parts,
    tile_sums, dnorm_parts, B, C, P, N, O, ld, blocks, tiles, steps, weight_programs,
    X1_LAST: tl.constexpr, DX_LAST: tl.constexpr, IMAGES: tl.constexpr, PITCH: tl.constexpr, BP: tl.constexpr,
    BO: tl.constexpr, WHOLE: tl.constexpr, WEIGHT_O: tl.constexpr, WEIGHT_P: tl.constexpr, STAGE: tl.constexpr,
    PROJ: tl.constexpr,
):  # fmt: skip
    """A part of the weight's gradient, or dz of a tile and what follows from it."""
    program = tl.program_id(0)
    if program >= weight_programs:
        _input_tile(
            program - weight_programs, dqkv, hats, means, bn_weight, bn_var, bn_eps, x1, dx, mean, rstd, norm_weight,
            weight, tile_sums, dnorm_parts, B, C, P, N, O, ld, blocks, X1_LAST, DX_LAST, IMAGES, PITCH, BP, BO, WHOLE,
            STAGE, PROJ,
        )  # fmt: skip
    elif dweight_parts is not None:  # known when it is compiled: what is not asked for could not be
        _weight_part(
            program, dqkv, hats, means, bn_weight, bn_var, bn_eps, x1, mean, rstd, norm_weight, norm_bias,
            dweight_parts, B, P, N, O, ld, blocks, tiles, steps, X1_LAST, IMAGES, PITCH, WEIGHT_O, WEIGHT_P, PROJ,
        )  # fmt: skip


@launched
def _batch_means(sums, bn_var, dbn_weight, dbn_bias, means, rows, O, count, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Gradients of the batch normalisation's parameters, and the means that its gradient takes off."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    along = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = sums + row.to(tl.int64)[:, None] * 2 * O + o[None, :]
        plain += tl.load(at, both(row < rows, o, O), 0.0)
        along += tl.load(at + O, both(row < rows, o, O), 0.0)
    plain = tl.sum(plain, 0)
    along = tl.sum(along, 0)
    if dbn_bias is not None:
        tl.store(dbn_bias + o, plain.to(dbn_bias.dtype.element_ty), o < O)
    if dbn_weight is not None:
        tl.store(dbn_weight + o, along.to(dbn_weight.dtype.element_ty), o < O)
    # A variance is clamped at 0 against rounding: no gradient passes there.
    varies = tl.load(bn_var + o, o < O, 0.0) != 0.0
    tl.store(means + o, plain / count, o < O)
    tl.store(means + O + o, tl.where(varies, along / count, 0.0), o < O)


# Launches


class Saved(NamedTuple):
    """What the forward saved of the attention; mean and rstd are None without a norm."""

    x1: Tensor
    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    row_max: Tensor
    row_sum: Tensor


class AttentionGradient(NamedTuple):
    """Rows of tokens, [B * N, at least O], and the sums of tiles of them, [tiles, kinds, O]."""

    dqkv: Tensor
    hats: Tensor | None
    sums: Tensor


def _attention_gradient(
    dy: Tensor,
    saved: Saved,
    norm: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    batch_norm: BatchNorm | None,
    settings: Settings,
) -> AttentionGradient:
    B, C, H, W = dy.shape
    x1, y, mean, rstd, row_max, row_sum = saved
    N, D = H * W, settings.qk_dim
    O, P = weight.shape[:2]
    ld = triton.cdiv(O, 16) * 16  # aligned for vectors
    kinds = 1 if batch_norm is None else 2
    bn = batch_norm or BatchNorm(None, None, None, None, 0.0)
    dqkv = x1.new_empty(B * N, ld)
    layout = {"X1_LAST": channels_last(x1), "LAST": channels_last(dy), "RELU": settings.relu}
    proj, attn = precision(settings.tf32_proj, x1), precision(settings.tf32_attn, x1)
    if _is_short(x1, D):
        hats = None if batch_norm is None else torch.empty_like(dqkv)
        sums = x1.new_empty(B, kinds, O, dtype=torch.float32)
        P0, P1 = split(P)
        tokens = padded(N)
        _attend_short[(B,)](
            dy, y, x1, mean, rstd, *norm, weight, bias, *bn, dqkv, hats, sums, settings.scale, ld,
            C=C, P=P, D=D, N=N, TOKENS=tokens, DP=padded(D), P0=P0, P1=P1, BP=16 if tokens > 16 else 32,
            PROJ=proj, ATTN=attn, num_warps=4 if tokens > 16 else 2, num_stages=1, **layout,
        )  # fmt: skip
        return AttentionGradient(dqkv, hats, sums)
    hats = torch.empty_like(dqkv)
    dout_ld = triton.cdiv(P, 16) * 16
    dout = x1.new_empty(B * N, dout_ld)
    delta = x1.new_empty(B, N, dtype=torch.float32)
    tiles = Tiles.of(B, N, _tile_tokens(x1))
    columns = 16 if x1.dtype == torch.float32 and attn == "ieee" else 32  # exact products hold their operands
    _stage[(tiles.count, triton.cdiv(O, columns) + 1)](
        dy, y, x1, mean, rstd, *norm, weight, bias, bn.mean, bn.var, bn.eps, hats, dout, delta,
        B, C, P, N, O, ld, dout_ld, tiles.blocks,
        IMAGES=tiles.images, PITCH=tiles.pitch, BO=columns, BK=32, PROJ=proj, num_stages=1, **layout,
    )  # fmt: skip
    sums = x1.new_empty(B * tiles.blocks, kinds, O, dtype=torch.float32)
    _attend_long[(B * tiles.blocks, 2 + triton.cdiv(P, columns))](
        hats, dout, delta, row_max, row_sum, bn.weight, bn.bias, dqkv, sums, settings.scale, P, D, N, ld, dout_ld,
        tiles.blocks, TOKENS=tiles.pitch, DP=padded(D), BP=columns, ONE_BLOCK=tiles.blocks == 1,
        BATCH_NORM=batch_norm is not None, ATTN=attn, num_warps=8, num_stages=1,
    )  # fmt: skip
    return AttentionGradient(dqkv, hats, sums)


def _is_short(x1: Tensor, D: int) -> bool:
    _, P, H, W = x1.shape
    fits = H * W <= MOST_SHORT_TOKENS and P <= MOST_SHORT_CHANNELS and D <= MOST_SHORT_WIDTH
    return fits and x1.dtype != torch.float32


def _tile_tokens(x1: Tensor) -> int:
    """Rows of a tile: exact products of float32 run out of registers with more."""
    return 32 if x1.dtype == torch.float32 else 64


def gradients(
    dy: Tensor,
    saved: Saved,
    norm: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    batch_norm: BatchNorm | None,
    settings: Settings,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, the norm's weight and bias, and the weight; then of the batch normalisation's weight and bias, or
    of the projection's bias."""
    B, C, H, W = dy.shape
    N = H * W
    P = weight.shape[1]
    O = 2 * settings.qk_dim + P
    of_batch = (None,) * 4 if batch_norm is None else batch_norm[:4]
    *norm, weight, bias, bn_weight, bn_bias, bn_mean, bn_var = check(
        saved.x1, *norm, weight, bias, *of_batch, settings.qk_dim
    )
    last = (bias,)
    if batch_norm is not None:
        batch_norm = BatchNorm(bn_weight, bn_bias, bn_mean, bn_var, batch_norm.eps)
        last = (bn_weight, bn_bias)
    dx = torch.empty_like(dy, memory_format=ops.memory_format(saved.y)) if needs[0] else None
    parameters = [
        torch.empty_like(t) if need and t is not None else None
        for need, t in zip(needs[1:], (*norm, weight, *last), strict=True)
    ]
    dnorm_weight, dnorm_bias, dweight, *dlast = parameters
    if B == 0:
        for t in parameters:
            if t is not None:
                t.zero_()
    elif dx is not None or any(t is not None for t in parameters):
        if norm[0] is None:
            saved = saved._replace(mean=None, rstd=None)
        x1 = saved.x1
        with on_device_of(x1):
            attention = _attention_gradient(dy, saved, norm, weight, bias, batch_norm, settings)
            means = None
            bn_weight = bn_var = None
            bn_eps = 0.0
            if batch_norm is not None:
                means = _means(attention.sums, batch_norm, float(B * N), *dlast)
                bn_weight, _, _, bn_var, bn_eps = batch_norm
            tiles = Tiles.of(B, N, PROJECTION_TOKENS)
            dnorm = dnorm_weight is not None or dnorm_bias is not None
            plan = InputGradient.of(x1, tiles, norm[0], dx is not None, dnorm)
            dweight_parts = None
            weight_programs = 0
            steps = triton.cdiv(tiles.count, PARTS)
            rows = 32  # with larger tiles some devices run out of registers
            columns, inner = (16, 16) if x1.dtype == torch.float32 else (32, 64)
            block = columns if tiles.blocks == 1 else 16
            is_whole = x1.dtype != torch.float32 and O <= MOST_WHOLE
            warps = 4 if x1.dtype != torch.float32 and tiles.blocks == 1 else 8  # for want of registers
            if dweight is not None:
                parts = triton.cdiv(tiles.count, steps)
                dweight_parts = x1.new_empty(parts, O, P, dtype=torch.float32)
                weight_programs = parts * triton.cdiv(O, rows) * triton.cdiv(P, columns)
            for stage in plan.stages or ("weight",) * (dweight is not None):
                input_programs = 0 if stage == "weight" else tiles.count
                if stage == "store":
                    weight_programs = 0
                _through_projection[(weight_programs + input_programs,)](
                    attention.dqkv, attention.hats, means, bn_weight, bn_var, bn_eps,
                    x1, dx, saved.mean, saved.rstd, *norm, weight, dweight_parts, plan.tile_sums, plan.dnorm_parts,
                    B, C, P, N, O, attention.dqkv.shape[1], tiles.blocks, tiles.count, steps, weight_programs,
                    X1_LAST=channels_last(x1), DX_LAST=channels_last(dy), IMAGES=tiles.images, PITCH=tiles.pitch,
                    BP=block, BO=padded(O) if is_whole else inner, WHOLE=is_whole, WEIGHT_O=rows, WEIGHT_P=columns,
                    STAGE=stage, PROJ=precision(settings.tf32_proj, x1), num_warps=warps, num_stages=1,
                )  # fmt: skip
            dbias = dlast[0] if batch_norm is None else None
            rest = None if dx is None else Rest(dy, saved.y, dx, P, settings.relu)
            sums = attention.sums
            reduce_parts(plan.dnorm_parts, dnorm_weight, dnorm_bias, dweight_parts, dweight, sums, dbias, rest)
    return tuple(t if t is not None else dy.new_empty(0) for t in (dx, *parameters))


def _means(
    sums: Tensor, batch_norm: BatchNorm, count: float, dbn_weight: Tensor | None, dbn_bias: Tensor | None
) -> Tensor:
    rows, _, O = sums.shape
    means = torch.empty_like(sums[0])
    block = 32
    _batch_means[(triton.cdiv(O, block),)](
        sums, batch_norm.var, dbn_weight, dbn_bias, means, rows, O, count, BLOCK=block, ROWS=32
    )
    return means


def shsa_backward(
    dy, x1, y, mean, rstd, row_max, row_sum, norm_weight, norm_bias, qkv_weight, qkv_bias,
    qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn, needs,
):  # fmt: skip
    saved = Saved(x1, y, mean, rstd, row_max, row_sum)
    settings = Settings(qk_dim, scale, relu, tf32_proj, tf32_attn)
    return gradients(dy, saved, (norm_weight, norm_bias), qkv_weight, qkv_bias, None, settings, needs)


OPERATORS = {"shsa_backward": shsa_backward}
