"""The specification: every function in plain PyTorch, differentiable twice, in any floating-point type."""

import torch
import torch.nn.functional as F
from torch import Tensor

name = "eager"


def why_unavailable() -> None:
    return None


def why_not(x: Tensor) -> None:
    return None


def _as(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.to(dtype) for t in tensors]


def shsa(
    x: Tensor,
    x1: Tensor | None,
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
    """Design section 2, line by line. ``x1`` and the TF32 flags only matter to kernels."""
    with torch.autocast(x.device.type, enabled=False):
        norm_weight, norm_bias, qkv_weight, qkv_bias = _as(x.dtype, norm_weight, norm_bias, qkv_weight, qkv_bias)
        B, C, H, W = x.shape
        P = qkv_weight.shape[1]
        x1, x2 = torch.split(x, [P, C - P], dim=1)
        z = x1 if norm_weight is None else F.group_norm(x1, 1, norm_weight, norm_bias, norm_eps)
        qkv = F.conv2d(z, qkv_weight[:, :, None, None], qkv_bias).flatten(2)
        q, k, v = torch.split(qkv, [qk_dim, qk_dim, P], dim=1)
        attn = (q.transpose(-2, -1) @ k * scale).softmax(dim=-1)
        y1 = (v @ attn.transpose(-2, -1)).reshape(B, P, H, W)
        y = torch.cat([y1, x2], dim=1)
        return F.relu(y) if relu else y


def partial_moments(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, pdim: int, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of the normalised first ``pdim`` channels, over images and tokens."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        norm_weight, norm_bias = _as(dtype, norm_weight, norm_bias)
        z = x[:, :pdim].to(dtype)
        if norm_weight is not None:
            z = F.group_norm(z, 1, norm_weight, norm_bias, norm_eps)
        z = z.transpose(0, 1).flatten(1)
        count = max(z.shape[1], 1)  # no tokens: zeros, not NaN
        mean = z.sum(dim=1) / count
        centred = z - mean[:, None]
        return mean, centred @ centred.t() / count
