"""The SHViT family (S. Yun, Y. Ro: SHViT, CVPR 2024, arXiv 2401.16456) on the library's SHSA layer.

Module names, and with them state-dict keys, are those of timm.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute

from .. import backends
from ..modules import SHSA, Conv2dNorm

VARIANTS: dict[str, dict[str, Any]] = {
    "shvit_s1": {"embed_dim": (128, 224, 320), "depth": (2, 4, 5), "partial_dim": (32, 48, 68)},
    "shvit_s2": {"embed_dim": (128, 308, 448), "depth": (2, 4, 5), "partial_dim": (32, 66, 96)},
    "shvit_s3": {"embed_dim": (192, 352, 448), "depth": (3, 5, 5), "partial_dim": (48, 75, 96)},
    "shvit_s4": {"embed_dim": (224, 336, 448), "depth": (4, 7, 6), "partial_dim": (48, 72, 96)},
}
"""What distinguishes the published models."""

IMAGE_SIZE = {"shvit_s1": 224, "shvit_s2": 224, "shvit_s3": 224, "shvit_s4": 256}
"""Side, in pixels, of the images that the published weights were trained on."""


class Residual(nn.Module):
    """``x + m(x)``."""

    def __init__(self, m: nn.Module):
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return self.m.with_residual(x) if type(self.m) is SHSA else x + self.m(x)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """One depthwise convolution that also carries the identity; any other branch stays a residual."""
        if not isinstance(self.m, Conv2dNorm):
            return self
        conv = self.m.fuse()
        height, width = conv.kernel_size
        conv.weight[:, :, height // 2, width // 2] += 1
        return conv


class NormLinear(nn.Sequential):
    """Batch normalisation (``bn``) and a linear layer (``l``)."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(in_features, device=device, dtype=dtype))
        self.add_module("l", nn.Linear(in_features, out_features, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The linear layer that computes the same in evaluation."""
        bn, linear = self.bn, self.l
        factor = bn.weight / (bn.running_var + bn.eps) ** 0.5
        offset = bn.bias - bn.running_mean * factor
        to = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        fused = nn.Linear(linear.in_features, linear.out_features, **to)
        fused.weight.copy_(linear.weight * factor)
        fused.bias.copy_(linear.bias + linear.weight @ offset)
        return fused.train(self.training)


class FFN(nn.Module):
    """Two 1x1 convolutions with ReLU between them."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.pw1 = Conv2dNorm(dim, hidden_dim, **to)
        self.act = nn.ReLU()
        self.pw2 = Conv2dNorm(hidden_dim, dim, bn_weight_init=0.0, **to)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels (squeeze-and-excitation)."""

    def __init__(self, channels: int, ratio: float = 0.25, device=None, dtype=None):
        super().__init__()
        squeezed = max(8, int(channels * ratio + 4) // 8 * 8)  # the nearest multiple of 8
        self.fc1 = nn.Conv2d(channels, squeezed, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(squeezed, channels, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(means))).sigmoid()


class PatchMerging(nn.Module):
    """Halves height and width (rounding up) and changes the number of channels."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        to = {"device": device, "dtype": dtype}
        hidden_dim = 4 * dim
        self.conv1 = Conv2dNorm(dim, hidden_dim, **to)
        self.act1 = nn.ReLU()
        self.conv2 = Conv2dNorm(hidden_dim, hidden_dim, 3, 2, 1, groups=hidden_dim, **to)
        self.act2 = nn.ReLU()
        self.se = SqueezeExcite(hidden_dim, **to)
        self.conv3 = Conv2dNorm(hidden_dim, out_dim, **to)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        return self.conv3(self.se(x))


class BasicBlock(nn.Module):
    """Depthwise convolution, token mixer (none for type ``"i"``, SHSA for ``"s"``) and FFN, each a residual."""

    def __init__(self, dim: int, qk_dim: int, pdim: int, type: str, device=None, dtype=None):
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.conv = Residual(Conv2dNorm(dim, dim, 3, 1, 1, bn_weight_init=0.0, groups=dim, **to))
        self.mixer = Residual(SHSA(dim, qk_dim, pdim, **to)) if type == "s" else nn.Identity()
        self.ffn = Residual(FFN(dim, 2 * dim, **to))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(self.conv(x)))


class _SecondForward:
    """While entered, a forward is what it was when this was made, for the backward: on the same backend, and batch
    normalisation leaves its running statistics alone."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.backend = backends.use_same_backend()

    def __enter__(self) -> None:
        self.backend.__enter__()
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training]
        norms = [norm for norm in norms if norm.track_running_stats]
        self.before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0

    def __exit__(self, *error) -> None:
        for norm, momentum, count in self.before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
        self.backend.__exit__(*error)


class StageBlock(nn.Module):
    """A stage: down-sampling (where the width changes), then ``depth`` blocks."""

    def __init__(
        self,
        prev_dim: int,
        dim: int,
        qk_dim: int,
        pdim: int,
        type: str,
        depth: int,
        device=None,
        dtype=None,
    ):
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        if prev_dim == dim:
            self.downsample = nn.Identity()
        else:
            self.downsample = nn.Sequential(
                Residual(Conv2dNorm(prev_dim, prev_dim, 3, 1, 1, groups=prev_dim, **to)),
                Residual(FFN(prev_dim, 2 * prev_dim, **to)),
                PatchMerging(prev_dim, dim, **to),
                Residual(Conv2dNorm(dim, dim, 3, 1, 1, groups=dim, **to)),
                Residual(FFN(dim, 2 * dim, **to)),
            )
        self.blocks = nn.Sequential(*(BasicBlock(dim, qk_dim, pdim, type, **to) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.blocks(x)
        for block in self.blocks:
            if torch.compiler.is_compiling():  # a compiled backward recomputes values, never updates of buffers
                x = recompute(block, x, use_reentrant=False)
            else:
                contexts = (nullcontext(), _SecondForward(block))
                x = recompute(block, x, use_reentrant=False, context_fn=lambda contexts=contexts: contexts)
        return x


class FeatureInfo(list):
    """One dict per stage (``num_chs``, ``reduction``, ``module``), with timm's accessors.

    ``out_indices`` are the stages that the model returns; the accessors speak of these, in order.
    """

    def __init__(self, info: list[dict[str, Any]], out_indices: Sequence[int]):
        super().__init__(info)
        self.out_indices = tuple(out_indices)

    def get_dicts(self) -> list[dict[str, Any]]:
        """The dicts of the returned stages."""
        return [self[i] for i in self.out_indices]

    def channels(self) -> list[int]:
        """Channels of each returned stage."""
        return [info["num_chs"] for info in self.get_dicts()]

    def reduction(self) -> list[int]:
        """Stride, in pixels of the image, of each returned stage."""
        return [info["reduction"] for info in self.get_dicts()]

    def module_name(self) -> list[str]:
        """Name of the module behind each returned stage."""
        return [info["module"] for info in self.get_dicts()]


def _take_indices(name: str, indices: int | Sequence[int] | None, stages: int) -> list[int]:
    """Stage numbers from timm's notation: None for all, an int for the last n, negative ones from the end."""
    if indices is None:
        return list(range(stages))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= stages:
            raise ValueError(f"{name} as a number of stages must lie between 1 and {stages}, got {indices}")
        return list(range(stages - indices, stages))
    if not isinstance(indices, Sequence) or not indices or not all(-stages <= i < stages for i in indices):
        raise ValueError(f"{name} must hold stage numbers from {-stages} to {stages - 1}, got {indices!r}")
    return [i % stages for i in indices]


def _check_three(**arguments: Sequence) -> None:
    for name, value in arguments.items():
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 3:
            raise ValueError(f"{name} must hold one value for each of the 3 stages, got {value!r}")


def _check_least(least: int, **arguments: int | Sequence[int]) -> None:
    for name, given in arguments.items():
        values = given if isinstance(given, Sequence) else [given]
        if not all(isinstance(value, Integral) and value >= least for value in values):
            raise ValueError(f"{name} must be at least {least}, got {given!r}")


class SHViT(nn.Module):
    """Single-head vision transformer: a stem of stride 16, three stages at strides 16, 32 and 64, and a head.

    Args:
        in_chans: channels of the images.
        num_classes: classes K; 0 leaves the head out and returns pooled features.
        global_pool: ``"avg"``, or ``""`` for no pooling (only with ``num_classes=0``).
        embed_dim: channels of the three stages; the first a multiple of 8.
        partial_dim: channels of each stage that take part in the attention.
        qk_dim: width of queries and keys in each stage.
        depth: blocks of each stage.
        types: token mixer of each stage: ``"s"`` for SHSA, ``"i"`` for none.
        drop_rate: dropout before the head.
        distillation: a second head, ``head_dist``. While training the model returns both heads' logits as a pair, in
            evaluation their mean.
        features_only: return a list of stage outputs instead of logits, for detection and segmentation.
        out_indices: the stages returned with ``features_only``, by number or the last n; later ones are left out.
        device, dtype: of the parameters.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size, in the dtype of the parameters; logits ``[B, K]``. Stage outputs
        are ``[B, embed_dim[i], ceil(H / s), ceil(W / s)]`` with s = 16, 32, 64.

    Raises:
        ValueError: if an argument is out of range; the message names it and the value.

    Source: arXiv 2401.16456; the official repository ysj9909/SHViT; ``timm.models.shvit`` for names and methods.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: Sequence[int] = (128, 224, 320),
        partial_dim: Sequence[int] = (32, 48, 68),
        qk_dim: Sequence[int] = (16, 16, 16),
        depth: Sequence[int] = (2, 4, 5),
        types: Sequence[str] = ("i", "s", "s"),
        drop_rate: float = 0.0,
        distillation: bool = False,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        device=None,
        dtype=None,
    ):
        _check_three(embed_dim=embed_dim, partial_dim=partial_dim, qk_dim=qk_dim, depth=depth, types=types)
        _check_least(1, in_chans=in_chans, embed_dim=embed_dim)
        _check_least(0, depth=depth)
        if embed_dim[0] < 8 or embed_dim[0] % 8:
            raise ValueError(f"embed_dim[0] must be a multiple of 8 for the stem, got {embed_dim[0]}")
        if not set(types) <= {"s", "i"}:
            raise ValueError(f"types must be 's' or 'i', got {types!r}")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must lie between 0 and 1, got {drop_rate}")
        if out_indices is not None and not features_only:
            raise ValueError(f"out_indices needs features_only=True, got out_indices {out_indices!r}")
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.distillation = distillation
        self.features_only = features_only

        width = embed_dim[0]
        self.patch_embed = nn.Sequential(
            Conv2dNorm(in_chans, width // 8, 3, 2, 1, **to),
            nn.ReLU(),
            Conv2dNorm(width // 8, width // 4, 3, 2, 1, **to),
            nn.ReLU(),
            Conv2dNorm(width // 4, width // 2, 3, 2, 1, **to),
            nn.ReLU(),
            Conv2dNorm(width // 2, width, 3, 2, 1, **to),
        )
        taken = sorted(set(_take_indices("out_indices", out_indices, 3)))
        stages, info, previous, stride = [], [], width, 16
        for i in range(max(taken) + 1):
            stages.append(StageBlock(previous, embed_dim[i], qk_dim[i], partial_dim[i], types[i], depth[i], **to))
            stride *= 1 if previous == embed_dim[i] else 2
            previous = embed_dim[i]
            info.append({"num_chs": previous, "reduction": stride, "module": f"stages.{i}", "index": i})
        self.stages = nn.Sequential(*stages)
        self.feature_info = FeatureInfo(info, taken)
        self.num_features = self.head_hidden_size = previous
        self._set_head(0 if features_only else num_classes, "" if features_only else global_pool)

        # What timm's data and weight utilities read; a published model adds its name and image size.
        heads = ("head.l", "head_dist.l") if distillation else "head.l"
        self.pretrained_cfg = self.default_cfg = {
            "architecture": None,
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (4, 4),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.0.c",
            "classifier": heads,
        }

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        _check_least(0, num_classes=num_classes)
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        if num_classes and not global_pool:
            raise ValueError(f"global_pool '' needs num_classes 0, got num_classes {num_classes}")
        self.num_classes = num_classes
        self.global_pool = global_pool
        like = next(self.patch_embed.parameters())
        for name in ("head", "head_dist") if self.distillation else ("head",):
            head: nn.Module = nn.Identity()
            if num_classes:
                head = NormLinear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            setattr(self, name, head.train(self.training))

    def _stem(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must have shape [B, {self.in_chans}, H, W], got {tuple(x.shape)}")
        return self.patch_embed(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's output, ``[B, C, ceil(H / 64), ceil(W / 64)]``."""
        return self.stages(self._stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits ``[B, K]`` of :meth:`forward_features`' result; with ``pre_logits`` the pooled ``[B, C]``."""
        if self.global_pool:
            x = x.mean((2, 3))
        x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits:
            return x
        if not self.distillation:
            return self.head(x)
        logits, distilled = self.head(x), self.head_dist(x)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor] | list[Tensor]:
        if self.features_only:
            return self.forward_intermediates(x, self.feature_info.out_indices, intermediates_only=True)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of stages, in order, and the last feature map (as timm's method of this name).

        Args:
            x: images ``[B, in_chans, H, W]``.
            indices: stage numbers, an int for the last n, None for all.
            norm: without effect, as no normalisation follows the stages.
            stop_early: leave out stages after the last wanted one.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the list alone.

        Raises:
            ValueError: for stage numbers that do not exist or another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken = _take_indices("indices", indices, len(self.stages))
        last = max(taken) if stop_early else len(self.stages) - 1
        x = self._stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if i > last:
                break
            x = stage(x)
            if i in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of ``indices``; the head goes with them, or with ``prune_head``.

        Returns the stage numbers kept as intermediates, which ``features_only`` then returns. ``prune_norm`` is without
        effect.
        """
        taken = _take_indices("indices", indices, len(self.stages))
        last = max(taken)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.feature_info = FeatureInfo(self.feature_info[: last + 1], taken)
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The linear layer of the head (an identity without one); the pair of them with distillation."""
        classifier = getattr(self.head, "l", self.head)  # a fused head is the linear layer itself
        if not self.distillation:
            return classifier
        return classifier, getattr(self.head_dist, "l", self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised head for ``num_classes`` (0 for none); ``global_pool`` as in the constructor."""
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations.

        Running statistics are updated once per step, as without it.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm's optimizer factory groups parameters into layers, the stem first."""
        if coarse:
            blocks = r"^stages\.(\d+)"
        else:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay: none beyond biases and norms."""
        return set()

    def fuse(self) -> "SHViT":
        """Fold every batch normalisation into the convolution or linear layer beside it, in place; for evaluation.

        State-dict keys change as timm's ``fuse`` changes them. Returns the model.
        """
        fuse_children(self)
        return self


def fuse_children(module: nn.Module) -> None:
    """Replace every module below this one that has a ``fuse`` by what that returns, in place."""
    for name, child in module.named_children():
        if hasattr(child, "fuse"):
            child = child.fuse()
            setattr(module, name, child)
        fuse_children(child)
