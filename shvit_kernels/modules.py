"""The layers of SHViT: ``SHSA`` on the library's operator, and the plain blocks around it.

Parameter names are those of timm and of the official repository.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import backends, functional
from .ops import memory_format, readable


class GroupNorm1(nn.GroupNorm):
    """Group normalisation with one group: every image is normalised over all its channels and tokens."""

    def __init__(self, num_channels: int, **kwargs):
        super().__init__(1, num_channels, **kwargs)


class Conv2dNorm(nn.Sequential):
    """A convolution without bias (``c``) and its batch normalisation (``bn``)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        bn_weight_init: float = 1.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.add_module(
            "c", nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False, **to, **kwargs)
        )
        self.add_module("bn", nn.BatchNorm2d(out_channels, **to))
        nn.init.constant_(self.bn.weight, bn_weight_init)
        nn.init.zeros_(self.bn.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The convolution that computes the same in evaluation."""
        c, bn = self.c, self.bn
        factor = bn.weight / (bn.running_var + bn.eps) ** 0.5
        fused = nn.Conv2d(
            c.in_channels,
            c.out_channels,
            c.kernel_size,
            c.stride,
            c.padding,
            c.dilation,
            c.groups,
            device=c.weight.device,
            dtype=c.weight.dtype,
        )
        fused.weight.copy_(c.weight * factor[:, None, None, None])
        fused.bias.copy_(bn.bias - bn.running_mean * factor)
        return fused.train(self.training)


class _Split(torch.autograd.Function):
    """``x`` -> (contiguous copy of its first P channels, ``x``), for two functions that both read the copy.

    The gradient of ``x`` is freshly made by the one operator that took it, so the copy's gradient is added to it in
    place: the other channels are not touched again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, pdim: int):
        ctx.pdim = pdim
        return x[:, :pdim].contiguous(memory_format=memory_format(x)), x.view_as(x)

    @staticmethod
    def backward(ctx, dx1: Tensor, dx: Tensor):
        dx[:, : ctx.pdim] += dx1
        return dx, None


class _ProjectedVariance(torch.autograd.Function):
    """``diag(W cov W^T)``; keeps only W and cov, where autograd would also keep ``W cov``."""

    @staticmethod
    def forward(ctx, weight: Tensor, cov: Tensor):
        ctx.save_for_backward(weight, cov)
        return ((weight @ cov) * weight).sum(dim=1)

    @staticmethod
    def backward(ctx, d: Tensor):
        weight, cov = ctx.saved_tensors
        scaled = d[:, None] * weight
        return scaled @ (cov + cov.t()), weight.t() @ scaled


def _has_hooks(*modules: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )


def _is_group_norm1(module: nn.Module) -> bool:
    """One-group normalisation as PyTorch computes it; timm's GroupNorm1 overrides ``forward`` with the same maths."""
    if not isinstance(module, nn.GroupNorm) or module.num_groups != 1 or module.weight is None:
        return False
    cls = type(module)
    is_timm = cls.__name__ == "GroupNorm1" and cls.__module__.startswith("timm.layers")
    return (cls.forward is nn.GroupNorm.forward or is_timm) and not _has_hooks(module)


def _is_pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
        and not _has_hooks(module)
    )


def _conv_and_norm(module: nn.Module) -> tuple[nn.Conv2d, nn.Module | None] | None:
    """A plain 1x1 convolution and its batch normalisation (None when fused), or None for anything else."""
    if _is_pointwise(module):
        return module, None
    if (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and list(module._modules) == ["c", "bn"]
        and _is_pointwise(module.c)
        and type(module.bn) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and not _has_hooks(module, module.bn)
    ):
        return module.c, module.bn
    return None


