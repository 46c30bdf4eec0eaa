"""Reading weights: official SHViT files, timm's, and plain state dicts, into any model of the family.

A file is read, never run: tensors, plain containers and ``argparse.Namespace`` (which official training files hold)
are all that it may contain.
"""

import argparse
import os
import re
from collections.abc import Mapping

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
        foreign = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if foreign:
            reason = f"it holds a {foreign[1]}, and only tensors, plain containers and argparse.Namespace are read"
        else:
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            reason = f"it is truncated or of another format ({first_line})"
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _state_dict(content: object, source: str) -> dict[str, Tensor]:
    """The weights in a file's content: under ``model`` (official), under ``state_dict`` (timm), or all of it."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} holds no weights: expected a dict of tensors, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source} holds no weights: {name!r} is a {type(value).__name__}, not a tensor")
        if value.is_meta or value.layout != torch.strided:
            kind = "meta" if value.is_meta else value.layout
            raise ValueError(f"{source} must hold ordinary tensors, and {name} is a {kind} tensor")
    return dict(content)


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


def _variant(shapes: dict[str, torch.Size]) -> str | None:
    """The published model whose widths and depths canonical names and shapes show, if any."""
    depth = [len({name.split(".")[3] for name in shapes if name.startswith(f"stages.{i}.blocks.")}) for i in range(3)]
    width = []
    for i in range(3):
        ends = (f"stages.{i}.blocks.0.ffn.m.pw2.c.weight", f"stages.{i}.blocks.0.ffn.m.pw2.weight")
        width += [shapes[name][0] for name in ends if name in shapes and len(shapes[name])]
    for name, variant in VARIANTS.items():
        if variant["embed_dim"] == tuple(width) and variant["depth"] == tuple(depth):
            return name
    return None


def _is_fused(names: dict[str, str] | set[str]) -> bool:
    return "patch_embed.0.weight" in names


def _some(what: str, items: list[str]) -> str:
    more = ", ..." if len(items) > _SHOWN else ""
    return f"{len(items)} {what} ({', '.join(items[:_SHOWN])}{more})"


def _misfit(have: dict[str, Tensor], want: dict[str, Tensor], original: dict[str, str]) -> str | None:
    """Why the weights ``have`` do not fit the model's ``want`` (by canonical names), in words; None if they do."""
    if _is_fused(have) != _is_fused(want):
        if _is_fused(have):
            return "its batch normalisation is fused and the model's is not: call model.fuse() before loading"
        return "its batch normalisation is not fused and the model's is: load it before calling fuse()"

    missing = [name for name in want if name not in have]
    unexpected = [name for name in have if name not in want]
    shapes = [name for name in want if name in have and have[name].shape != want[name].shape]
    types = [name for name in want if name in have and have[name].is_floating_point() != want[name].is_floating_point()]
    if not (missing or unexpected or shapes or types):
        return None

    theirs, ours = (_variant({name: value.shape for name, value in values.items()}) for values in (have, want))
    if theirs and theirs != ours:
        whose = f"it holds a {theirs}" + (f" and the model is a {ours}" if ours else "")
    elif all(name.startswith(("head.", "head_dist.")) for name in missing + unexpected + shapes + types):
        heads = [name for name in shapes if name.endswith("weight")]
        if heads:
            file_classes, classes = have[heads[0]].shape[0], want[heads[0]].shape[0]
            whose = (
                f"its head has {file_classes} classes and the model's has {classes}: make the model with "
                f"num_classes={file_classes}, load, and call reset_classifier({classes})"
            )
        elif unexpected and not missing:
            whose = "it has a second head: make the model with distillation=True"
        else:
            whose = "it lacks the model's head"
    else:
        whose = None
    parts = [whose] if whose else []
    if missing:
        parts.append(_some("entries are missing", missing))
    if unexpected:
        parts.append(_some("entries are unexpected", [original[name] for name in unexpected]))
    if shapes:
        described = [
            f"{original[name]}: {tuple(have[name].shape)}, the model's is {tuple(want[name].shape)}" for name in shapes
        ]
        parts.append(_some("entries have another shape", described))
    if types:
        described = [f"{original[name]}: {have[name].dtype}, the model's is {want[name].dtype}" for name in types]
        parts.append(_some("entries have another type", described))
    return "; ".join(parts)


def load_checkpoint(model: nn.Module, checkpoint) -> nn.Module:
    """Load weights into a model; either all of them, or an error and the model stays as it was.

    Args:
        model: a :class:`shvit_kernels.SHViT`, a timm or an official SHViT, accelerated, fused and wrapped
            (``DistributedDataParallel``, ``torch.compile``) or not. Its parameters keep their dtype and device.
        checkpoint: a path (``.safetensors``, or anything that ``torch.load`` reads), or a dict with the content of
            one. The weights are what stands under ``"model"`` (official release and training files), under
            ``"state_dict"`` (timm's training files), or the whole dict. Averaged weights beside them (``model_ema``)
            are not read; for these pass ``torch.load(path)["model_ema"]``. Names may be the official repository's or
            timm's, with the prefixes ``module.`` and ``_orig_mod.`` or without.

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
    if isinstance(checkpoint, Mapping):
        source, content = "the checkpoint", checkpoint
    elif isinstance(checkpoint, (str, os.PathLike)):
        source = os.fspath(checkpoint)
        content = _read(source)
    else:
        raise TypeError(f"checkpoint must be a path or a dict, got {type(checkpoint).__name__}")

    theirs = _state_dict(content, source)
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

    reason = _misfit(have, want, original)
    if reason:
        raise ValueError(f"{source} does not fit the model: {reason}")
    model.load_state_dict({key: have[name] for key, name in names.items()})
    return model
