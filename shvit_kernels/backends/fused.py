"""The operators of fused models: in plain PyTorch (the specification), and in C++ for float32 on the CPU.

Weights are packed: ``[ceil(outputs / 16), inputs, 16]``, the same on every instruction set and in every state dict.
A sequence has those of several layers in one tensor, in the order in which they are read.
Images are ``[B, C, H, W]``, channels_last inside a model.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Kind, as_images, gives_rows, layers_of, readable, unpack
from . import choose, cpu, eager


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """3x3 convolution with stride 2 and padding 1; inputs of ``weight`` are ordered kernel row, column, channel."""
    outputs = bias.shape[0]
    kernel = unpack(weight, outputs).view(outputs, 3, 3, -1).permute(0, 3, 1, 2)
    y = F.conv2d(x, kernel, bias, stride=2, padding=1)
    return F.relu(y) if relu else y


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int, relu: bool) -> Tensor:
    """3x3 convolution of each channel alone, padding 1; ``weight`` is ``[9, C]``, not packed."""
    channels = x.shape[1]
    y = F.conv2d(x, weight.t().reshape(channels, 1, 3, 3), bias, stride=stride, padding=1, groups=channels)
    return F.relu(y) if relu else y


def pointwise(x: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """1x1 convolution of ``x`` times ``scale`` ``[B, C]``."""
    if scale is not None:
        x = x * scale[:, :, None, None]
    y = F.conv2d(x, unpack(weight, bias.shape[0])[:, :, None, None], bias)
    return F.relu(y) if relu else y


def ffn(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """``x + W2 relu(W1 x + b1) + b2`` per token."""
    return x + pointwise(pointwise(x, None, weight1, bias1, True), None, weight2, bias2, False)


def mixer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    qk_dim: int,
    norm_eps: float,
    scale: float,
) -> Tensor:
    """``shsa_mixer`` with a packed projection."""
    attention = (norm_weight, norm_bias, qkv_weight, qkv_bias)
    return eager.shsa_mixer(x, *attention, unpack(weight, bias.shape[0]), bias, qk_dim, norm_eps, scale, False, False)


def pool(x: Tensor) -> Tensor:
    """Means over the pixels, ``[B, C]``."""
    return x.mean((2, 3))


def patch_merging(
    x: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    conv3_weight: Tensor,
    conv3_bias: Tensor,
) -> Tensor:
    """Pointwise with ReLU, depthwise of stride 2 with ReLU, squeeze-and-excitation, pointwise."""
    x = pointwise(x, None, conv1_weight, conv1_bias, True)
    x = depthwise(x, conv2_weight, conv2_bias, 2, True)
    gate = pointwise(pool(x)[:, :, None, None], None, fc1_weight, fc1_bias, True)
    gate = pointwise(gate, None, fc2_weight, fc2_bias, False).sigmoid()
    return pointwise(x, gate.flatten(1), conv3_weight, conv3_bias, False)


def sequence(x: Tensor, weights: list[Tensor], layers: list[int], constants: list[float]) -> Tensor:
    """One layer after the other: each is some integers (``ops.Kind``), weights and constants.

    Weights are flattened tensors (``ops.flatten``), each of one or more layers. ``x`` may be rows ``[B, C]``, images of
    one pixel. The result is ``[B, C]`` if ``x`` is, or if there is pooling.
    """
    constants = iter(constants)
    image = as_images(x)
    for kind, (first, second, _), own in layers_of(layers, weights, x.shape[1]):
        if kind == Kind.CONV3X3:
            image = conv3x3(image, *own, bool(second))
        elif kind == Kind.DEPTHWISE:
            image = depthwise(image, *own, first, bool(second))
        elif kind == Kind.FFN:
            image = ffn(image, *own)
        elif kind == Kind.MIXER:
            image = mixer(image, *own, first, next(constants), next(constants))
        elif kind == Kind.PATCH_MERGING:
            image = patch_merging(image, *own)
        elif kind == Kind.POOL:
            image = pool(image)[:, :, None, None]
        else:
            image = pointwise(image, None, *own, bool(second))
    return image.flatten(1) if gives_rows(x, layers) else image


class Operators(NamedTuple):
    """What a fused model is made of."""

    conv3x3: Callable[..., Tensor]
    depthwise: Callable[..., Tensor]
    pointwise: Callable[..., Tensor]
    ffn: Callable[..., Tensor]
    mixer: Callable[..., Tensor]
    pool: Callable[..., Tensor]
    sequence: Callable[..., Tensor]


SPECIFICATION = Operators(conv3x3, depthwise, pointwise, ffn, mixer, pool, sequence)


def _on_rows(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, *rest) -> Tensor:
        return operator(x.contiguous(memory_format=torch.channels_last), *rest)

    return call


_OPERATORS = {name: getattr(torch.ops.shvit_kernels, f"fused_{name}").default for name in Operators._fields}


def _conv3x3(x: Tensor, *rest) -> Tensor:
    # The first convolution of a stem reads images as they come.
    return _OPERATORS["conv3x3"](readable(x), *rest)


def _sequence(x: Tensor, weights: list[Tensor], layers: list[int], constants: list[float]) -> Tensor:
    x = x.contiguous() if x.dim() == 2 else readable(x)
    return _OPERATORS["sequence"](x, weights, layers, constants)


NATIVE = Operators(
    **{name: _on_rows(operator) for name, operator in _OPERATORS.items()} | {"conv3x3": _conv3x3, "sequence": _sequence}
)


def operators(x: Tensor) -> Operators:
    """The operators for ``x``: those in C++ where they run and no gradient is asked for."""
    if x.dtype == torch.float32 and choose(x, None) is cpu and not (torch.is_grad_enabled() and x.requires_grad):
        return NATIVE
    return SPECIFICATION
