"""Growth of peak resident memory, from just before a model is built to after its last batch, in a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import backends
from ..models import create_model
from ..models.shvit import IMAGE_SIZE
from . import peers
from .cases import CONTENDERS, EVALUATION, FOLDED, FUSE, ONNX_RUNTIME

VARIANT = "shvit_s4"
MEASURED = (FUSE, ONNX_RUNTIME)


def _images(variant: str, batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, IMAGE_SIZE[variant], IMAGE_SIZE[variant])


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would begin with the peak of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def print_growth(contender: str, variant: str, batches: int, batch: int, threads: int, file: str) -> None:
    """What the fresh process does; ``file`` is the ONNX file that a runtime reads."""
    torch.set_num_threads(threads)
    images = _images(variant, batch)
    peers.why_missing(*CONTENDERS[contender].needs)  # imports them
    before = _peak_resident()
    if contender == ONNX_RUNTIME:
        run = peers.onnx_runtime(Path(file), threads)
        images = images.numpy()
    else:
        run = CONTENDERS[contender].make(create_model(variant).eval(), EVALUATION)
    with torch.no_grad():
        for _ in range(batches):
            run(images)
    print(_peak_resident() - before)


def growth(variant: str, names: list[str], batches: int = 10, batch: int = 16) -> dict[str, Any]:
    """Bytes by contender, with the number of threads and the backend in force."""
    backend = backends.chosen_name(None)
    environment = os.environ | ({backends.ENVIRONMENT_VARIABLE: backend} if backend else {})
    found = {}
    with TemporaryDirectory() as directory:
        file = Path(directory) / "model.onnx"
        if ONNX_RUNTIME in names:
            peers.export(CONTENDERS[FOLDED].make(create_model(variant), EVALUATION), _images(variant, batch), file)
        for name in names:
            arguments = name, variant, batches, batch, torch.get_num_threads(), str(file)
            program = f"from shvit_kernels.bench.memory import print_growth; print_growth(*{arguments!r})"
            command = [sys.executable, "-c", program]
            child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = int(child.stdout.split()[-1])
    return {"name": variant, "batches": batches, "images": batch, "bytes": found}
