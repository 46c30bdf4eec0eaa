"""``shsa_mixer``: attention, ReLU, projection and residual of a layer in inference.

    a   = relu(attention(x))                         [B, N, P], by ``forward``
    out = x + proj_weight @ concat(a, relu(x2)) + proj_bias

Two launches (four where images are long). The second is a product of matrices over the tokens of all images that reads
x2 from x itself, so concat(a, relu(x2)) never exists. Its cost model, for B images in float16:

- Memory: x once for attention (P channels) and once for the product, the result once, and a, P / C of x, twice:
  (2 + 3 P / C) times x, where one launch for all would move 2 times x. At C = 336, P = 72 that is 1.3 times as much,
  and a is still in the L2 cache when the product reads it.
- Fused, every block of attention would read all of proj_weight, C^2 elements for the N tokens of its images. At
  B = 256, C = 336, N = 64 that is 58 MB of L2 traffic, against 10 MB of x and 29 MB for blocks of 128 tokens here, and
  16 tokens of a small image fill a quarter of the rows of a matrix instruction. It would save one launch of about 2
  microseconds.

So the parts stay separate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from . import common, table
from .common import dot, rectified
from .forward import Settings, attend_into, check
from .projection import load_row

MOST_FLAT_TOKENS = 256
"""Longer images fill blocks of their own, and a kernel for every number of tokens would be one too many."""


@triton.jit
def input_tile(base, rows, columns, stride, inside, end):
    """Rows [tokens] of pointers, ``columns`` of distance ``stride``, 0 outside."""
    return tl.load(base + rows[:, None] + columns[None, :] * stride, inside[:, None] & (columns < end)[None, :], 0.0)


@triton.jit
def weight_columns(weight, outs, columns, C: tl.constexpr, end):
    """``weight[outs, columns]`` transposed, 0 outside."""
    within = (outs < C)[None, :] & (columns < end)[:, None]
    return tl.load(weight + outs[None, :] * C + columns[:, None], mask=within, other=0.0)


@common.launched
def project_and_add(
    x, attended, weight, bias, out, B, long_tokens,
    C: tl.constexpr, P: tl.constexpr, SHORT: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, PROJ: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens and OUTS channels of the result: tokens of all images in a row where SHORT is their number in an
    image, of one image of ``long_tokens`` where SHORT is 0."""
    OUT_BLOCKS: tl.constexpr = (C + OUTS - 1) // OUTS
    outs = tl.program_id(0) % OUT_BLOCKS * OUTS + tl.arange(0, OUTS)
    block = tl.program_id(0) // OUT_BLOCKS
    if SHORT > 0:
        N = SHORT
        token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        image = token // N
        n = token % N
        inside = image < B
    else:
        N = long_tokens
        blocks = tl.cdiv(N, TOKENS)
        image = (block // blocks).to(tl.int64)
        n = block % blocks * TOKENS + tl.arange(0, TOKENS)
        token = image * N + n
        inside = n < N
    stride = 1 if LAST else N
    rows = token * C if LAST else image * N * C + n

    product = tl.zeros([TOKENS, OUTS], tl.float32)
    for first in range(0, P, CHANNELS):
        columns = first + tl.arange(0, CHANNELS)
        a = input_tile(attended, token * P, columns, 1, inside, P)
        product = dot(a, weight_columns(weight, outs, columns, C, P), PROJ, product)
    for first in range(P, C, CHANNELS):
        columns = first + tl.arange(0, CHANNELS)
        a = rectified(input_tile(x, rows, columns, stride, inside, C)).to(x.dtype.element_ty)
        product = dot(a, weight_columns(weight, outs, columns, C, C), PROJ, product)
    if bias is not None:
        product += load_row(bias, outs, C)[None, :]
    product += input_tile(x, rows, outs, stride, inside, C)
    pointers = out + rows[:, None] + outs[None, :] * stride
    tl.store(pointers, product.to(out.dtype.element_ty), mask=inside[:, None] & (outs < C)[None, :])


def shsa_mixer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    qk_dim: int,
    norm_eps: float,
    scale: float,
    tf32_proj: bool,
    tf32_attn: bool,
) -> Tensor:
    no_batch_norm = (None, None, None, None)
    parameters = check(x, norm_weight, norm_bias, qkv_weight, qkv_bias, *no_batch_norm, qk_dim)
    B, C, H, W = x.shape
    N, P = H * W, qkv_weight.shape[1]
    proj_weight, proj_bias = common.parameters(proj_weight=(proj_weight, C * C), proj_bias=(proj_bias, C))
    out = torch.empty_like(x, memory_format=ops.memory_format(x))
    attended = x.new_empty(B, H, W, P).permute(0, 3, 1, 2)
    attend_into(attended, x, parameters, Settings(qk_dim, norm_eps, 0.0, scale, True, tf32_proj, tf32_attn))
    if B == 0:
        return out
    launch = table.mixer(P, N, x.element_size())
    short = N if N <= MOST_FLAT_TOKENS else 0
    token_blocks = triton.cdiv(B * N, launch.tokens) if short else B * triton.cdiv(N, launch.tokens)
    with common.on_device_of(x):
        project_and_add[(token_blocks * triton.cdiv(C, launch.outs),)](
            x, attended, proj_weight, proj_bias, out, B, N,
            C=C, P=P, SHORT=short, TOKENS=launch.tokens, OUTS=launch.outs, CHANNELS=launch.channels,
            LAST=common.channels_last(x), PROJ=common.precision(tf32_proj, x), num_warps=launch.warps,
            num_stages=launch.stages,
        )  # fmt: skip
    return out


OPERATORS = {"shsa_mixer": shsa_mixer}
