"""The layers of SHViT: ``SHSA`` on the library's operator, and the plain blocks around it.

Parameter names are those of timm and of the official repository.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import backends, functional
from .backends import operators


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


def hooks_on_all_modules() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs its ``forward`` and nothing else, on parameters that are just parameters."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "parametrizations" in module._modules
        or "forward" in module.__dict__
    )


def _weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Those of a plain module; ``nn.Module.__getattr__`` would take a microsecond for each."""
    own = module._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return module.weight, module.bias  # replicas of nn.DataParallel keep them elsewhere


def is_group_norm1(module: nn.Module) -> bool:
    """One-group normalisation as PyTorch computes it; timm's GroupNorm1 overrides ``forward`` with the same maths."""
    cls = type(module)
    if cls is not GroupNorm1:
        is_timm = cls.__name__ == "GroupNorm1" and cls.__module__.startswith("timm.layers")
        if not (isinstance(module, nn.GroupNorm) and (is_timm or cls.forward is nn.GroupNorm.forward)):
            return False
        if hasattr(cls, "weight") or hasattr(cls, "bias"):  # which stand before the parameters of these names
            return False
    return module.num_groups == 1 and module.affine and is_plain(module)


def is_sequence_of(module: nn.Module | None, *children: str) -> bool:
    """Whether a module runs children of just these names, one after the other."""
    if not (isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and is_plain(module)):
        return False
    return tuple(module._modules) == children


def conv_and_norm(module: nn.Module | None) -> tuple[nn.Conv2d, nn.Module | None] | None:
    """A plain convolution and its batch normalisation (None when fused), or None for anything else."""
    conv, bn = module, None
    if is_sequence_of(module, "c", "bn"):
        conv, bn = module._modules.values()
        if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or not is_plain(bn):
            return None
    return (conv, bn) if type(conv) is nn.Conv2d and is_plain(conv) else None


def _pointwise_and_norm(module: nn.Module) -> tuple[nn.Conv2d, nn.Module | None] | None:
    """Those of a 1x1 convolution."""
    found = conv_and_norm(module)
    if found is None:
        return None
    conv, bn = found
    if bn is not None and len({t is None for t in _statistics(bn)}) > 1:  # PyTorch refuses one without the other
        return None
    padding = conv.padding in ((0, 0), "valid", "same")
    return found if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and padding and conv.groups == 1 else None


def _by_batch(bn: nn.Module) -> bool:
    """Whether ``bn`` normalises by the statistics of the batch."""
    return bn.training or _statistics(bn)[0] is None


def _buffer(bn: nn.Module, name: str) -> Tensor | None:
    own = bn._buffers
    if name in own:
        return own[name]
    return getattr(bn, name)  # somebody made it something else


