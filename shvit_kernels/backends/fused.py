"""The operators of fused models: in plain PyTorch (the specification), and in C++ for float32 and bfloat16 on the CPU.

Weights are packed (``ops.pack``), the same on every instruction set and in every state dict.
A sequence has those of several layers in one tensor, in the order in which they are read.
Images are ``[B, C, H, W]``, channels_last inside a model.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Kind, as_images, gives_rows, layers_of, readable, taps_of_winograd, unpack
from . import choose, cpu, eager
from .operators import tracks_gradients


def _kernel3x3(weight: Tensor, bias: Tensor) -> Tensor:
    """``[outputs, C, 3, 3]`` of packed weights."""
    outputs = bias.shape[0]
    return unpack(weight, outputs).view(outputs, 3, 3, -1).permute(0, 3, 1, 2)


def _kernel_of_winograd(weight: Tensor, bias: Tensor) -> Tensor:
    """``[outputs, C, 3, 3]`` of packed weights for squares of outputs."""
    outputs = bias.shape[0]
    taps = taps_of_winograd(unpack(weight, outputs).view(outputs, 25, -1))
    return taps.transpose(1, 2).unflatten(2, (3, 3))


def _kernel1x1(weight: Tensor, bias: Tensor) -> Tensor:
    """``[outputs, inputs, 1, 1]`` of packed weights."""
    return unpack(weight, bias.shape[0])[:, :, None, None]


def _kernel_of_taps(weight: Tensor, bias: Tensor) -> Tensor:
    """``[C, 1, 3, 3]`` of ``[9, C]``."""
    return weight.t().reshape(-1, 1, 3, 3)


def _conv(x: Tensor, kernel: Tensor, bias: Tensor, relu: bool = False, **settings) -> Tensor:
    y = F.conv2d(x, kernel, bias, **settings)
    return F.relu(y) if relu else y


def _conv_stride2(x: Tensor, kernel: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return _conv(x, kernel, bias, relu, stride=2, padding=1)


def _depthwise(x: Tensor, kernel: Tensor, bias: Tensor, stride: int, relu: bool) -> Tensor:
    return _conv(x, kernel, bias, relu, stride=stride, padding=1, groups=x.shape[1])


def _ffn(x: Tensor, kernel1: Tensor, bias1: Tensor, kernel2: Tensor, bias2: Tensor) -> Tensor:
    return x + _conv(_conv(x, kernel1, bias1, True), kernel2, bias2)


def _mixer(x: Tensor, *arguments) -> Tensor:
    return eager.shsa_mixer(x, *arguments, False, False)


def _patch_merging(x: Tensor, *kernels: Tensor) -> Tensor:
    """Pointwise with ReLU, depthwise of stride 2 with ReLU, squeeze-and-excitation, pointwise."""
    conv1, conv2, fc1, fc2, conv3 = zip(kernels[::2], kernels[1::2], strict=True)
    x = _depthwise(_conv(x, *conv1, True), *conv2, 2, True)
    gate = _conv(pool(x)[:, :, None, None], *fc1, True)
    return _conv(x * _conv(gate, *fc2).sigmoid(), *conv3)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, winograd: bool) -> Tensor:
    """3x3 convolution with stride 2 and padding 1.

    Inputs of ``weight`` are ordered kernel row, column, channel; with ``winograd`` they are those of ``ops.winograd``,
    from which float32 kernels compute 2x2 outputs at a time, in 25 products per channel instead of 36. Where such
    outputs read an infinity they may be NaN.
    """
    return _conv_stride2(x, (_kernel_of_winograd if winograd else _kernel3x3)(weight, bias), bias, relu)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int, relu: bool) -> Tensor:
    """3x3 convolution of each channel alone, padding 1; ``weight`` is ``[9, C]``, not packed."""
    return _depthwise(x, _kernel_of_taps(weight, bias), bias, stride, relu)


def pointwise(x: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """1x1 convolution of ``x`` times ``scale`` ``[B, C]``."""
    if scale is not None:
        x = x * scale[:, :, None, None]
    return _conv(x, _kernel1x1(weight, bias), bias, relu)


def ffn(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """``x + W2 relu(W1 x + b1) + b2`` per token."""
    return _ffn(x, _kernel1x1(weight1, bias1), bias1, _kernel1x1(weight2, bias2), bias2)


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
    return _mixer(x, *attention, unpack(weight, bias.shape[0]), bias, qk_dim, norm_eps, scale)


def pool(x: Tensor) -> Tensor:
    """Means over the pixels, ``[B, C]``."""
    return x.mean((2, 3))


# How each weight of a layer becomes the kernel of a convolution, its bias beside it.
_KERNELS: dict[Kind, tuple[Callable[[Tensor, Tensor], Tensor], ...]] = {
    Kind.CONV3X3: (_kernel3x3,),
    Kind.DEPTHWISE: (_kernel_of_taps,),
    Kind.FFN: (_kernel1x1, _kernel1x1),
    Kind.MIXER: (
        lambda weight, _: weight,
        lambda weight, _: weight,
        lambda weight, bias: unpack(weight, bias.shape[0]),
    ),
    Kind.PATCH_MERGING: (_kernel1x1, _kernel_of_taps, _kernel1x1, _kernel1x1, _kernel1x1),
    Kind.POOL: (),
    Kind.POINTWISE: (_kernel1x1,),
}


class Layer(NamedTuple):
    """A layer of a sequence as PyTorch runs it."""

    kind: Kind
    settings: list[int]
    kernels: list[Tensor]


def layers(weights: list[Tensor], code: list[int], channels: int) -> list[Layer]:
    """The layers of a sequence on an image of so many channels.

    Raises:
        ValueError: if the layers do not fit the image or one another, or do not take just these weights.
    """
    found = []
    for kind, settings, own in layers_of(code, weights, channels):
        by_winograd = kind == Kind.CONV3X3 and settings[2]
        makes = (_kernel_of_winograd,) if by_winograd else _KERNELS[kind]
        kernels = [t for make, w, b in zip(makes, own[::2], own[1::2], strict=True) for t in (make(w, b), b)]
        found.append(Layer(kind, settings, kernels))
    return found


def run(x: Tensor, sequence: list[Layer], constants: list[float], mix: Callable[..., Tensor]) -> Tensor:
    """One layer after the other. The result is ``[B, C]`` if ``x`` is, or if there is pooling.

    Args:
        mix: computes what ``mixer`` does, of a projection that is not packed.
    """
    constants = iter(constants)
    image = as_images(x)
    for kind, (first, second, _), kernels in sequence:
        if kind == Kind.CONV3X3:
            image = _conv_stride2(image, *kernels, bool(second))
        elif kind == Kind.DEPTHWISE:
            image = _depthwise(image, *kernels, first, bool(second))
        elif kind == Kind.FFN:
            image = _ffn(image, *kernels)
        elif kind == Kind.MIXER:
            image = mix(image, *kernels, first, next(constants), next(constants))
        elif kind == Kind.PATCH_MERGING:
            image = _patch_merging(image, *kernels)
        elif kind == Kind.POOL:
            image = pool(image)[:, :, None, None]
        else:
            image = _conv(image, *kernels, bool(second))
    return image.flatten(1) if gives_rows(x, (layer.kind for layer in sequence)) else image


def sequence(x: Tensor, weights: list[Tensor], code: list[int], constants: list[float]) -> Tensor:
    """One layer after the other: each is some integers (``ops.Kind``), weights and constants.

    Weights are flattened tensors (``ops.flatten``), each of one or more layers. ``x`` may be rows ``[B, C]``, images of
    one pixel. The result is ``[B, C]`` if ``x`` is, or if there is pooling.
    """
    return run(x, layers(weights, code, x.shape[1]), constants, _mixer)


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


_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def operators(x: Tensor, weights: list[Tensor]) -> Operators:
    """The operators for ``x``: those in C++ where they run and give all that is asked for."""
    if x.dtype in _NATIVE_DTYPES and choose(x, None) is cpu and not tracks_gradients(x, *weights):
        return NATIVE
    return SPECIFICATION
