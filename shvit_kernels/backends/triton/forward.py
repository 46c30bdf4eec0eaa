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

- ``short`` for at most 64 tokens and queries of at most 64 in float16 and bfloat16: one launch, x read once.
- ``tiled`` for everything else. Up to 256 tokens it projects k and v again in every block of Q queries: N / Q times
  the projection, 2 * N * (D + P) * P operations, from an image that is in the cache, but one launch. Beyond, that
  factor grows with N, and staging pays: k and v are written once and read N / Q times, N * (D + P) elements each, for
  two more launches of about 2 microseconds. Float32 goes here at any length, because exact products have no tensor
  cores and want small tiles.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ... import ops
from . import common, table
from .short import attend_short
from .tiled import attend_tiled, measure, stage

SHORT_TOKENS = 64
SHORT_WIDTH = 64
"""Width of queries that ``short`` takes at most: some devices have no shared memory for more."""
UNSTAGED_TOKENS = 256
SLICE = 128
"""Value channels of one block at most; where there are more, several blocks compute the same probabilities."""
PART = 256
"""Tokens of a long image whose moments one block takes."""


class Settings(NamedTuple):
    qk_dim: int
    norm_eps: float
    bn_eps: float
    scale: float
    relu: bool
    tf32_proj: bool
    tf32_attn: bool

    def of_kernel(self, x: Tensor, y: Tensor) -> dict[str, bool | str]:
        return {
            "LAST": common.channels_last(x),
            "Y_LAST": common.channels_last(y),
            "RELU": self.relu,
            "PROJ": common.precision(self.tf32_proj, x),
            "ATTN": common.precision(self.tf32_attn, x),
        }


