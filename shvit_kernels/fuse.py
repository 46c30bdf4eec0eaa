"""Whole models for inference: every block of SHViT as a few fused operators."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional
from .accelerate import is_stock_shsa
from .backends import cpu, eager, fused, is_traced_to_aten, use_backend
from .backends.operators import tracks_gradients
from .modules import conv_and_norm, hooks_on_all_modules, is_group_norm1, is_plain, is_sequence_of
from .ops import CODE, Kind, flatten, pack, winograd


class _Inference(nn.Module):
    """A module that cannot be trained."""

    def train(self, mode: bool = True) -> "_Inference":
        if mode:
            raise RuntimeError("a fused model is for inference alone: train the model that it was made of, and fuse it")
        return super().train(False)


def _mix(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    qk_dim: int,
    norm_eps: float,
    scale: float,
) -> Tensor:
    """The attention layer on the backend for ``x``."""
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps}
    return functional.shsa_mixer(x, qkv_weight, qkv_bias, proj_weight, proj_bias, qk_dim=qk_dim, scale=scale, **norm)


class FusedLayers(_Inference):
    """Layers one after the other as one operator (``backends.fused.sequence``).

    Args:
        code: ``ops.CODE`` integers for each layer, its kind, the channels of its input and its settings.
        constants: those of all layers.
        weights: of all layers, flattened; None if they have none. A parameter that asks for no gradient.
    """

    def __init__(self, code: list[int], constants: list[float], weights: Tensor | None):
        super().__init__()
        self.code = code
        self.constants = constants
        self.register_parameter("weights", weights if weights is None else nn.Parameter(weights, requires_grad=False))
        self.eval()

    @property
    def kinds(self) -> list[Kind]:
        return [Kind(number) for number in self.code[::CODE]]

    def extra_repr(self) -> str:
        return ", ".join(kind.name.lower() for kind in self.kinds)

    def forward(self, x: Tensor) -> Tensor:
        weights = _weights([self])
        operators = fused.operators(x, weights)
        # Tracers know what the specification is made of.
        if operators is fused.NATIVE or is_traced_to_aten() or tracks_gradients(x, *weights):
            return operators.sequence(x, weights, self.code, self.constants)
        return fused.run(x, fused.layers(weights, self.code, x.shape[1]), self.constants, _mix)


_POOL = FusedLayers([int(Kind.POOL), 0, 0, 0, 0], [], None)


def _weights(parts: list[FusedLayers]) -> list[Tensor]:
    return [w for w in (part.weights for part in parts) if w is not None]


class _Whole:
    """A SHViT as one operator from its stem to its head, until one of ``modules`` changes: itself and what it runs.

    To find the parts anew would take 0.1 ms of a call: after the weights of a model, none of this is in cache.
    """

    def __init__(self, parts: list[FusedLayers], modules: list[nn.Module]):
        self.parts = parts
        self.code = [number for part in parts for number in part.code]
        self.constants = [value for part in parts for value in part.constants]
        self._dicts = [
            attributes
            for m in modules
            for attributes in (
                m.__dict__,
                m._modules,
                m._forward_hooks,
                m._forward_pre_hooks,
                m._backward_hooks,
                m._backward_pre_hooks,
            )
        ]
        self._seen = list(self._values())

    def _values(self) -> Iterator[object]:
        return chain.from_iterable(map(dict.values, self._dicts))

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the model, and its hooks, children and attributes are those that were there."""
        return (
            self._dicts[0] is model.__dict__
            and sum(map(len, self._dicts)) == len(self._seen)
            and all(map(is_, self._values(), self._seen))
        )

    def run(self, x: Tensor) -> Tensor | None:
        """By the compiled kernels, if ``x`` is an image for them."""
        if x.dim() != 4 or x.size(1) != self.code[1]:
            return None
        weights = _weights(self.parts)
        operators = fused.operators(x, weights)
        return operators.sequence(x, weights, self.code, self.constants) if operators is fused.NATIVE else None


