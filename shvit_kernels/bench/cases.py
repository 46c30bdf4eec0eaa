"""The benchmark cases, defined once for the command line, for pytest-benchmark and for the run on a GPU.

A case is a shape, a type and a mode; its contenders compute the same from the same weights. To add a peer, add it to
:data:`CONTENDERS`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import backends, functional
from .._randomise import randomise
from ..fuse import fuse
from ..models import create_model
from ..models.shvit import IMAGE_SIZE, VARIANTS, Residual, fuse_children
from ..modules import SHSA
from ..stock import FusedAttentionSHSA, with_stock_layers
from . import peers
from .timing import Call

SUITES = {
    "op": "the attention alone, from the split of the channels to the ReLU",
    "shsa": "the same as a function, on folded weights",
    "layer": "the SHSA layer with its residual",
    "mixer": "the same as a function, on folded weights",
    "models": "whole models",
}
RIVALS = "rivals"
"""The suite of other models on the images of one of ours, whose rounds they share."""
RIVAL_OF = {"shvit_s4": "mobilevitv2_100"}
"""The model that the paper states its headline against, by its name in timm."""
OURS, FUSE, EAGER, FUSED, COMPILE, AUTOTUNE, COPY = (
    "shvit_kernels",
    "shvit_kernels.fuse",
    "eager",
    "scaled_dot_product_attention",
    "torch.compile",
    "max-autotune",
    "copy",
)
FOLDED, FOLDED_LAST, COMPILE_LAST, ONNX_RUNTIME, OPENVINO = (
    "eager fused",
    "fused, channels_last",
    "compile, channels_last",
    "ONNX Runtime",
    "OpenVINO",
)
EVALUATION, TRAINING = "evaluation", "training"  # a training step: forward and backward
BATCHES = (1, 16)
QK_DIM = 16

Shape = tuple[int, int, int, int]
Step = Callable[[Tensor, Tensor], object]
"""A call of a contender on an input and the gradient of its output (not used in evaluation)."""


def _ours(module: nn.Module, mode: str) -> nn.Module:
    return module


def _fuse(module: nn.Module, mode: str) -> nn.Module:
    return fuse(module.eval())


def _stock(module: nn.Module, mode: str) -> nn.Module:
    return with_stock_layers(module)


def _fused(module: nn.Module, mode: str) -> nn.Module:
    return with_stock_layers(module, FusedAttentionSHSA)


def _folded(module: nn.Module, mode: str) -> nn.Module:
    module = with_stock_layers(module).eval()
    fuse_children(module)
    return module


def _folded_last(module: nn.Module, mode: str) -> nn.Module:
    return _folded(module, mode).to(memory_format=torch.channels_last)


def _compiled(module: nn.Module, mode: str, options: dict[str, bool] | None = None) -> nn.Module:
    torch.compiler.reset()  # the limit of recompilations is per piece of code, and all cases share theirs
    options = {**(options or {}), **({"freezing": True} if mode == EVALUATION else {})}
    return torch.compile(with_stock_layers(module), options=options or None)


def _compiled_last(module: nn.Module, mode: str) -> nn.Module:
    return _compiled(_folded_last(module, mode), mode)


def _exported(load: Callable[..., peers.Run]) -> Callable[[nn.Module, str], nn.Module]:
    def make(module: nn.Module, mode: str) -> nn.Module:
        dtype = next(module.parameters()).dtype
        return peers.Exported(_folded(module.float(), mode), load, dtype)

    return make


def _autotuned(module: nn.Module, mode: str) -> nn.Module:
    return _compiled(module, mode, torch._inductor.list_mode_options("max-autotune-no-cudagraphs"))


class _Copy(nn.Module):
    """What any kernel must move at least: reads the input once and writes as much."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x)


