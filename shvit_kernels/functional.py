"""The functions of the library: documented, validated, and sent to a backend.

Symbols: B images, C channels, P partial channels (``pdim``), D = ``qk_dim``, N = H*W tokens.
"""

import torch
from torch import Tensor

from . import backends

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_input(x: Tensor, pdim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [B, C, H, W], got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions [B, C, H, W], got {x.dim()}: a tensor of shape {tuple(x.shape)}")
    if x.dtype not in _FLOATING:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not 1 <= pdim <= x.shape[1]:
        raise ValueError(f"pdim must lie between 1 and the channels of x ({x.shape[1]}), got {pdim}")
    if x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"x must have at least one token, got height {x.shape[2]} and width {x.shape[3]}")


def _check_parameter(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor, autocast: bool) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype != x.dtype and not (autocast and value.dtype in _FLOATING):
        raise TypeError(f"{name} must have the dtype of x outside autocast: {name} is {value.dtype}, x is {x.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x: {name} is on {value.device}, x is on {x.device}")


def _check_norm(norm_weight: Tensor | None, norm_bias: Tensor | None, pdim: int, x: Tensor, autocast: bool) -> None:
    _check_parameter("norm_weight", norm_weight, (pdim,), x, autocast)
    _check_parameter("norm_bias", norm_bias, (pdim,), x, autocast)
    if norm_bias is not None and norm_weight is None:
        given = f"a tensor of shape {tuple(norm_bias.shape)}"
        raise ValueError(f"norm_bias needs norm_weight, got norm_weight None and norm_bias {given}")


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for ``x``; float64 is left alone."""
    device = x.device.type
    known = x.is_cpu or torch.amp.is_autocast_available(device)  # asking costs more than the rest
    return known and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that parameters are cast to, None where autocast is off or leaves ``x`` alone."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else None


# The tracer of torch.compile cannot read the settings; what they were stays in the compiled code.
@torch.compiler.assume_constant_result
def _tf32_settings() -> tuple[bool, bool]:
    return (
        torch.backends.cudnn.conv.fp32_precision == "tf32",
        torch.backends.cuda.matmul.fp32_precision == "tf32",
    )


def tf32(x: Tensor) -> tuple[bool, bool]:
    """PyTorch's TF32 settings for convolutions (the projection) and matrix products (attention)."""
    return _tf32_settings() if x.is_cuda and x.dtype == torch.float32 else (False, False)


def _checked_scale(scale: float | None, qk_dim: int) -> float:
    if isinstance(scale, Tensor):  # kernels have no gradient for it
        raise TypeError(f"scale must be a number, got a tensor of shape {tuple(scale.shape)}")
    return qk_dim**-0.5 if scale is None else scale


def _checked(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qk_dim: int,
    **others: tuple[Tensor | None, int],
) -> list[Tensor | None]:
    """Norm and projection, then ``others`` (a tensor, and how many of its dimensions have C values), checked and cast
    for autocast."""
    if not isinstance(qkv_weight, Tensor):
        raise TypeError(f"qkv_weight must be a tensor [2 * qk_dim + P, P], got {type(qkv_weight).__name__}")
    if qkv_weight.dim() != 2:
        given = f"a tensor of shape {tuple(qkv_weight.shape)}"
        raise ValueError(f"qkv_weight must have 2 dimensions [2 * qk_dim + P, P], got {given}")
    if isinstance(qk_dim, bool) or not isinstance(qk_dim, (int, torch.SymInt)):
        raise TypeError(f"qk_dim must be an int, got {qk_dim!r}")
    if qk_dim < 1:
        raise ValueError(f"qk_dim must be at least 1, got {qk_dim}")
    P = qkv_weight.shape[1]
    _check_input(x, P)
    dtype = _autocast_dtype(x)
    autocast = dtype is not None
    O = 2 * qk_dim + P
    _check_parameter("qkv_weight", qkv_weight, (O, P), x, autocast)
    _check_parameter("qkv_bias", qkv_bias, (O,), x, autocast)
    _check_norm(norm_weight, norm_bias, P, x, autocast)
    for name, (value, dimensions) in others.items():
        _check_parameter(name, value, (x.shape[1],) * dimensions, x, autocast)
    tensors = [norm_weight, norm_bias, qkv_weight, qkv_bias, *(value for value, _ in others.values())]
    return [t if t is None else t.to(dtype) for t in tensors] if autocast else tensors


