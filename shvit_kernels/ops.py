"""The operators behind ``shvit_kernels.functional``: schemas, fake kernels and autograd, once for every family.

A *family* is a set of kernels with one schema: ``native`` (C++, CPU). For a family X there are

    shsa_forward_X, partial_moments_forward_X     kernels; no Python runs below them
    shsa_backward_X, partial_moments_backward_X   their derivatives; once differentiable
    shsa_X, partial_moments_X                     the same functions with autograd

They are private: validation and the choice of a family happen in ``functional``. Kernels take ``x`` and ``x1``
NCHW-contiguous or channels_last and keep that format; gradients that were not asked for come back with size [0].
"""

import torch
from torch import Tensor

FAMILIES = ("native",)

_SHSA_PARAMETERS = "Tensor? norm_weight, Tensor? norm_bias, Tensor qkv_weight, Tensor? qkv_bias"
_SHSA_SETTINGS = "int qk_dim, float norm_eps, float scale, bool relu, bool tf32_proj, bool tf32_attn"
_SHSA_RESULTS = "(Tensor y, Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum)"
_NORM_PARAMETERS = "Tensor? norm_weight, Tensor? norm_bias"
_MOMENTS_RESULTS = "(Tensor mean, Tensor cov, Tensor image_mean, Tensor image_rstd)"

