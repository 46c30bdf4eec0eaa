"""Mean and covariance of the normalised first P channels over all tokens, and their gradients.

The covariance is a sum of products of centred values: every tile of tokens is centred by its own mean, and tiles and
parts are merged exactly (Chan, Golub and LeVeque 1983). Kernels take z less a constant of each channel, on which the
covariance does not depend: the norm's bias, or without a norm the first token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import channels_last, check_images, dot, empty_image, launched, on_device_of, padded, parameters
from .norm_backward import InputGradient, add_to_sums, leave_sums, reduce_parts, store_input_gradient, sums_of_images
from .tiled import measure, merged
from .tiles import Tiles, affine_tile, both, element, normal_tile, sum_of_image, tile_tokens

TOKENS = 64
CHANNELS = 32
"""Channels of a block of the covariance: exact products of larger blocks run out of registers."""
PARTS = 64
"""Partial covariances of a batch, at most."""
MOST_WHOLE = 128
"""Channels up to which a program measures its images itself."""
PART = 256
"""Tokens that one program measures of an image that it does not hold."""


@launched
def _merge_parts(
    part_mean, part_squares, image_mean, image_rstd, N, P, eps, PART: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    images = tl.program_id(0) + tl.arange(0, 1)
    mean, rstd = merged(part_mean, part_squares, images, N, P, eps, PART, PARTS)
    tl.store(image_mean + images, mean)
    tl.store(image_rstd + images, rstd)


@triton.jit
def statistics_of_tile(
    x, image_mean, image_rstd, norm_weight, first, image, n, valid, keeps, C, P, N, eps, LAST: tl.constexpr,
    IMAGES: tl.constexpr, PITCH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of the image of each token: read, or where ``WHOLE`` columns hold all channels measured, and stored
    by the program that ``keeps`` them; nothing without a norm."""
    if norm_weight is None:
        mean = tl.zeros(valid.shape, tl.float32)
        rstd = mean
    elif WHOLE > 0:
        c = tl.arange(0, WHOLE)
        mask = both(valid, c, P)
        values = tl.load(x + first * C * N + element(image, c, n, C, N, LAST), mask, 0.0).to(tl.float32)
        mean = sum_of_image(tl.sum(values, 1), IMAGES, PITCH) / (P * N)
        centred = tl.where(mask, values - mean[:, None], 0.0)
        variance = sum_of_image(tl.sum(centred * centred, 1), IMAGES, PITCH) / (P * N)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        tl.store(image_mean + first + image, mean, valid & (n == 0) & keeps)
        tl.store(image_rstd + first + image, rstd, valid & (n == 0) & keeps)
    else:
        mean = tl.load(image_mean + first + image, valid, 0.0)
        rstd = tl.load(image_rstd + first + image, valid, 0.0)
    return mean, rstd


@triton.jit
def shift(x, norm_bias, c, P, N, HAS_NORM: tl.constexpr, LAST: tl.constexpr):
    """The constant of each channel that :func:`shifted_z` leaves out."""
    if norm_bias is not None:
        return tl.load(norm_bias + c, c < P, 0.0).to(tl.float32)
    elif HAS_NORM:
        return tl.zeros(c.shape, tl.float32)
    else:
        return tl.load(x + c * (1 if LAST else N), c < P, 0.0).to(tl.float32)


@triton.jit
def shifted_z(x, norm_weight, mean, rstd, first, image, c, n, valid, C, P, N, LAST: tl.constexpr):
    """z less the constant of its channel, 0 where there is none."""
    mask = both(valid, c, P)
    values = tl.load(x + first * C * N + element(image, c, n, C, N, LAST), mask, 0.0).to(tl.float32)
    if norm_weight is not None:
        w = tl.load(norm_weight + c, c < P, 0.0).to(tl.float32)
        return tl.where(mask, (values - mean[:, None]) * rstd[:, None] * w[None, :], 0.0)
    else:
        return tl.where(mask, values - shift(x, None, c, P, N, False, LAST)[None, :], 0.0)


