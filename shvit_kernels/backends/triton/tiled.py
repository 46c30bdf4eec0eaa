"""Attention in tiles of queries and keys with online softmax: for long images, and for products without tensor cores.

Keys and values are projected again in every block of queries, or staged in memory once: ``forward`` says when.
"""

import triton
import triton.language as tl

from .common import dot, launched, row_maximum
from .projection import affine, weight_tile
from .tokens import centred, copy_rest, load_tokens, normalised, store_tokens


@triton.jit
def moments_of(x, images, begin, end, N, C, P, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """Mean, and sum of the squared deviations from it, of some tokens of one image."""
    total = tl.zeros([1, TOKENS, CHANNELS], tl.float32)
    for token in range(begin, end, TOKENS):
        tokens = token + tl.arange(0, TOKENS)
        within = (tokens < end)[None, :, None]
        for first in range(0, P, CHANNELS):
            total += load_tokens(x, images, tokens, first, N, C, P, CHANNELS, LAST, within).to(tl.float32)
    mean = tl.sum(tl.sum(total, 1), 1) / (P * (end - begin))
    total = tl.zeros([1, TOKENS, CHANNELS], tl.float32)
    for token in range(begin, end, TOKENS):
        tokens = token + tl.arange(0, TOKENS)
        within = (tokens < end)[None, :, None]
        for first in range(0, P, CHANNELS):
            values = load_tokens(x, images, tokens, first, N, C, P, CHANNELS, LAST, within).to(tl.float32)
            deviation = centred(values, mean, first, P, CHANNELS, within)
            total += deviation * deviation
    return mean, tl.sum(tl.sum(total, 1), 1)


@launched
def measure(
    x, part_mean, part_squares, N, C,
    P: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """:func:`moments_of` for every PART tokens of every image."""
    parts = tl.cdiv(N, PART)
    block = tl.program_id(0)
    images = block // parts + tl.arange(0, 1)
    begin = block % parts * PART
    mean, squares = moments_of(x, images, begin, tl.minimum(begin + PART, N), N, C, P, TOKENS, CHANNELS, LAST)
    tl.store(part_mean + block + tl.arange(0, 1), mean)
    tl.store(part_squares + block + tl.arange(0, 1), squares)


@triton.jit
def merged(part_mean, part_squares, images, N, P, norm_eps, PART: tl.constexpr, PARTS: tl.constexpr):
    """Mean and rstd of an image from its parts, at most PARTS, by Chan's formula."""
    parts = tl.cdiv(N, PART)
    part = tl.arange(0, PARTS)
    means = tl.load(part_mean + images * parts + part, mask=part < parts, other=0.0)
    squares = tl.load(part_squares + images * parts + part, mask=part < parts, other=0.0)
    count = tl.where(part < parts, tl.minimum(N - part * PART, PART) * P, 0).to(tl.float32)
    first = tl.load(part_mean + images * parts)  # large means would lose digits in a sum
    mean = first + tl.sum(count * (means - first), 0) / (P * N)
    deviation = tl.where(part < parts, means - mean, 0.0)
    variance = (tl.sum(squares, 0) + tl.sum(count * deviation * deviation, 0)) / (P * N)
    return mean, tl.rsqrt(variance + norm_eps) + tl.zeros([1], tl.float32)


@triton.jit
def z_tile(
    x, images, tokens, first, N, C, P, mean, rstd, norm_weight, norm_bias, CHANNELS: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """z of some tokens and channels of one image, [tokens, channels], in the type of x."""
    within = (tokens < N)[None, :, None]
    z = load_tokens(x, images, tokens, first, N, C, P, CHANNELS, LAST, within)
    if norm_weight is not None:
        z = normalised(z.to(tl.float32), mean, rstd, norm_weight, norm_bias, first, P, CHANNELS, within)
    return z.to(x.dtype.element_ty).reshape(tokens.shape[0], CHANNELS)


@triton.jit
def keys_and_values(
    x, images, tokens, N, C, mean, rstd, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var,
    bn_eps, v_row, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, PROJ: tl.constexpr,
):  # fmt: skip
    """k and v, from row ``v_row`` of the weight on, of some tokens of one image; v is 0 beyond the last token."""
    k_rows = D + tl.arange(0, DP)
    v0_rows = v_row + tl.arange(0, P0)
    k = tl.zeros([tokens.shape[0], DP], tl.float32)
    v0 = tl.zeros([tokens.shape[0], P0], tl.float32)
    v1 = v0
    if P1 > 0:
        v1_rows = v_row + P0 + tl.arange(0, P1)
        v1 = tl.zeros([tokens.shape[0], P1], tl.float32)
    for first in range(0, P, CHANNELS):
        z = z_tile(x, images, tokens, first, N, C, P, mean, rstd, norm_weight, norm_bias, CHANNELS, LAST)
        k = dot(z, weight_tile(weight, k_rows, 2 * D, first, P, CHANNELS), PROJ, k)
        v0 = dot(z, weight_tile(weight, v0_rows, 2 * D + P, first, P, CHANNELS), PROJ, v0)
        if P1 > 0:
            v1 = dot(z, weight_tile(weight, v1_rows, 2 * D + P, first, P, CHANNELS), PROJ, v1)
    dtype = x.dtype.element_ty
    own = (tokens < N)[:, None]
    factor, offset = affine(k_rows, 2 * D, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
    k = (k * factor[None, :] + offset[None, :]).to(dtype)
    factor, offset = affine(v0_rows, 2 * D + P, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
    v0 = tl.where(own, v0 * factor[None, :] + offset[None, :], 0.0).to(dtype)
    if P1 > 0:
        factor, offset = affine(v1_rows, 2 * D + P, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        v1 = tl.where(own, v1 * factor[None, :] + offset[None, :], 0.0)
    return k, v0, v1.to(dtype)


@triton.jit
def staged_tile(staged, images, tokens, N, first, CHANNELS, COLUMNS: tl.constexpr):
    """Pointers [tokens, channels] into staged keys or values [B, N, CHANNELS], and which of them are within."""
    columns = first + tl.arange(0, COLUMNS)
    rows = images.to(tl.int64)[:, None] * N + tokens[:, None]
    return staged + rows * CHANNELS + columns[None, :], (tokens < N)[:, None] & (columns < CHANNELS)[None, :]


@launched
def stage(
    x, keys, values, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, given_mean, given_rstd,
    part_mean, part_squares, mean_out, rstd_out, N, C, norm_eps, bn_eps,
    P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, SLICES: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, PROJ: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """k and v of some tokens of one image into memory; the first block of an image keeps its mean and rstd."""
    block = tl.program_id(0)
    token_blocks = tl.cdiv(N, TOKENS)
    part = block % (token_blocks * SLICES)
    images = block // (token_blocks * SLICES) + tl.arange(0, 1)
    tokens = part // SLICES * TOKENS + tl.arange(0, TOKENS)
    channel = part % SLICES * P0
    mean = tl.zeros([1], tl.float32)
    rstd = tl.full([1], 1.0, tl.float32)
    if norm_weight is not None:
        if given_mean is not None:
            mean = tl.load(given_mean + images)
            rstd = tl.load(given_rstd + images)
        else:
            mean, rstd = merged(part_mean, part_squares, images, N, P, norm_eps, PART, PARTS)
    if mean_out is not None:
        first = (tl.arange(0, 1) + part) == 0
        tl.store(mean_out + images, mean, mask=first)
        tl.store(rstd_out + images, rstd, mask=first)
    k, v0, v1 = keys_and_values(
        x, images, tokens, N, C, mean, rstd, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var,
        bn_eps, 2 * D + channel, P, D, DP, P0, P1, CHANNELS, LAST, PROJ,
    )  # fmt: skip
    if channel == 0:
        pointers, within = staged_tile(keys, images, tokens, N, 0, D, DP)
        tl.store(pointers, k, mask=within)
    pointers, within = staged_tile(values, images, tokens, N, channel, P, P0)
    tl.store(pointers, v0, mask=within)
    if P1 > 0:
        pointers, within = staged_tile(values, images, tokens, N, P0, P, P1)
        tl.store(pointers, v1, mask=within)


@launched
def attend_tiled(
    x, y, keys, values, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, given_mean,
    given_rstd, mean_out, rstd_out, row_max_out, row_sum_out, B, N, C, y_channels, attention_blocks, norm_eps, bn_eps,
    scale,
    P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, SLICES: tl.constexpr,
    CHANNELS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LAST: tl.constexpr, Y_LAST: tl.constexpr,
    RELU: tl.constexpr, PROJ: tl.constexpr, ATTN: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some queries of one image, and one of SLICES slices of the value channels, per attention block."""
    block = tl.program_id(0)
    if block >= attention_blocks:
        copy_rest(x, y, block - attention_blocks, B, N, C, P, RELU, LAST, VECTOR, ROWS, COLUMNS)
    else:
        query_blocks = tl.cdiv(N, QUERIES)
        part = block % (query_blocks * SLICES)
        images = block // (query_blocks * SLICES) + tl.arange(0, 1)
        queries = part // SLICES * QUERIES + tl.arange(0, QUERIES)
        channel = part % SLICES * P0
        dtype = x.dtype.element_ty

        mean = tl.zeros([1], tl.float32)
        rstd = tl.full([1], 1.0, tl.float32)
        if norm_weight is not None:
            if given_mean is not None:
                mean = tl.load(given_mean + images)
                rstd = tl.load(given_rstd + images)
            else:
                mean, squares = moments_of(x, images, 0, N, N, C, P, KEYS, CHANNELS, LAST)
                rstd = tl.rsqrt(squares / (P * N) + norm_eps)
        if mean_out is not None:
            first = (tl.arange(0, 1) + part) == 0
            tl.store(mean_out + images, mean, mask=first)
            tl.store(rstd_out + images, rstd, mask=first)

        q_rows = tl.arange(0, DP)
        q = tl.zeros([QUERIES, DP], tl.float32)
        for first in range(0, P, CHANNELS):
            z = z_tile(x, images, queries, first, N, C, P, mean, rstd, norm_weight, norm_bias, CHANNELS, LAST)
            q = dot(z, weight_tile(weight, q_rows, D, first, P, CHANNELS), PROJ, q)
        factor, offset = affine(q_rows, D, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        q = (q * factor[None, :] + offset[None, :]).to(dtype)

        row_max = tl.full([QUERIES], float("-inf"), tl.float32)
        row_sum = tl.zeros([QUERIES], tl.float32)
        out0 = tl.zeros([QUERIES, P0], tl.float32)
        out1 = out0
        if P1 > 0:
            out1 = tl.zeros([QUERIES, P1], tl.float32)
        for key in range(0, N, KEYS):
            tokens = key + tl.arange(0, KEYS)
            if keys is not None:
                pointers, within = staged_tile(keys, images, tokens, N, 0, D, DP)
                k = tl.load(pointers, mask=within, other=0.0)
                pointers, within = staged_tile(values, images, tokens, N, channel, P, P0)
                v0 = tl.load(pointers, mask=within, other=0.0)
                v1 = v0
                if P1 > 0:
                    pointers, within = staged_tile(values, images, tokens, N, P0, P, P1)
                    v1 = tl.load(pointers, mask=within, other=0.0)
            else:
                k, v0, v1 = keys_and_values(
                    x, images, tokens, N, C, mean, rstd, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias,
                    bn_mean, bn_var, bn_eps, 2 * D + channel, P, D, DP, P0, P1, CHANNELS, LAST, PROJ,
                )  # fmt: skip
            logits = tl.where((tokens < N)[None, :], dot(q, k.trans(), ATTN) * scale, float("-inf"))
            before = row_max
            row_max = tl.maximum(row_max, row_maximum(logits, 1), propagate_nan=tl.PropagateNan.ALL)
            # Where all logits were -inf so far, exp(-inf - row_max) would be NaN and not 0.
            reference = tl.where(row_max == float("-inf"), 0.0, row_max)
            p = tl.exp(logits - reference[:, None])
            kept = tl.exp(before - reference)
            row_sum = row_sum * kept + tl.sum(p, 1)
            p = p.to(dtype)
            out0 = dot(p, v0, ATTN, out0 * kept[:, None])
            if P1 > 0:
                out1 = dot(p, v1, ATTN, out1 * kept[:, None])

        share = (1.0 / row_sum)[:, None]
        within = (queries < N)[None, :, None]
        out0 = (out0 * share).reshape(1, QUERIES, P0)
        store_tokens(y, out0, images, queries, channel, N, y_channels, P, Y_LAST, RELU, within)
        if P1 > 0:
            out1 = (out1 * share).reshape(1, QUERIES, P1)
            store_tokens(y, out1, images, queries, P0, N, y_channels, P, Y_LAST, RELU, within)
        if row_max_out is not None:
            rows = images.to(tl.int64) * N + queries
            within = (queries < N) & (channel == 0)
            tl.store(row_max_out + rows, row_max, mask=within)
            tl.store(row_sum_out + rows, row_sum, mask=within)