class FusedModel(_Inference):
    """What :func:`fuse` makes of a model: called as that one, which is ``model``, and with its attributes.

    An attribute that ``model`` has is also set and deleted there.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, *args, **kwargs):
        return self._modules["model"](*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None:
                raise
            return getattr(model, name)

    def _is_of_model(self, name: str) -> bool:
        model = self.__dict__.get("_modules", {}).get("model")
        own = name == "model" or name in self.__dict__ or hasattr(type(self), name)
        return model is not None and not own and hasattr(model, name)

    def __setattr__(self, name: str, value) -> None:
        if self._is_of_model(name):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_of_model(name):
            delattr(self.model, name)
        else:
            super().__delattr__(name)


class FusedSHViT(FusedModel):
    """A fused SHViT, which where it can runs as one operator."""

    _whole: _Whole | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_whole": None}

    def forward(self, x: Tensor):
        model = self._modules["model"]
        if isinstance(x, Tensor) and not torch.compiler.is_compiling() and not hooks_on_all_modules():
            whole = self._whole
            if whole is None or not whole.is_of(model):
                whole = self._whole = _whole(model)
            # What does not fit gets the error of the model itself.
            if whole is not None and (y := whole.run(x)) is not None:
                return y
        return model(x)


def _taps(weight: Tensor) -> Tensor:
    """A depthwise kernel ``[C, 1, 3, 3]`` as ``[9, C]``."""
    return weight.flatten(1).t().contiguous()


def _packed(weight: Tensor) -> Tensor:
    """A 1x1 kernel ``[outputs, inputs, 1, 1]``, packed."""
    return pack(weight.flatten(1))


# ----------------------------------------------------------------------------------------------------------------------
# Recognition: by class name and children, so that no other library is imported; before anything is replaced, both are
# run. Each function returns the layers that a module is, or None.


class _Plan(NamedTuple):
    """Layers one after the other: their code, constants and weights."""

    code: list[int]
    constants: list[float]
    weights: list[Tensor]


def _layer(
    kind: Kind, inputs: int, *weights: Tensor, settings: tuple[int, ...] = (), constants: tuple[float, ...] = ()
) -> _Plan:
    """One layer, its weights in the type of its last bias."""
    code = [int(kind), inputs, *map(int, settings), 0, 0, 0][:CODE]
    return _Plan(code, list(constants), [w.to(weights[-1].dtype) for w in weights])


def _joined(plans: Iterable[_Plan]) -> _Plan:
    return _Plan(*(list(chain.from_iterable(parts)) for parts in zip(_Plan([], [], []), *plans, strict=True)))


def _is(module: nn.Module | None, name: str) -> bool:
    """Whether a module is of this class, has nothing but children of its own, and runs nothing but its forward."""
    return type(module).__name__ == name and is_plain(module) and not (module._parameters or module._buffers)


def _has(module: nn.Module | None, name: str, *children: str) -> bool:
    """The same with these children alone."""
    return _is(module, name) and set(module._modules) == set(children)


def _is_relu(module: nn.Module | None) -> bool:
    return type(module) is nn.ReLU and is_plain(module)


def _conv(module: nn.Module | None, kernel: int, stride: int = 1, depthwise: bool = False):
    """Kernel and bias of a square convolution, with the batch normalisation behind it folded in."""
    both = conv_and_norm(module)
    if both is None or (both[1] is not None and both[1].running_mean is None):
        return None
    conv, bn = both
    groups = conv.in_channels if depthwise else 1
    found = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    padding = kernel // 2
    wanted = (kernel, kernel), (stride, stride), (padding, padding), (1, 1), groups, "zeros"
    if found != wanted or (depthwise and conv.out_channels != conv.in_channels):
        return None
    weight, bias = conv.weight.double(), conv.bias
    if bn is not None:
        flat, bias = eager.fold(weight.flatten(1), bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        weight = flat.view(weight.shape)
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _depthwise(module: nn.Module) -> _Plan | None:
    conv = _conv(module, 3, depthwise=True)
    return conv and _depthwise_layer(*conv)


def _depthwise_layer(weight: Tensor, bias: Tensor) -> _Plan:
    return _layer(Kind.DEPTHWISE, bias.shape[0], _taps(weight), bias, settings=(1, False))


def _residual(module: nn.Module) -> _Plan | None:
    if not _has(module, "Residual", "m"):
        return None
    inner = module.m
    if is_stock_shsa(inner) and is_group_norm1(inner.pre_norm) and all(map(is_plain, inner.modules())):
        qkv, proj = _conv(inner.qkv, 1), _conv(inner.proj[1], 1)
        if not (qkv and proj):
            return None
        norm, pdim = inner.pre_norm, qkv[0].shape[1]
        weights = norm.weight, norm.bias, qkv[0], qkv[1], _packed(proj[0]), proj[1]
        settings, constants = (inner.qk_dim, pdim), (norm.eps, inner.scale)
        return _layer(Kind.MIXER, inner.dim, *weights, settings=settings, constants=constants)
    if _has(inner, "FFN", "pw1", "act", "pw2") and _is_relu(inner.act):
        convs = _conv(inner.pw1, 1), _conv(inner.pw2, 1)
        if not all(convs):
            return None
        (weight1, bias1), (weight2, bias2) = convs
        weights = _packed(weight1), bias1, _packed(weight2), bias2
        return _layer(Kind.FFN, bias2.shape[0], *weights, settings=(bias1.shape[0],))
    conv = _conv(inner, 3, depthwise=True)
    if conv is None:
        return None
    weight, bias = conv
    identity = torch.zeros_like(weight)
    identity[:, :, 1, 1] = 1
    return _depthwise_layer(weight + identity, bias)


def _squeeze_excite(module: nn.Module) -> list[tuple[Tensor, Tensor]] | None:
    """Both linear layers of a stock squeeze-and-excitation."""
    stock = {"fc1": "Conv2d", "bn": "Identity", "act": "ReLU", "fc2": "Conv2d", "gate": "Sigmoid"}
    children = module._modules
    if not (_is(module, "SqueezeExcite") or _is(module, "SEModule")) or set(children) not in (
        {"fc1", "fc2"},
        set(stock),
    ):
        return None
    if any(stock[name] != type(child).__name__ or not is_plain(child) for name, child in children.items()):
        return None
    return None if getattr(module, "add_maxpool", False) else [_conv(module.fc1, 1), _conv(module.fc2, 1)]


def _patch_merging(module: nn.Module) -> _Plan | None:
    others = {"conv1", "conv2", "se", "conv3"}
    if not (_is(module, "PatchMerging") and others <= set(module._modules)):
        return None
    # One activation twice, or two.
    if not all(name in others or _is_relu(child) for name, child in module._modules.items()):
        return None
    gate = _squeeze_excite(module.se)
    conv2 = _conv(module.conv2, 3, 2, depthwise=True)
    convs = [_conv(module.conv1, 1), conv2, *(gate or [None]), _conv(module.conv3, 1)]
    if not all(convs):
        return None
    weights = [t for conv in convs for t in (_taps(conv[0]) if conv is conv2 else _packed(conv[0]), conv[1])]
    hidden, _, squeezed, _, outputs = (bias.shape[0] for _, bias in convs)
    inputs = convs[0][0].shape[1]
    return _layer(Kind.PATCH_MERGING, inputs, *weights, settings=(outputs, hidden, squeezed))


# Channels of the input, below which what Winograd's squares cost beside their products outweighs what they save.
_FEWEST_FOR_WINOGRAD = 16


def _stem(module: nn.Module) -> _Plan | None:
    """3x3 convolutions of stride 2 in a row, each with ReLU behind it or not."""
    if not (type(module) is nn.Sequential and is_plain(module)):
        return None
    layers, rest = [], list(module)
    while rest:
        conv = _conv(rest.pop(0), 3, 2)
        if conv is None:
            return None
        relu = bool(rest) and _is_relu(rest[0])
        rest = rest[relu:]
        weight, bias = conv
        outputs, inputs = weight.shape[:2]
        by_winograd = inputs >= _FEWEST_FOR_WINOGRAD
        products = winograd(weight) if by_winograd else weight.permute(0, 2, 3, 1)
        packed = pack(products.flatten(1))
        layers.append(_layer(Kind.CONV3X3, inputs, packed, bias, settings=(outputs, relu, by_winograd)))
    return _joined(layers) if layers else None


def _norm_linear(module: nn.Module) -> _Plan | None:
    if not is_sequence_of(module, "bn", "l"):
        return None
    bn, linear = module._modules.values()
    stock = type(bn) is nn.BatchNorm1d and type(linear) is nn.Linear and is_plain(bn) and is_plain(linear)
    if not stock or bn.running_mean is None:
        return None
    factor = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        factor = factor * bn.weight
    offset = -bn.running_mean * factor if bn.bias is None else bn.bias - bn.running_mean * factor
    bias = linear.weight.double() @ offset
    if linear.bias is not None:
        bias = bias + linear.bias
    dtype = linear.weight.dtype
    weight = (linear.weight * factor).to(dtype)
    outputs, inputs = weight.shape
    return _layer(Kind.POINTWISE, inputs, pack(weight), bias.to(dtype), settings=(outputs, False))


_RECOGNISED: tuple[Callable[[nn.Module], _Plan | None], ...] = (
    _residual,
    _patch_merging,
    _stem,
    _norm_linear,
    _depthwise,
)


def _plan(module: nn.Module) -> _Plan | None:
    """The layers that a module runs one after the other, none for an identity; None if it does anything else."""
    if type(module) is nn.Identity and is_plain(module):
        return _Plan([], [], [])
    for recognise in _RECOGNISED:
        if (plan := recognise(module)) is not None:
            return plan
    blocks = {"BasicBlock": ("conv", "mixer", "ffn"), "StageBlock": ("downsample", "blocks")}
    children = module._modules
    order = blocks.get(type(module).__name__)
    if type(module) is nn.Sequential:
        order = tuple(children)
    if order is None or not _has(module, type(module).__name__, *order):
        return None
    if any(type(child).__name__ == "StageBlock" for child in children.values()):
        return None  # models take the stages out of their sequence
    plans = []
    for name in order:
        if (plan := _plan(children[name])) is None:
            return None
        plans.append(plan)
    return _joined(plans)


def _whole(model: nn.Module) -> _Whole | None:
    """A fused SHViT from the stem to the head; None if its forward runs anything else."""
    # Parts of forward that are methods of their own, which an instance may replace.
    if not _is(model, "SHViT") or "forward_features" in vars(model) or "forward_head" in vars(model):
        return None
    children = model._modules
    names = [name for name in children if name not in ("patch_embed", "global_pool", "flatten", "head")]
    if "global_pool" in children:  # timm
        pools = getattr(children["global_pool"], "pool_type", "") == "avg" and "flatten" in children
    else:
        pools = getattr(model, "global_pool", "avg") == "avg"
    if not (pools and names in (["stages"], ["blocks1", "blocks2", "blocks3"]) and "head" in children):
        return None
    stages = children["stages"] if names == ["stages"] else [children[name] for name in names]
    stem, head = children.get("patch_embed"), children["head"]
    modules = [model, *children.values(), *stages]
    if not all(map(is_plain, modules)):
        return None
    if not all(type(part) is FusedLayers for part in (stem, *stages)) or stem.code[0] != Kind.CONV3X3:
        return None
    is_linear = type(head) is FusedLayers and head.kinds == [Kind.POINTWISE]
    if not (is_linear or type(head) is nn.Identity):
        return None
    return _Whole([stem, *stages, _POOL, *([head] if is_linear else [])], modules)


def _noise(*size: int, like: Tensor) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(like)


def _gives(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Whether a module computes this, up to rounding, where both are finite: weights may not have been set yet."""
    try:
        y = module(x)
    except Exception:  # a forward with other arguments, or for images of some size alone, is no stock one
        return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.2
    known = y.isfinite() & expected.isfinite()
    y, expected = y[known].double(), expected[known].double()
    return y.numel() == 0 or bool((y - expected).abs().amax() <= tolerance * expected.abs().amax())


