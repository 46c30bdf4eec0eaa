"""Exact results of calls whose images are not independent, and S of each (design section 6)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from shvit_kernels import functional

from .cases import Case
from .numerics import Call, Exact, Results, largest


def of_moments(call: Call) -> tuple[Results, dict[str, float]]:
    """Results in float64 and S of each: of the mean the largest average |z| of a channel; of a parameter's gradient the
    sum over images of the largest absolute value of the image's part."""
    results = call.run("eager")
    x, weight, bias = (call.inputs[k] for k in ("x", "norm_weight", "norm_bias"))
    P, B = call.upstream["mean"].shape[0], x.shape[0]
    z = x[:, :P]
    own = {}  # every image with parameters of its own, for its part of their gradients
    if weight is not None:
        z = F.group_norm(z, 1) if z.numel() > 1 else torch.zeros_like(z)
        own = {k: t.expand(B, P).clone().requires_grad_() for k, t in call.inputs.items() if k != "x" and t is not None}
        z = z * own["norm_weight"][:, :, None, None]
        if bias is not None:
            z = z + own["norm_bias"][:, :, None, None]
    sizes = {k: largest(t) for k, t in results.items()}
    if weight is not None and P * x.shape[2] * x.shape[3] == 1:
        # The only value is its own mean: dx is a difference of equals, large for want of a variance, and zero in truth.
        sizes["dx"] = 1e-5**-0.5 * largest(weight) * largest(call.upstream["mean"])
    sizes["mean"] = largest(z.detach().abs().mean((0, 2, 3))) if B else 0.0
    if own:
        _, mean, cov = functional.partial_moments(z, None, None, pdim=P, backend="eager")
        grads = torch.autograd.grad([mean, cov], list(own.values()), [call.upstream["mean"], call.upstream["cov"]])
        sizes |= {f"d{k}": sum(largest(part) for part in g) for k, g in zip(own, grads, strict=True)}
    return results, sizes


def _own_parameters(case: Case, call: Call) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """Parameters of its own for every image, and with them attention before ReLU and S of the projection's mean.

    Batch statistics are constants.
    """
    x = call.inputs["x"]
    given = {k: t for k, t in call.inputs.items() if k != "x" and t is not None}
    own = {k: t.expand(case.B, *t.shape).clone().requires_grad_() for k, t in given.items()}
    z = x[:, : case.P]
    if "norm_weight" in own:
        z = F.group_norm(z, 1) * own["norm_weight"][:, :, None, None]
    if "norm_bias" in own:
        z = z + own["norm_bias"][:, :, None, None]
    projected = own["weight"] @ z.flatten(2)
    qkv = _batch_normed(projected, own.get("bn_weight"), own.get("bn_bias"))
    q, k, v = qkv.split([case.D, case.D, case.P], dim=1)
    attended = v @ (q.mT @ k * case.D**-0.5).softmax(-1).mT
    return own, torch.cat([attended, x[:, case.P :].flatten(2)], 1), _typical(projected)


def _batch_normed(projected: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    variance, mean = torch.var_mean(projected.detach(), (0, 2), correction=0, keepdim=True)
    normal = (projected - mean) / (variance + 1e-5).sqrt()
    return normal if weight is None else normal * weight[:, :, None] + bias[:, :, None]


def _typical(projected: torch.Tensor) -> float:
    """S of a mean: the largest average of absolute values."""
    return largest(projected.detach().abs().mean((0, 2)))


def _of(case: Case, result: str, again: Callable[[Call, Results, torch.Tensor], tuple]) -> Exact:
    """``again`` makes the result of this name, and what other S there are, from each image's own parameters and its
    attention before ReLU."""

    def of(call: Call) -> tuple[Results, dict[str, float]]:
        results = call.run("eager")
        sizes = {k: largest(t) for k, t in results.items()}
        if not case.B:
            return results, sizes
        own, y, sizes["mean"] = _own_parameters(case, call)
        made, others = again(call, own, y)
        grads = torch.autograd.grad(made, list(own.values()), call.upstream[result])
        for name, parts in zip(own, grads, strict=True):
            sizes[f"d{name}"] = sum(largest(part) for part in parts)
        assert largest(made.detach() - results[result]) <= 1e-9 * sizes[result]  # it is the same function
        return results, sizes | others

    return of


def of_training(case: Case) -> Exact:
    """Results in float64, and S of each.

    For a parameter's gradient that is the sum over images of the image's part with the batch statistics held constant,
    for through them gradients cancel, that of ``norm_bias`` to nothing. Every image gets parameters of its own for it.
    """

    def again(call: Call, own: Results, y: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return (y.relu() if case.relu else y).view_as(call.inputs["x"]), {}

    return _of(case, "y", again)


def of_mixer_training(case: Case, residual: bool) -> Exact:
    """Results of ``mixer_train`` in float64, and S of each, as for :func:`of_training`."""

    def again(call: Call, own: Results, y: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        projected = own["proj_weight"] @ y.relu()
        out = _batch_normed(projected, own.get("proj_bn_weight"), own.get("proj_bn_bias"))
        out = out.view_as(call.inputs["x"]) + (call.inputs["x"] if residual else 0)
        return out, {"proj_mean": _typical(projected)}

    return _of(case, "out", again)
