"""The specification: every function in plain PyTorch, differentiable twice, in any floating-point type."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import memory_format, sum_dtype

name = "eager"
devices = ()


def why_unavailable() -> None:
    return None


def why_not(x: Tensor, pdim: int = 1, qk_dim: int = 1) -> None:
    return None


def _full_precision(x: Tensor):
    """Autocast off, on devices that have it."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _as(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.to(dtype) for t in tensors]


def attention(qkv: Tensor, qk_dim: int, scale: float) -> Tensor:
    """``v softmax(scale * q^T k)^T``, ``[B, P, N]``, of a projection ``[B, 2 * D + P, N]``."""
    q, k, v = torch.split(qkv, [qk_dim, qk_dim, qkv.shape[1] - 2 * qk_dim], dim=1)
    attn = (q.transpose(-2, -1) @ k * scale).softmax(dim=-1)
    return v @ attn.transpose(-2, -1)


def shsa(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    qk_dim: int,
    norm_eps: float,
    scale: float,
    relu: bool,
    tf32_proj: bool,
    tf32_attn: bool,
) -> Tensor:
    """Design section 2, line by line. The TF32 flags only matter to kernels: PyTorch reads its own settings."""
    with _full_precision(x):
        norm_weight, norm_bias, qkv_weight, qkv_bias = _as(x.dtype, norm_weight, norm_bias, qkv_weight, qkv_bias)
        B, C, H, W = x.shape
        P = qkv_weight.shape[1]
        x1, x2 = torch.split(x, [P, C - P], dim=1)
        if norm_weight is None:
            z = x1
        else:  # PyTorch's forward derivative and vmap of the norm fail on channels of a larger tensor
            x1 = x1.clone(memory_format=torch.contiguous_format)
            z = torch.group_norm(x1, 1, norm_weight, norm_bias, norm_eps)
        qkv = F.conv2d(z, qkv_weight[:, :, None, None], qkv_bias).flatten(2)
        y1 = attention(qkv, qk_dim, scale).reshape(B, P, H, W)
        y = torch.cat([y1, x2], dim=1).contiguous(memory_format=memory_format(x))
        return F.relu(y) if relu else y


