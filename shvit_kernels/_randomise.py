"""Weights under which every part of a model matters, for tests, benchmarks and demonstrations.

At initialisation the last batch normalisation of each residual branch has weight 0, so that nothing computed inside
the branches, attention included, reaches the output.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_BATCHES, _IMAGES, _SIDE = 3, 4, 128


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw norm weights from [0.5, 1.5] and biases from normal(0, 0.2); take running statistics from training batches.

    Args:
        model: takes images ``[B, in_chans, H, W]`` and has no fused normalisation yet. Training flags are kept.
        seed: the same seed gives models of the same structure the same weights, on every device and in every dtype.

    Returns:
        ``model``.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, (_BatchNorm, nn.GroupNorm))]
    for parameter in (p for m in model.modules() if m not in norms for p in m.parameters(recurse=False)):
        # Drawn again, so that the result depends on the seed alone and not on how the model was made.
        bound = 1 / max(parameter[0].numel(), 1) ** 0.5 if parameter.dim() > 1 else 0.2
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    for norm in norms:
        norm.weight.copy_(torch.empty(norm.weight.shape).uniform_(0.5, 1.5, generator=generator))
        norm.bias.copy_(torch.empty(norm.bias.shape).normal_(0, 0.2, generator=generator))

    first = next(p for p in model.parameters() if p.dim() == 4)
    training = {m: m.training for m in model.modules()}
    model.train()
    for _ in range(_BATCHES):
        images = torch.randn(_IMAGES, first.shape[1], _SIDE, _SIDE, generator=generator)
        model(images.to(first.device, first.dtype))
    for module, flag in training.items():
        module.training = flag
    return model
