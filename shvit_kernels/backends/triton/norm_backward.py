"""What every backward ends with: from the gradient of z to those of x1 and of the norm's parameters.

    dx1 = rstd * (g - mean(g) - normal * mean(g * normal))       with g = norm_weight * dz, means over an image

The means need all of an image. A tile that holds whole images takes them itself (stage "whole"); otherwise the kernel
that makes dz runs twice: it leaves the sums of each tile (stage "sums"), then adds those of the image ("store").
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import channels_last, padded
from .forward import copy_blocks
from .tiles import Tiles, both, element, sum_of_image
from .tokens import copy_rest

MOST_WHOLE = 128
"""Channels up to which one program holds all of them."""
MOST_CHUNK = 64
"""Channels of a program beyond that, and of long images."""
REDUCED = 64
"""Sums of one program."""
COPIED = 4096
"""Elements that one program copies."""


@triton.jit
def finish_input_gradient(
    dz,
    x1,
    dx,
    mean,
    rstd,
    norm_weight,
    tile_sums,
    dnorm_parts,
    tile,
    first,
    image,
    n,
    valid,
    start,
    C,
    P,
    N,
    blocks,
    X1_LAST: tl.constexpr,
    DX_LAST: tl.constexpr,
    IMAGES: tl.constexpr,
    PITCH: tl.constexpr,
    BP: tl.constexpr,
    STAGE: tl.constexpr,
):
    """From dz [rows, BP], float32, of the channels from ``start`` on."""
    c = start + tl.arange(0, BP)
    mask = both(valid, c, P)
    if norm_weight is not None:
        m = tl.load(mean + first + image, valid, 0.0)
        r = tl.load(rstd + first + image, valid, 0.0)
        x = tl.load(x1 + first * P * N + element(image, c, n, P, N, X1_LAST), mask, 0.0).to(tl.float32)
        dz = tl.where(mask, dz, 0.0)
        normal = tl.where(mask, (x - m[:, None]) * r[:, None], 0.0)
        if STAGE != "store" and dnorm_parts is not None:
            to = dnorm_parts + tile.to(tl.int64) * 2 * P + c
            tl.store(to, tl.sum(dz * normal, 0), c < P)
            tl.store(to + P, tl.sum(dz, 0), c < P)
        g = dz * tl.load(norm_weight + c, c < P, 0.0).to(tl.float32)[None, :]
        chunks = tl.cdiv(P, BP)
        if STAGE == "store":
            total = tl.zeros([IMAGES * PITCH], tl.float32)
            projected = tl.zeros([IMAGES * PITCH], tl.float32)
            at = tile_sums + (first + image) * blocks * chunks * 2
            for _ in range(blocks * chunks):
                total += tl.load(at, valid, 0.0)
                projected += tl.load(at + 1, valid, 0.0)
                at += 2
        else:
            total = sum_of_image(tl.sum(g, 1), IMAGES, PITCH)
            projected = sum_of_image(tl.sum(g * normal, 1), IMAGES, PITCH)
        if STAGE == "sums":
            block = (first + image) * blocks + tile % blocks
            at = tile_sums + (block * chunks + start // BP) * 2
            writes = valid & (n % PITCH == 0)
            tl.store(at, total, writes)
            tl.store(at + 1, projected, writes)
        dz = r[:, None] * (g - (total / (P * N))[:, None] - normal * (projected / (P * N))[:, None])
    if STAGE != "sums" and dx is not None:
        tl.store(dx + first * C * N + element(image, c, n, C, N, DX_LAST), dz.to(dx.dtype.element_ty), mask)


class InputGradient(NamedTuple):
    """How a kernel that ends with ``finish_input_gradient`` is launched: grid (tiles, chunks), once for each stage."""

    channels: int
    chunks: int
    stages: tuple[str, ...]
    tile_sums: Tensor | None
    dnorm_parts: Tensor | None

    @classmethod
    def of(cls, x1: Tensor, tiles: Tiles, norm_weight: Tensor | None, dx: bool, dnorm: bool) -> "InputGradient":
        """``dx``, ``dnorm``: whether the gradients of x1 and of the norm's parameters are asked for."""
        B, P = x1.shape[:2]
        whole = norm_weight is not None and tiles.blocks == 1 and P <= MOST_WHOLE
        channels = padded(P) if whole else min(padded(P), MOST_CHUNK)
        chunks = triton.cdiv(P, channels)
        in_two = norm_weight is not None and not whole
        stages = ("sums", "store") if in_two and dx else ("sums",) if in_two else ("whole",)
        return cls(
            channels,
            chunks,
            stages,
            x1.new_empty(B, tiles.blocks, chunks, 2, dtype=torch.float32) if in_two else None,
            x1.new_empty(tiles.count, 2, P, dtype=torch.float32) if dnorm and norm_weight is not None else None,
        )


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


@triton.jit
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
        ROWS=32,
        RELU=rest is not None and rest.relu,
        LAST=dx is not None and channels_last(dx),
        VECTOR=sizes["VECTOR"],
        COPY_ROWS=sizes["ROWS"],
        COPY_COLUMNS=sizes["COLUMNS"],
    )