@launched
def _partial_moments(
    x,
    norm_weight,
    image_mean,
    image_rstd,
    part_count,
    part_mean,
    part_products,
    B,
    C,
    P,
    N,
    blocks,
    tiles,
    steps,
    eps,
    LAST: tl.constexpr,
    IMAGES: tl.constexpr,
    PITCH: tl.constexpr,
    BP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Count, mean and centred products of ``steps`` tiles, for one pair of blocks of channels.

    ``WHOLE``, if not 0, holds all channels: then images are measured here.
    """
    if tl.program_id(2) < tl.program_id(1):
        return  # the covariance is symmetric
    part = tl.program_id(0)
    left = tl.program_id(1) * BP + tl.arange(0, BP)
    right = tl.program_id(2) * BP + tl.arange(0, BP)
    count = 0.0
    left_mean = tl.zeros([BP], tl.float32)
    right_mean = tl.zeros([BP], tl.float32)
    products = tl.zeros([BP, BP], tl.float32)
    for tile in range(part * steps, tl.minimum((part + 1) * steps, tiles)):
        first, image, n, valid = tile_tokens(tile, B, N, blocks, IMAGES, PITCH)
        mean, rstd = statistics_of_tile(
            x, image_mean, image_rstd, norm_weight, first, image, n, valid, tl.program_id(2) == 0, C, P, N, eps,
            LAST, IMAGES, PITCH, WHOLE,
        )  # fmt: skip
        size = tl.sum(valid.to(tl.float32), 0)
        z_left = shifted_z(x, norm_weight, mean, rstd, first, image, left, n, valid, C, P, N, LAST)
        z_right = shifted_z(x, norm_weight, mean, rstd, first, image, right, n, valid, C, P, N, LAST)
        own_left = tl.sum(z_left, 0) / size
        own_right = tl.sum(z_right, 0) / size
        z_left = tl.where(valid[:, None], z_left - own_left[None, :], 0.0)
        z_right = tl.where(valid[:, None], z_right - own_right[None, :], 0.0)
        change_left = own_left - left_mean
        change_right = own_right - right_mean
        products = dot(tl.trans(z_left), z_right, "ieee", products)
        products += change_left[:, None] * change_right[None, :] * (count * size / (count + size))
        left_mean += change_left * (size / (count + size))
        right_mean += change_right * (size / (count + size))
        count += size
    pairs = (left < P)[:, None] & (right < P)[None, :]
    at = part.to(tl.int64) * P * P + left[:, None] * P + right[None, :]
    tl.store(part_products + at, products, pairs)
    if tl.program_id(1) == 0:
        tl.store(part_mean + part * P + right, right_mean, right < P)
        if tl.program_id(2) == 0:
            tl.store(part_count + part, count)


@launched
def _merge_moments(
    x,
    norm_bias,
    part_count,
    part_mean,
    part_products,
    z_mean,
    z_cov,
    parts,
    count,
    P,
    N,
    HAS_NORM: tl.constexpr,
    LAST: tl.constexpr,
    PP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One row of the covariance and, by symmetry, one column; every program merges the means for it."""
    row = tl.program_id(0)
    c = tl.arange(0, PP)
    r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, PP], tl.float32)
    for start in range(0, parts, ROWS):
        part = start + r
        counts = tl.load(part_count + part, part < parts, 0.0)
        total += counts[:, None] * tl.load(part_mean + part[:, None] * P + c[None, :], both(part < parts, c, P), 0.0)
    mean = tl.sum(total, 0) / count
    own_mean = tl.sum(tl.where(c == row, mean, 0.0), 0)
    total = tl.zeros([ROWS, PP], tl.float32)
    for start in range(0, parts, ROWS):
        part = start + r
        mask = both(part < parts, c, P) & (c >= row)[None, :]
        counts = tl.load(part_count + part, part < parts, 0.0)
        change = tl.load(part_mean + part[:, None] * P + c[None, :], mask, 0.0) - mean[None, :]
        own_change = tl.load(part_mean + part * P + row, part < parts, 0.0) - own_mean
        total += tl.where(mask, change * (own_change * counts)[:, None], 0.0)
        total += tl.load(part_products + part.to(tl.int64)[:, None] * P * P + row * P + c[None, :], mask, 0.0)
    cov = tl.sum(total, 0) / count
    upper = (c >= row) & (c < P)
    tl.store(z_cov + row * P + c, cov, upper)
    tl.store(z_cov + c * P + row, cov, upper)
    if row == 0:
        tl.store(z_mean + c, mean + shift(x, norm_bias, c, P, N, HAS_NORM, LAST), c < P)


