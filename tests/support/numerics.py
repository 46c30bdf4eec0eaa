"""The numerical contract of the kernels (design section 6), as one comparison that every parity test goes through:

max|kernel - truth| <= 2 * max|eager - truth| + 8 * u * S

The truth is ``eager`` in float64 on the upcast inputs; ``eager`` beside it runs NCHW-contiguous in the kernel's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shvit_kernels.backends import triton

Results = dict[str, Tensor]
"""Outputs by name, and gradients by the name of the input with a ``d`` in front."""


def device_of(backend: str) -> str:
    """The kind of device on which the tests run a backend."""
    on_gpu = backend == "cuda" or (backend == "triton" and not triton.INTERPRETED)
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


def set_tf32(convolutions: bool, products: bool) -> None:
    """PyTorch's settings for float32 on a GPU. Not all by ``fp32_precision``: ``torch.export`` would then fail."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for kind, on in ((torch.backends.cudnn.conv, convolutions), (torch.backends.cuda.matmul, products)):
        if on:
            kind.fp32_precision = "tf32"


@contextmanager
def filled_with_nan(device: str = "cpu") -> Iterator[None]:
    """Inside, fresh tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def tf32(convolutions: bool, products: bool) -> Iterator[None]:
    """TF32 as given inside, and none afterwards."""
    set_tf32(convolutions, products)
    try:
        yield
    finally:
        set_tf32(False, False)


def moved(t: Tensor, device: str) -> Tensor:
    """``t`` on a device, with its strides and the memory around it."""
    if t.device.type == device:
        return t
    whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@dataclass(frozen=True)
class Call:
    """A function of named tensors, and a gradient for each of its differentiable outputs."""

    function: Callable[..., Results]
    """Takes the inputs and ``backend`` by keyword, returns the outputs by name."""
    inputs: dict[str, Tensor | None]
    upstream: Results
    autocast: bool = False
    """Run under autocast in bfloat16, to which every input but ``x`` is then rounded."""

    def run(self, backend: str, needs: tuple[str, ...] | None = None) -> Results:
        """Outputs, and the gradients of the inputs in ``needs`` (by default of all) as they come from one backward."""
        needs = [name for name, t in self.inputs.items() if t is not None and (needs is None or name in needs)]
        device = device_of(backend)
        inputs = {
            k: t if t is None else moved(t.detach(), device).requires_grad_(k in needs) for k, t in self.inputs.items()
        }
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.autocast):
            outputs = self.function(**inputs, backend=backend)
        results = {k: t.detach() for k, t in outputs.items()}
        if needs:
            differentiated = [outputs[k] for k in self.upstream]
            upstream = [moved(t, device) for t in self.upstream.values()]
            grads = torch.autograd.grad(differentiated, [inputs[k] for k in needs], upstream)
            results |= {f"d{k}": g for k, g in zip(needs, grads, strict=True)}
        return {k: t.cpu() for k, t in results.items()}

    @property
    def rounded_by_autocast(self) -> set[str]:
        """Names of the inputs that autocast rounds; it leaves a float64 ``x`` and its parameters alone."""
        return set(self.inputs) - {"x"} if self.autocast and self.inputs["x"].dtype != torch.float64 else set()

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """The same call with every input and upstream gradient changed."""
        return replace(
            self,
            inputs={k: t if t is None else change(k, t) for k, t in self.inputs.items()},
            upstream={k: change(k, t) for k, t in self.upstream.items()},
        )

    def to(self, dtype: torch.dtype) -> Call:
        """The same call NCHW-contiguous in another type, on the values that the kernel sees."""
        rounded = self.rounded_by_autocast

        def convert(name: str, t: Tensor) -> Tensor:
            return (t.bfloat16() if name in rounded else t).to(dtype).contiguous()

        return replace(self.map(convert), autocast=False)


@dataclass(frozen=True)
class Expected:
    """What one result of a call must be, and how near."""

    value: Tensor  # float64
    bound: float
    dtype: torch.dtype


Exact = Callable[[Call], tuple[Results, dict[str, float]]]
"""From a call in float64 to its results and S of each result."""


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def largest(t: Tensor) -> float:
    """max|t|; 0 for an empty tensor, NaN if there is a NaN."""
    return t.abs().max().item() if t.numel() else 0.0


def distance(result: Tensor, value: Tensor) -> float:
    return largest(result.double() - value)


def per_image(call: Call) -> tuple[Results, dict[str, float]]:
    """Results of a call whose images are independent, and S: for a parameter's gradient, the sum over the images of the
    largest absolute value of the image's part; for everything else the largest absolute value of the whole."""
    per_token = {"x", *call.upstream}
    images = call.inputs["x"].shape[0]
    parts = [call.map(lambda k, t, b=b: t[b : b + 1] if k in per_token else t).run("eager") for b in range(images)]
    if not parts:
        results = call.run("eager")
        return results, dict.fromkeys(results, 0.0)
    whole = {*call.upstream, "dx"}
    results = {k: torch.cat([p[k] for p in parts]) if k in whole else sum(p[k] for p in parts) for k in parts[0]}
    sizes = {k: largest(t) if k in whole else sum(largest(p[k]) for p in parts) for k, t in results.items()}
    return results, sizes


def expect(call: Call, exact: Exact = per_image) -> dict[str, Expected]:
    """Every result of ``call`` as the specification has it, with its bound."""
    plain = call.map(lambda _, t: t.contiguous()).run("eager")
    values, sizes = exact(call.to(torch.float64))
    # The truth about float64 is rounded in float64 too, and BLAS sums there in longer chains than in float32, so
    # eager's error can only be guessed: at most 16 times 2^-29 of its error in float32, of which 2 are allowed. One
    # source makes the kernels of all types: the others hold the 2, here float32 in between would be 2^29 times off.
    if call.inputs["x"].dtype == torch.float64:
        factor, single = 32 * 2.0**-29, call.to(torch.float32)
        upcast = single.to(torch.float64).run("eager")
        errors = {k: distance(t, upcast[k]) for k, t in single.run("eager").items()}
    else:
        factor, errors = 2, {k: distance(t, values[k]) for k, t in plain.items()}
    rounded_by_autocast = {f"d{k}" for k in call.rounded_by_autocast}
    expected = {}
    for k, value in values.items():
        unit = unit_roundoff(torch.bfloat16 if k in rounded_by_autocast else plain[k].dtype)
        bound = factor * errors[k] + 8 * unit * sizes[k]
        assert bound < float("inf"), f"{k} has no bound: the specification is not finite here"
        expected[k] = Expected(value, bound, plain[k].dtype)
    return expected


def assert_parity(results: Results, expected: dict[str, Expected]) -> None:
    """Every result has its shape and type and lies within its bound."""
    wrong = []
    for name, result in results.items():
        e = expected[name]
        assert result.shape == e.value.shape, f"{name} has shape {tuple(result.shape)}, not {tuple(e.value.shape)}"
        assert result.dtype == e.dtype, f"{name} is {result.dtype}, not {e.dtype}"
        error = distance(result, e.value)
        if not error <= e.bound:  # so that NaN is wrong too
            wrong.append(f"{name} is {error:.3g} from the truth, its bound is {e.bound:.3g}")
    assert not wrong, "; ".join(wrong)


def assert_same_non_finite(result: Tensor, specified: Tensor) -> None:
    assert torch.equal(result.isnan(), specified.isnan()), "NaN is not where the specification has it"
    infinite = specified.isinf()
    assert torch.equal(result.isinf(), infinite), "infinity is not where the specification has it"
    assert torch.equal(result[infinite], specified[infinite]), "infinity has the other sign"
