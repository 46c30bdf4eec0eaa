"""SHViT's single-head self-attention as one memory-efficient operator, and the SHViT family built on it."""

from .backends import use_backend
from .functional import partial_moments, shsa
from .modules import SHSA

__version__ = "0.1.0"

__all__ = ["SHSA", "partial_moments", "shsa", "use_backend"]
