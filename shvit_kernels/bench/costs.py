"""What a call costs besides its arithmetic: the overhead of the call, and what it keeps for the backward."""

import torch
from torch import Tensor, nn

from .. import functional
from .timing import Spread, measure


def call_overhead(rounds: int) -> Spread:
    """Seconds that ``functional.shsa`` adds to the bare operator on a tensor of one token, without gradients."""
    qk_dim, pdim = 1, 1
    x = torch.randn(1, 2, 1, 1)
    norm = torch.ones(pdim), torch.zeros(pdim)
    projection = torch.randn(2 * qk_dim + pdim, pdim), torch.zeros(2 * qk_dim + pdim)
    operator = torch.ops.shvit_kernels.shsa_forward_native.default

    def bare() -> tuple[Tensor, ...]:
        return operator(x, *norm, *projection, qk_dim, 1e-5, 1.0, False, False, False)

    def full() -> Tensor:
        return functional.shsa(
            x, *projection, qk_dim=qk_dim, norm_weight=norm[0], norm_bias=norm[1], scale=1.0, backend="cpu"
        )

    with torch.no_grad():
        samples = measure({"bare": bare, "full": full}, rounds)
    return Spread.of([b - a for a, b in zip(samples["bare"], samples["full"], strict=True)])


def kept_activations(module: nn.Module, x: Tensor) -> float:
    """Bytes that a training forward keeps for the backward, in multiples of ``x``.

    Distinct storages are counted whole; those of the parameters are left out.
    """
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.train()(x)
    return sum(storage.nbytes() for storage in kept.values()) / (x.numel() * x.element_size())
