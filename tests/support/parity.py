"""Two models of one structure compared: outputs, gradients and running statistics (design section 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shvit_kernels import SHSA

RELATIVE = 1e-9  # float64

Size = int | tuple[int, int]


def images(size: Size, batch: int = 2, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, shapes and types; each within 1e-9 of the largest expected value of its tensor.

    A bias's gradient, which is zero in truth where batch normalisation follows, may be as far off as its weight's.
    """
    assert results.keys() == expected.keys()
    wrong = []
    for name, value in expected.items():
        result = results[name]
        assert result.shape == value.shape and result.dtype == value.dtype, f"{name}: {result.shape}, {value.shape}"
        difference = (result - value).abs().max()
        size = value.abs().max()
        if name.startswith("gradient of") and name.endswith(".bias"):
            size = max(size, expected[name.removesuffix("bias") + "weight"].abs().max())
        if not difference <= RELATIVE * size:  # so that NaN is wrong too
            wrong.append(f"{name} is off by {difference:.3g} of {size:.3g}")
    assert not wrong, f"{len(wrong)} differ: " + "; ".join(wrong[:5])


def evaluation(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Evaluation output by name."""
    model.eval()
    with torch.no_grad():
        return {"output": model(x)}


def training(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One training step's output, gradients of the input and of every parameter, and buffers after it, by name."""
    model.train().zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    outputs = {"output": output} if isinstance(output, Tensor) else {f"output {i}": o for i, o in enumerate(output)}
    generator = torch.Generator().manual_seed(8)
    upstream = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs.values()]
    torch.autograd.backward(list(outputs.values()), upstream)
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {k: o.detach() for k, o in outputs.items()} | {"gradient of input": x.grad} | gradients | buffers


MODES = {"evaluation": evaluation, "training": training}


def break_attention(model: nn.Module) -> None:
    """Make attention slightly wrong in every accelerated layer."""
    for layer in model.modules():
        if isinstance(layer, SHSA):
            layer.scale *= 1.01
