"""Swapping the SHSA layers inside existing models."""

import warnings
from collections import Counter

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import SHSA

_NAMES = ("SHSA", "StockSHSA")  # timm and the official repository; shvit_kernels.stock
_SETTINGS = ("dim", "qk_dim", "pdim", "scale")
_CHILDREN = {"pre_norm", "qkv", "proj"}


def _is_shsa(layer: nn.Module) -> bool:
    """Whether a layer is some SHSA: by class name, settings and children, so that no other library is imported."""
    return (
        type(layer).__name__ in _NAMES
        and all(isinstance(getattr(layer, name, None), (int, float)) for name in _SETTINGS)
        and set(layer._modules) == _CHILDREN
    )


def _projects(module: nn.Module, inputs: int, outputs: int) -> bool:
    """Whether a module is a 1x1 convolution of these widths, alone (fused) or followed by batch normalisation."""
    if isinstance(module, nn.Sequential) and list(module._modules) == ["c", "bn"]:
        if not isinstance(module.bn, _BatchNorm):
            return False
        module = module.c
    return isinstance(module, nn.Conv2d) and module.weight.shape == (outputs, inputs, 1, 1)


def _why_not(layer: nn.Module) -> str | None:
    """Why a layer has to stay as it is, or None."""
    norm, proj = layer.pre_norm, layer.proj
    if not (isinstance(norm, nn.GroupNorm) and norm.num_groups == 1 and norm.num_channels == layer.pdim):
        return "another norm"
    if not (isinstance(proj, nn.Sequential) and len(proj) == 2 and isinstance(proj[0], nn.ReLU)):
        return "another activation"
    if not _projects(layer.qkv, layer.pdim, 2 * layer.qk_dim + layer.pdim):
        return "another projection"
    if not _projects(proj[1], layer.dim, layer.dim):
        return "another projection"
    derived = any(base.__name__ == type(layer).__name__ for base in type(layer).__mro__[1:])
    if layer._parameters or layer._buffers or "forward" in vars(layer) or derived:
        return "additions of their own"
    return None


def is_stock_shsa(layer: nn.Module) -> bool:
    """Whether a layer is an SHSA, ours or another, that computes what the stock one does."""
    return (type(layer) is SHSA or _is_shsa(layer)) and _why_not(layer) is None


def accelerate(model: nn.Module) -> nn.Module:
    """Make every SHSA layer of a model run as :class:`shvit_kernels.SHSA`, in place.

    Works on models of timm, of the official repository and of this library, fused (``model.fuse()``) or not, wrapped
    (``DistributedDataParallel``, ``torch.compile``) or not, and on a layer alone. Each layer stays the same object and
    only changes its class: parameters, buffers, hooks, optimizers that hold its parameters, state-dict keys, device,
    dtype, training flag, ``requires_grad`` and ``scale`` are untouched, and layers shared between parts of a model
    stay shared. Compiled models compile again at their next call. Calling it twice does nothing more.

    Layers that are an SHSA with another norm, activation or projection, or with additions of their own (parameters,
    buffers, a ``forward`` on the instance, a class derived from another SHSA), are left alone; one ``UserWarning`` says
    how many, which and why. What was done cannot be seen by ``torch.fx.symbolic_trace`` and ``torch.jit.script``, which
    refuse the accelerated layer; ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` take it.

    Args:
        model: a model, or an SHSA layer.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if it has no SHSA layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SHSA) or _is_shsa(layer)}
    if not layers:
        raise ValueError(f"model must have at least one SHSA layer, and this {type(model).__name__} has none")

    left_alone = {}
    for name, layer in layers.items():
        if isinstance(layer, SHSA):
            continue
        reason = _why_not(layer)
        if reason:
            left_alone[name] = reason
        else:
            layer.__class__ = SHSA  # its settings and submodules are those of ours, only forward differs
    if left_alone:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in Counter(left_alone.values()).items())
        warnings.warn(
            f"accelerate left {len(left_alone)} of {len(layers)} SHSA layers alone: {reasons} "
            f"(the first is {next(iter(left_alone)) or 'the model itself'})",
            stacklevel=2,
        )
    return model
