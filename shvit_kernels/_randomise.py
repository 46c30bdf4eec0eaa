"""Weights under which every part of a model matters, for tests, benchmarks and demonstrations.

At initialisation the last batch normalisation of each residual branch has weight 0, so that nothing computed inside
the branches, attention included, reaches the output.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_BATCHES, _IMAGES = 3, 4
_MODEL_SIDE, _LAYER_SIDE = 128, 16


def _input_shape(model: nn.Module) -> tuple[int, int, int, int]:
    """Images where the model begins with a convolution, feature maps where it is a layer around an SHSA."""
    for module in model.modules():
        if hasattr(module, "pdim"):
            return _IMAGES, module.dim, _LAYER_SIDE, _LAYER_SIDE
        if isinstance(module, nn.Conv2d):
            return _IMAGES, module.in_channels, _MODEL_SIDE, _MODEL_SIDE
    raise ValueError(f"model must hold a convolution, and this {type(model).__name__} has none")


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw norm weights from [0.5, 1.5] and biases from normal(0, 0.2); take running statistics from training batches.

    Args:
        model: a model of the family, or a layer around SHSA, not fused yet. Training flags are kept.
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

    shape = _input_shape(model)
    like = next(model.parameters())
    training = {m: m.training for m in model.modules()}
    model.train()
    for _ in range(_BATCHES):
        model(torch.randn(shape, generator=generator).to(like.device, like.dtype))
    for module, flag in training.items():
        module.training = flag
    return model
