"""The operators behind ``shvit_kernels.functional``: schemas, fake kernels and autograd, once for every family.

A *family* is a set of kernels with one schema: ``native`` (C++ on CPUs, CUDA C++ on GPUs) and ``triton``. For a family
X there are

    shsa_forward_X, shsa_backward_X                         attention over the first P channels
    partial_moments_forward_X, partial_moments_backward_X   moments of the normalised first P channels
    shsa_train_forward_X, shsa_train_backward_X             moments, fold of the batch normalisation, attention
    shsa_eval_X                                             fold of the running statistics (if any), attention
    shsa_mixer_X                                            attention, ReLU, projection and residual (inference)
    update_running_statistics_X                             of a batch normalisation, in place

the whole attention layer from its plain parameters, for the CPU alone: mixer_train_forward, which updates the running
statistics (if any), and mixer_train_backward in training, mixer_eval in evaluation, where running statistics (if any)
are folded into both projections; and the operators of fused models, for the CPU alone: fused_conv3x3, fused_depthwise,
fused_pointwise, fused_ffn, fused_mixer, fused_pool, and fused_sequence of such layers. These take channels_last images
(a sequence NCHW ones and rows too) and packed weights (a sequence those of all layers, flattened), all float32 or all
bfloat16; ``backends.fused`` says what each computes.

They are private: validation and the choice of a family happen in ``functional``; autograd
is in the ``torch.autograd.Function`` classes below. Kernels take ``x`` and ``x1`` NCHW-contiguous or channels_last and
keep that format; gradients that were not asked for come back with size [0]. The ``weight`` of what trains or folds may
be that of a convolution, ``[O, P, 1, 1]`` (``proj_weight`` ``[C, C, 1, 1]``): a view of it would be one more step for
autograd.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

_NORM = "Tensor? norm_weight, Tensor? norm_bias"
_QKV = "Tensor qkv_weight, Tensor? qkv_bias"
_SETTINGS = "float scale, bool relu, bool tf32_proj, bool tf32_attn"
_SHSA = f"{_NORM}, {_QKV}, int qk_dim, float norm_eps, {_SETTINGS}"
_SHSA_SAVED = "Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum"
_MOMENTS = f"Tensor x, {_NORM}, int pdim, float norm_eps"
_MOMENTS_RESULTS = "(Tensor mean, Tensor cov, Tensor image_mean, Tensor image_rstd)"
_BATCH_NORM = "Tensor weight, Tensor? bn_weight, Tensor? bn_bias"
_TRAIN = f"{_NORM}, {_BATCH_NORM}, int qk_dim, float norm_eps, float bn_eps, {_SETTINGS}"
_TRAIN_SAVED = f"Tensor x1, {_SHSA_SAVED}, Tensor z_mean, Tensor z_cov, Tensor batch_mean, Tensor batch_var"


def _evaluated(prefix: str) -> str:
    """A projection and the running statistics behind it."""
    names = ("bias", "bn_weight", "bn_bias", "bn_mean", "bn_var")
    return f"Tensor {prefix}weight, " + ", ".join(f"Tensor? {prefix}{name}" for name in names)


_SCHEMAS = (
    f"shsa_forward_X(Tensor x, {_SHSA}) -> (Tensor y, {_SHSA_SAVED})",
    f"shsa_backward_X(Tensor dy, Tensor x1, Tensor y, {_SHSA_SAVED}, {_SHSA}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"partial_moments_forward_X({_MOMENTS}) -> {_MOMENTS_RESULTS}",
    "partial_moments_backward_X(Tensor dmean, Tensor dcov, Tensor x1, Tensor mean, Tensor image_mean, "
    f"Tensor image_rstd, {_NORM}, int channels, bool[] needs) -> (Tensor, Tensor, Tensor)",
    f"shsa_train_forward_X(Tensor x, {_TRAIN}) -> (Tensor y, {_TRAIN_SAVED})",
    f"shsa_train_backward_X(Tensor dy, Tensor y, {_TRAIN_SAVED}, {_TRAIN}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"shsa_eval_X(Tensor x, {_NORM}, {_evaluated('')}, int qk_dim, float norm_eps, float bn_eps, {_SETTINGS})"
    " -> Tensor",
    f"shsa_mixer_X(Tensor x, {_NORM}, {_QKV}, Tensor proj_weight, Tensor? proj_bias, int qk_dim, float norm_eps, "
    "float scale, bool tf32_proj, bool tf32_attn) -> Tensor",
    "update_running_statistics_X(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, "
    "Tensor mean, Tensor variance, int count, float? momentum) -> ()",
)

_PROJ = "Tensor proj_weight, Tensor? proj_bn_weight, Tensor? proj_bn_bias"
_MIXER_TRAIN = (
    f"{_NORM}, {_BATCH_NORM}, {_PROJ}, int qk_dim, float norm_eps, float bn_eps, float proj_bn_eps, float scale, "
    "bool residual"
)
_RUNNING = (
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, "
    "Tensor(d!)? proj_running_mean, Tensor(e!)? proj_running_var, Tensor(f!)? proj_num_batches_tracked, "
    "float? proj_momentum"
)
_MIXER_TRAIN_SAVED = "Tensor projected, Tensor statistics"
_MIXER_TRAIN_SCHEMAS = (
    f"mixer_train_forward(Tensor x, {_MIXER_TRAIN}, {_RUNNING}) -> (Tensor out, {_MIXER_TRAIN_SAVED})",
    f"mixer_train_backward(Tensor dout, Tensor x, {_MIXER_TRAIN_SAVED}, {_MIXER_TRAIN}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

_MIXER_EVAL_SCHEMA = (
    f"mixer_eval(Tensor x, {_NORM}, {_evaluated('')}, {_evaluated('proj_')}, int qk_dim, float norm_eps, "
    "float bn_eps, float proj_bn_eps, float scale, bool residual) -> Tensor"
)

_FUSED_SCHEMAS = (
    "fused_conv3x3(Tensor x, Tensor weight, Tensor bias, bool relu, bool winograd) -> Tensor",
    "fused_depthwise(Tensor x, Tensor weight, Tensor bias, int stride, bool relu) -> Tensor",
    "fused_pointwise(Tensor x, Tensor? scale, Tensor weight, Tensor bias, bool relu) -> Tensor",
    "fused_ffn(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) -> Tensor",
    f"fused_mixer(Tensor x, {_NORM}, {_QKV}, Tensor weight, Tensor bias, int qk_dim, float norm_eps, float scale)"
    " -> Tensor",
    "fused_pool(Tensor x) -> Tensor",
    "fused_sequence(Tensor x, Tensor[] weights, int[] layers, float[] constants) -> Tensor",
)

_library = torch.library.Library("shvit_kernels", "DEF")


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where only that describes ``x``, otherwise contiguous; what kernels read and write in place."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def readable(x: Tensor) -> Tensor:
    """``x`` itself where kernels can read it in place, otherwise a copy in the format nearest to its strides."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    nearest = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return x.contiguous(memory_format=nearest)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and sums: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