def _merge_ranks(bn: nn.Module, count: int, mean: Tensor, cov: Tensor) -> tuple[int | Tensor, Tensor, Tensor]:
    """Moments over all ranks of a training SyncBatchNorm, by one all-reduce; anything else keeps its own moments."""
    if not (type(bn) is nn.SyncBatchNorm and bn.training and dist.is_available() and dist.is_initialized()):
        return count, mean, cov
    group = bn.process_group or dist.group.WORLD
    if dist.get_world_size(group) == 1:
        return count, mean, cov
    # Uncentred products are summed, so in float64.
    mean64 = mean.double()
    second = cov.double() + mean64[:, None] * mean64
    packed = torch.cat([mean64.new_tensor([count]), mean64 * count, (second * count).flatten()])
    packed = dist.nn.functional.all_reduce(packed, group=group)
    total = packed[0].detach()
    P = mean.shape[0]
    sums = packed[1:] / total.clamp_min(1)
    merged = sums[:P]
    merged_cov = sums[P:].view(P, P) - merged[:, None] * merged
    return total, merged.to(mean.dtype), merged_cov.to(cov.dtype)


@torch.no_grad()
def _update_running(bn: nn.Module, count: int | Tensor, mean: Tensor, variance: Tensor) -> None:
    """The running statistics of ``bn`` after a batch, as ``torch.nn.BatchNorm2d`` keeps them (unbiased variance)."""
    factor = 1.0 / bn.num_batches_tracked if bn.momentum is None else bn.momentum
    unbiased = variance * (count / (count - 1))
    for running, value in ((bn.running_mean, mean), (bn.running_var, unbiased)):
        running.add_((value.to(running.dtype) - running) * factor)


