"""The registry of backends and the choice between them (design section 4).

A backend is a module with

    name                                 what users write
    devices                              types of the devices whose tensors automatic choice gives to it
    why_unavailable()                    None, or one sentence: why it cannot run on this machine
    why_not(x, pdim=1, qk_dim=1)         None, or one sentence: why it cannot run this call
    shsa, partial_moments, shsa_train, shsa_eval, shsa_mixer, update_running_statistics
                                         the functions, as ``eager`` defines them, on validated arguments

``cpu`` and ``eager`` have ``mixer_train`` and ``mixer_eval`` too.
"""

import difflib
import os
import threading
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, cuda, eager, native, triton

ENVIRONMENT_VARIABLE = "SHVIT_KERNELS_BACKEND"

BACKENDS: dict[str, ModuleType] = {module.name: module for module in (cuda, triton, cpu, eager)}
"""Every backend by name, in the order of automatic choice.

``cuda`` before ``triton``: call by call it is predicted to win everywhere (benchmarks/results/predictions.md); no GPU
has measured both yet.
"""

# Read once: a look-up per call would cost as much as the rest of the choice.
_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or None


class _Override(threading.local):
    name: str | None = None

    def __init__(self):
        self.outer: list[str | None] = []
        """What the blocks that this thread is in replaced, outermost first."""


_override = _Override()


def unknown(kind: str, value: object, known: list[str]) -> str:
    """The message for a name that does not exist, with the nearest ones that do."""
    near = difflib.get_close_matches(str(value), known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown {kind} {value!r}: {hint}known are {', '.join(map(repr, known))}"


def get(name: str, source: str = "backend") -> ModuleType:
    """The backend called ``name``; ``ValueError`` with the known names otherwise."""
    if name not in BACKENDS:
        raise ValueError(unknown(source, name, list(BACKENDS)))
    return BACKENDS[name]


class use_backend:
    """Run every call in this ``with`` block, in this thread, on one backend.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"eager"`` (``shvit_kernels info`` lists them).

    A ``backend=`` argument at a call wins over this, and this wins over the environment variable
    ``SHVIT_KERNELS_BACKEND``, which is read when the package is imported. ``torch.compile`` and ``torch.export``
    keep the backend that was chosen when they traced the call.

    Raises:
        ValueError: if there is no such backend.
    """

    def __init__(self, name: str):
        get(name)
        self.name = name

    def __enter__(self) -> "use_backend":
        _override.outer.append(_override.name)
        _override.name = self.name
        return self

    def __exit__(self, *_) -> None:
        _override.name = _override.outer.pop()


class use_same_backend(use_backend):
    """Run every call in this ``with`` block, wherever it stands, as calls are run where this is made."""

    def __init__(self):
        self.name = _override.name


@cache
def _warn_of_missing_native(reason: str) -> None:
    warnings.warn(f"shvit_kernels runs without its compiled kernels: {reason}", stacklevel=4)


def is_traced_to_aten() -> bool:
    """Whether a tracer is watching that knows ATen's operators only (``torch.jit.trace``, ``torch.onnx.export``)."""
    # Both exporters to ONNX trace or compile, which is cheaper to ask.
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def chosen_name(name: str | None) -> str | None:
    """The backend that a call, a ``use_backend`` block or the environment names, in this order; None for no one."""
    return name or _override.name or _from_environment


def choose(x: Tensor, name: str | None, pdim: int = 1, qk_dim: int = 1) -> ModuleType:
    """The backend for a call on ``x``; sizes that are not given are no obstacle.

    By itself the specification for tracers that know ATen only, and under ``torch.func``, whose transforms would find
    no gradient of a bare operator.

    Raises:
        ValueError: if the name is unknown, or the named backend cannot run this call; the message says why.
    """
    named = chosen_name(name)
    if named is not None:
        source = "backend" if name or _override.name else f"backend in {ENVIRONMENT_VARIABLE}"
        backend = get(named, source)
        reason = backend.why_not(x, pdim, qk_dim)
        if reason is not None:
            raise ValueError(f"backend {named!r} cannot run this call: {reason}")
        return backend
    if is_traced_to_aten() or torch._C._are_functorch_transforms_active():
        return eager
    device = "cpu" if x.is_cpu else x.device.type  # to make a torch.device takes longer
    for backend in BACKENDS.values():
        if device in backend.devices and backend.why_not(x, pdim, qk_dim) is None:
            return backend
    if device == "cpu" and native.why_unavailable() is not None and not torch.compiler.is_compiling():
        _warn_of_missing_native(native.why_unavailable())
    return eager