def measure_images(x: Tensor, P: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and rstd of the first P channels of images that no single program holds."""
    B, C, H, W = x.shape
    N = H * W
    parts = triton.cdiv(N, PART)
    part_mean, part_squares = (x.new_empty(B, parts, dtype=torch.float32) for _ in range(2))
    mean, rstd = (x.new_empty(B, dtype=torch.float32) for _ in range(2))
    last = channels_last(x)
    measure[(B * parts,)](x, part_mean, part_squares, N, C, P=P, PART=PART, TOKENS=TOKENS, CHANNELS=CHANNELS, LAST=last)
    _merge_parts[(B,)](part_mean, part_squares, mean, rstd, N, P, eps, PART=PART, PARTS=triton.next_power_of_2(parts))
    return mean, rstd


def fits_whole(tiles: Tiles, P: int) -> bool:
    """Whether a program can measure its images itself."""
    return tiles.blocks == 1 and P <= MOST_WHOLE


def partial_moments_forward(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, pdim: int, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, C, H, W = x.shape
    N, P = H * W, pdim
    check_images(x, P)
    norm_weight, norm_bias = parameters(norm_weight=(norm_weight, P), norm_bias=(norm_bias, P))

    def fresh(*size: int) -> Tensor:
        return x.new_empty(size, dtype=torch.float32)

    z_mean, z_cov, image_mean, image_rstd = fresh(P), fresh(P, P), fresh(B), fresh(B)
    if norm_weight is None:
        image_mean.zero_()
        image_rstd.fill_(1.0)
    if B == 0:
        return z_mean.zero_(), z_cov.zero_(), image_mean, image_rstd
    tiles = Tiles.of(B, N, TOKENS)
    steps = triton.cdiv(tiles.count, PARTS)
    parts = triton.cdiv(tiles.count, steps)
    chunks = triton.cdiv(P, CHANNELS)
    part_count, part_mean, part_products = fresh(parts), fresh(parts, P), fresh(parts, P, P)
    last = channels_last(x)
    is_whole = fits_whole(tiles, P)
    with on_device_of(x):
        if norm_weight is not None and not is_whole:
            image_mean, image_rstd = measure_images(x, P, norm_eps)
        _partial_moments[(parts, chunks, chunks)](
            x, norm_weight, image_mean, image_rstd, part_count, part_mean, part_products,
            B, C, P, N, tiles.blocks, tiles.count, steps, norm_eps,
            LAST=last, IMAGES=tiles.images, PITCH=tiles.pitch, BP=CHANNELS, WHOLE=padded(P) if is_whole else 0,
            num_warps=8, num_stages=1,
        )  # fmt: skip
        _merge_moments[(P,)](
            x, norm_bias, part_count, part_mean, part_products, z_mean, z_cov, parts, float(B * N), P, N,
            HAS_NORM=norm_weight is not None, LAST=last, PP=padded(P), ROWS=16, num_warps=8,
        )  # fmt: skip
    return z_mean, z_cov, image_mean, image_rstd


# Backward: dz = (dmean + (dcov + dcov^T) (z - mean)) / count, then through the group normalisation


@triton.jit
def _dz(
    dmean, dcov, x1, z_mean, image_mean, image_rstd, norm_weight, norm_bias, count, first, image, n, valid, c, P, N,
    X1_LAST: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    dz = tl.zeros([valid.shape[0], c.shape[0]], tl.float32)
    for start in range(0, P, BK):
        k = start + tl.arange(0, BK)
        z = normal_tile(x1, image_mean, image_rstd, first, image, k, n, valid, P, N, X1_LAST)
        z = affine_tile(z, norm_weight, norm_bias, valid, k, P)
        z = tl.where(both(valid, k, P), z - tl.load(z_mean + k, k < P, 0.0)[None, :], 0.0)
        pairs = both(k < P, c, P)
        symmetric = tl.load(dcov + k[:, None] * P + c[None, :], pairs, 0.0)
        symmetric += tl.load(dcov + c[None, :] * P + k[:, None], pairs, 0.0)
        dz = dot(z, symmetric, "ieee", dz)
    dz = (dz + tl.load(dmean + c, c < P, 0.0)[None, :]) / count
    return tl.where(both(valid, c, P), dz, 0.0)


@launched
def _moments_backward(
    dmean, dcov, x1, dx, z_mean, image_mean, image_rstd, norm_weight, norm_bias, tile_sums, dnorm_parts, count,
    B, C, P, N, blocks, X1_LAST: tl.constexpr, DX_LAST: tl.constexpr, IMAGES: tl.constexpr, PITCH: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, image, n, valid = tile_tokens(tile, B, N, blocks, IMAGES, PITCH)
    total = tl.zeros([IMAGES * PITCH], tl.float32)
    projected = tl.zeros([IMAGES * PITCH], tl.float32)
    if norm_weight is not None:
        if STAGE == "store":
            total, projected = sums_of_images(tile_sums, first, image, valid, blocks)
        else:
            for start in range(0, P, BP):
                c = start + tl.arange(0, BP)
                dz = _dz(
                    dmean, dcov, x1, z_mean, image_mean, image_rstd, norm_weight, norm_bias, count, first, image, n,
                    valid, c, P, N, X1_LAST, BK,
                )  # fmt: skip
                normal = normal_tile(x1, image_mean, image_rstd, first, image, c, n, valid, P, N, X1_LAST)
                total, projected = add_to_sums(
                    dz, normal, norm_weight, total, projected, dnorm_parts, tile, c, P
                )  # fmt: skip
            total = sum_of_image(total, IMAGES, PITCH)
            projected = sum_of_image(projected, IMAGES, PITCH)
            if STAGE == "sums":
                leave_sums(total, projected, tile_sums, tile, first, image, n, valid, blocks, PITCH)
    if STAGE != "sums" and dx is not None:
        for start in range(0, P, BP):
            c = start + tl.arange(0, BP)
            dz = _dz(
                dmean, dcov, x1, z_mean, image_mean, image_rstd, norm_weight, norm_bias, count, first, image, n, valid,
                c, P, N, X1_LAST, BK,
            )  # fmt: skip
            normal = normal_tile(x1, image_mean, image_rstd, first, image, c, n, valid, P, N, X1_LAST)
            store_input_gradient(
                dz, normal, image_rstd, norm_weight, total, projected, dx, first, image, n, valid, c, C, P, N, DX_LAST
            )  # fmt: skip


def partial_moments_backward(
    dmean: Tensor,
    dcov: Tensor,
    x1: Tensor,
    mean: Tensor,
    image_mean: Tensor,
    image_rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    channels: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    B, P, H, W = x1.shape
    N = H * W
    norm_weight, norm_bias = parameters(norm_weight=(norm_weight, P), norm_bias=(norm_bias, P))
    dx = None
    if needs[0]:
        dx = empty_image(x1, channels).zero_()
    dnorm_weight, dnorm_bias = (
        torch.empty_like(t) if need and t is not None else None
        for need, t in zip(needs[1:], (norm_weight, norm_bias), strict=True)
    )
    dnorm = dnorm_weight is not None or dnorm_bias is not None
    if norm_weight is None:
        image_mean = image_rstd = None
    tiles = Tiles.of(B, N, TOKENS)
    plan = InputGradient.of(x1, tiles, norm_weight, needs[0], dnorm)
    with on_device_of(x1):
        for stage in plan.stages if B > 0 else ():
            _moments_backward[(tiles.count,)](
                dmean, dcov, x1, dx, mean, image_mean, image_rstd, norm_weight, norm_bias, plan.tile_sums,
                plan.dnorm_parts, float(B * N), B, channels, P, N, tiles.blocks,
                X1_LAST=channels_last(x1), DX_LAST=dx is not None and channels_last(dx), IMAGES=tiles.images,
                PITCH=tiles.pitch, BP=CHANNELS, BK=32, STAGE=stage, num_warps=8, num_stages=1,
            )  # fmt: skip
        reduce_parts(plan.dnorm_parts, dnorm_weight, dnorm_bias)
    return tuple(t if t is not None else x1.new_empty(0) for t in (dx, dnorm_weight, dnorm_bias))


OPERATORS = {
    "partial_moments_forward": partial_moments_forward,
    "partial_moments_backward": partial_moments_backward,
}