def _fold(
    conv: nn.Conv2d,
    bn: nn.Module | None,
    moments: tuple[int | Tensor, Tensor, Tensor] | None,
    size: torch.Size,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Weight ``[O, P]`` and bias ``[O]`` of ``bn(conv(z))`` as one projection (design section 3).

    ``moments`` are count, mean and covariance of z where batch statistics are used, None for running statistics.
    """
    weight, bias = conv.weight.flatten(1), conv.bias
    if bn is None:
        return weight, bias
    with torch.autocast(weight.device.type, enabled=False):
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        tracked = bn.training and bn.track_running_stats
        if tracked:
            bn.num_batches_tracked.add_(1)
        if moments is None:
            mean, variance = bn.running_mean.to(weight.dtype), bn.running_var.to(weight.dtype)
        else:
            count, z_mean, z_cov = moments
            if count == 1:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
            mean = weight @ z_mean.to(weight.dtype)
            variance = _ProjectedVariance.apply(weight, z_cov.to(weight.dtype)).clamp_min(0)
            if bias is not None:
                mean = mean + bias
            if tracked and count > 0:
                _update_running(bn, count, mean, variance)
        factor = (variance + bn.eps).rsqrt()
        if bn.weight is not None:
            factor = factor * bn.weight
        offset = -mean if bias is None else bias - mean
        folded_bias = offset * factor
        if bn.bias is not None:
            folded_bias = folded_bias + bn.bias
        return (factor[:, None] * weight).to(dtype), folded_bias.to(dtype)


class SHSA(nn.Module):
    """Single-head self-attention over a part of the channels, as one operator (SHViT, section 3.2).

    A drop-in for ``timm.models.shvit.SHSA`` and the official layer: same arguments, parameter names, state-dict keys
    and results, in training and in evaluation, running statistics included::

        proj(relu(concat(attention(qkv(pre_norm(x[:, :pdim]))), x[:, pdim:])))

    The batch normalisation of ``qkv`` is folded into its weights at each call, from the running statistics in
    evaluation and from the moments of the projection's input in training; ranks are merged under
    ``torch.nn.SyncBatchNorm``. The submodules are read at each call, so they may be fused, converted or replaced at
    any time. Where they are more than the stock ones (another normalisation, hooks, parametrisations), the layer
    calls them one by one instead.

    Args:
        dim: channels C of input and output.
        qk_dim: width of queries and keys.
        pdim: channels P that take part in the attention, at most ``dim``.
        norm_layer: makes ``pre_norm`` from a number of channels.
        act_layer: makes the activation before the projection.
        device, dtype: of the parameters.

    Shape:
        ``[B, dim, H, W]`` in and out.

    Raises:
        ValueError: if ``qk_dim < 1`` or ``pdim`` does not lie between 1 and ``dim``.
    """

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        pdim: int,
        norm_layer: Callable[..., nn.Module] = GroupNorm1,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        device=None,
        dtype=None,
    ):
        if qk_dim < 1:
            raise ValueError(f"qk_dim must be at least 1, got {qk_dim}")
        if not 1 <= pdim <= dim:
            raise ValueError(f"pdim must lie between 1 and dim ({dim}), got {pdim}")
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.scale = qk_dim**-0.5
        self.qk_dim = qk_dim
        self.dim = dim
        self.pdim = pdim
        self.pre_norm = norm_layer(pdim, **to)
        self.qkv = Conv2dNorm(pdim, 2 * qk_dim + pdim, **to)
        self.proj = nn.Sequential(act_layer(), Conv2dNorm(dim, dim, bn_weight_init=0.0, **to))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, qk_dim={self.qk_dim}, pdim={self.pdim}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x must have shape [B, {self.dim}, H, W], got {tuple(x.shape)}")
        projection = self._foldable(x)
        if projection is None:
            return self.proj(self._composite(x))
        proj = self.proj
        if type(proj) is nn.Sequential and type(proj[0]) is nn.ReLU and not _has_hooks(proj, proj[0]):
            y = self._attend(x, *projection, relu=True)
            for module in proj[1:]:
                y = module(y)
            return y
        return proj(self._attend(x, *projection, relu=False))

    def _foldable(self, x: Tensor) -> tuple[nn.Conv2d, nn.Module | None] | None:
        """The projection's convolution and norm where the fused operator computes what the submodules would."""
        globally_hooked = nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        if globally_hooked or not _is_group_norm1(self.pre_norm):
            return None
        projection = _conv_and_norm(self.qkv)
        if projection is None:
            return None
        same_dtype = self.pre_norm.weight.dtype == projection[0].weight.dtype == x.dtype
        return projection if same_dtype or torch.is_autocast_enabled(x.device.type) else None

    def _attend(self, x: Tensor, conv: nn.Conv2d, bn: nn.Module | None, relu: bool) -> Tensor:
        """From the split to the concatenation (and ReLU)."""
        norm = self.pre_norm
        x1, moments = None, None
        if bn is not None and (bn.training or bn.running_mean is None):
            if backends.choose(x, None) is backends.eager:
                read = x
            else:
                x1, x = _Split.apply(readable(x), self.pdim)
                read = x1
            moments = functional.partial_moments(
                read, norm.weight, norm.bias, pdim=self.pdim, norm_eps=norm.eps
            )
            moments = _merge_ranks(bn, *moments)
        weight, bias = _fold(conv, bn, moments, x.shape, x.dtype)
        return functional._shsa(
            x,
            None if x1 is None else x1.detach(),
            weight,
            bias,
            qk_dim=self.qk_dim,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            norm_eps=norm.eps,
            scale=self.scale,
            relu=relu,
            backend=None,
        )

    def _composite(self, x: Tensor) -> Tensor:
        """The same, calling the submodules one by one."""
        B, _, H, W = x.shape
        x1, x2 = torch.split(x, [self.pdim, self.dim - self.pdim], dim=1)
        qkv = self.qkv(self.pre_norm(x1)).flatten(2)
        q, k, v = torch.split(qkv, [self.qk_dim, self.qk_dim, self.pdim], dim=1)
        attn = (q.transpose(-2, -1) @ k * self.scale).softmax(dim=-1)
        return torch.cat([(v @ attn.transpose(-2, -1)).reshape(B, self.pdim, H, W), x2], dim=1)
