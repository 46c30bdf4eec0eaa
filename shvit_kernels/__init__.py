"""SHViT's single-head self-attention as one memory-efficient operator, and the SHViT family built on it."""

from .accelerate import accelerate
from .backends import use_backend
from .functional import partial_moments, shsa, shsa_mixer
from .fuse import fuse
from .models import SHViT, create_model, list_models, load_checkpoint, shvit_s1, shvit_s2, shvit_s3, shvit_s4
from .modules import SHSA

__version__ = "0.1.0"

__all__ = [
    "SHSA",
    "SHViT",
    "accelerate",
    "create_model",
    "fuse",
    "list_models",
    "load_checkpoint",
    "partial_moments",
    "shsa",
    "shsa_mixer",
    "shvit_s1",
    "shvit_s2",
    "shvit_s3",
    "shvit_s4",
    "use_backend",
]
