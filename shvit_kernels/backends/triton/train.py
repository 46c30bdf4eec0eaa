"""Attention whose projection is batch-normalised by the statistics of this batch.

Forward, three launches: mean and centred squares of the projection of every tile, their merge by Chan's formula,
attention with the batch normalisation folded in. The variance is that of exact z, and attention's z is rounded, so the
first takes z as a sum of numbers of x's type, whose products with the weight are exact.

Backward: ``backward``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward import BatchNorm, Saved, Settings, gradients
from .common import channels_last, dot, empty_image, launched, on_device_of, padded, parameters
from .forward import attend, check
from .moments import fits_whole, measure_images, shift, shifted_z, statistics_of_tile
from .tiles import Tiles, both, element, tile_tokens

TOKENS = 64
MERGED = 32
"""Channels of the projection that one program merges."""


@triton.jit
def _exact_product(z, w, acc):
    """``z @ w`` of float32 z, in as many terms of w's type as hold its digits."""
    if w.dtype == tl.float32:
        acc = dot(z, w, "ieee", acc)
    else:
        for _ in tl.static_range(2 if w.dtype == tl.float16 else 3):
            term = z.to(w.dtype)
            acc = dot(term, w, "ieee", acc)
            z -= term.to(tl.float32)
    return acc