def copy_blocks(y: Tensor, P: int, elements: int) -> tuple[int, dict[str, int]]:
    """How many blocks copy the channels of y from P on, ``elements`` each, and their sizes for ``copy_rest``."""
    B, C, H, W = y.shape
    last = common.channels_last(y)
    vector = 16 // y.element_size()
    columns = triton.next_power_of_2(max(C - P, 1)) if last else vector
    rows = max(elements // columns, 1)
    if C == P:
        blocks = 0
    elif last:
        blocks = triton.cdiv(B * H * W, rows)
    else:
        blocks = B * triton.cdiv((C - P) * H * W // vector + 1, rows)
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
    parameters = check(x, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, qk_dim)
    B, _, H, W = x.shape
    y = torch.empty_like(x, memory_format=ops.memory_format(x))
    row_max = row_sum = mean_out = rstd_out = None
    if statistics:
        row_max, row_sum = (x.new_empty(B, H * W, dtype=torch.float32) for _ in range(2))
        if mean is None:
            mean_out, rstd_out = (x.new_empty(B, dtype=torch.float32) for _ in range(2))
    settings = Settings(qk_dim, norm_eps, bn_eps, scale, relu, tf32_proj, tf32_attn)
    attend_into(y, x, parameters, settings, (mean, rstd), (mean_out, rstd_out, row_max, row_sum))
    return y, mean_out if mean is None else mean, rstd_out if rstd is None else rstd, row_max, row_sum


def check(x, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, qk_dim) -> list[Tensor | None]:
    """The parameters of a call as kernels read them, or an error where x or one of them cannot be read."""
    P = weight.shape[1]
    O = 2 * qk_dim + P
    common.check_images(x, P)
    if (bn_mean is None) != (bn_var is None):
        raise RuntimeError("bn_mean and bn_var must be given together")
    return common.parameters(
        norm_weight=(norm_weight, P),
        norm_bias=(norm_bias, P),
        weight=(weight, O * P),
        bias=(bias, O),
        bn_weight=(bn_weight, O),
        bn_bias=(bn_bias, O),
        bn_mean=(bn_mean, O),
        bn_var=(bn_var, O),
    )


def attend_into(
    y: Tensor,
    x: Tensor,
    parameters: list[Tensor | None],
    settings: Settings,
    given: tuple[Tensor | None, Tensor | None] = (None, None),
    outputs: tuple[Tensor | None, ...] = (None, None, None, None),
) -> None:
    """:func:`attend` into y, which has all channels of x or the first P alone, in any memory format.

    Parameters are norm_weight to bn_var, ``given`` are mean and rstd, ``outputs`` are mean, rstd, row_max, row_sum.
    """
    if x.shape[0] == 0:
        return
    tokens, P = x.shape[2] * x.shape[3], parameters[2].shape[1]
    is_short = tokens <= SHORT_TOKENS and P <= SLICE and settings.qk_dim <= SHORT_WIDTH
    launch = _short if is_short and x.element_size() == 2 else _tiled
    with common.on_device_of(x):
        launch(y, x, parameters, settings, given, outputs)


def _short(y, x, parameters, settings, given, outputs) -> None:
    B, C, H, W = x.shape
    N, P, D = H * W, parameters[2].shape[1], settings.qk_dim
    launch = table.short(P, N, x.element_size())
    attention_blocks = triton.cdiv(B, launch.images)
    copies, copy_sizes = copy_blocks(y, P, launch.copied)
    P0, P1 = common.split(P)
    attend_short[(attention_blocks + copies,)](
        x, y, *parameters, *given, *outputs, B, attention_blocks, settings.norm_eps, settings.bn_eps, settings.scale,
        C=C, Y_CHANNELS=y.shape[1], P=P, D=D, N=N, IMAGES=launch.images, NP=common.padded(N), DP=common.padded(D),
        P0=P0, P1=P1, **settings.of_kernel(x, y), **copy_sizes, num_warps=launch.warps,
    )  # fmt: skip


def _tiled(y, x, parameters, settings, given, outputs) -> None:
    B, C, H, W = x.shape
    N, P, D = H * W, parameters[2].shape[1], settings.qk_dim
    launch = table.tiled(P, N, x.element_size())
    P0, P1 = common.split(min(P, SLICE))
    sizes = {
        "P": P,
        "D": D,
        "DP": common.padded(D),
        "P0": P0,
        "P1": P1,
        "SLICES": 1 if P1 else triton.cdiv(P, P0),
        "CHANNELS": launch.channels,
    }
    keys = values = None
    if N > UNSTAGED_TOKENS:
        keys, values = x.new_empty(B, N, D), x.new_empty(B, N, P)
        given = _stage(keys, values, x, parameters, settings, given, outputs[:2], sizes, launch)
        outputs = (None, None, *outputs[2:])
    attention_blocks = B * triton.cdiv(N, launch.queries) * sizes["SLICES"]
    copies, copy_sizes = copy_blocks(y, P, launch.copied)
    attend_tiled[(attention_blocks + copies,)](
        x, y, keys, values, *parameters, *given, *outputs, B, N, C, y.shape[1], attention_blocks, settings.norm_eps,
        settings.bn_eps, settings.scale, **sizes, QUERIES=launch.queries, KEYS=launch.keys,
        **settings.of_kernel(x, y), **copy_sizes, num_warps=launch.warps,
        num_stages=launch.stages,
    )  # fmt: skip


def _stage(keys, values, x, parameters, settings, given, outputs, sizes, launch) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values of all tokens; returns mean and rstd of the images."""
    B, C, H, W = x.shape
    N, last = H * W, common.channels_last(x)
    parts = triton.cdiv(N, PART)
    part_moments = (None, None)
    if parameters[0] is not None and given[0] is None:
        part_moments = tuple(x.new_empty(B, parts, dtype=torch.float32) for _ in range(2))
        measure[(B * parts,)](
            x, *part_moments, N, C,
            P=sizes["P"], PART=PART, TOKENS=launch.keys, CHANNELS=launch.channels, LAST=last,
        )  # fmt: skip
        if outputs[0] is None:
            outputs = tuple(x.new_empty(B, dtype=torch.float32) for _ in range(2))
    stage[(B * triton.cdiv(N, launch.keys) * sizes["SLICES"],)](
        x, keys, values, *parameters, *given, *part_moments, *outputs, N, C, settings.norm_eps, settings.bn_eps,
        **sizes, TOKENS=launch.keys, LAST=last, PROJ=common.precision(settings.tf32_proj, x), PART=PART,
        PARTS=triton.next_power_of_2(parts), num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return given if given[0] is not None else outputs


def shsa_forward(x, norm_weight, norm_bias, qkv_weight, qkv_bias, qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn):
    settings = (qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn)
    return attend(x, norm_weight, norm_bias, qkv_weight, qkv_bias, None, None, None, None, 0.0, *settings, True)


def shsa_eval(x, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, *settings):
    qk_dim, norm_eps, bn_eps, *rest = settings
    batch_norm = (bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
    return attend(x, norm_weight, norm_bias, weight, bias, *batch_norm, qk_dim, norm_eps, *rest, False)[0]


OPERATORS = {"shsa_forward": shsa_forward, "shsa_eval": shsa_eval}
