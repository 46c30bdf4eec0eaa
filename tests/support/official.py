"""The official repository's names for timm's state-dict keys, one rule per row of its layout."""

from __future__ import annotations

from torch import Tensor

# timm's child of ``downsample`` -> the official repository's child of ``blocksN``.
_DOWNSAMPLE = {"0": "0.0", "1": "0.1", "2": "1", "3": "2.0", "4": "2.1"}


def official_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "stages":
        return name
    stage, part, index, *rest = parts[1:]
    blocks = f"blocks{int(stage) + 1}"
    if part == "downsample":
        return ".".join([blocks, _DOWNSAMPLE[index], *rest])
    offset = 3 if stage != "0" else 0
    return ".".join([blocks, str(int(index) + offset), *rest])


def official_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {official_name(name): value for name, value in weights.items()}
