"""How the kernels of the backward and of the moments cut a batch into tiles, and where a tile's elements are.

A tile holds tokens in rows: those of several short images, each padded to ``pitch``, or a block of one long image.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .common import padded


class Tiles(NamedTuple):
    """``images`` short images in each tile, or ``blocks`` tiles of each image; one of both is 1."""

    pitch: int
    images: int
    blocks: int
    count: int

    @classmethod
    def of(cls, B: int, N: int, tokens: int) -> "Tiles":
        """Tiles of ``tokens`` rows."""
        if tokens < N:
            blocks = triton.cdiv(N, tokens)
            return cls(tokens, 1, blocks, B * blocks)
        pitch = padded(N)
        images = tokens // pitch
        return cls(pitch, images, 1, triton.cdiv(B, images))


@triton.jit
def tile_tokens(tile, B, N, blocks, IMAGES: tl.constexpr, PITCH: tl.constexpr):
    """First image of a tile; of each row the image after it, the token, and whether there is one."""
    first = tile // blocks * IMAGES
    row = tl.arange(0, IMAGES * PITCH)
    image = row // PITCH
    n = tile % blocks * PITCH + row % PITCH
    return first.to(tl.int64), image, n, (first + image < B) & (n < N)


@triton.jit
def element(image, c, n, C, N, LAST: tl.constexpr):
    """Offsets [rows, channels] in a tensor [B, C, N], or [B, N, C] in memory where ``LAST``."""
    if LAST:
        return (image * (C * N) + n * C)[:, None] + c[None, :]
    else:
        return (image * (C * N) + n)[:, None] + (c * N)[None, :]


@triton.jit
def both(valid, c, C):
    """The mask of existing rows and of columns below C."""
    return valid[:, None] & (c < C)[None, :]


@triton.jit
def sum_of_image(rows, IMAGES: tl.constexpr, PITCH: tl.constexpr):
    """For each row the sum over the rows of its image: a non-finite value stays in its image."""
    sums = tl.sum(tl.reshape(rows, [IMAGES, PITCH]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [IMAGES, PITCH]), [IMAGES * PITCH])


@triton.jit
def normal_tile(x1, mean, rstd, first, image, c, n, valid, P, N, LAST: tl.constexpr):
    """(x1 - mean) / deviation of the tokens' images, or x1 itself where ``mean`` is None; 0 where there is none."""
    mask = both(valid, c, P)
    values = tl.load(x1 + first * P * N + element(image, c, n, P, N, LAST), mask, 0.0).to(tl.float32)
    if mean is not None:
        m = tl.load(mean + first + image, valid, 0.0)
        r = tl.load(rstd + first + image, valid, 0.0)
        values = tl.where(mask, (values - m[:, None]) * r[:, None], 0.0)
    return values


@triton.jit
def affine_tile(normal, norm_weight, norm_bias, valid, c, P):
    """z from :func:`normal_tile`."""
    if norm_weight is not None:
        normal = normal * tl.load(norm_weight + c, c < P, 0.0).to(tl.float32)[None, :]
    if norm_bias is not None:
        normal = tl.where(both(valid, c, P), normal + tl.load(norm_bias + c, c < P, 0.0).to(tl.float32)[None, :], 0.0)
    return normal
