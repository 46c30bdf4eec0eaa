"""timm, where torchvision's compiled operators do not load either."""

from shvit_kernels.bench.timm_import import timm

__all__ = ["timm"]
