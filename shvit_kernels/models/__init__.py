"""The SHViT family by name: ``create_model``, ``shvit_s1`` to ``shvit_s4``, and loading of checkpoints."""

from .. import backends
from .checkpoints import load_checkpoint
from .shvit import IMAGE_SIZE, VARIANTS, SHViT

__all__ = [
    "SHViT",
    "create_model",
    "list_models",
    "load_checkpoint",
    "shvit_s1",
    "shvit_s2",
    "shvit_s3",
    "shvit_s4",
]


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return list(VARIANTS)


def create_model(name: str, *, checkpoint=None, **arguments) -> SHViT:
    """A model of the family.

    Args:
        name: ``"shvit_s1"`` to ``"shvit_s4"``.
        checkpoint: weights to load, a path or a dict (see :func:`shvit_kernels.load_checkpoint`); by default the model
            is freshly initialised.
        arguments: those of :class:`SHViT`.

    Raises:
        ValueError: if there is no such model, an argument is out of range, or the checkpoint does not fit.
        FileNotFoundError: if there is no file at ``checkpoint``.
    """
    if name not in VARIANTS:
        raise ValueError(backends.unknown("model", name, list_models()))
    model = SHViT(**{**VARIANTS[name], **arguments})
    side = IMAGE_SIZE[name]
    model.pretrained_cfg.update(architecture=name, input_size=(3, side, side))
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def shvit_s1(**arguments) -> SHViT:
    """SHViT-S1, for 224x224 images: 6.3 M parameters, 241 M multiply-adds. Arguments of :func:`create_model`."""
    return create_model("shvit_s1", **arguments)


def shvit_s2(**arguments) -> SHViT:
    """SHViT-S2, for 224x224 images: 11.4 M parameters, 366 M multiply-adds. Arguments of :func:`create_model`."""
    return create_model("shvit_s2", **arguments)


def shvit_s3(**arguments) -> SHViT:
    """SHViT-S3, for 224x224 images: 14.2 M parameters, 601 M multiply-adds. Arguments of :func:`create_model`."""
    return create_model("shvit_s3", **arguments)


def shvit_s4(**arguments) -> SHViT:
    """SHViT-S4, for 256x256 images: 16.5 M parameters, 986 M multiply-adds. Arguments of :func:`create_model`."""
    return create_model("shvit_s4", **arguments)