@dataclass(frozen=True)
class Contender:
    """How one competitor is made of our module, and what it takes."""

    make: Callable[[nn.Module, str], nn.Module]
    backend: str | None = None
    """The backend that it names, if any."""
    needs: tuple[str, ...] = ()
    """Modules that this library can do without."""
    layout: torch.memory_format = torch.contiguous_format
    """Of the inputs that suit it."""
    dtype: torch.dtype | None = None
    """Of its inputs, if not that of the case."""

    def context(self) -> AbstractContextManager:
        """To be entered around calls."""
        return backends.use_backend(self.backend) if self.backend else nullcontext()

    def why_missing(self) -> str | None:
        """Why it cannot run anywhere here, or None."""
        return peers.why_missing(*self.needs)

    def why_not(self, x: Tensor) -> str | None:
        """Why it cannot run on ``x``, or None."""
        return self.why_missing() or (backends.get(self.backend).why_not(x) if self.backend else None)


CONTENDERS = {
    OURS: Contender(_ours),
    **{name: Contender(_ours, name) for name in ("cuda", "triton")},
    FUSE: Contender(_fuse),
    EAGER: Contender(_stock),
    FUSED: Contender(_fused),
    COMPILE: Contender(_compiled),
    AUTOTUNE: Contender(_autotuned),
    COPY: Contender(lambda module, mode: _Copy()),
    FOLDED: Contender(_folded),
    FOLDED_LAST: Contender(_folded_last, layout=torch.channels_last),
    COMPILE_LAST: Contender(_compiled_last, layout=torch.channels_last),
    ONNX_RUNTIME: Contender(_exported(peers.onnx_runtime), needs=peers.ONNX_RUNTIME_NEEDS, dtype=torch.float32),
    OPENVINO: Contender(_exported(peers.openvino), needs=peers.OPENVINO_NEEDS, dtype=torch.float32),
}
_RUNTIMES = (ONNX_RUNTIME, OPENVINO)
PEERS = {
    "op": (OURS, EAGER, FOLDED, COMPILE, *_RUNTIMES),
    "layer": (FUSE, EAGER, FOLDED, COMPILE, *_RUNTIMES),
    "models": (FUSE, EAGER, FOLDED, FOLDED_LAST, COMPILE_LAST, *_RUNTIMES),
    RIVALS: (EAGER, COMPILE_LAST, *_RUNTIMES),
}
"""Who takes part in evaluation among peers, by suite."""


