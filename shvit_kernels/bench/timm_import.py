"""Import timm where torchvision's compiled operators do not load, as with a CPU-only torch."""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # torchvision registers fake kernels for these when it is imported, which needs their schemas.
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm

__all__ = ["timm"]
