"""The operators behind ``shvit_kernels.functional``: schemas, fake kernels and autograd, once for every family.

A *family* is a set of kernels with one schema: ``native`` (C++, CPU). For a family X there are

    shsa_forward_X                attention over the first P channels; no Python runs below it
    shsa_X                        the same with autograd, through shsa_backward_X
    partial_moments_forward_X     moments of the normalised first P channels; likewise
    partial_moments_X             the same with autograd, through partial_moments_backward_X
    shsa_train_X                  moments, fold of the batch normalisation and attention, with autograd, through
                                  shsa_train_backward_X
    fold_X                        a projection and the batch normalisation behind it as one projection

They are private: validation and the choice of a family happen in ``functional``. Kernels take ``x`` and ``x1``
NCHW-contiguous or channels_last and keep that format; gradients that were not asked for come back with size [0].
"""

import torch
from torch import Tensor

FAMILIES = ("native",)

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

_SCHEMAS = (
    f"shsa_forward_X(Tensor x, {_SHSA}) -> (Tensor y, {_SHSA_SAVED})",
    f"shsa_X(Tensor x, {_SHSA}) -> (Tensor y, {_SHSA_SAVED})",
    f"shsa_backward_X(Tensor dy, Tensor x1, Tensor y, {_SHSA_SAVED}, {_SHSA}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"partial_moments_forward_X({_MOMENTS}) -> {_MOMENTS_RESULTS}",
    f"partial_moments_X({_MOMENTS}) -> {_MOMENTS_RESULTS}",
    "partial_moments_backward_X(Tensor dmean, Tensor dcov, Tensor x1, Tensor mean, Tensor image_mean, "
    f"Tensor image_rstd, {_NORM}, int channels, bool[] needs) -> (Tensor, Tensor, Tensor)",
    f"shsa_train_X(Tensor x, {_TRAIN}) -> (Tensor y, {_TRAIN_SAVED})",
    f"shsa_train_backward_X(Tensor dy, Tensor y, {_TRAIN_SAVED}, {_TRAIN}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fold_X(Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, Tensor variance, float eps)"
    " -> (Tensor qkv_weight, Tensor qkv_bias)",
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


def _empty_image(like: Tensor, channels: int) -> Tensor:
    B, _, H, W = like.shape
    return like.new_empty(B, channels, H, W).contiguous(memory_format=memory_format(like))


def _gradients(needs: list[bool], like: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
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
    return dx, *_gradients(needs[1:], y, nw, nb, qkv_weight, qkv_bias)


def _fake_moments(x, norm_weight, norm_bias, pdim, norm_eps):
    B = x.shape[0]
    dtype = sum_dtype(x.dtype)
    return tuple(x.new_empty(size, dtype=dtype) for size in ((pdim,), (pdim, pdim), (B,), (B,)))


def _fake_moments_backward(dmean, dcov, x1, mean, image_mean, image_rstd, norm_weight, norm_bias, channels, needs):
    dx = _empty_image(x1, channels) if needs[0] else x1.new_empty(0)
    return dx, *_gradients(needs[1:], x1, norm_weight, norm_bias)


def _fake_train(x, norm_weight, norm_bias, weight, *settings):
    O, P = weight.shape
    dtype = sum_dtype(x.dtype)
    y, *statistics = _fake_shsa(x, norm_weight, norm_bias, weight)
    sizes = ((P,), (P, P), (O,), (O,))
    return y, _empty_image(x, P), *statistics, *(x.new_empty(size, dtype=dtype) for size in sizes)


def _fake_train_backward(dy, y, *rest):
    norm_weight, norm_bias, weight, bn_weight, bn_bias = rest[9:14]
    needs = rest[-1]
    dx = _empty_image(y, y.shape[1]) if needs[0] else y.new_empty(0)
    return dx, *_gradients(needs[1:], y, norm_weight, norm_bias, weight, bn_weight, bn_bias)


def _fake_fold(weight, *rest):
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _define(family: str) -> None:
    """Declare a family's operators and give them their fake kernels and derivatives."""

    def operator(name):
        return getattr(torch.ops.shvit_kernels, f"{name}_{family}").default

    def fake(name, function):
        torch.library.register_fake(f"shvit_kernels::{name}_{family}", function, lib=_library)

    def autograd(name, backward, setup_context=None):
        torch.library.register_autograd(
            f"shvit_kernels::{name}_{family}", backward, setup_context=setup_context, lib=_library
        )

    for schema in _SCHEMAS:
        _library.define(schema.replace("_X(", f"_{family}("))

    fake("shsa_forward", _fake_shsa)
    fake("shsa", _fake_shsa)
    fake("shsa_backward", _fake_shsa_backward)
    fake("partial_moments_forward", _fake_moments)
    fake("partial_moments", _fake_moments)
    fake("partial_moments_backward", _fake_moments_backward)
    fake("shsa_train", _fake_train)
    fake("shsa_train_backward", _fake_train_backward)
    fake("fold", _fake_fold)

    def gradients(name, needs, *arguments):
        results = operator(name)(*arguments, list(needs))
        return tuple(g if need else None for g, need in zip(results, needs, strict=True))

    def shsa_setup(ctx, inputs, output):
        x, *parameters = inputs[:5]
        ctx.settings = inputs[5:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        x1 = x[:, : parameters[2].shape[1]].contiguous(memory_format=memory_format(x))
        ctx.save_for_backward(x1, *output, *parameters)

    def shsa_backward(ctx, dy, *_):
        if dy is None:
            return (None,) * (5 + len(ctx.settings))
        x1, y, *rest = ctx.saved_tensors
        dy = dy.contiguous(memory_format=memory_format(y))
        needs = ctx.needs_input_grad[:5]
        return *gradients("shsa_backward", needs, dy, x1, y, *rest, *ctx.settings), *(None,) * len(ctx.settings)

    def train_setup(ctx, inputs, output):
        ctx.settings = inputs[6:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[1:6])

    def train_backward(ctx, dy, *_):
        if dy is None:
            return (None,) * (6 + len(ctx.settings))
        y, *rest = ctx.saved_tensors
        dy = dy.contiguous(memory_format=memory_format(y))
        needs = ctx.needs_input_grad[:6]
        return *gradients("shsa_train_backward", needs, dy, y, *rest, *ctx.settings), *(None,) * len(ctx.settings)

    def moments_setup(ctx, inputs, output):
        x, norm_weight, norm_bias, pdim, _ = inputs
        mean, _, image_mean, image_rstd = output
        ctx.channels = x.shape[1]
        ctx.mark_non_differentiable(image_mean, image_rstd)
        ctx.set_materialize_grads(False)
        x1 = x[:, :pdim].contiguous(memory_format=memory_format(x))
        ctx.save_for_backward(x1, mean, image_mean, image_rstd, norm_weight, norm_bias)

    def moments_backward(ctx, dmean, dcov, *_):
        if dmean is None and dcov is None:
            return (None,) * 5
        x1, mean, *rest = ctx.saved_tensors
        P = mean.shape[0]
        dmean = mean.new_zeros(P) if dmean is None else dmean.contiguous()
        dcov = mean.new_zeros(P, P) if dcov is None else dcov.contiguous()
        needs = ctx.needs_input_grad[:3]
        return *gradients("partial_moments_backward", needs, dmean, dcov, x1, mean, *rest, ctx.channels), None, None

    def refuse(function):
        def second_derivative(ctx, *_):
            raise RuntimeError(
                f"{function} is differentiable once with this backend; "
                "for second derivatives run the forward under shvit_kernels.use_backend('eager')"
            )

        return second_derivative

    autograd("shsa", shsa_backward, shsa_setup)
    autograd("partial_moments", moments_backward, moments_setup)
    autograd("shsa_train", train_backward, train_setup)
    autograd("shsa_backward", refuse("shvit_kernels.shsa"))
    autograd("partial_moments_backward", refuse("shvit_kernels.partial_moments"))
    autograd("shsa_train_backward", refuse("shvit_kernels.SHSA"))


for _family in FAMILIES:
    _define(_family)
