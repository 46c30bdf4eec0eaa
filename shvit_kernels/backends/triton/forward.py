"""Attention over the first P channels, the others copied: ``shsa_forward`` and ``shsa_eval``.

    z       = (x1 - mean) * rstd * norm_weight + norm_bias          per token; left out without a norm
    q, k, v = factor * (W z) + offset                               the projection, with batch normalisation folded in
    p       = exp(scale * q k^T - row_max),  row_sum = sum_keys p
    y       = concat(p v / row_sum, x2)                             then ReLU, if asked for

Tokens are the rows of every tile and channels its columns, in both layouts of x. Channels are held as two tiles of P0
and P1 channels (``common.split``), P1 = 0 where one tile does. Blocks that copy x2 follow those that attend in the
same grid, so that their traffic fills the time in which attention waits.

``row_max`` and ``row_sum`` are those of the formula, natural logarithms: the backward recomputes p from them.

Which kernel:

- ``short`` for at most 64 tokens in float16 and bfloat16: one launch, x read once.
- ``tiled`` for everything else. Up to 256 tokens it projects k and v again in every block of Q queries: N / Q times
  the projection, 2 * N * (D + P) * P operations, from an image that is in the cache, but one launch. Beyond, that
  factor grows with N, and staging pays: k and v are written once and read N / Q times, N * (D + P) elements each, for
  two more launches of about 2 microseconds. Float32 goes here at any length, because exact products have no tensor
  cores and want small tiles.
"""

import torch
import triton
from torch import Tensor

from ... import ops
from . import common, table
from .short import attend_short
from .tiled import attend_tiled, measure, stage

SHORT_TOKENS = 64
UNSTAGED_TOKENS = 256
SLICE = 128
"""Value channels of one block at most; where there are more, several blocks compute the same probabilities."""
PART = 256
"""Tokens of a long image whose moments one block takes."""


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
    B, _, H, W = x.shape
    N = H * W
    y = torch.empty_like(x, memory_format=ops.memory_format(x))
    row_max = row_sum = mean_out = rstd_out = None
    if statistics:
        row_max, row_sum = (x.new_empty(B, N, dtype=torch.float32) for _ in range(2))
        if mean is None:
            mean_out, rstd_out = (x.new_empty(B, dtype=torch.float32) for _ in range(2))
    results = y, mean_out if mean is None else mean, rstd_out if rstd is None else rstd, row_max, row_sum
    if B == 0:
        return results
    arguments = (norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, mean, rstd)
    flags = {
        "LAST": common.channels_last(x),
        "RELU": relu,
        "PROJ": common.precision(tf32_proj),
        "ATTN": common.precision(tf32_attn),
    }
    launch = _short if x.element_size() == 2 and N <= SHORT_TOKENS and weight.shape[1] <= SLICE else _tiled
    with common.on_device_of(x):
        launch(x, y, arguments, (mean_out, rstd_out, row_max, row_sum), qk_dim, norm_eps, bn_eps, scale, flags)
    return results


def _short(x, y, arguments, outputs, D, norm_eps, bn_eps, scale, flags) -> None:
    B, C, H, W = x.shape
    N, P = H * W, arguments[2].shape[1]
    launch = table.short(P, N, x.element_size())
    attention_blocks = triton.cdiv(B, launch.images)
    copies, copy_sizes = copy_blocks(B, N, C, P, flags["LAST"], x.element_size(), launch.copied)
    P0, P1 = common.split(P)
    attend_short[(attention_blocks + copies,)](
        x, y, *arguments, *outputs, B, attention_blocks, norm_eps, bn_eps, scale,
        C=C, P=P, D=D, N=N, IMAGES=launch.images, NP=common.padded(N), DP=common.padded(D), P0=P0, P1=P1,
        **flags, **copy_sizes, num_warps=launch.warps,
    )  # fmt: skip


def _tiled(x, y, arguments, outputs, D, norm_eps, bn_eps, scale, flags) -> None:
    B, C, H, W = x.shape
    norm_weight, _, weight, *_, mean, _ = arguments
    N, P = H * W, weight.shape[1]
    launch = table.tiled(P, N, x.element_size())
    P0, P1 = common.split(min(P, SLICE))
    slices = 1 if P1 else triton.cdiv(P, P0)
    sizes = {"P": P, "D": D, "DP": common.padded(D), "P0": P0, "P1": P1, "SLICES": slices, "CHANNELS": launch.channels}
    keys = values = None
    if N > UNSTAGED_TOKENS:
        keys, values = x.new_empty(B, N, D), x.new_empty(B, N, P)
        part_mean = part_squares = None
        stage_mean, stage_rstd = outputs[:2]
        if norm_weight is not None and mean is None:
            parts = triton.cdiv(N, PART)
            part_mean, part_squares = x.new_empty(2, B, parts, dtype=torch.float32)
            measure[(B * parts,)](
                x, part_mean, part_squares, N, C,
                P=P, PART=PART, TOKENS=launch.keys, CHANNELS=launch.channels, LAST=flags["LAST"],
            )  # fmt: skip
            if stage_mean is None:
                stage_mean, stage_rstd = x.new_empty(2, B, dtype=torch.float32)
        stage[(B * triton.cdiv(N, launch.keys) * slices,)](
            x, keys, values, *arguments, part_mean, part_squares, stage_mean, stage_rstd, N, C, norm_eps, bn_eps,
            **sizes, TOKENS=launch.keys, LAST=flags["LAST"], PROJ=flags["PROJ"], PART=PART,
            PARTS=triton.next_power_of_2(triton.cdiv(N, PART)), num_warps=launch.warps,
        )  # fmt: skip
        outputs = (None, None, *outputs[2:])
        if mean is None:
            arguments = (*arguments[:-2], stage_mean, stage_rstd)
    attention_blocks = B * triton.cdiv(N, launch.queries) * slices
    copies, copy_sizes = copy_blocks(B, N, C, P, flags["LAST"], x.element_size(), launch.copied)
    attend_tiled[(attention_blocks + copies,)](
        x, y, keys, values, *arguments, *outputs, B, N, C, attention_blocks, norm_eps, bn_eps, scale,
        **sizes, QUERIES=launch.queries, KEYS=launch.keys, **flags, **copy_sizes, num_warps=launch.warps,
    )  # fmt: skip


def shsa_forward(x, norm_weight, norm_bias, qkv_weight, qkv_bias, qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn):
    settings = (qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn)
    return attend(x, norm_weight, norm_bias, qkv_weight, qkv_bias, None, None, None, None, 0.0, *settings, True)


def shsa_eval(x, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, *settings):
    qk_dim, norm_eps, bn_eps, *rest = settings
    batch_norm = (bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
    return attend(x, norm_weight, norm_bias, weight, bias, *batch_norm, qk_dim, norm_eps, *rest, False)[0]


OPERATORS = {"shsa_forward": shsa_forward, "shsa_eval": shsa_eval}
