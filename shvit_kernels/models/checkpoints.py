"""Reading weights: official SHViT files, timm's, and plain state dicts, into any model of the family.

A file is read, never run: tensors, plain containers and ``argparse.Namespace`` (which official training files hold)
are all that it may contain.
"""

import argparse
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .shvit import VARIANTS

_SHOWN = 3  # names of each kind in an error

_OFFICIAL_DOWNSAMPLE = {"0.0": "0", "0.1": "1", "1": "2", "2.0": "3", "2.1": "4"}


def _read(path: str) -> object:
    """The content of a file, on the CPU."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        # One sentence of PyTorch's message: others advise to run whatever the file holds.
        text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        foreign = re.search(r"GLOBAL (\S+) (was not an allowed global|whose module)", text)
        if foreign:
            reason = f"it holds a {foreign[1]}, and only tensors, plain containers and argparse.Namespace are read"
        else:
            reason = f"it is truncated or of another format ({text.splitlines()[0].partition('. ')[0]})"
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


def read_weights(checkpoint) -> dict[str, Tensor]:
    """The weights of a path or dict as :func:`load_checkpoint` takes it, names as they stand there; same errors."""
    if isinstance(checkpoint, Mapping):
        source, content = "the checkpoint", checkpoint
    elif isinstance(checkpoint, (str, os.PathLike)):
        source = os.fspath(checkpoint)
        content = _read(source)
    else:
        raise TypeError(f"checkpoint must be a path or a dict, got {type(checkpoint).__name__}")
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} holds no weights: expected a dict of tensors, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source} holds no weights: {name!r} is of type {type(value).__name__}, not a tensor")
        if value.is_meta or value.layout != torch.strided:
            kind = "meta" if value.is_meta else value.layout
            raise ValueError(f"{source} must hold ordinary tensors, and {name} is a {kind} tensor")
    return {name: value for name, value in content.items() if name != "n_averaged"}  # of AveragedModel


def _canonical(names: list[str]) -> dict[str, str]:
    """Each name as timm would write it: without wrappers' prefixes, official blocks as stages."""
    plain = {name: name.replace("_orig_mod.", "") for name in names}
    while plain and all(short.startswith("module.") for short in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return {name: _timm_name(short) for name, short in plain.items()}


def _timm_name(name: str) -> str:
    match = re.fullmatch(r"blocks([123])\.(\d+)\.(.+)", name)
    if not match:
        return name
    stage, index, rest = int(match[1]) - 1, int(match[2]), match[3]
    if stage == 0:
        return f"stages.0.blocks.{index}.{rest}"
    if index >= 3:
        return f"stages.{stage}.blocks.{index - 3}.{rest}"
    if index != 1:
        child, rest = rest.split(".", 1) if "." in rest else (rest, "")
        index = f"{index}.{child}"
    return f"stages.{stage}.downsample.{_OFFICIAL_DOWNSAMPLE.get(str(index), index)}.{rest}"


class Description(NamedTuple):
    """What names and shapes tell of the model that weights come from."""

    variant: str | None
    """The published model of these widths and depths, if any."""
    num_classes: int
    """0 without a head."""
    distillation: bool
    fused: bool | None
    """None where there is no stem to tell by."""


def describe(weights: Mapping[str, Tensor]) -> Description:
    """The model that a state dict comes from, its names in any style that :func:`load_checkpoint` reads."""
    weights = {name: weights[key] for key, name in _canonical(list(weights)).items()}
    shapes = {name: tuple(value.shape) for name, value in weights.items() if value.dim()}

    def first(*names: str) -> int:
        return next((shapes[name][0] for name in names if name in shapes), 0)

    width = tuple(
        first(f"stages.{i}.blocks.0.ffn.m.pw2.c.weight", f"stages.{i}.blocks.0.ffn.m.pw2.weight") for i in range(3)
    )
    depth = tuple(
        len({name.split(".")[3] for name in shapes if name.startswith(f"stages.{i}.blocks.")}) for i in range(3)
    )
    fused = "patch_embed.0.weight" in shapes
    if not fused and "patch_embed.0.c.weight" not in shapes:
        fused = None
    variants = [n for n, variant in VARIANTS.items() if (variant["embed_dim"], variant["depth"]) == (width, depth)]
    return Description(
        variant=variants[0] if variants else None,
        num_classes=first("head.l.weight", "head.weight"),
        distillation=any(name.startswith("head_dist.") for name in shapes),
        fused=fused,
    )


def _show(value: torch.Size | torch.dtype) -> str:
    return str(tuple(value) if isinstance(value, torch.Size) else value)


def _some(what: str, items: list[str]) -> str:
    """How many entries, and the first of them; empty for none."""
    more = ", ..." if len(items) > _SHOWN else ""
    return f"{len(items)} {what} ({', '.join(items[:_SHOWN])}{more})" if items else ""


def _reason(file: Description, model: Description, offending: list[str]) -> str | None:
    """The likely cause why entries do not fit, with what to do; None if there is none to name."""
    if file.fused is not None and model.fused is not None and file.fused != model.fused:
        if file.fused:
            return "its batch normalisation is fused and the model's is not; call model.fuse() before loading"
        return "its batch normalisation is not fused and the model's is; load it before calling fuse()"
    if file.variant and file.variant != model.variant:
        return f"it holds a {file.variant}" + (f" and the model is a {model.variant}" if model.variant else "")
    if not all(name.startswith(("head.", "head_dist.")) for name in offending):
        return None
    if file.num_classes and file.num_classes != model.num_classes:
        return (
            f"its head has {file.num_classes} classes and the model's has {model.num_classes}; make the model with "
            f"num_classes={file.num_classes}, load, and call reset_classifier({model.num_classes})"
        )
    if file.distillation != model.distillation:
        return f"it comes from a model with distillation={file.distillation}; make the model so"
    return None


def _misfit(have: dict[str, Tensor], want: dict[str, Tensor], original: dict[str, str]) -> str | None:
    """Why the weights ``have`` do not fit the model's ``want`` (by canonical names), in words; None if they do."""
    missing = [name for name in want if name not in have]
    unexpected = [name for name in have if name not in want]
    common = [name for name in want if name in have]
    shapes = [name for name in common if have[name].shape != want[name].shape]
    types = [name for name in common if have[name].is_floating_point() != want[name].is_floating_point()]
    offending = missing + unexpected + shapes + types
    if not offending:
        return None

    def differing(names: list[str], what: str) -> list[str]:
        return [f"{original[n]}: {_show(getattr(have[n], what))}, not {_show(getattr(want[n], what))}" for n in names]

    parts = [
        _some("missing", missing),
        _some("unexpected", [original[name] for name in unexpected]),
        _some("of another shape", differing(shapes, "shape")),
        _some("of another type", differing(types, "dtype")),
    ]
    reason = _reason(describe(have), describe(want), offending)
    return (f"{reason}. " if reason else "") + "Entries: " + "; ".join(filter(None, parts))


def load_checkpoint(model: nn.Module, checkpoint) -> nn.Module:
    """Load weights into a model; either all of them, or an error and the model stays as it was.

    Args:
        model: a :class:`shvit_kernels.SHViT`, a timm or an official SHViT, accelerated, fused and wrapped
            (``DistributedDataParallel``, ``torch.compile``) or not. Its parameters keep their dtype and device.
        checkpoint: a path (``.safetensors``, or anything that ``torch.load`` reads), or a dict with the content of
            one. The weights are what stands under ``"model"`` (official release and training files), under
            ``"state_dict"`` (timm's training files), or the whole dict. Averaged weights beside them (``model_ema``)
            are not read; for these pass ``torch.load(path)["model_ema"]``. Names may be the official repository's or
            timm's, with the prefixes ``module.`` and ``_orig_mod.`` or without. Without counts of batches
            (``num_batches_tracked``) the model keeps its own.

    Entries that the model has no place for are left out where a whole part is missing from the model: the heads where
    it has none (``num_classes=0``, ``features_only=True``), and the stages after its last.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if the file cannot be read, holds anything but tensors, plain containers and
            ``argparse.Namespace``, or does not fit the model; the message names the file, the first offending
            entries, and the variant that the file fits where its shapes tell.
        TypeError: if ``checkpoint`` is neither a path nor a dict.
    """
    theirs = read_weights(checkpoint)
    source = "the checkpoint" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ValueError("model must be on a real device to load weights, and it is on meta: call model.to_empty()")
    names = _canonical(list(own))
    want = {name: own[key] for key, name in names.items()}
    original, have = {}, {}
    for key, name in _canonical(list(theirs)).items():
        if name in have:
            raise ValueError(f"{source} holds {name} twice, as {original[name]} and as {key}")
        original[name], have[name] = key, theirs[key]

    if not any(name.startswith("head.") for name in want):
        have = {name: value for name, value in have.items() if not name.startswith(("head.", "head_dist."))}
    for i in range(3):
        stage = f"stages.{i}."
        if not any(name.startswith(stage) for name in want):
            have = {name: value for name, value in have.items() if not name.startswith(stage)}
    for name, value in have.items():
        # Official files may hold a 1x1 convolution as a matrix.
        if name in want and value.dim() == 2 and want[name].shape == (*value.shape, 1, 1):
            have[name] = value[:, :, None, None]

    for name, value in want.items():
        if name.endswith(".num_batches_tracked") and name not in have:  # PyTorch does not insist on it either
            original[name], have[name] = name, value

    reason = _misfit(have, want, original)
    if reason:
        raise ValueError(f"{source} does not fit the model: {reason}")
    model.load_state_dict({key: have[name] for key, name in names.items()})
    return model
