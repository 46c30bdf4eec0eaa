"""The ``cpu`` backend: the C++ kernels of the native library."""

import torch
from torch import Tensor

from .. import ops
from . import eager, native, operators

name = "cpu"
devices = ("cpu",)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MIXER_DTYPES = (torch.float32, torch.float64)


def why_unavailable() -> str | None:
    return native.why_unavailable()


def why_not(x: Tensor, pdim: int = 1, qk_dim: int = 1) -> str | None:
    if native._missing is not None:
        return native._missing
    if not x.is_cpu:
        return f"it runs on cpu tensors and x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"it has kernels for float32, float64 and bfloat16 and x is {x.dtype}"
    return None


shsa, partial_moments, shsa_train, shsa_eval, _, update_running_statistics = operators.functions("native")


def mixer_train(x: Tensor, *rest) -> Tensor:
    """One operator in float32 and float64 on running statistics that it can update; otherwise the projection is
    PyTorch's."""
    updates = x.dtype in MIXER_DTYPES and operators.can_update(*rest[14:17]) and operators.can_update(*rest[18:21])
    if not updates:
        return eager.mixer_train_after(shsa_train, x, *rest)
    x = ops.readable(x)
    differentiated = operators.tracks_gradients(x, *rest[:8])
    if differentiated:
        operators.check_reverse_mode("mixer_train", x, *rest[:8])
    with torch.no_grad():
        out, *saved = torch.ops.shvit_kernels.mixer_train_forward.default(x, *rest)
    return ops.MixerTrain.apply((rest[8:14], saved, out), x, *rest[:8]) if differentiated else out


def mixer_eval(x: Tensor, *rest) -> Tensor:
    """One operator in float32 and float64 without gradients; otherwise the projection is PyTorch's."""
    if x.dtype not in MIXER_DTYPES or operators.tracks_gradients(x, *rest[:14]):
        return eager.mixer_eval_after(shsa_eval, x, *rest)
    return torch.ops.shvit_kernels.mixer_eval.default(ops.readable(x), *rest)


def shsa_mixer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    qk_dim: int,
    norm_eps: float,
    scale: float,
    *tf32: bool,
) -> Tensor:
    """:func:`mixer_eval` of projections that are folded."""
    no_statistics = (None, None, None, None)
    attention = (norm_weight, norm_bias, qkv_weight, qkv_bias, *no_statistics)
    projection = (proj_weight, proj_bias, *no_statistics)
    return mixer_eval(x, *attention, *projection, qk_dim, norm_eps, 0.0, 0.0, scale, True)