PANEL = 16
"""Columns of packed weights that stand side by side, on every instruction set."""


def pack(weight: Tensor) -> Tensor:
    """``[outputs, inputs]`` as ``[ceil(outputs / 16), inputs + 1, 16]``, zeros for the outputs that are missing.

    The weights of an output are divided by a power of two near their size, the geometric mean of their mean and their
    largest magnitude, which stands behind them (0 where all weights are): values of the order of 1 are what products
    in pairs need (csrc/cpu/pairs.h).
    """
    outputs, inputs = weight.shape
    magnitudes = weight.detach().double().abs()
    mean, largest = magnitudes.mean(1), magnitudes.amax(1)
    exponent = (mean.frexp().exponent + largest.frexp().exponent).div(2, rounding_mode="floor")
    exponent = torch.where(mean.isfinite(), exponent, 0).clamp(*_exponents(weight.dtype))
    divisor = torch.ones_like(mean).ldexp(exponent).to(weight.dtype)
    factor = torch.where(largest == 0, 0, divisor)
    scaled = torch.cat([weight / divisor[:, None], factor[:, None]], 1)
    return F.pad(scaled, (0, 0, 0, -outputs % PANEL)).view(-1, PANEL, inputs + 1).transpose(1, 2).contiguous()


def _exponents(dtype: torch.dtype) -> tuple[int, int]:
    """Those of normal numbers of a type, and of float32 at most, to which a model may be converted."""
    return (-14, 15) if dtype == torch.float16 else (-126, 126)


