"""Tokens of images inside kernels: where they are, loaded, normalised and stored; and the channels that are copied.

Tiles are [images, tokens, channels] in both layouts of x. Everything outside is 0 and never a product with 0, which
would spread a NaN.
"""

import triton
import triton.language as tl

from .common import rectified
from .projection import load_row


@triton.jit
def offsets_of(images, tokens, channels, N, C, LAST: tl.constexpr):
    """Offsets [images, tokens, channels] in a tensor [B, C, N] (NCHW) or [B, N, C] (channels_last)."""
    image = images.to(tl.int64)[:, None, None] * N * C
    if LAST:
        return image + tokens[None, :, None] * C + channels[None, None, :]
    return image + tokens[None, :, None] + channels[None, None, :] * N


@triton.jit
def load_tokens(x, images, tokens, first, N, C, P, CHANNELS: tl.constexpr, LAST: tl.constexpr, within):
    """Channels ``first`` to ``first + CHANNELS`` of tokens of images, [images, tokens, channels], 0 outside."""
    channels = first + tl.arange(0, CHANNELS)
    offsets = offsets_of(images, tokens, channels, N, C, LAST)
    return tl.load(x + offsets, mask=within & (channels < P)[None, None, :], other=0.0)


@triton.jit
def store_tokens(y, out, images, tokens, first, N, C, P, LAST: tl.constexpr, RELU: tl.constexpr, within):
    """The counterpart of :func:`load_tokens`, with ReLU."""
    channels = first + tl.arange(0, out.shape[2])
    if RELU:
        out = rectified(out)
    offsets = offsets_of(images, tokens, channels, N, C, LAST)
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=within & (channels < P)[None, None, :])


@triton.jit
def sum_of_image(a0, a1, P1: tl.constexpr):
    """Sum of [images, tokens, channels] per image; over tokens first, which lie within a warp."""
    total = tl.sum(tl.sum(a0, 1), 1)
    if P1 > 0:
        total += tl.sum(tl.sum(a1, 1), 1)
    return total


@triton.jit
def centred(x0, mean, first, P, CHANNELS: tl.constexpr, within):
    channels = first + tl.arange(0, CHANNELS)
    return tl.where(within & (channels < P)[None, None, :], x0 - mean[:, None, None], 0.0)


@triton.jit
def normalised(x, mean, rstd, norm_weight, norm_bias, first, P, CHANNELS: tl.constexpr, within):
    """z of [images, tokens, channels], 0 outside."""
    channels = first + tl.arange(0, CHANNELS)
    z = (x - mean[:, None, None]) * rstd[:, None, None] * load_row(norm_weight, channels, P)[None, None, :]
    if norm_bias is not None:
        z += load_row(norm_bias, channels, P)[None, None, :]
    return tl.where(within & (channels < P)[None, None, :], z, 0.0)


@triton.jit
def before_relu(gradient, result, offsets, mask):
    """The gradient of what ReLU made ``result`` of: passed on where that is positive or NaN."""
    return tl.where(tl.load(result + offsets, mask=mask, other=0.0) <= 0.0, 0.0, gradient)


@triton.jit
def copy_piece(x, y, offsets, mask, RELU: tl.constexpr, result):
    values = tl.load(x + offsets, mask=mask, other=0.0)
    if RELU:
        values = rectified(values) if result is None else before_relu(values, result, offsets, mask)
    tl.store(y + offsets, values, mask=mask)


@triton.jit
def copy_rest(
    x, y, block, B, N, C, P, RELU: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, result=None,
):  # fmt: skip
    """Block ``block`` of those that copy the channels from P on; with ``result`` x is a gradient, see before_relu.

    channels_last: ROWS tokens of COLUMNS channels. NCHW: ROWS * COLUMNS elements of the run that these channels are in
    one image. Such a run may start anywhere, so its inner part is moved in vectors of VECTOR elements that are aligned,
    and the few elements before and after it by the first block of the image.
    """
    if LAST:
        tokens = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        channels = P + tl.arange(0, COLUMNS)
        mask = (tokens < B * N)[:, None] & (channels < C)[None, :]
        copy_piece(x, y, tokens[:, None] * C + channels[None, :], mask, RELU, result)
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
        copy_piece(x, y, offsets, (vectors < last)[:, None], RELU, result)
        if block % blocks == 0:
            edge = tl.arange(0, VECTOR)
            copy_piece(x, y, start + edge, start + edge < tl.minimum(first * VECTOR, end), RELU, result)
            copy_piece(x, y, last * VECTOR + edge, last * VECTOR + edge < end, RELU, result)
