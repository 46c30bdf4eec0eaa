"""The stock SHSA layer, transcribed: what this library is measured against where timm is not at hand."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import SHSA, Conv2dNorm, GroupNorm1


class StockSHSA(nn.Module):
    """SHSA as the official repository and timm run it, one PyTorch operator after the other.

    Arguments, parameter names and results are those of :class:`shvit_kernels.SHSA`. Source: arXiv 2401.16456,
    section 3.2.
    """

    def __init__(self, dim: int, qk_dim: int, pdim: int, device=None, dtype=None):
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.scale = qk_dim**-0.5
        self.qk_dim = qk_dim
        self.dim = dim
        self.pdim = pdim
        self.pre_norm = GroupNorm1(pdim, **to)
        self.qkv = Conv2dNorm(pdim, 2 * qk_dim + pdim, **to)
        self.proj = nn.Sequential(nn.ReLU(), Conv2dNorm(dim, dim, bn_weight_init=0.0, **to))

    def forward(self, x: Tensor) -> Tensor:
        attended, passed = x.split([self.pdim, self.dim - self.pdim], dim=1)
        projected = self.qkv(self.pre_norm(attended))
        query, key, value = projected.flatten(2).split([self.qk_dim, self.qk_dim, self.pdim], dim=1)
        attended = self.attention(query, key, value).reshape(attended.shape)
        return self.proj(torch.cat([attended, passed], dim=1))

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, P, N]`` of ``[B, D, N]`` twice and ``[B, P, N]``."""
        weights = torch.softmax(query.transpose(1, 2) @ key * self.scale, dim=-1)
        return value @ weights.transpose(1, 2)


class FusedAttentionSHSA(StockSHSA):
    """The stock layer with PyTorch's fused attention, which wants widths of a multiple of 8, channels last."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        width = value.shape[1]
        if width % 8:
            value = F.pad(value, (0, 0, 0, -width % 8))
        query, key, value = (t.transpose(1, 2).contiguous()[:, None] for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return attended[:, 0, :, :width].transpose(1, 2)


def with_stock_layers(model: nn.Module, layer: type[StockSHSA] = StockSHSA) -> nn.Module:
    """A deep copy of ``model`` whose :class:`shvit_kernels.SHSA` layers are stock ones, with equal weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is SHSA:
            module.__class__ = layer  # the two differ in their forward alone
    return model