@dataclass(frozen=True)
class Case:
    """What is timed."""

    suite: str
    name: str
    mode: str
    shape: Shape
    """Of the input: images, channels, height, width."""
    dtype: torch.dtype
    flops: int
    """Floating-point operations of one call, by the definition of its layers, also where Winograd's filtering and
    products in pairs save some, so that more than the peak of multiply-adds can be reached; a training step counts
    three times the forward."""
    module: Callable[[], nn.Module]
    """Makes ours, in float32 on the CPU."""

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.suite}: {self.name}, {self.mode}, batch {self.shape[0]}, {dtype}"

    def inputs(self, copies: int = 1, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """Inputs and gradients of the output, each copy with values and memory of its own."""
        generator = torch.Generator(device).manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(self.shape, generator=generator, dtype=self.dtype, device=device)

        train = self.mode == TRAINING
        return [(draw().requires_grad_(train), draw() if train else torch.empty(0)) for _ in range(copies)]

    def step(self, contender: str, device: str = "cpu") -> Step:
        """Sets up a contender; the call to be timed."""
        module = CONTENDERS[contender].make(self.module().to(device, self.dtype), self.mode)
        if self.mode == EVALUATION or contender == COPY:
            module.eval()

            def evaluate(x: Tensor, dy: Tensor) -> Tensor:
                with torch.no_grad():
                    return module(x)

            return evaluate

        parameters = list(module.train().parameters())

        def train(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(x), [x, *parameters], dy)

        return train

    def call(self, contender: str) -> Call:
        """Sets up a contender on the CPU with one input."""
        x, dy = self.inputs()[0]
        taken = CONTENDERS[contender]
        return partial(self.step(contender), x.to(taken.dtype or x.dtype, memory_format=taken.layout), dy)


def contenders(case: Case, *, compile: bool, with_peers: bool = False) -> list[str]:
    """Who takes part in a case on the CPU."""
    if with_peers and case.mode == EVALUATION:
        names = PEERS[case.suite]
    else:
        names = (OURS, FUSE, EAGER, COMPILE) if case.suite == "models" else (OURS, EAGER, COMPILE)
    return [name for name in names if compile or name not in (COMPILE, COMPILE_LAST)]


def _attention(dim: int, pdim: int) -> nn.Module:
    layer = SHSA(dim, QK_DIM, pdim)
    layer.proj = nn.Sequential(nn.ReLU())
    return nn.Sequential(layer)


def _layer(dim: int, pdim: int) -> nn.Module:
    return Residual(SHSA(dim, QK_DIM, pdim))


class _Function(nn.Module):
    """The only SHSA layer of ``module``, fused for evaluation and called as a function; stock layers run as layers."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.eval()
        layer = next(m for m in module.modules() if isinstance(m, SHSA))
        layer.qkv = layer.qkv.fuse()
        for i in range(1, len(layer.proj)):
            layer.proj[i] = layer.proj[i].fuse()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if type(layer) is not SHSA:
            return self.module(x)
        norm, qkv = layer.pre_norm, layer.qkv
        settings = {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps, "qk_dim": layer.qk_dim}
        weight = qkv.weight.flatten(1)
        if len(layer.proj) == 1:
            return functional.shsa(x, weight, qkv.bias, **settings, relu=True)
        proj = layer.proj[1]
        return functional.shsa_mixer(x, weight, qkv.bias, proj.weight.flatten(1), proj.bias, **settings)


_BUILDERS = {"op": _attention, "shsa": _attention, "layer": _layer, "mixer": _layer}
_AS_FUNCTIONS = ("shsa", "mixer")
_TRAINED = ("op", "layer")


def _with_weights(suite: str, module: nn.Module, channels: int) -> nn.Module:
    if suite in ("models", RIVALS):
        return randomise(module, seed=0)
    # `randomise` shows images of 128 x 128 pixels; this makes a feature map of 8 x 8 of them.
    randomise(nn.Sequential(nn.Conv2d(channels, channels, 1, stride=16), module), seed=0)
    return module


def _flops(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> int:
    with torch.device("meta"), torch.no_grad():
        module, x = with_stock_layers(build()).eval(), torch.empty(shape)
        with FlopCounterMode(display=False) as counter:
            module(x)
    return counter.get_total_flops()


def _stages(variants: Iterable[str]) -> Iterator[tuple[str, int, int, int]]:
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


def _of_module(
    suite: str,
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    batches: Iterable[int],
    dtypes: Iterable[torch.dtype],
) -> Iterator[Case]:
    """The cases of one module and one shape of image, in every mode, batch and type; they share its weights."""
    flops = _flops(build, (1, *shape))

    @cache
    def original() -> nn.Module:
        module = _with_weights(suite, build(), shape[0])
        return _Function(module) if suite in _AS_FUNCTIONS else module

    def module() -> nn.Module:
        return copy.deepcopy(original())

    for mode in (EVALUATION, TRAINING) if suite in _TRAINED else (EVALUATION,):
        for batch in batches:
            for dtype in dtypes:
                total = batch * flops * (3 if mode == TRAINING else 1)
                yield Case(suite, name, mode, (batch, *shape), dtype, total, module)


def cases(
    suites: Iterable[str],
    variants: Iterable[str],
    batches: Iterable[int] = BATCHES,
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    sides: Iterable[tuple[int, int]] = (),
) -> list[Case]:
    """The cases of these suites (:data:`SUITES`) at the shapes of these models.

    ``sides``, where given, are the height and width of the feature maps instead of the published ones.
    """
    found = []
    for suite in suites:
        if suite == "models":
            for variant in variants:
                side = IMAGE_SIZE[variant]
                build = partial(create_model, variant)
                found += _of_module(suite, variant, build, (3, side, side), batches, dtypes)
            continue
        for name, dim, pdim, side in _stages(variants):
            for height, width in sides or ((side, side),):
                label = f"{name} ({dim} channels, {pdim} partial, {height}x{width})"
                build = partial(_BUILDERS[suite], dim, pdim)
                found += _of_module(suite, label, build, (dim, height, width), batches, dtypes)
    return found


def rival(case: Case) -> Case:
    """The model of :data:`RIVAL_OF` on the images of ``case``."""
    from .timm_import import timm

    name = RIVAL_OF[case.name]
    build = partial(timm.create_model, name)
    return next(_of_module(RIVALS, name, build, case.shape[1:], case.shape[:1], [case.dtype]))