@launched
def _measure_projection(
    x, x1, norm_weight, image_mean, image_rstd, weight, tile_mean, tile_squares, B, C, P, N, O, blocks, eps,
    LAST: tl.constexpr, IMAGES: tl.constexpr, PITCH: tl.constexpr, WHOLE: tl.constexpr, BK: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of some columns of a tile's projection; the first program of a tile copies it into x1.

    ``WHOLE``, if not 0, holds all channels: then images are measured here.
    """
    tile = tl.program_id(0)
    first, image, n, valid = tile_tokens(tile, B, N, blocks, IMAGES, PITCH)
    size = tl.sum(valid.to(tl.float32), 0)
    is_first = tl.program_id(1) == 0
    mean, rstd = statistics_of_tile(
        x, image_mean, image_rstd, norm_weight, first, image, n, valid, is_first, C, P, N, eps,
        LAST, IMAGES, PITCH, WHOLE,
    )  # fmt: skip
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    projected = tl.zeros([IMAGES * PITCH, BO], tl.float32)
    for start in range(0, P, BK):
        k = start + tl.arange(0, BK)
        if is_first:
            mask = both(valid, k, P)
            values = tl.load(x + first * C * N + element(image, k, n, C, N, LAST), mask, 0.0)
            tl.store(x1 + first * P * N + element(image, k, n, P, N, LAST), values, mask)
        z = shifted_z(x, norm_weight, mean, rstd, first, image, k, n, valid, C, P, N, LAST)
        w = tl.load(weight + o[None, :] * P + k[:, None], both(k < P, o, O), 0.0)
        projected = _exact_product(z, w.to(x.dtype.element_ty), projected)
    own = tl.sum(projected, 0) / size  # rows of no token are 0
    centred = tl.where(valid[:, None], projected - own[None, :], 0.0)
    tl.store(tile_mean + tile.to(tl.int64) * O + o, own, o < O)
    tl.store(tile_squares + tile.to(tl.int64) * O + o, tl.sum(centred * centred, 0), o < O)


@launched
def _merge_projection(
    x, norm_bias, weight, tile_mean, tile_squares, batch_mean, batch_var, z_mean, z_cov, B, P, N, O, blocks, tiles,
    count, HAS_NORM: tl.constexpr, LAST: tl.constexpr, IMAGES: tl.constexpr, PITCH: tl.constexpr, BO: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """Mean and variance of some rows of the projection over the batch; and zeros for the moments that nothing reads."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    total = tl.zeros([BT, BO], tl.float32)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        sizes = _tokens_of(tile, B, N, blocks, tiles, IMAGES, PITCH)
        at = tile.to(tl.int64)[:, None] * O + o[None, :]
        total += sizes[:, None] * tl.load(tile_mean + at, both(tile < tiles, o, O), 0.0)
    mean = tl.sum(total, 0) / count
    total = tl.zeros([BT, BO], tl.float32)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        mask = both(tile < tiles, o, O)
        sizes = _tokens_of(tile, B, N, blocks, tiles, IMAGES, PITCH)
        at = tile.to(tl.int64)[:, None] * O + o[None, :]
        away = tl.load(tile_mean + at, mask, 0.0) - mean[None, :]
        total += tl.where(mask, tl.load(tile_squares + at, mask, 0.0) + sizes[:, None] * away * away, 0.0)
    tl.store(batch_var + o, tl.sum(total, 0) / count, o < O)
    for start in range(0, P, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(weight + o[:, None] * P + k[None, :], both(o < O, k, P), 0.0).to(tl.float32)
        mean += tl.sum(w * shift(x, norm_bias, k, P, N, HAS_NORM, LAST)[None, :], 1)
    tl.store(batch_mean + o, mean, o < O)
    for start in range(tl.program_id(0) * FILLED, P * P, tl.num_programs(0) * FILLED):
        i = start + tl.arange(0, FILLED)
        tl.store(z_cov + i, 0.0, i < P * P)
        tl.store(z_mean + i, 0.0, i < P)


@triton.jit
def _tokens_of(tile, B, N, blocks, tiles, IMAGES: tl.constexpr, PITCH: tl.constexpr):
    """How many tokens a tile has, 0 beyond the last."""
    images = tl.minimum(B - tile // blocks * IMAGES, IMAGES)
    tokens = tl.minimum(N - tile % blocks * PITCH, PITCH)
    return tl.where(tile < tiles, images * tokens, 0).to(tl.float32)


def _statistics(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """The first P channels; mean and rstd of their images, None without a norm; zeros for the moments of z; mean and
    variance of the projection."""
    B, C, H, W = x.shape
    N = H * W
    O, P = weight.shape[:2]
    x1 = empty_image(x, P)

    def fresh(*size: int) -> Tensor:
        return x.new_empty(size, dtype=torch.float32)

    statistics = fresh(P), fresh(P, P), fresh(O), fresh(O)
    if B == 0:
        return x1, fresh(0), fresh(0), *(t.zero_() for t in statistics)
    z_mean, z_cov, batch_mean, batch_var = statistics
    tiles = Tiles.of(B, N, TOKENS)
    tile_mean, tile_squares = fresh(tiles.count, O), fresh(tiles.count, O)
    geometry = {"LAST": channels_last(x), "IMAGES": tiles.images, "PITCH": tiles.pitch}
    mean = rstd = None
    is_whole = fits_whole(tiles, P)
    with on_device_of(x):
        if norm_weight is not None:
            mean, rstd = (fresh(B), fresh(B)) if is_whole else measure_images(x, P, norm_eps)
        columns = 32 if x.dtype == torch.float32 else 64
        _measure_projection[(tiles.count, triton.cdiv(O, columns))](
            x, x1, norm_weight, mean, rstd, weight, tile_mean, tile_squares, B, C, P, N, O, tiles.blocks, norm_eps,
            WHOLE=padded(P) if is_whole else 0, BK=32, BO=columns, num_stages=1, **geometry,
        )  # fmt: skip
        _merge_projection[(triton.cdiv(O, MERGED),)](
            x, norm_bias, weight, tile_mean, tile_squares, batch_mean, batch_var, z_mean, z_cov, B, P, N, O,
            tiles.blocks, tiles.count, float(B * N), HAS_NORM=norm_weight is not None, BO=MERGED, BT=64, BK=32,
            FILLED=1024, num_warps=8, **geometry,
        )  # fmt: skip
    return x1, mean, rstd, *statistics


def shsa_train_forward(
    x, norm_weight, norm_bias, weight, bn_weight, bn_bias,
    qk_dim, norm_eps, bn_eps, scale, relu, tf32_proj, tf32_attn,
):  # fmt: skip
    given = (norm_weight, norm_bias, weight, None, bn_weight, bn_bias, None, None)
    norm_weight, norm_bias, weight, _, bn_weight, bn_bias, _, _ = check(x, *given, qk_dim)
    x1, mean, rstd, *statistics = _statistics(x, norm_weight, norm_bias, weight, norm_eps)
    y, *saved = attend(
        x, norm_weight, norm_bias, weight, None, bn_weight, bn_bias, *statistics[2:], bn_eps,
        qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn, True, mean, rstd,
    )  # fmt: skip
    return y, x1, *saved, *statistics


def shsa_train_backward(
    dy, y, x1, mean, rstd, row_max, row_sum, z_mean, z_cov, batch_mean, batch_var,
    norm_weight, norm_bias, weight, bn_weight, bn_bias,
    qk_dim, norm_eps, bn_eps, scale, relu, tf32_proj, tf32_attn, needs,
):  # fmt: skip
    saved = Saved(x1, y, mean, rstd, row_max, row_sum)
    batch_norm = BatchNorm(bn_weight, bn_bias, batch_mean, batch_var, bn_eps)
    settings = Settings(qk_dim, scale, relu, tf32_proj, tf32_attn)
    return gradients(dy, saved, (norm_weight, norm_bias), weight, None, batch_norm, settings, needs)


@triton.jit
def _moved(old, aim, share):
    """By a share of the way; from the nearer end, so that a share of one leaves nothing of a large old value."""
    return tl.where(share < 0.5, old + share * (aim - old), aim - (1.0 - share) * (aim - old))


@launched
def _update_running_statistics(
    running_mean, running_var, num_batches_tracked, mean, variance, unbiased, momentum, O,
    COUNTS_ONLY: tl.constexpr, AVERAGES: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """By one program of one warp: every thread reads the number of batches before one writes it."""
    batches = tl.load(num_batches_tracked) + 1
    tl.store(num_batches_tracked, batches)
    if not COUNTS_ONLY:
        share = 1.0 / batches.to(tl.float32) if AVERAGES else momentum
        o = tl.arange(0, BO)
        old_mean = tl.load(running_mean + o, o < O).to(tl.float32)
        old_var = tl.load(running_var + o, o < O).to(tl.float32)
        tl.store(running_mean + o, _moved(old_mean, tl.load(mean + o, o < O), share), o < O)
        tl.store(running_var + o, _moved(old_var, tl.load(variance + o, o < O) * unbiased, share), o < O)


def update_running_statistics(running_mean, running_var, num_batches_tracked, mean, variance, count, momentum):
    O = mean.numel()
    given = {"running_mean": running_mean, "running_var": running_var, "mean": mean, "variance": variance}
    parameters(num_batches_tracked=(num_batches_tracked, 1), **{name: (t, O) for name, t in given.items()})
    for name, t in given.items():
        if t.dtype == torch.float64 or not t.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous and of the type that the kernel takes")
    unbiased = count / (count - 1) if count > 1 else 1.0
    with on_device_of(mean):
        _update_running_statistics[(1,)](
            running_mean, running_var, num_batches_tracked, mean, variance, unbiased, momentum or 0.0, O,
            COUNTS_ONLY=count == 0, AVERAGES=momentum is None, BO=padded(O), num_warps=1,
        )  # fmt: skip


OPERATORS = {
    "shsa_train_forward": shsa_train_forward,
    "shsa_train_backward": shsa_train_backward,
    "update_running_statistics": update_running_statistics,
}