_SCHEMAS = (
    f"shsa_forward_X(Tensor x, {_SHSA_PARAMETERS}, {_SHSA_SETTINGS}) -> {_SHSA_RESULTS}",
    f"shsa_X(Tensor x, Tensor? x1, {_SHSA_PARAMETERS}, {_SHSA_SETTINGS}) -> {_SHSA_RESULTS}",
    f"shsa_backward_X(Tensor dy, Tensor x1, Tensor y, Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum, "
    f"{_SHSA_PARAMETERS}, {_SHSA_SETTINGS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"partial_moments_forward_X(Tensor x, {_NORM_PARAMETERS}, int pdim, float norm_eps) -> {_MOMENTS_RESULTS}",
    f"partial_moments_X(Tensor x, {_NORM_PARAMETERS}, int pdim, float norm_eps) -> {_MOMENTS_RESULTS}",
    f"partial_moments_backward_X(Tensor dmean, Tensor dcov, Tensor x1, Tensor mean, Tensor image_mean, "
    f"Tensor image_rstd, {_NORM_PARAMETERS}, int channels, bool[] needs) -> (Tensor, Tensor, Tensor)",
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


def _needed(needs: list[bool], *gradients: tuple[Tensor | None, torch.Size | tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Fake gradients: like the parameter where asked for, empty otherwise."""
    like = next(t for t, _ in gradients if t is not None)
    return tuple(
        t.new_empty(shape) if need and t is not None else like.new_empty(0)
        for need, (t, shape) in zip(needs, gradients, strict=True)
    )


def _fake_shsa_forward(x, norm_weight, norm_bias, qkv_weight, *settings):
    B, _, H, W = x.shape
    dtype = sum_dtype(x.dtype)
    per_image = [x.new_empty(B, dtype=dtype) for _ in range(2)]
    per_token = [x.new_empty(B, H * W, dtype=dtype) for _ in range(2)]
    return x.new_empty(x.shape).contiguous(memory_format=memory_format(x)), *per_image, *per_token


def _fake_shsa(x, x1, *rest):
    return _fake_shsa_forward(x, *rest)


def _fake_shsa_backward(
    dy, x1, y, mean, rstd, row_max, row_sum, norm_weight, norm_bias, qkv_weight, qkv_bias, *settings_and_needs
):
    needs = settings_and_needs[-1]
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias)
    dx = torch.empty_like(y) if needs[0] else qkv_weight.new_empty(0)
    shapes = [(t, () if t is None else t.shape) for t in parameters]
    return dx, *_needed(needs[1:], *shapes)


def _fake_moments_forward(x, norm_weight, norm_bias, pdim, norm_eps):
    B = x.shape[0]
    dtype = sum_dtype(x.dtype)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in ((pdim,), (pdim, pdim), (B,), (B,)))


def _fake_moments_backward(
    dmean, dcov, x1, mean, image_mean, image_rstd, norm_weight, norm_bias, channels, needs
):
    B, _, H, W = x1.shape
    dx = x1.new_empty(B, channels, H, W).contiguous(memory_format=memory_format(x1)) if needs[0] else x1.new_empty(0)
    P = mean.shape
    return dx, *_needed(needs[1:], (x1 if norm_weight is None else norm_weight, P), (x1 if norm_bias is None else norm_bias, P))


def _define(family: str) -> None:
    """Declare a family's operators and give them their fake kernels and derivatives."""

    def named(name):
        return f"{name}_{family}"

    def operator(name):
        return getattr(torch.ops.shvit_kernels, named(name)).default

    def fake(name, function):
        torch.library.register_fake(f"shvit_kernels::{named(name)}", function, lib=_library)

    def autograd(name, backward, setup_context=None):
        torch.library.register_autograd(
            f"shvit_kernels::{named(name)}", backward, setup_context=setup_context, lib=_library
        )

    for schema in _SCHEMAS:
        _library.define(schema.replace("_X(", f"_{family}("))

    fake("shsa_forward", _fake_shsa_forward)
    fake("shsa", _fake_shsa)
    fake("shsa_backward", _fake_shsa_backward)
    fake("partial_moments_forward", _fake_moments_forward)
    fake("partial_moments", _fake_moments_forward)
    fake("partial_moments_backward", _fake_moments_backward)

    def shsa(x, x1, *rest):
        return operator("shsa_forward")(x, *rest)

    def moments(*arguments):
        return operator("partial_moments_forward")(*arguments)

    _library.impl(named("shsa"), shsa, "CompositeExplicitAutograd")
    _library.impl(named("partial_moments"), moments, "CompositeExplicitAutograd")

    def shsa_setup(ctx, inputs, output):
        x, x1, norm_weight, norm_bias, qkv_weight, qkv_bias, *ctx.settings = inputs
        if x1 is None:
            x1 = x[:, : qkv_weight.shape[1]].contiguous(memory_format=memory_format(x))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x1, *output, norm_weight, norm_bias, qkv_weight, qkv_bias)

    def shsa_backward(ctx, dy, *_):
        nothing = (None,) * len(ctx.settings)
        if dy is None:
            return None, None, None, None, None, None, *nothing
        x1, y, *rest = ctx.saved_tensors
        needs_x, _, *needs_parameters = ctx.needs_input_grad[:6]
        needs = [needs_x, *needs_parameters]
        dy = dy.contiguous(memory_format=memory_format(y))
        grads = operator("shsa_backward")(dy, x1, y, *rest, *ctx.settings, needs)
        dx, *dparameters = (g if need else None for g, need in zip(grads, needs, strict=True))
        return dx, None, *dparameters, *nothing

    def moments_setup(ctx, inputs, output):
        x, norm_weight, norm_bias, pdim, _ = inputs
        mean, _, image_mean, image_rstd = output
        ctx.channels = x.shape[1]
        ctx.mark_non_differentiable(image_mean, image_rstd)
        ctx.set_materialize_grads(False)
        x1 = x[:, :pdim].contiguous(memory_format=memory_format(x))
        ctx.save_for_backward(x1, mean, image_mean, image_rstd, norm_weight, norm_bias)

    def moments_backward(ctx, dmean, dcov, *_):
        x1, mean, *rest = ctx.saved_tensors
        if dmean is None and dcov is None:
            return (None,) * 5
        P = mean.shape[0]
        dmean = mean.new_zeros(P) if dmean is None else dmean.contiguous()
        dcov = mean.new_zeros(P, P) if dcov is None else dcov.contiguous()
        needs = list(ctx.needs_input_grad[:3])
        grads = operator("partial_moments_backward")(dmean, dcov, x1, mean, *rest, ctx.channels, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None

    def refuse(function):
        def second_derivative(ctx, *_):
            raise RuntimeError(
                f"shvit_kernels.{function} is differentiable once with this backend; "
                "for second derivatives run the forward with backend='eager' or use_backend('eager')"
            )

        return second_derivative

    autograd("shsa", shsa_backward, shsa_setup)
    autograd("partial_moments", moments_backward, moments_setup)
    autograd("shsa_backward", refuse("shsa"))
    autograd("partial_moments_backward", refuse("partial_moments"))


for _family in FAMILIES:
    _define(_family)
