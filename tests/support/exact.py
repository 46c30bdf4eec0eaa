"""Exact results of calls whose images are not independent, and S of each (design section 6)."""

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


def of_training(case: Case) -> Exact:
    """Results in float64, and S of each.

    For a parameter's gradient that is the sum over images of the image's part with the batch statistics held constant,
    for through them gradients cancel, that of ``norm_bias`` to nothing. Every image gets parameters of its own for it.
    """

    def of(call: Call) -> tuple[Results, dict[str, float]]:
        results = call.run("eager")
        sizes = {k: largest(t) for k, t in results.items()}
        x, B = call.inputs["x"], case.B
        if not B:
            return results, sizes
        given = {k: t for k, t in call.inputs.items() if k != "x" and t is not None}
        own = {k: t.expand(B, *t.shape).clone().requires_grad_() for k, t in given.items()}
        z = x[:, : case.P]
        if "norm_weight" in own:
            z = F.group_norm(z, 1) * own["norm_weight"][:, :, None, None]
        if "norm_bias" in own:
            z = z + own["norm_bias"][:, :, None, None]
        projected = own["weight"] @ z.flatten(2)
        variance, mean = torch.var_mean(projected.detach(), (0, 2), correction=0, keepdim=True)
        qkv = (projected - mean) / (variance + 1e-5).sqrt()
        if "bn_weight" in own:
            qkv = qkv * own["bn_weight"][:, :, None] + own["bn_bias"][:, :, None]
        q, k, v = qkv.split([case.D, case.D, case.P], dim=1)
        attended = v @ (q.mT @ k * case.D**-0.5).softmax(-1).mT
        y = torch.cat([attended, x[:, case.P :].flatten(2)], 1).view_as(x)
        y = y.relu() if case.relu else y
        grads = torch.autograd.grad(y, list(own.values()), call.upstream["y"])
        for name, parts in zip(own, grads, strict=True):
            sizes[f"d{name}"] = sum(largest(part) for part in parts)
        assert largest(y.detach() - results["y"]) <= 1e-9 * sizes["y"]  # it is the same function
        sizes["mean"] = largest(projected.detach().abs().mean((0, 2)))
        return results, sizes

    return of
