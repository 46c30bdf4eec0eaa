"""Attention of short images: everything of an image between the load of x and the store of y stays on chip."""

import triton.language as tl

from .common import dot, launched, row_maximum
from .projection import affine, project, weight_tiles
from .tokens import centred, copy_rest, load_tokens, normalised, store_tokens, sum_of_image


@launched
def attend_short(
    x, y, norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, given_mean, given_rstd,
    mean_out, rstd_out, row_max_out, row_sum_out,
    B, attention_blocks, norm_eps, bn_eps, scale,
    C: tl.constexpr, Y_CHANNELS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    IMAGES: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, LAST: tl.constexpr,
    Y_LAST: tl.constexpr, RELU: tl.constexpr, PROJ: tl.constexpr, ATTN: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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

        # x and the weight are asked for before anything waits; the vectors later, for want of registers.
        x0 = load_tokens(x, images, tokens, 0, N, C, P, P0, LAST, within).to(tl.float32)
        x1 = x0
        if P1 > 0:
            x1 = load_tokens(x, images, tokens, P0, N, C, P, P1, LAST, within).to(tl.float32)
        q_rows = tl.arange(0, DP)
        k_rows = D + tl.arange(0, DP)
        v0_rows = 2 * D + tl.arange(0, P0)
        wq0, wq1 = weight_tiles(weight, q_rows, D, P, P0, P1)
        wk0, wk1 = weight_tiles(weight, k_rows, 2 * D, P, P0, P1)
        wv00, wv01 = weight_tiles(weight, v0_rows, 2 * D + P, P, P0, P1)
        if P1 > 0:
            v1_rows = 2 * D + P0 + tl.arange(0, P1)
            wv10, wv11 = weight_tiles(weight, v1_rows, 2 * D + P, P, P0, P1)

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

        q_factor, q_offset = affine(q_rows, D, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        k_factor, k_offset = affine(k_rows, 2 * D, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        v0_factor, v0_offset = affine(v0_rows, 2 * D + P, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        if P1 > 0:
            v1_factor, v1_offset = affine(v1_rows, 2 * D + P, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
        # v comes first because its weights take most registers.
        # The rows of v beyond the last token meet probabilities of 0, so they must not be NaN or infinite.
        own = within.reshape(IMAGES * NP, 1)
        v0 = tl.where(own, project(z0, z1, wv00, wv01, v0_factor, v0_offset, P1, PROJ), 0.0).to(dtype)
        v1 = v0
        if P1 > 0:
            v1 = tl.where(own, project(z0, z1, wv10, wv11, v1_factor, v1_offset, P1, PROJ), 0.0).to(dtype)
        q = project(z0, z1, wq0, wq1, q_factor, q_offset, P1, PROJ).to(dtype)
        k = project(z0, z1, wk0, wk1, k_factor, k_offset, P1, PROJ).to(dtype)

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
        store_tokens(y, out, images, tokens, 0, N, Y_CHANNELS, P, Y_LAST, RELU, within)
        if P1 > 0:
            out = (dot(p, v1, ATTN) * share).reshape(IMAGES, NP, P1)
            store_tokens(y, out, images, tokens, P0, N, Y_CHANNELS, P, Y_LAST, RELU, within)
        if row_max_out is not None:
            rows = images[:, None] * N + tokens[None, :]
            mask = (images < B)[:, None] & (tokens < N)[None, :]
            tl.store(row_max_out + rows, row_max.reshape(IMAGES, NP), mask=mask)
            tl.store(row_sum_out + rows, row_sum.reshape(IMAGES, NP), mask=mask)
