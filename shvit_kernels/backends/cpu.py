"""The ``cpu`` backend: the C++ kernels of the native library."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from . import eager, native, operators

name = "cpu"
devices = ("cpu",)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MIXER_TRAIN_DTYPES = (torch.float32, torch.float64)


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


def mixer_train(
    x: Tensor, *rest, measured: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One operator in float32 and float64; in bfloat16 the projection is PyTorch's.

    ``measured`` is called with the statistics, before anything is saved for the backward.
    """
    tensors = (x, *rest[:8])
    if any(t is not None and t.dtype not in MIXER_TRAIN_DTYPES for t in tensors):
        out, *statistics = eager.mixer_train_after(shsa_train, x, *rest)
        if measured is not None:
            measured(*statistics)
        return out, *statistics
    x = ops.readable(x)
    with torch.no_grad():
        out, *saved = torch.ops.shvit_kernels.mixer_train_forward.default(x, *rest)
    statistics = saved[5:]
    if measured is not None:
        measured(*statistics)
    if operators.tracks_gradients(*tensors):
        out = ops.MixerTrain.apply((rest[8:], saved, out), x, *rest[:8])
    return out, *statistics


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
    """One operator in float32, which packs the projection at each call; otherwise the projection is PyTorch's."""
    attention = (norm_weight, norm_bias, qkv_weight, qkv_bias)
    given = (x, *attention, proj_weight, proj_bias)
    if not all(t is None or t.dtype == torch.float32 for t in given) or operators.tracks_gradients(*given):
        return eager.mix_after(shsa, x, *attention, proj_weight, proj_bias, qk_dim, norm_eps, scale, *tf32)
    bias = proj_weight.new_zeros(proj_weight.shape[0]) if proj_bias is None else proj_bias
    rows = x.contiguous(memory_format=torch.channels_last)
    dense = [t if t is None else t.contiguous() for t in attention]
    mixed = torch.ops.shvit_kernels.fused_mixer.default(
        rows, *dense, ops.pack(proj_weight), bias.contiguous(), qk_dim, norm_eps, scale
    )
    return mixed.contiguous(memory_format=ops.memory_format(x))