def _statistics(bn: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance."""
    return _buffer(bn, "running_mean"), _buffer(bn, "running_var")


def _norm(bn: nn.Module | None) -> tuple[Tensor | None, ...]:
    """Weight, bias, running mean and variance of a batch normalisation; four times None without one."""
    return (None, None, None, None) if bn is None else (*_weight_and_bias(bn), *_statistics(bn))


def _are_trained(conv: nn.Conv2d, bn: nn.Module | None, proj: nn.Conv2d, proj_bn: nn.Module | None) -> bool:
    """Whether ``mixer_train`` computes both projections: by the statistics of the batch, on this process alone."""
    if bn is None or not _by_batch(bn) or type(proj_bn) is not nn.BatchNorm2d or not _by_batch(proj_bn):
        return False
    return _weight_and_bias(conv)[1] is None and _weight_and_bias(proj)[1] is None and not _merges_ranks(bn)


_PLAIN = (Tensor, nn.Parameter)


def _are_evaluated(bn: nn.Module | None, proj: nn.Conv2d, proj_bn: nn.Module | None) -> bool:
    """Whether ``mixer_eval`` computes both projections: by running statistics, if any.

    What PyTorch refuses of the last ones, and tensors that are more than tensors, are left to PyTorch.
    """
    if (bn is not None and _by_batch(bn)) or (proj_bn is not None and _by_batch(proj_bn)):
        return False
    weight, bias = _weight_and_bias(proj)
    norm = _norm(proj_bn)
    if type(weight) not in _PLAIN or (proj_bn is not None and (norm[3] is None or proj_bn.eps < 0)):
        return False
    return all(
        t is None
        or (type(t) in _PLAIN and t.shape == weight.shape[:1] and t.dtype == weight.dtype and t.device == weight.device)
        for t in (bias, *norm)
    )


def _merges_ranks(bn: nn.Module) -> bool:
    """Whether ``bn`` takes its batch statistics over several processes."""
    if not (type(bn) is nn.SyncBatchNorm and bn.training and dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(bn.process_group or dist.group.WORLD) > 1


def _merge_ranks(bn: nn.Module, count: int, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of all ranks together, by one all-reduce."""
    # Uncentred products are summed, so in float64.
    mean64 = mean.double()
    second = cov.double() + mean64[:, None] * mean64
    packed = torch.cat([mean64.new_tensor([count]), mean64 * count, (second * count).flatten()])
    packed = dist.nn.functional.all_reduce(packed, group=bn.process_group or dist.group.WORLD)
    total = packed[0].detach()
    P = mean.shape[0]
    sums = packed[1:] / total.clamp_min(1)
    merged = sums[:P]
    merged_cov = sums[P:].view(P, P) - merged[:, None] * merged
    return total, merged.to(mean.dtype), merged_cov.to(cov.dtype)


def _check_count(count: int | Tensor, size: torch.Size) -> None:
    """Refuse a single value per channel as ``torch.nn.BatchNorm2d`` does."""
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


def _tracked(bn: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None, float | None]:
    """The running mean, variance and number of batches that a batch updates, and with which momentum."""
    if not (bn.training and bn.track_running_stats):
        return None, None, None, None
    return *_statistics(bn), _buffer(bn, "num_batches_tracked"), bn.momentum


def _track(
    backend: ModuleType, bn: nn.Module, count: int | Tensor, size: torch.Size, mean: Tensor, variance: Tensor
) -> None:
    """Update the running statistics of ``bn`` as ``torch.nn.BatchNorm2d`` does."""
    _check_count(count, size)
    *running, momentum = _tracked(bn)
    backend.update_running_statistics(*running, mean, variance, count, momentum)


class SHSA(nn.Module):
    """Single-head self-attention over a part of the channels, as one operator (SHViT, section 3.2).

    A drop-in for ``timm.models.shvit.SHSA`` and the official layer: same arguments, parameter names, state-dict keys
    and results, in training and in evaluation, running statistics included::

        proj(relu(concat(attention(qkv(pre_norm(x[:, :pdim]))), x[:, pdim:])))

    The batch normalisation of ``qkv`` is folded into its weights at each call, from the running statistics in
    evaluation and from the moments of the projection's input in training; ranks are merged under
    ``torch.nn.SyncBatchNorm``. On CPUs, in float32 and float64, one operator runs the whole layer in training, and in
    evaluation without gradients. In training it keeps the input and the projection's output for the backward:
    ``x = x + layer(x)``, not ``x += layer(x)``. The submodules are read at each call, so they may be fused, converted
    or replaced at any time. Where they are more than the stock ones (another normalisation, hooks, parametrisations, a
    learnable ``scale``), the layer calls them one by one instead.

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
        return self._run(x, residual=False)

    def with_residual(self, x: Tensor) -> Tensor:
        """``x + self(x)``, in training by one operator where there is one."""
        if is_plain(self) and not hooks_on_all_modules():
            return self._run(x, residual=True)
        return x + self(x)

    def _child(self, name: str) -> nn.Module | None:
        """``getattr``, without the microsecond of ``nn.Module.__getattr__`` where nothing stands before it."""
        if type(self) is SHSA and name not in self.__dict__:
            return self._modules.get(name)
        return getattr(self, name)

    def _run(self, x: Tensor, residual: bool) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.dim or 0 in x.shape[2:]:
            raise ValueError(f"x must have shape [B, {self.dim}, H, W] with H and W at least 1, got {tuple(x.shape)}")
        projection, rest = self._foldable(x), self._after_relu()
        if projection is None:
            y = self.proj(self._composite(x))
        elif rest is None:
            y = self.proj(self._attend(x, *projection, relu=False))
        else:
            last = self._last_projection(x, rest)
            if last is not None and _are_trained(*projection, *last):
                return self._train(x, *projection, *last, residual)
            if last is not None and _are_evaluated(projection[1], *last):
                y = self._evaluate(x, *projection, *last, residual)
                if y is not None:
                    return y
            y = self._attend(x, *projection, relu=True)
            for module in rest:
                y = module(y)
        return x + y if residual else y

    def _after_relu(self) -> list[nn.Module] | None:
        """What follows the ReLU in front of the projection; None for another activation."""
        proj = self._child("proj")
        if type(proj) is nn.Sequential and is_plain(proj):
            act, *rest = proj._modules.values()
            if type(act) is nn.ReLU and is_plain(act):
                return rest
        return None

    def _last_projection(self, x: Tensor, rest: list[nn.Module]) -> tuple[nn.Conv2d, nn.Module | None] | None:
        """The last convolution and norm where one operator can run them too: on CPUs, and of the type of ``x``."""
        if not x.is_cpu or x.dtype not in backends.cpu.MIXER_DTYPES or len(rest) != 1:
            return None
        last = _pointwise_and_norm(rest[0])
        if last is None or functional.is_autocast(x):
            return None
        weight = _weight_and_bias(last[0])[0]
        if weight.shape != (self.dim, self.dim, 1, 1) or weight.dtype != x.dtype or weight.device != x.device:
            return None
        return last if backends.choose(x, None, self.pdim, self.qk_dim) is backends.cpu else None

    def _train(
        self,
        x: Tensor,
        conv: nn.Conv2d,
        bn: nn.Module,
        proj: nn.Conv2d,
        proj_bn: nn.BatchNorm2d,
        residual: bool,
    ) -> Tensor:
        """The whole layer, with the residual if asked for, by one operator."""
        norm = self._child("pre_norm")
        attention = (*_weight_and_bias(norm), _weight_and_bias(conv)[0], *_weight_and_bias(bn))
        projection = (_weight_and_bias(proj)[0], *_weight_and_bias(proj_bn))
        epsilons = (norm.eps, bn.eps, proj_bn.eps)

        _check_count(x.shape[0] * x.shape[2] * x.shape[3], x.shape)
        settings = (self.qk_dim, *epsilons, self.scale, residual)
        return backends.cpu.mixer_train(x, *attention, *projection, *settings, *_tracked(bn), *_tracked(proj_bn))

    def _evaluate(
        self,
        x: Tensor,
        conv: nn.Conv2d,
        bn: nn.Module | None,
        proj: nn.Conv2d,
        proj_bn: nn.Module | None,
        residual: bool,
    ) -> Tensor | None:
        """The same by running statistics; None where gradients may be asked for, which cost less module by module, and
        in exported programs, which may run on another device."""
        norm = self._child("pre_norm")
        projections = (*_weight_and_bias(conv), *_norm(bn), *_weight_and_bias(proj), *_norm(proj_bn))
        epsilons = (norm.eps, *(0.0 if b is None else b.eps for b in (bn, proj_bn)))
        settings = (self.qk_dim, *epsilons, self.scale, residual)
        parameters = (*_weight_and_bias(norm), *projections)
        if operators.tracks_gradients(x, *parameters) or torch.compiler.is_exporting():
            return None
        return backends.cpu.mixer_eval(x, *parameters, *settings)

    def _foldable(self, x: Tensor) -> tuple[nn.Conv2d, nn.Module | None] | None:
        """The projection's convolution and norm where the fused operator computes what the submodules would."""
        norm = self._child("pre_norm")
        if hooks_on_all_modules() or not is_group_norm1(norm) or isinstance(self.scale, Tensor):
            return None
        projection = _pointwise_and_norm(self._child("qkv"))
        if projection is None:
            return None
        weight = _weight_and_bias(projection[0])[0]
        if norm.num_channels != self.pdim or weight.shape != (2 * self.qk_dim + self.pdim, self.pdim, 1, 1):
            return None
        same_dtype = _weight_and_bias(norm)[0].dtype == weight.dtype == x.dtype
        if weight.device == x.device and (same_dtype or functional.is_autocast(x)):
            return projection
        return None

    def _attend(self, x: Tensor, conv: nn.Conv2d, bn: nn.Module | None, relu: bool) -> Tensor:
        """From the split to the concatenation (and ReLU)."""
        norm = self._child("pre_norm")
        norm_weight, norm_bias = _weight_and_bias(norm)
        weight, bias = _weight_and_bias(conv)
        batch_statistics = bn is not None and _by_batch(bn)
        if functional.is_autocast(x) or (batch_statistics and (bias is not None or _merges_ranks(bn))):
            weight = weight.flatten(1)
            if batch_statistics:
                weight, bias, *measured = self._fold_batch(x, weight, bias, bn)
            elif bn is not None:
                weight, bias = backends.eager.fold(
                    weight, bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
                )
            y = functional.shsa(
                x,
                weight,
                bias,
                qk_dim=self.qk_dim,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                norm_eps=norm.eps,
                scale=self.scale,
                relu=relu,
            )
            if batch_statistics:
                _track(backends.eager, bn, *measured)  # of a call that was not refused
            return y
        # The shapes of the parameters were checked by _foldable, so the backend is called without another look.
        backend = backends.choose(x, None, self.pdim, self.qk_dim)
        settings = (self.scale, relu, *functional.tf32(x))
        if batch_statistics:
            y, mean, variance = backend.shsa_train(
                x, norm_weight, norm_bias, weight, *_weight_and_bias(bn), self.qk_dim, norm.eps, bn.eps, *settings
            )
            _track(backend, bn, x.shape[0] * x.shape[2] * x.shape[3], x.shape, mean, variance)
            return y
        bn_eps = 0.0 if bn is None else bn.eps
        return backend.shsa_eval(
            x, norm_weight, norm_bias, weight, bias, *_norm(bn), self.qk_dim, norm.eps, bn_eps, *settings
        )

    def _fold_batch(self, x: Tensor, weight: Tensor, bias: Tensor | None, bn: nn.Module):
        """The projection with ``bn`` folded in, by the moments of the batch (of all ranks); what ``_track`` takes."""
        norm = self._child("pre_norm")
        moments = functional.partial_moments(x, norm.weight, norm.bias, pdim=self.pdim, norm_eps=norm.eps)
        if _merges_ranks(bn):
            moments = _merge_ranks(bn, *moments)
        count, z_mean, z_cov = moments
        with torch.autocast(x.device.type, enabled=False):
            wide = weight.to(z_cov.dtype)
            mean, variance = backends.eager.batch_statistics(wide, z_mean, z_cov)
            if bias is not None:
                mean = mean + bias
            folded = backends.eager.fold(wide, bias, bn.weight, bn.bias, mean, variance, bn.eps)
            return *(t.to(weight.dtype) for t in folded), count, x.shape, mean.detach(), variance.detach()

    def _composite(self, x: Tensor) -> Tensor:
        """The same, calling the submodules one by one."""
        B, _, H, W = x.shape
        x1, x2 = torch.split(x, [self.pdim, self.dim - self.pdim], dim=1)
        qkv = self.qkv(self.pre_norm(x1)).flatten(2)
        y1 = backends.eager.attention(qkv, self.qk_dim, self.scale)
        return torch.cat([y1.reshape(B, self.pdim, H, W), x2], dim=1)
