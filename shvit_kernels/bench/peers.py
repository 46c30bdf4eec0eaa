"""The runtimes that a user could pick instead: ONNX Runtime and OpenVINO, both from one ONNX file in float32.

OpenVINO computes in bfloat16 if asked to, ONNX Runtime has no kernels for it on the CPU.
"""

import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[np.ndarray], np.ndarray]
_EXPORT = "onnx", "onnxscript"
ONNX_RUNTIME_NEEDS = (*_EXPORT, "onnxruntime")
OPENVINO_NEEDS = (*_EXPORT, "openvino")
TIMM = "shvit_kernels.bench.timm_import"


def why_missing(*modules: str) -> str | None:
    """Why one of these modules does not import, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation raises what it likes
            return f"{type(error).__name__}: {error}"
    return None


def versions() -> dict[str, str | None]:
    """Versions of the peers; None for what is not installed."""
    found = {}
    for name in ("onnxruntime", "openvino", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def export(module: nn.Module, x: Tensor, path: Path) -> None:
    """Write what ``module`` computes in evaluation as ONNX, for inputs of the shape of ``x`` alone."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (x,), path, external_data=False, verbose=False)


def onnx_runtime(path: Path, threads: int, dtype: torch.dtype = torch.float32) -> Run:
    """An ONNX file under ONNX Runtime, in float32 whatever ``dtype`` is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def openvino(path: Path, threads: int, dtype: torch.dtype = torch.float32) -> Run:
    """An ONNX file under OpenVINO, which computes in float32 or bfloat16."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # By itself it takes bfloat16 where the processor has it.
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "ENABLE_CPU_PINNING": False,
        "ENABLE_HYPER_THREADING": True,  # else it takes fewer threads than it is given where two share a core
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0]


class Exported(nn.Module):
    """A module under a runtime, which takes it over at the first call, for inputs of that shape.

    Module and inputs are float32, ``dtype`` is what to compute in.
    """

    def __init__(self, module: nn.Module, load: Callable[[Path, int, torch.dtype], Run], dtype: torch.dtype):
        super().__init__()
        self.module = module
        self.load = load
        self.dtype = dtype
        self.run: Run | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.run is None:
            with TemporaryDirectory() as directory:
                path = Path(directory) / "model.onnx"
                export(self.module, x, path)
                self.run = self.load(path, torch.get_num_threads(), self.dtype)
        return torch.from_numpy(self.run(x.numpy()))