def unpack(packed: Tensor, outputs: int) -> Tensor:
    """The ``[outputs, inputs]`` that :func:`pack` was given."""
    return (packed[:, :-1] * packed[:, -1:]).transpose(1, 2).flatten(0, 1)[:outputs]


# A 3x3 convolution of stride 2 by Winograd's minimal filtering (Lavin and Gray, "Fast Algorithms for Convolutional
# Neural Networks", CVPR 2016), F(2, 2) on every second value: in each direction two outputs are three sums of five
# products (csrc/cpu/conv3x3.h). Those of a sum lie side by side.
_SUMS = ((0, 1), (2,), (3, 4))
_PRODUCTS = [5 * i + j for rows in _SUMS for columns in _SUMS for i in rows for j in columns]
_TAPS = [_PRODUCTS.index(5 * i + j) for i in (0, 1, 3) for j in (0, 1, 3)]


def _factors(kernel: Tensor, dim: int) -> Tensor:
    """The five right factors along a dimension of three weights."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack((first, middle, first + last, last, middle), dim)


def winograd(kernel: Tensor) -> Tensor:
    """``[outputs, C, 3, 3]`` as ``[outputs, 25, C]``, the weights of all products for squares of 2x2 outputs."""
    products = _factors(_factors(kernel.double(), 2), 3)
    return products.flatten(2)[..., _PRODUCTS].transpose(1, 2).to(kernel.dtype)


def taps_of_winograd(products: Tensor) -> Tensor:
    """The kernel that :func:`winograd` was given, as ``[outputs, 9, C]``."""
    return products[:, _TAPS]


def _empty_image(like: Tensor, channels: int) -> Tensor:
    B, _, H, W = like.shape
    return like.new_empty(B, channels, H, W).contiguous(memory_format=memory_format(like))


def _fake_gradients(needs: list[bool], like: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """Fake gradients: the shape and type of the parameter where asked for, empty otherwise."""
    return tuple(
        (like if t is None else t).new_empty(t.shape if need and t is not None else (0,))
        for need, t in zip(needs, parameters, strict=True)
    )


def _fake_shsa(x, norm_weight, norm_bias, qkv_weight, *settings):
    B, C, H, W = x.shape
    dtype = sum_dtype(x.dtype)
    sizes = ((B,), (B,), (B, H * W), (B, H * W))
    return _empty_image(x, C), *(x.new_empty(size, dtype=dtype) for size in sizes)


def _fake_shsa_backward(dy, x1, y, mean, rstd, row_max, row_sum, nw, nb, qkv_weight, qkv_bias, *settings_and_needs):
    needs = settings_and_needs[-1]
    dx = _empty_image(y, y.shape[1]) if needs[0] else y.new_empty(0)
    return dx, *_fake_gradients(needs[1:], y, nw, nb, qkv_weight, qkv_bias)


def _fake_moments(x, norm_weight, norm_bias, pdim, norm_eps):
    B = x.shape[0]
    dtype = sum_dtype(x.dtype)
    return tuple(x.new_empty(size, dtype=dtype) for size in ((pdim,), (pdim, pdim), (B,), (B,)))


def _fake_moments_backward(dmean, dcov, x1, mean, image_mean, image_rstd, norm_weight, norm_bias, channels, needs):
    dx = _empty_image(x1, channels) if needs[0] else x1.new_empty(0)
    return dx, *_fake_gradients(needs[1:], x1, norm_weight, norm_bias)


def _fake_train(x, norm_weight, norm_bias, weight, *settings):
    # z_mean and z_cov are zeros where the projection itself is measured: inductor mistakes empty ones.
    O, P = weight.shape[:2]
    dtype = sum_dtype(x.dtype)
    y, *statistics = _fake_shsa(x, norm_weight, norm_bias, weight)
    sizes = ((P,), (P, P), (O,), (O,))
    return y, _empty_image(x, P), *statistics, *(x.new_empty(size, dtype=dtype) for size in sizes)


def _fake_train_backward(dy, y, *rest):
    norm_weight, norm_bias, weight, bn_weight, bn_bias = rest[9:14]
    needs = rest[-1]
    dx = _empty_image(y, y.shape[1]) if needs[0] else y.new_empty(0)
    return dx, *_fake_gradients(needs[1:], y, norm_weight, norm_bias, weight, bn_weight, bn_bias)


def _fake_mixer_train(x, norm_weight, norm_bias, weight, *rest):
    # Means and variances [O, O, C, C] of both projections, of the images [B, B], of the softmax's rows [B N, B N].
    B, C, H, W = x.shape
    out = _empty_image(x, C)
    return out, torch.empty_like(out), x.new_empty(2 * (weight.shape[0] + C + B + B * H * W))


def _fake_mixer_train_backward(dout, x, projected, statistics, *rest):
    parameters, needs = rest[:8], rest[-1]
    dx = _empty_image(x, x.shape[1]) if needs[0] else x.new_empty(0)
    return dx, *_fake_gradients(needs[1:], x, *parameters)


def _fake_image(x, *rest):
    return _empty_image(x, x.shape[1])


def _empty_rows(like: Tensor, channels: int, stride: int = 1) -> Tensor:
    """A channels_last image, its sides divided by ``stride``."""
    B, _, H, W = like.shape
    return like.new_empty(B, (H + stride - 1) // stride, (W + stride - 1) // stride, channels).permute(0, 3, 1, 2)


class Kind(IntEnum):
    """The layers that a sequence is made of. Each is ``CODE`` integers: a kind, the channels of its input (0 for
    pooling, which takes any) and these settings, then zeros.
    """

    CONV3X3 = 0  # outputs, relu, winograd
    DEPTHWISE = 1  # stride, relu
    FFN = 2  # hidden
    MIXER = 3  # qk_dim, pdim; and two constants, norm_eps and scale
    PATCH_MERGING = 4  # outputs, hidden, squeezed
    POOL = 5
    POINTWISE = 6  # outputs, relu


CODE = 5


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Weights of layers as one tensor ``[n]``: one behind the other, each from a multiple of 16 values on."""
    pieces = [piece for t in tensors for piece in (t.flatten(), t.new_zeros(-t.numel() % PANEL))]
    return torch.cat(pieces)