def _compute_the_same(module: nn.Module, layers: FusedLayers) -> bool:
    """Whether a module gives what layers do, on noise: its class may have the name and the children of a stock one, and
    another forward."""
    weights, inputs = layers.weights, layers.code[1]
    if weights.is_meta or type(weights.detach()) is not Tensor:
        return True
    x = _noise(*((2, inputs) if layers.kinds == [Kind.POINTWISE] else (1, inputs, 6, 5)), like=weights)
    # The compiled kernels unpack no weights, which would add to the peak of memory.
    backend = "cpu" if cpu.why_not(x) is None else "eager"
    with use_backend(backend), torch.autocast(x.device.type, enabled=False):
        sequence = fused.operators(x, [weights]).sequence
        return _gives(module, x, sequence(x, [weights], layers.code, layers.constants))


def _fused(module: nn.Module) -> FusedLayers | None:
    """The layers that a module is, if there are any and they compute what it does."""
    plan = _plan(module)
    if not (plan and plan.code) or len({(w.dtype, w.device) for w in plan.weights}) != 1:
        return None
    layers = FusedLayers(plan.code, plan.constants, flatten(plan.weights))
    return layers if _compute_the_same(module, layers) else None


def _replace(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """What takes the place of a module: itself, its children replaced, where its own forward stays."""
    if id(module) in done:
        return done[id(module)]
    replacement = _fused(module)
    if replacement is None:
        replacement = module
        for name in list(module._modules):
            if module._modules[name] is not None:
                module._modules[name] = _replace(module._modules[name], done)
    done[id(module)] = replacement
    return replacement


def _called(model: nn.Module) -> FusedModel:
    """A fused model, as it is called."""
    if type(model).__name__ != "SHViT" or list(inspect.signature(model.forward).parameters) != ["x"]:
        return FusedModel(model)
    whole = _whole(model)
    if whole is not None and cpu.why_not(whole.parts[0].weights) is None:
        with use_backend("cpu"):
            x = _noise(1, whole.code[1], 128, 96, like=whole.parts[0].weights)
            y = whole.run(x)
            if y is not None and not _gives(model, x, y):
                return FusedModel(model)
    return FusedSHViT(model)


@torch.no_grad()
def fuse(model: nn.Module) -> FusedModel | FusedLayers:
    """A copy of a model for inference, in which every block of SHViT is a few fused operators (design section 2).

    Takes models of timm, of the official repository and of this library, accelerated or not, batch normalisation
    fused (``model.fuse()``) or not, or any module that contains their blocks. Batch normalisation is folded into the
    convolutions and linear layers, and the identity of depthwise residuals into their kernel. What is not recognised
    (other norms or activations, hooks, parametrisations, bare layers without their residual) stays as it is; so does
    what looks like a block of SHViT and gives something else on noise.

    On the CPU in float32 and bfloat16 the operators are compiled kernels, which keep images channels_last between the
    blocks. On other devices and dtypes attention layers are :func:`shsa_mixer` on its backend and the others PyTorch
    operators with the same result, which unpack the weights in each call. Under ``torch.jit.trace`` and
    ``torch.onnx.export``, and where derivatives are asked for, all are PyTorch operators.

    In float32 the 3x3 convolutions of the stem, from 16 channels on, are computed by Winograd's minimal filtering, with
    25 multiplications where the definition has 36. That rounds differently, and where an infinity is read the result
    may be NaN. On AMD's cores from Zen 4 on, whose adders work beside their multiply-adds, large float32 products are
    in pairs (S. Winograd, "A New Algorithm for Inner Product", 1968): a third of the multiplications become additions,
    and a value is exact to the size of its token and of its output's weights, not to that of each single product.

    bfloat16 (``fuse(model).to(torch.bfloat16)``, and images of that type) is faster than float32 on processors with
    AVX512_BF16 and slower on others; sums are float32, what lies between the layers is rounded.

    Args:
        model: in evaluation mode; it is not changed.

    Returns:
        A module with the call signature of ``model``, which can be moved, copied, pickled, compiled and exported. Its
        weights are packed: its state dict fits other fused models alone. It has the attributes of ``model``, also to
        be set, unless that is a bare block, which becomes the layers that it is.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if it is in training mode, or has no block of SHViT.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    # timm's own fuse() leaves new convolutions in training mode, where that makes no difference.
    training = [
        name or "the model itself"
        for name, module in model.named_modules()
        if module.training and (module is model or isinstance(module, _BatchNorm))
    ]
    if training:
        raise ValueError(
            f"model must be in evaluation mode, call model.eval() first: {training[0]} is in training mode"
        )
    if isinstance(model, FusedModel):
        return copy.deepcopy(model)
    # What is replaced is never copied, which halves the memory; what stays is copied at the end.
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    fast = _replace(copy.deepcopy(model, shared).eval(), {})
    layers = [module for module in fast.modules() if isinstance(module, FusedLayers)]
    if not layers:
        raise ValueError(f"model must have at least one block of SHViT, and this {type(model).__name__} has none")
    new = {id(p): p for module in layers for p in module.parameters() if id(p) not in shared}
    fast = copy.deepcopy(fast, new)
    return fast if isinstance(fast, FusedLayers) else _called(fast)