def shsa(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None = None,
    *,
    qk_dim: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    scale: float | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Single-head self-attention over the first P channels; the others pass through (SHViT, section 3.2)::

        x1, x2  = x[:, :P], x[:, P:]                          # P = qkv_weight.shape[1]
        z       = group_norm(x1, 1, norm_weight, norm_bias)   # left out without norm_weight
        q, k, v = split(qkv_weight @ z + qkv_bias, [D, D, P]) # per token
        y       = concat(v softmax(scale * q^T k)^T, x2)      # then max(y, 0) if relu

    Args:
        x: ``[B, C, H, W]``, float16, bfloat16, float32 or float64, C >= P. NCHW-contiguous and channels_last
            tensors are read in place; others are copied first.
        qkv_weight: ``[2 * D + P, P]``, rows ordered query, key, value.
        qkv_bias: ``[2 * D + P]``, or None for zeros.
        qk_dim: D, the width of queries and keys, at least 1.
        norm_weight: ``[P]``, weight of the group normalisation (one group); None leaves it out.
        norm_bias: ``[P]``, its bias, or None for zeros.
        norm_eps: added to the variance.
        scale: factor of the logits, by default ``qk_dim ** -0.5``.
        relu: apply ReLU to all channels of the result.
        backend: name of a backend; by default the first that can run the call (see ``use_backend``).

    Returns:
        ``y``, shape, dtype and memory format of ``x``. Sums, softmax and statistics are at least float32. Under
        autocast the parameters are cast to the autocast dtype. Compiled backends are differentiable once,
        ``backend="eager"`` twice.

    Raises:
        TypeError: if an argument is no tensor, not of floating point, or its dtype differs from that of ``x`` outside
            autocast.
        ValueError: if shapes or devices do not fit, ``qk_dim < 1``, or the named backend is unknown or cannot run
            the call; the message names the argument and both values.
    """
    norm_weight, norm_bias, qkv_weight, qkv_bias = _checked(x, qkv_weight, qkv_bias, norm_weight, norm_bias, qk_dim)
    scale = _checked_scale(scale, qk_dim)
    return backends.choose(x, backend, qkv_weight.shape[1], qk_dim).shsa(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, qk_dim, norm_eps, scale, relu, *tf32(x)
    )


def partial_moments(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    pdim: int,
    norm_eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[int, Tensor, Tensor]:
    """Moments of the normalised first ``pdim`` channels over all images and tokens.

    With ``z = group_norm(x[:, :pdim], 1, norm_weight, norm_bias)``, they give the batch statistics of any linear
    projection ``W z``: mean ``W mean``, variance ``diag(W cov W^T)``. That is what makes batch normalisation foldable
    while training.

    Args:
        x: ``[B, C, H, W]`` as for :func:`shsa`.
        norm_weight: ``[P]``, or None to leave the group normalisation out.
        norm_bias: ``[P]``, or None for zeros.
        pdim: P, at most C.
        norm_eps: added to the variance of the group normalisation.
        backend: as for :func:`shsa`.

    Returns:
        ``(count, mean, cov)``: the number of tokens ``B * N``, the mean ``[P]`` and the biased covariance ``[P, P]``,
        computed from centred values in at least float32; zeros for an empty batch. Both are differentiable.

    Raises:
        TypeError, ValueError: as :func:`shsa` does.
    """
    if isinstance(pdim, bool) or not isinstance(pdim, (int, torch.SymInt)):
        raise TypeError(f"pdim must be an int, got {pdim!r}")
    _check_input(x, pdim)
    dtype = _autocast_dtype(x)
    _check_norm(norm_weight, norm_bias, pdim, x, dtype is not None)
    if dtype is not None:
        norm_weight, norm_bias = (t if t is None else t.to(dtype) for t in (norm_weight, norm_bias))
    mean, cov = backends.choose(x, backend, pdim).partial_moments(x, norm_weight, norm_bias, pdim, norm_eps)
    return x.shape[0] * x.shape[2] * x.shape[3], mean, cov


def shsa_mixer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    *,
    qk_dim: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The whole residual layer of a block, for inference (SHViT, figure 4)::

        x + proj_weight @ max(shsa(x), 0) + proj_bias         # per token

    Args:
        proj_weight: ``[C, C]``, with any batch normalisation folded in.
        proj_bias: ``[C]``, or None for zeros.
        x, qkv_weight, qkv_bias, qk_dim, norm_weight, norm_bias, norm_eps, scale, backend: as for :func:`shsa`.

    Returns:
        A tensor with the shape, dtype and memory format of ``x``. Where gradients are asked for, the attention is
        :func:`shsa` and the projection PyTorch's.

    Raises:
        TypeError, ValueError: as :func:`shsa` does.
    """
    if not isinstance(proj_weight, Tensor):
        raise TypeError(f"proj_weight must be a tensor [C, C], got {type(proj_weight).__name__}")
    parameters = _checked(
        x,
        qkv_weight,
        qkv_bias,
        norm_weight,
        norm_bias,
        qk_dim,
        proj_weight=(proj_weight, 2),
        proj_bias=(proj_bias, 1),
    )
    scale = _checked_scale(scale, qk_dim)
    chosen = backends.choose(x, backend, qkv_weight.shape[1], qk_dim)
    return chosen.shsa_mixer(x, *parameters, qk_dim, norm_eps, scale, *tf32(x))