def _shapes(kind: Kind, channels: int, settings: list[int]) -> list[tuple[int, ...]]:
    """Those of the weights of a layer, in their order."""

    def linear(outputs: int, inputs: int) -> list[tuple[int, ...]]:
        return [(-(-outputs // PANEL), inputs + 1, PANEL), (outputs,)]

    first, second, third = settings
    if kind == Kind.CONV3X3:
        return linear(first, (25 if third else 9) * channels)
    if kind == Kind.DEPTHWISE:
        return [(9, channels), (channels,)]
    if kind == Kind.FFN:
        return linear(first, channels) + linear(channels, first)
    if kind == Kind.MIXER:
        outputs = 2 * first + second
        return [(second,), (second,), (outputs, second), (outputs,), *linear(channels, channels)]
    if kind == Kind.PATCH_MERGING:
        squeeze_excite = linear(third, second) + linear(second, third)
        return [*linear(second, channels), (9, second), (second,), *squeeze_excite, *linear(first, second)]
    return linear(first, channels) if kind == Kind.POINTWISE else []


def layers_of(
    layers: list[int], weights: list[Tensor], channels: int
) -> Iterator[tuple[Kind, list[int], list[Tensor]]]:
    """Each layer of a sequence on an image of so many channels: its kind, its settings, its part of the weights.

    Raises:
        ValueError: if the layers do not fit the image or one another, or do not take just these weights.
    """
    rest = list(weights)
    flat, left = None, 0
    for number, inputs, *settings in zip(*[iter(layers)] * CODE, strict=True):
        kind, own = Kind(number), []
        if kind != Kind.POOL and inputs != channels:
            raise ValueError(f"x must have {inputs} channels at a {kind.name} layer, got {channels}")
        shapes = _shapes(kind, inputs, settings)
        for shape in shapes:
            if left == 0:
                if not rest:
                    raise ValueError(f"the layers take more weights than the {len(weights)} tensors have")
                flat = rest.pop(0)
                left = flat.shape[0]
            values = math.prod(shape)
            own.append(flat.narrow(0, flat.shape[0] - left, values).view(shape))
            left -= values + -values % PANEL
        channels = shapes[-1][0] if shapes else channels  # those of the last bias
        yield kind, settings, own
    if left or rest:
        raise ValueError(f"the layers take fewer weights than the {len(weights)} tensors have")


def as_images(x: Tensor) -> Tensor:
    """Rows ``[B, C]`` as images of one pixel; images as they are."""
    return x[:, :, None, None] if x.dim() == 2 else x


def gives_rows(x: Tensor, kinds: Iterable[int]) -> bool:
    """Whether a sequence of layers gives rows ``[B, C]``."""
    return x.dim() == 2 or Kind.POOL in kinds


def _fake_sequence(x, weights, layers, constants):
    """The width is that of the last bias, and some kinds of layer halve the sides."""
    image = as_images(x)
    for kind, settings, own in layers_of(layers, weights, x.shape[1]):
        halves = kind in (Kind.CONV3X3, Kind.PATCH_MERGING) or (kind == Kind.DEPTHWISE and settings[0] == 2)
        image = _empty_rows(image, own[-1].shape[0] if own else image.shape[1], 2 if halves else 1)
    return image.new_empty(image.shape[:2]) if gives_rows(x, layers[::CODE]) else image


_FUSED_FAKES = {
    "fused_conv3x3": lambda x, weight, bias, *settings: _empty_rows(x, bias.shape[0], 2),
    "fused_depthwise": lambda x, weight, bias, stride, relu: _empty_rows(x, x.shape[1], stride),
    "fused_pointwise": lambda x, scale, weight, bias, relu: _empty_rows(x, bias.shape[0]),
    "fused_ffn": lambda x, *rest: _empty_rows(x, x.shape[1]),
    "fused_mixer": lambda x, *rest: _empty_rows(x, x.shape[1]),
    "fused_pool": lambda x: x.new_empty(x.shape[:2]),
    "fused_sequence": _fake_sequence,
}

_FAKES = {
    "shsa_forward": _fake_shsa,
    "shsa_backward": _fake_shsa_backward,
    "partial_moments_forward": _fake_moments,
    "partial_moments_backward": _fake_moments_backward,
    "shsa_train_forward": _fake_train,
    "shsa_train_backward": _fake_train_backward,
    "shsa_eval": _fake_image,
    "shsa_mixer": _fake_image,
    "update_running_statistics": lambda *arguments: None,
}


def _on_one_device(fake: Callable) -> Callable:
    """The dispatcher takes a fake kernel wherever one argument is on meta; for real values the result is garbage."""

    def checked(x: Tensor, *rest):
        for t in chain.from_iterable(a if isinstance(a, (list, tuple)) else (a,) for a in rest):
            if isinstance(t, Tensor) and t.device != x.device:
                raise ValueError(f"all tensors must be on one device, got {x.device} and {t.device}")
        return fake(x, *rest)

    return checked


FAMILIES: dict[str, dict[str, torch._ops.OpOverload]] = {}
"""The operators of each family by name, without the family's suffix."""


def define(family: str) -> None:
    """Add a family: its operators, without kernels, and their fakes."""
    for schema in _SCHEMAS:
        _library.define(schema.replace("_X(", f"_{family}("))
    FAMILIES[family] = {}
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"shvit_kernels::{name}_{family}", _on_one_device(fake), lib=_library)
        FAMILIES[family][name] = getattr(torch.ops.shvit_kernels, f"{name}_{family}").default


for _family in ("native", "triton"):
    define(_family)

_MIXER_FAKES = {
    "mixer_train_forward": _fake_mixer_train,
    "mixer_train_backward": _fake_mixer_train_backward,
    "mixer_eval": _fake_image,
}

for _schema in (*_MIXER_TRAIN_SCHEMAS, _MIXER_EVAL_SCHEMA, *_FUSED_SCHEMAS):
    _library.define(_schema)
for _name, _fake in (_MIXER_FAKES | _FUSED_FAKES).items():
    torch.library.register_fake(f"shvit_kernels::{_name}", _on_one_device(_fake), lib=_library)


class _Once(torch.autograd.Function):
    """Passes first derivatives on and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, function: str, *gradients: Tensor | None):
        ctx.function = function
        return tuple(g if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.function} is differentiable once with this backend; for second derivatives run the forward "
            "under shvit_kernels.use_backend('eager')"
        )


def _gradients(ctx, function: str, operator: Callable, *arguments) -> tuple[Tensor | None, ...]:
    """Run the backward operator of ``function``: None for the settings and for the inputs that need no gradient."""
    needs = ctx.needs_input_grad[1:]
    results = operator(*arguments, list(needs))
    results = tuple(g if need else None for g, need in zip(results, needs, strict=True))
    if torch.is_grad_enabled():
        results = _Once.apply(f"shvit_kernels.{function}", *results)
    return None, *results


def _first_channels(x: Tensor, P: int) -> Tensor:
    """The first P channels of dense images, dense too, for the backward: never a view, which would keep all alive."""
    return x if x.shape[1] == P else x[:, :P].clone(memory_format=memory_format(x))


# Each call takes microseconds: a separate setup_context would cost more than a small layer's kernel, and every argument
# costs more than an item of the settings.


class Shsa(torch.autograd.Function):
    """``apply((family, *settings), x, norm_weight, norm_bias, qkv_weight, qkv_bias)``: y of shsa_forward."""

    @staticmethod
    def forward(ctx, settings, x, *parameters):
        family, *rest = settings
        output = FAMILIES[family]["shsa_forward"](x, *parameters, *rest)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        x1 = _first_channels(x, parameters[2].shape[1])
        ctx.save_for_backward(x1, *output, *parameters)
        return output[0]

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x1, y, *rest = ctx.saved_tensors
        dy = dy.contiguous(memory_format=memory_format(y))
        family, *settings = ctx.settings
        return _gradients(ctx, "shsa", FAMILIES[family]["shsa_backward"], dy, x1, y, *rest, *settings)


class ShsaTrain(torch.autograd.Function):
    """``apply((family, *settings), x, norm_weight, norm_bias, weight, bn_weight, bn_bias)`` of shsa_train_forward.

    Returns y, and the mean and biased variance of the projection.
    """

    @staticmethod
    def forward(ctx, settings, x, *parameters):
        family, *rest = settings
        output = FAMILIES[family]["shsa_train_forward"](x, *parameters, *rest)
        y, *_, mean, variance = output
        ctx.settings = settings
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *parameters)
        return y, mean, variance

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        y, *rest = ctx.saved_tensors
        dy = dy.contiguous(memory_format=memory_format(y))
        family, *settings = ctx.settings
        return _gradients(ctx, "shsa_train", FAMILIES[family]["shsa_train_backward"], dy, y, *rest, *settings)


class MixerTrain(torch.autograd.Function):
    """``apply((settings, saved, out), x, norm_weight, norm_bias, weight, bn_weight, bn_bias, proj_weight,
    proj_bn_weight, proj_bn_bias)`` of mixer_train_forward: ``out``, its first result, differentiable.

    The operator, which updates the running statistics, runs before: gradient checkpointing runs a layer again, but not
    beyond the last tensor that is saved.
    """

    @staticmethod
    def forward(ctx, made, x, *parameters):
        ctx.settings, saved, out = made
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *saved, *parameters)
        return out

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *rest = ctx.saved_tensors
        dout = dout.contiguous(memory_format=memory_format(x))
        operator = torch.ops.shvit_kernels.mixer_train_backward.default
        return _gradients(ctx, "mixer_train", operator, dout, x, *rest, *ctx.settings)


class PartialMoments(torch.autograd.Function):
    """``apply((family, pdim, norm_eps), x, norm_weight, norm_bias)``: mean and cov of partial_moments_forward."""

    @staticmethod
    def forward(ctx, settings, x, norm_weight, norm_bias):
        family, pdim, norm_eps = settings
        output = FAMILIES[family]["partial_moments_forward"](x, norm_weight, norm_bias, pdim, norm_eps)
        mean, cov, image_mean, image_rstd = output
        ctx.family, ctx.channels = family, x.shape[1]
        ctx.set_materialize_grads(False)
        x1 = _first_channels(x, pdim)
        ctx.save_for_backward(x1, mean, image_mean, image_rstd, norm_weight, norm_bias)
        return mean, cov

    @staticmethod
    def backward(ctx, dmean, dcov):
        if dmean is None and dcov is None:
            return (None,) * len(ctx.needs_input_grad)
        x1, mean, *rest = ctx.saved_tensors
        P = mean.shape[0]
        dmean = mean.new_zeros(P) if dmean is None else dmean.contiguous()
        dcov = mean.new_zeros(P, P) if dcov is None else dcov.contiguous()
        operator = FAMILIES[ctx.family]["partial_moments_backward"]
        return _gradients(ctx, "partial_moments", operator, dmean, dcov, x1, mean, *rest, ctx.channels)
