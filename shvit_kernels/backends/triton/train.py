"""Attention whose projection is batch-normalised by the statistics of this batch.

Forward: the moments of z in parts, their merge and what they say of the projection, attention. Backward: ``backward``.
"""

from ... import ops
from .backward import BatchNorm, Saved, Settings, gradients
from .forward import attend
from .moments import moments


def shsa_train_forward(
    x, norm_weight, norm_bias, weight, bn_weight, bn_bias,
    qk_dim, norm_eps, bn_eps, scale, relu, tf32_proj, tf32_attn,
):  # fmt: skip
    B, _, H, W = x.shape
    P = weight.shape[1]
    x1 = x.new_empty(B, P, H, W).contiguous(memory_format=ops.memory_format(x))
    z_mean, z_cov, mean, rstd, batch_mean, batch_var = moments(x, norm_weight, norm_bias, P, norm_eps, x1, weight)
    y, *statistics = attend(
        x, norm_weight, norm_bias, weight, None, bn_weight, bn_bias, batch_mean, batch_var, bn_eps,
        qk_dim, norm_eps, scale, relu, tf32_proj, tf32_attn, True, mean, rstd,
    )  # fmt: skip
    return y, x1, *statistics, z_mean, z_cov, batch_mean, batch_var


def shsa_train_backward(
    dy, y, x1, mean, rstd, row_max, row_sum, z_mean, z_cov, batch_mean, batch_var,
    norm_weight, norm_bias, weight, bn_weight, bn_bias,
    qk_dim, norm_eps, bn_eps, scale, relu, tf32_proj, tf32_attn, needs,
):  # fmt: skip
    saved = Saved(x1, y, mean, rstd, row_max, row_sum)
    batch_norm = BatchNorm(bn_weight, bn_bias, batch_mean, batch_var, bn_eps)
    settings = Settings(qk_dim, scale, relu, tf32_proj, tf32_attn)
    return gradients(dy, saved, (norm_weight, norm_bias), weight, None, batch_norm, settings, needs)


OPERATORS = {"shsa_train_forward": shsa_train_forward, "shsa_train_backward": shsa_train_backward}
