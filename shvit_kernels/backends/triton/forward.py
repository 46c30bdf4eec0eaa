"""Attention over the first P channels, the others copied: ``shsa_forward`` and ``shsa_eval``.

    z       = (x1 - mean) * rstd * norm_weight + norm_bias          per token; left out without a norm
    q, k, v = factor * (W z) + offset                               the projection, with batch normalisation folded in
    p       = exp(scale * q k^T - row_max),  row_sum = sum_keys p
    y       = concat(p v / row_sum, x2)                             then ReLU, if asked for

Tokens are the rows of every tile and channels its columns, in both layouts of x. P channels are held as two tiles of P0
and P1 channels (``common.split``), P1 = 0 where one tile does. Blocks that copy x2 follow those that attend in the
same grid, so that their traffic fills the time in which attention waits.

``row_max`` and ``row_sum`` are those of the formula, natural logarithms: the backward recomputes p from them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from . import common, table
from .common import dot, rectified, row_maximum


@triton.jit
def load_tokens(x, images, tokens, first: tl.constexpr, N, C, P, CHANNELS: tl.constexpr, LAST: tl.constexpr, within):
    """Channels ``first`` to ``first + CHANNELS`` of tokens of images, [images, tokens, channels], 0 outside."""
    channels = first + tl.arange(0, CHANNELS)
    offsets = offsets_of(images, tokens, channels, N, C, LAST)
    return tl.load(x + offsets, mask=within & (channels < P)[None, None, :], other=0.0)


@triton.jit
def offsets_of(images, tokens, channels, N, C, LAST: tl.constexpr):
    """Offsets [images, tokens, channels] in a tensor [B, C, N] (NCHW) or [B, N, C] (channels_last)."""
    image = images.to(tl.int64)[:, None, None] * N * C
    if LAST:
        return image + tokens[None, :, None] * C + channels[None, None, :]
    return image + tokens[None, :, None] + channels[None, None, :] * N


@triton.jit
def weight_tile(weight, rows, end, first: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr):
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
def load_row(vector, rows, end):
    return tl.load(vector + rows, mask=rows < end, other=0.0).to(tl.float32)


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


@triton.jit
def sum_of_image(a0, a1, P1: tl.constexpr):
    """Sum of [images, tokens, channels] per image; over tokens first, which lie within a warp."""
    total = tl.sum(tl.sum(a0, 1), 1)
    if P1 > 0:
        total += tl.sum(tl.sum(a1, 1), 1)
    return total


@triton.jit
def centred(x0, mean, first: tl.constexpr, P, CHANNELS: tl.constexpr, within):
    channels = first + tl.arange(0, CHANNELS)
    return tl.where(within & (channels < P)[None, None, :], x0 - mean[:, None, None], 0.0)


@triton.jit
def normalised(x, mean, rstd, norm_weight, norm_bias, first: tl.constexpr, P, CHANNELS: tl.constexpr, within):
    """z of [images, tokens, channels], 0 outside."""
    channels = first + tl.arange(0, CHANNELS)
    z = (x - mean[:, None, None]) * rstd[:, None, None] * load_row(norm_weight, channels, P)[None, None, :]
    if norm_bias is not None:
        z += load_row(norm_bias, channels, P)[None, None, :]
    return tl.where(within & (channels < P)[None, None, :], z, 0.0)


@triton.jit
def store_tokens(y, out, images, tokens, first: tl.constexpr, N, C, P, LAST: tl.constexpr, RELU: tl.constexpr, within):
    """The counterpart of :func:`load_tokens`, with ReLU."""
    channels = first + tl.arange(0, out.shape[2])
    if RELU:
        out = rectified(out)
    offsets = offsets_of(images, tokens, channels, N, C, LAST)
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=within & (channels < P)[None, None, :])


@triton.jit
def copy_piece(x, y, offsets, mask, RELU: tl.constexpr):
    values = tl.load(x + offsets, mask=mask, other=0.0)
    if RELU:
        values = rectified(values)
    tl.store(y + offsets, values, mask=mask)


@triton.jit
def copy_rest(
    x, y, block, B, N, C, P, RELU: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Block ``block`` of those that copy the channels from P on.

    channels_last: ROWS tokens of COLUMNS channels. NCHW: ROWS * COLUMNS elements of the run that these channels are in
    one image. Such a run may start anywhere, so its inner part is moved in vectors of VECTOR elements that are aligned,
    and the few elements before and after it by the first block of the image.
    """
    if LAST:
        tokens = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        channels = P + tl.arange(0, COLUMNS)
        mask = (tokens < B * N)[:, None] & (channels < C)[None, :]
        copy_piece(x, y, tokens[:, None] * C + channels[None, :], mask, RELU)
    else:
        VECTORS: tl.constexpr = ROWS * COLUMNS // VECTOR
        blocks = tl.cdiv((C - P) * N // VECTOR + 1, VECTORS)
        image = (block // blocks).to(tl.int64)
        start = (image * C + P) * N
        end = (image + 1) * C * N
        first = (start + VECTOR - 1) // VECTOR
        last = tl.maximum(end // VECTOR, first)
        vectors = first + (block % blocks) * VECTORS + tl.arange(0, VECTORS)
        offsets = vectors[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        copy_piece(x, y, offsets, (vectors < last)[:, None], RELU)
        if block % blocks == 0:
            edge = tl.arange(0, VECTOR)
            copy_piece(x, y, start + edge, start + edge < tl.minimum(first * VECTOR, end), RELU)
            copy_piece(x, y, last * VECTOR + edge, last * VECTOR + edge < end, RELU)


@triton.jit
def attend_short(
    x, y, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, given_mean, given_rstd,
    mean_out, rstd_out, row_max_out, row_sum_out,
    B, attention_blocks, norm_eps, bn_eps, scale,
    C: tl.constexpr, P: tl.constexpr, D: tl.constexpr, N: tl.constexpr, IMAGES: tl.constexpr, NP: tl.constexpr,
    DP: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr,
    PROJ: tl.constexpr, ATTN: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """IMAGES whole images, of at most NP tokens each, per attention block."""
    block = tl.program_id(0)
    if block >= attention_blocks:
        copy_rest(x, y, block - attention_blocks, B, N, C, P, RELU, LAST, VECTOR, ROWS, COLUMNS)
    else:
        images = block * IMAGES + tl.arange(0, IMAGES)
        tokens = tl.arange(0, NP)
        within = (images < B)[:, None, None] & (tokens < N)[None, :, None]
        dtype = x.dtype.element_ty

        # Everything that main memory or L2 must send is asked for before anything waits.
        x0 = load_tokens(x, images, tokens, 0, N, C, P, P0, LAST, within).to(tl.float32)
        x1 = x0
        if P1 > 0:
            x1 = load_tokens(x, images, tokens, P0, N, C, P, P1, LAST, within).to(tl.float32)
        q_rows = tl.arange(0, DP)
        k_rows = D + tl.arange(0, DP)
        v0_rows = 2 * D + tl.arange(0, P0)
        v0_end: tl.constexpr = 2 * D + (P0 if P1 > 0 else P)
        wq0, wq1 = weight_tiles(weight, q_rows, D, P, P0, P1)
        wk0, wk1 = weight_tiles(weight, k_rows, 2 * D, P, P0, P1)
        wv00, wv01 = weight_tiles(weight, v0_rows, v0_end, P, P0, P1)
        q_factor, q_offset = affine(q_rows, D, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        k_factor, k_offset = affine(k_rows, 2 * D, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        v0_factor, v0_offset = affine(v0_rows, v0_end, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        if P1 > 0:
            v1_rows = 2 * D + P0 + tl.arange(0, P1)
            wv10, wv11 = weight_tiles(weight, v1_rows, 2 * D + P, P, P0, P1)
            v1_factor, v1_offset = affine(v1_rows, 2 * D + P, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)

        mean = tl.zeros([IMAGES], tl.float32)
        rstd = tl.full([IMAGES], 1.0, tl.float32)
        if norm_weight is not None:
            if given_mean is not None:
                mean = tl.load(given_mean + images, mask=images < B, other=0.0)
                rstd = tl.load(given_rstd + images, mask=images < B, other=0.0)
            else:
                mean = sum_of_image(x0, x1, P1) / (P * N)
                c0 = centred(x0, mean, 0, P, P0, within)
                c1 = c0
                if P1 > 0:
                    c1 = centred(x1, mean, P0, P, P1, within)
                rstd = tl.rsqrt(sum_of_image(c0 * c0, c1 * c1, P1) / (P * N) + norm_eps)
            x0 = normalised(x0, mean, rstd, norm_weight, norm_bias, 0, P, P0, within)
            if P1 > 0:
                x1 = normalised(x1, mean, rstd, norm_weight, norm_bias, P0, P, P1, within)
        if mean_out is not None:
            tl.store(mean_out + images, mean, mask=images < B)
            tl.store(rstd_out + images, rstd, mask=images < B)
        z0 = x0.to(dtype).reshape(IMAGES * NP, P0)
        z1 = z0
        if P1 > 0:
            z1 = x1.to(dtype).reshape(IMAGES * NP, P1)

        # The rows of v beyond the last token meet probabilities of 0, so they must not be NaN or infinite.
        q = project(z0, z1, wq0, wq1, q_factor, q_offset, P1, PROJ).to(dtype)
        k = project(z0, z1, wk0, wk1, k_factor, k_offset, P1, PROJ).to(dtype)
        own = within.reshape(IMAGES * NP, 1)
        v0 = tl.where(own, project(z0, z1, wv00, wv01, v0_factor, v0_offset, P1, PROJ), 0.0).to(dtype)
        v1 = v0
        if P1 > 0:
            v1 = tl.where(own, project(z0, z1, wv10, wv11, v1_factor, v1_offset, P1, PROJ), 0.0).to(dtype)

        # One image: products of matrices, which Hopper has special instructions for. Several: one product per image.
        KEYS: tl.constexpr = 1 if IMAGES == 1 else 2  # the axis of the keys in the logits
        if IMAGES == 1:
            logits = dot(q, k.trans(), ATTN) * scale
        else:
            q = q.reshape(IMAGES, NP, DP)
            k = k.reshape(IMAGES, NP, DP)
            logits = dot(q, k.permute(0, 2, 1), ATTN) * scale
            v0 = v0.reshape(IMAGES, NP, P0)
            if P1 > 0:
                v1 = v1.reshape(IMAGES, NP, P1)
        logits = tl.where(tokens < N, logits, float("-inf"))
        row_max = row_maximum(logits, KEYS)
        p = tl.exp(logits - tl.expand_dims(row_max, KEYS))
        row_sum = tl.sum(p, KEYS)
        p = p.to(dtype)
        share = tl.expand_dims(1.0 / row_sum, KEYS)
        out = (dot(p, v0, ATTN) * share).reshape(IMAGES, NP, P0)
        store_tokens(y, out, images, tokens, 0, N, C, P, LAST, RELU, within)
        if P1 > 0:
            out = (dot(p, v1, ATTN) * share).reshape(IMAGES, NP, P1)
            store_tokens(y, out, images, tokens, P0, N, C, P, LAST, RELU, within)
        if row_max_out is not None:
            rows = images[:, None] * N + tokens[None, :]
            mask = (images < B)[:, None] & (tokens < N)[None, :]
            tl.store(row_max_out + rows, row_max.reshape(IMAGES, NP), mask=mask)
            tl.store(row_sum_out + rows, row_sum.reshape(IMAGES, NP), mask=mask)


def copy_blocks(B: int, N: int, C: int, P: int, last: bool, itemsize: int, elements: int) -> tuple[int, dict[str, int]]:
    """How many blocks copy the channels from P on, ``elements`` each, and their sizes for :func:`copy_rest`."""
    vector = 16 // itemsize
    columns = triton.next_power_of_2(max(C - P, 1)) if last else vector
    rows = max(elements // columns, 1)
    if C == P:
        blocks = 0
    elif last:
        blocks = triton.cdiv(B * N, rows)
    else:
        blocks = B * triton.cdiv((C - P) * N // vector + 1, rows)
    return blocks, {"VECTOR": vector, "ROWS": rows, "COLUMNS": columns}


def attend(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    bn_eps: float,
    qk_dim: int,
    norm_eps: float,
    scale: float,
    relu: bool,
    tf32_proj: bool,
    tf32_attn: bool,
    statistics: bool,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """y, and if ``statistics`` what the backward reads: mean and rstd per image, row maximum and row sum per token.

    Mean and rstd of the images are computed where they are not given.
    """
    B, C, H, W = x.shape
    N, P, D = H * W, weight.shape[1], qk_dim
    y = torch.empty_like(x, memory_format=ops.memory_format(x))
    row_max = row_sum = mean_out = rstd_out = None
    if statistics:
        row_max, row_sum = (x.new_empty(B, N, dtype=torch.float32) for _ in range(2))
        if mean is None:
            mean_out, rstd_out = (x.new_empty(B, dtype=torch.float32) for _ in range(2))
    results = y, mean_out if mean is None else mean, rstd_out if rstd is None else rstd, row_max, row_sum
    if B == 0:
        return results
    last = common.channels_last(x)
    launch = table.short(P, N, x.element_size())
    attention_blocks = triton.cdiv(B, launch.images)
    copies, copy_sizes = copy_blocks(B, N, C, P, last, x.element_size(), launch.copied)
    P0, P1 = common.split(P)
    with common.on_device_of(x):
        attend_short[(attention_blocks + copies,)](
            x, y, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, mean, rstd,
            mean_out, rstd_out, row_max, row_sum, B, attention_blocks, norm_eps, bn_eps, scale,
            C=C, P=P, D=D, N=N, IMAGES=launch.images, NP=common.padded(N), DP=common.padded(D), P0=P0, P1=P1, LAST=last,
            RELU=relu, PROJ=common.precision(tf32_proj), ATTN=common.precision(tf32_attn), **copy_sizes,
            num_warps=launch.warps,
        )  # fmt: skip
    return results


def shsa_forward(x, norm_weight, norm_bias, qkv_weight, qkv_bias, qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn):
    settings = (qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn)
    return attend(x, norm_weight, norm_bias, qkv_weight, qkv_bias, None, None, None, None, 0.0, *settings, True)


def shsa_eval(x, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, *settings):
    qk_dim, norm_eps, bn_eps, *rest = settings
    batch_norm = (bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
    return attend(x, norm_weight, norm_bias, weight, bias, *batch_norm, qk_dim, norm_eps, *rest, False)[0]


OPERATORS = {"shsa_forward": shsa_forward, "shsa_eval": shsa_eval}
