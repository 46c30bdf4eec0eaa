"""The functions of a compiled backend, made once from the operators of its family (``ops``)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from . import eager


class Functions(NamedTuple):
    """What a backend offers, on validated arguments; ``eager`` says what each computes."""

    shsa: Callable[..., Tensor]
    partial_moments: Callable[..., tuple[Tensor, Tensor]]
    shsa_train: Callable[..., tuple[Tensor, Tensor, Tensor]]
    shsa_eval: Callable[..., Tensor]
    shsa_mixer: Callable[..., Tensor]
    update_running_statistics: Callable[..., None]


def tracks_gradients(*tensors: Tensor | None) -> bool:
    """Whether derivatives or the transforms of ``torch.func`` are asked for."""
    # The autograd functions refuse tangents and transforms, bare operators would drop them.
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_reverse_mode(function: str, *tensors: Tensor | None) -> None:
    """Refuse what an autograd function would, before an operator changes anything in place.

    Raises:
        NotImplementedError: if a tensor has a tangent or a transform of ``torch.func`` is active.
    """
    forward_mode = forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if forward_mode or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"shvit_kernels.{function} has no derivatives in forward mode and none under torch.func with this backend; "
            "run the forward under shvit_kernels.use_backend('eager')"
        )


def can_update(running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None) -> bool:
    """Whether kernels can update running statistics where they stand; PyTorch's operators update others or refuse."""
    if num_batches_tracked is not None:
        # They refuse tensors of inference mode outside of it; torch.compile cannot trace the question.
        of_inference = not torch.compiler.is_compiling() and num_batches_tracked.is_inference()
        if of_inference or num_batches_tracked.dtype != torch.int64:
            return False
    return running_mean is None or (running_mean.is_contiguous() and running_var.is_contiguous())


def functions(family: str) -> Functions:
    """The functions on the operators of a family: through autograd only where a gradient may be asked for."""
    operators = ops.FAMILIES[family]
    shsa_forward, moments_forward = operators["shsa_forward"], operators["partial_moments_forward"]
    train_forward, evaluate, mix = operators["shsa_train_forward"], operators["shsa_eval"], operators["shsa_mixer"]
    update = operators["update_running_statistics"]

    def shsa(x: Tensor, *rest) -> Tensor:
        x = ops.readable(x)
        if tracks_gradients(x, *rest[:4]):
            return ops.Shsa.apply((family, *rest[4:]), x, *rest[:4])
        return shsa_forward(x, *rest)[0]

    def partial_moments(x: Tensor, *rest) -> tuple[Tensor, Tensor]:
        x = ops.readable(x)
        if tracks_gradients(x, *rest[:2]):
            return ops.PartialMoments.apply((family, *rest[2:]), x, *rest[:2])
        return moments_forward(x, *rest)[:2]

    def shsa_train(x: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
        x = ops.readable(x)
        if tracks_gradients(x, *rest[:5]):
            return ops.ShsaTrain.apply((family, *rest[5:]), x, *rest[:5])
        y, *_, mean, variance = train_forward(x, *rest)
        return y, mean, variance

    def shsa_eval(x: Tensor, *rest) -> Tensor:
        if tracks_gradients(x, *rest[:8]):
            return eager.fold_and(shsa, x, *rest)
        return evaluate(ops.readable(x), *rest)

    def shsa_mixer(x: Tensor, *rest) -> Tensor:
        if tracks_gradients(x, *rest[:6]):
            return eager.mix_after(shsa, x, *rest)
        return mix(ops.readable(x), *rest)

    def update_running_statistics(running_mean: Tensor | None, *rest) -> None:
        running_var, num_batches_tracked, mean, *_ = rest
        known = running_mean is not None and num_batches_tracked is not None
        known = known and can_update(running_mean, running_var, num_batches_tracked)
        # Kernels count the batches, and take the statistics that go with their images.
        if known and (running_mean.dtype == torch.float64) == (mean.dtype == torch.float64):
            update(running_mean, *rest)
        else:
            eager.update_running_statistics(running_mean, *rest)

    return Functions(shsa, partial_moments, shsa_train, shsa_eval, shsa_mixer, update_running_statistics)
