"""The benchmark cases, defined once for the command line and for pytest-benchmark.

A case is a shape and a mode; its contenders compute the same from the same weights. To add a peer, add its factory in
:func:`_contenders`.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .._randomise import randomise
from ..models import create_model
from ..models.shvit import IMAGE_SIZE, VARIANTS, Residual, SHViT
from ..modules import SHSA
from ..stock import with_stock_layers
from .timing import Call

SUITES = {
    "op": "the attention alone, from the split of the channels to the ReLU",
    "layer": "the SHSA layer with its residual",
    "models": "whole models",
}
OURS, EAGER, COMPILE = "shvit_kernels", "eager", "torch.compile"
EVALUATION, TRAINING = "evaluation", "training"  # a training step: forward and backward
BATCHES = (1, 16)
QK_DIM = 16


@dataclass(frozen=True)
class Case:
    """What is timed: ``contenders`` maps a name to a function that sets up and returns the call to be timed."""

    suite: str
    name: str
    mode: str
    shape: tuple[int, int, int, int]
    """Of the input: images, channels, height, width."""
    flops: int
    """Floating-point operations of one call; a training step counts three times the forward."""
    contenders: dict[str, Callable[[], Call]]
    module: Callable[[], nn.Module]
    """Makes ours."""

    @property
    def id(self) -> str:
        return f"{self.suite}: {self.name}, {self.mode}, batch {self.shape[0]}"


def _attention(dim: int, pdim: int) -> nn.Module:
    layer = SHSA(dim, QK_DIM, pdim)
    layer.proj = nn.Sequential(nn.ReLU())
    return nn.Sequential(layer)


def _layer(dim: int, pdim: int) -> nn.Module:
    return Residual(SHSA(dim, QK_DIM, pdim))


def _with_weights(module: nn.Module, channels: int) -> nn.Module:
    if isinstance(module, SHViT):
        return randomise(module, seed=0)
    # `randomise` shows images of 128 x 128 pixels; this makes a feature map of 8 x 8 of them.
    randomise(nn.Sequential(nn.Conv2d(channels, channels, 1, stride=16), module), seed=0)
    return module


def _call(module: nn.Module, shape: tuple[int, ...], mode: str) -> Call:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if mode == EVALUATION:
        module.eval()

        def evaluate() -> Tensor:
            with torch.no_grad():
                return module(x)

        return evaluate

    module.train()
    x.requires_grad_()
    wanted = [x, *module.parameters()]
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), wanted, dy)

    return step


def _contenders(module: Callable[[], nn.Module], shape: tuple[int, ...], mode: str) -> dict[str, Callable[[], Call]]:
    def ours() -> Call:
        return _call(module(), shape, mode)

    def stock() -> nn.Module:
        return with_stock_layers(module())

    def compiled() -> Call:
        torch.compiler.reset()  # the limit of recompilations is per piece of code, and all cases share theirs
        options = {"freezing": True} if mode == EVALUATION else None
        return _call(torch.compile(stock(), options=options), shape, mode)

    return {OURS: ours, EAGER: lambda: _call(stock(), shape, mode), COMPILE: compiled}


def _flops(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> int:
    with torch.device("meta"), torch.no_grad():
        module, x = with_stock_layers(build()).eval(), torch.empty(shape)
        with FlopCounterMode(display=False) as counter:
            module(x)
    return counter.get_total_flops()


def _stages(variants: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """Name, channels, partial channels and side of each attention stage; a shape that occurs twice comes once."""
    seen = set()
    for variant in variants:
        embed_dim, pdim = VARIANTS[variant]["embed_dim"], VARIANTS[variant]["partial_dim"]
        for i in (1, 2):
            side = -(-IMAGE_SIZE[variant] // (16 << i))
            shape = embed_dim[i], pdim[i], side
            if shape not in seen:
                seen.add(shape)
                yield f"{variant} stage {i + 1}", *shape


def cases(suites: list[str], variants: list[str]) -> list[Case]:
    """The cases of these suites (:data:`SUITES`) at the shapes of these models."""
    found = []

    def add(suite: str, name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], modes: list[str]) -> None:
        flops = _flops(build, (1, *shape))

        @cache
        def original() -> nn.Module:
            return _with_weights(build(), shape[0])

        def module() -> nn.Module:
            return copy.deepcopy(original())

        for mode in modes:
            for batch in BATCHES:
                full = (batch, *shape)
                total = batch * flops * (3 if mode == TRAINING else 1)
                found.append(Case(suite, name, mode, full, total, _contenders(module, full, mode), module))

    for suite in suites:
        if suite == "models":
            for variant in variants:
                side = IMAGE_SIZE[variant]
                add(suite, variant, partial(create_model, variant), (3, side, side), [EVALUATION])
            continue
        make = _attention if suite == "op" else _layer
        for name, dim, pdim, side in _stages(variants):
            label = f"{name} ({dim} channels, {pdim} partial, {side}x{side})"
            add(suite, label, partial(make, dim, pdim), (dim, side, side), [EVALUATION, TRAINING])
    return found
