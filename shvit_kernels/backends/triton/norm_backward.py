"""What every backward ends with: from the gradient of z to those of x1 and of the norm's parameters.

    dx1 = rstd * (g - mean(g) - normal * mean(g * normal))       with g = norm_weight * dz, means over an image

A program has all channels of a tile, but only a block of them at a time: it makes dz twice, first for the sums that the
means need, then for dx1. Where a tile is not all of an image, that is two launches (stages "sums" and "store" instead
of "whole"), with the sums of the tiles in memory between them. Without a norm there is only the second half.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import channels_last, launched
from .forward import copy_blocks
from .tiles import Tiles, both, element
from .tokens import copy_rest

REDUCED = 64
"""Sums of one program."""
COPIED = 4096
"""Elements that one program copies."""


@triton.jit
def add_to_sums(dz, normal, norm_weight, total, projected, dnorm_parts, tile, c, P):
    """The sums over channels of g and g * normal, of each row; and the tile's part of the parameters' gradients.

    dz and normal are 0 outside.
    """
    if dnorm_parts is not None:
        to = dnorm_parts + tile.to(tl.int64) * 2 * P + c
        tl.store(to, tl.sum(dz * normal, 0), c < P)
        tl.store(to + P, tl.sum(dz, 0), c < P)
    g = dz * tl.load(norm_weight + c, c < P, 0.0).to(tl.float32)[None, :]
    return total + tl.sum(g, 1), projected + tl.sum(g * normal, 1)


@triton.jit
def leave_sums(total, projected, tile_sums, tile, first, image, n, valid, blocks, PITCH: tl.constexpr):
    """Those of each image in a tile to memory."""
    at = tile_sums + ((first + image) * blocks + tile % blocks) * 2
    writes = valid & (n % PITCH == 0)
    tl.store(at, total, writes)
    tl.store(at + 1, projected, writes)


@triton.jit
def sums_of_images(tile_sums, first, image, valid, blocks):
    """For each row those of all tiles of its image."""
    total = tl.zeros(valid.shape, tl.float32)
    projected = tl.zeros(valid.shape, tl.float32)
    at = tile_sums + (first + image) * blocks * 2
    for _ in range(blocks):
        total += tl.load(at, valid, 0.0)
        projected += tl.load(at + 1, valid, 0.0)
        at += 2
    return total, projected


@triton.jit
def store_input_gradient(
    dz, normal, rstd, norm_weight, total, projected, dx, first, image, n, valid, c, C, P, N, LAST: tl.constexpr
):  # fmt: skip
    """dx of a block of channels, from the sums over the row's image."""
    if norm_weight is not None:
        g = dz * tl.load(norm_weight + c, c < P, 0.0).to(tl.float32)[None, :]
        r = tl.load(rstd + first + image, valid, 0.0)
        dz = r[:, None] * (g - (total / (P * N))[:, None] - normal * (projected / (P * N))[:, None])
    to = dx + first * C * N + element(image, c, n, C, N, LAST)
    tl.store(to, dz.to(dx.dtype.element_ty), both(valid, c, P))


class InputGradient(NamedTuple):
    """How a kernel that ends so is launched, a program for each tile: its stages, and what they leave in memory."""

    stages: tuple[str, ...]
    tile_sums: Tensor | None
    dnorm_parts: Tensor | None

    @classmethod
    def of(cls, x1: Tensor, tiles: Tiles, norm_weight: Tensor | None, dx: bool, dnorm: bool) -> "InputGradient":
        """``dx``, ``dnorm``: whether the gradients of x1 and of the norm's parameters are asked for."""
        if norm_weight is None:
            return cls(("whole",) if dx else (), None, None)
        B, P = x1.shape[:2]
        dnorm_parts = x1.new_empty(tiles.count, 2, P, dtype=torch.float32) if dnorm else None
        if tiles.blocks == 1:
            return cls(("whole",) if dx or dnorm else (), None, dnorm_parts)
        stages = ("sums", "store") if dx else ("sums",) if dnorm else ()
        return cls(stages, x1.new_empty(B, tiles.blocks, 2, dtype=torch.float32), dnorm_parts)


