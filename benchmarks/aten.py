"""What PyTorch's own operators must do in a call, noted on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Tensors = dict[tuple[int, int], Tensor]
"""By storage and offset in it. They keep their storage, so that no other is taken for it."""


def tensors(values: object) -> Tensors:
    found = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {(t.untyped_storage()._cdata, t.storage_offset()): t for t in found}


def storages(several: list[Tensors]) -> set[int]:
    return {storage for each in several for storage, _ in each}


@dataclass(frozen=True)
class Launch:
    """An operator, or several merged into one."""

    read: Tensors
    written: Tensors
    operations: int
    """Of matrix products and convolutions; no other operator is limited by them."""

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for part in (self.read, self.written) for t in part.values())


class _Noting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        read, written = tensors((args, kwargs)), tensors(result)
        is_view = storages([written]) <= storages([read]) and not operator._schema.is_mutable
        if read and not is_view:
            count = flop_registry.get(operator._overloadpacket)
            self.launches.append(Launch(read, written, count(*args, **kwargs, out_val=result) if count else 0))
        return result


def noted(call: Callable[[], object]) -> list[Launch]:
    """Every operator of a call on tensors of device "meta"; views and fresh memory cost nothing."""
    with _Noting() as mode:
        call()
    return mode.launches


def merged(launches: list[Launch]) -> list[Launch]:
    """The least that is left to launch where matrix products and convolutions stay alone: every run of other operators
    between them becomes one, which reads once what others made and writes once what is not used up within."""
    runs: list[list[Launch]] = []
    for launch in launches:
        if launch.operations or not runs or runs[-1][0].operations:
            runs.append([])
        runs[-1].append(launch)
    found = []
    for i, run in enumerate(runs):
        made, used = storages([launch.written for launch in run]), storages([launch.read for launch in run])
        used -= storages([launch.read for later in runs[i + 1 :] for launch in later])
        read = {at: t for launch in run for at, t in launch.read.items() if at[0] not in made}
        written = {at: t for launch in run for at, t in launch.written.items() if at[0] not in used}
        found.append(Launch(read, written, run[0].operations))
    return found