def partial_moments(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, pdim: int, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of the normalised first ``pdim`` channels, over images and tokens."""
    dtype = sum_dtype(x.dtype)
    with _full_precision(x):
        norm_weight, norm_bias = _as(dtype, norm_weight, norm_bias)
        z = x[:, :pdim].to(dtype)
        if norm_weight is not None:
            z = torch.group_norm(z, 1, norm_weight, norm_bias, norm_eps)
        z = z.transpose(0, 1).flatten(1)
        count = max(z.shape[1], 1)  # no tokens: zeros, not NaN
        mean = z.sum(dim=1) / count
        centred = z - mean[:, None]
        return mean, centred @ centred.t() / count


def batch_statistics(weight: Tensor, z_mean: Tensor, z_cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``weight @ z`` per row, from the moments of z."""
    return weight @ z_mean, ((weight @ z_cov) * weight).sum(dim=1).clamp_min(0)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A projection and the batch normalisation behind it as one projection, in at least float32 (design section 3)."""
    given = {"bias": bias, "bn_weight": bn_weight, "bn_bias": bn_bias, "mean": mean, "variance": variance}
    for name, value in given.items():
        if value is not None and value.shape != weight.shape[:1]:  # a single value would be broadcast
            raise ValueError(f"{name} must have shape ({weight.shape[0]},), got {tuple(value.shape)}")
    wide = sum_dtype(weight.dtype)
    dtype = weight.dtype
    weight, bias, bn_weight, bn_bias, mean, variance = _as(wide, weight, bias, bn_weight, bn_bias, mean, variance)
    factor = (variance + eps).rsqrt()
    if bn_weight is not None:
        factor = factor * bn_weight
    offset = -mean if bias is None else bias - mean
    folded_bias = offset * factor if bn_bias is None else offset * factor + bn_bias
    return (factor[:, None] * weight).to(dtype), folded_bias.to(dtype)


def shsa_train(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    qk_dim: int,
    norm_eps: float,
    bn_eps: float,
    *settings: float | bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``shsa`` with the projection batch-normalised by its own statistics: y, and the projection's mean, variance."""
    wide = weight.flatten(1).to(sum_dtype(weight.dtype))
    z_mean, z_cov = partial_moments(x, norm_weight, norm_bias, weight.shape[1], norm_eps)
    mean, variance = batch_statistics(wide, z_mean, z_cov)
    qkv_weight, qkv_bias = fold(wide, None, bn_weight, bn_bias, mean, variance, bn_eps)
    y = shsa(x, norm_weight, norm_bias, qkv_weight, qkv_bias, qk_dim, norm_eps, *settings)
    return y, mean, variance


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: int | Tensor,
    momentum: float | None,
) -> None:
    """As ``torch.nn.BatchNorm2d`` does, from the mean and biased variance of ``count`` values per channel: running
    means with ``momentum``, or averages of all batches without it, which without a number of batches stay as they are.
    A batch without values is only counted, and so is any without running mean and variance."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None or count == 0:
        return
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else num_batches_tracked.to(running_mean.dtype).reciprocal()
    unbiased = variance * (count / (count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def mixer_train_after(
    attend: Callable[..., tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bn_weight: Tensor | None,
    proj_bn_bias: Tensor | None,
    qk_dim: int,
    norm_eps: float,
    bn_eps: float,
    proj_bn_eps: float,
    scale: float,
    residual: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    proj_running_mean: Tensor | None,
    proj_running_var: Tensor | None,
    proj_num_batches_tracked: Tensor | None,
    proj_momentum: float | None,
) -> Tensor:
    """``attend``, a ``shsa_train``, with ReLU, then the projection ``[C, C]``, batch-normalised by its own statistics,
    and the residual if asked for. The running statistics of both, where given, are updated."""
    parameters = (norm_weight, norm_bias, weight, bn_weight, bn_bias)
    y, mean, variance = attend(x, *parameters, qk_dim, norm_eps, bn_eps, scale, True, False, False)
    with _full_precision(x):
        proj_weight, proj_bn_weight, proj_bn_bias = _as(x.dtype, proj_weight, proj_bn_weight, proj_bn_bias)
        projected = F.conv2d(y, proj_weight.flatten(1)[:, :, None, None])
        values = projected.to(sum_dtype(x.dtype)).transpose(0, 1).flatten(1)
        count = max(values.shape[1], 1)  # no tokens: zeros, not NaN
        proj_mean = values.sum(dim=1) / count
        proj_var = (values - proj_mean[:, None]).square().sum(dim=1) / count
        # Not F.batch_norm, which refuses a single value per channel: that is for the layer to say.
        out = torch.batch_norm(
            projected, proj_bn_weight, proj_bn_bias, None, None, True, 0.0, proj_bn_eps, torch.backends.cudnn.enabled
        )
    values_per_channel = x.shape[0] * x.shape[2] * x.shape[3]
    for running, batch, share in (
        ((running_mean, running_var, num_batches_tracked), (mean, variance), momentum),
        ((proj_running_mean, proj_running_var, proj_num_batches_tracked), (proj_mean, proj_var), proj_momentum),
    ):
        update_running_statistics(*running, *(t.detach() for t in batch), values_per_channel, share)
    return x + out if residual else out


mixer_train = partial(mixer_train_after, shsa_train)


def fold_and(
    attend: Callable[..., Tensor],
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    qk_dim: int,
    norm_eps: float,
    bn_eps: float,
    *settings: float | bool,
) -> Tensor:
    """``attend``, a ``shsa``, on the projection with the running statistics folded in; without them on it as it is."""
    weight = weight.flatten(1)
    if bn_mean is not None:
        weight, bias = fold(weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_eps)
    return attend(x, norm_weight, norm_bias, weight, bias, qk_dim, norm_eps, *settings)


shsa_eval = partial(fold_and, shsa)


def mixer_eval_after(
    attend: Callable[..., Tensor],
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    proj_bn_weight: Tensor | None,
    proj_bn_bias: Tensor | None,
    proj_bn_mean: Tensor | None,
    proj_bn_var: Tensor | None,
    qk_dim: int,
    norm_eps: float,
    bn_eps: float,
    proj_bn_eps: float,
    scale: float,
    residual: bool,
) -> Tensor:
    """``attend``, a ``shsa_eval``, with ReLU, then the projection ``[C, C]`` with its running statistics folded in, and
    the residual if asked for."""
    attention = (norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var)
    y = attend(x, *attention, qk_dim, norm_eps, bn_eps, scale, True, False, False)
    with _full_precision(x):
        proj_weight, proj_bias = _as(x.dtype, proj_weight.flatten(1), proj_bias)
        if proj_bn_mean is not None:
            statistics = (proj_bn_weight, proj_bn_bias, proj_bn_mean, proj_bn_var)
            proj_weight, proj_bias = _as(x.dtype, *fold(proj_weight, proj_bias, *statistics, proj_bn_eps))
        out = F.conv2d(y, proj_weight[:, :, None, None], proj_bias)
        return x + out if residual else out


mixer_eval = partial(mixer_eval_after, shsa_eval)


def mix_after(
    attend: Callable[..., Tensor],
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
    """``attend``, a ``shsa``, with ReLU, then the projection ``[C, C]`` and the residual."""
    settings = (qk_dim, norm_eps, scale, True, tf32_proj, tf32_attn)
    y = attend(x, norm_weight, norm_bias, qkv_weight, qkv_bias, *settings)
    with _full_precision(x):
        proj_weight, proj_bias = _as(x.dtype, proj_weight, proj_bias)
        return x + F.conv2d(y, proj_weight[:, :, None, None], proj_bias)


shsa_mixer = partial(mix_after, shsa)
