"""Import timm where torchvision's compiled operators do not load, as with a CPU-only torch."""

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")


def _declare(schema: str) -> None:
    if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
        _library.define(schema)


# torchvision registers fake kernels for these when it is imported, which needs their schemas.
_declare("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_declare("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402

__all__ = ["timm"]