@triton.jit
def sum_rows(source, target, rows, columns, stride, block, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """target[columns] = the sum over rows of source, for one block of columns if there is such a block."""
    if (block >= 0) & (block < tl.cdiv(columns, BLOCK)):
        c = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            at = row.to(tl.int64)[:, None] * stride + c[None, :]
            total += tl.load(source + at, (row < rows)[:, None] & (c < columns)[None, :], 0.0)
        tl.store(target + c, tl.sum(total, 0).to(target.dtype.element_ty), c < columns)


@triton.jit
def _pass_rest(
    dy, y, dx, block, B, N, C, P, RELU: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    if block >= 0:
        copy_rest(dy, dx, block, B, N, C, P, RELU, LAST, VECTOR, ROWS, COLUMNS, y)


@launched
def _reduce_parts(
    matrix_parts,
    dmatrix,
    matrix_rows,
    matrix_size,
    bias_parts,
    dbias,
    bias_rows,
    bias_stride,
    O,
    dnorm_parts,
    dnorm_weight,
    dnorm_bias,
    tiles,
    dy,
    y,
    dx,
    B,
    N,
    C,
    P,
    reductions,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    COPY_ROWS: tl.constexpr,
    COPY_COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    if dx is not None:
        _pass_rest(dy, y, dx, block - reductions, B, N, C, P, RELU, LAST, VECTOR, COPY_ROWS, COPY_COLUMNS)
    if dmatrix is not None:
        sum_rows(matrix_parts, dmatrix, matrix_rows, matrix_size, matrix_size, block, BLOCK, ROWS)
        block -= tl.cdiv(matrix_size, BLOCK)
    if dbias is not None:
        sum_rows(bias_parts, dbias, bias_rows, O, bias_stride, block, BLOCK, ROWS)
        block -= tl.cdiv(O, BLOCK)
    if dnorm_weight is not None:
        sum_rows(dnorm_parts, dnorm_weight, tiles, P, 2 * P, block, BLOCK, ROWS)
        block -= tl.cdiv(P, BLOCK)
    if dnorm_bias is not None:
        sum_rows(dnorm_parts + P, dnorm_bias, tiles, P, 2 * P, block, BLOCK, ROWS)


class Rest(NamedTuple):
    """The channels from P on of a gradient, to be passed on through ReLU, if any."""

    dy: Tensor
    y: Tensor
    dx: Tensor
    P: int
    relu: bool


def reduce_parts(
    dnorm_parts: Tensor | None,
    dnorm_weight: Tensor | None,
    dnorm_bias: Tensor | None,
    matrix_parts: Tensor | None = None,
    dmatrix: Tensor | None = None,
    bias_parts: Tensor | None = None,
    dbias: Tensor | None = None,
    rest: Rest | None = None,
) -> None:
    """Fill the gradients that are given from their parts [parts, 2, P], [parts, O, P] and [parts, kinds, O].

    ``rest`` goes with it because no other launch leaves as many registers to a copy.
    """
    given = [t for t in (dmatrix, dbias, dnorm_weight, dnorm_bias) if t is not None]
    reductions = sum(triton.cdiv(t.numel(), REDUCED) for t in given)
    copies, sizes = 0, {"VECTOR": 1, "ROWS": 1, "COLUMNS": 1}
    dy = y = dx = None
    B = C = N = 0
    P = 0 if dnorm_parts is None else dnorm_parts.shape[2]
    if rest is not None:
        dy, y, dx, P, _ = rest
        B, C, H, W = dy.shape
        N = H * W
        copies, sizes = copy_blocks(dx, P, COPIED)
    if reductions + copies == 0:
        return
    _reduce_parts[(reductions + copies,)](
        matrix_parts,
        dmatrix,
        0 if matrix_parts is None else matrix_parts.shape[0],
        0 if dmatrix is None else dmatrix.numel(),
        bias_parts,
        dbias,
        0 if bias_parts is None else bias_parts.shape[0],
        0 if bias_parts is None else bias_parts.stride(0),
        0 if dbias is None else dbias.numel(),
        dnorm_parts,
        dnorm_weight,
        dnorm_bias,
        0 if dnorm_parts is None else dnorm_parts.shape[0],
        dy,
        y,
        dx,
        B,
        N,
        C,
        P,
        reductions,
        BLOCK=REDUCED,
        ROWS=16,
        RELU=rest is not None and rest.relu,
        LAST=dx is not None and channels_last(dx),
        VECTOR=sizes["VECTOR"],
        COPY_ROWS=sizes["ROWS"],
        COPY_COLUMNS=sizes["COLUMNS"],
    )
