"""Calls every operator of a backend once per type and branch on small tensors: what compute-sanitizer watches.

python -m benchmarks.every_operator BACKEND
"""

import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from shvit_kernels import backends

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Partial channels, channels, height, width, images: ragged and whole short images, several to a block, and long ones.
SHAPES = ((66, 70, 7, 7, 3), (96, 128, 4, 4, 5), (72, 88, 8, 8, 2), (48, 56, 16, 17, 1))
FORMATS = (torch.contiguous_format, torch.channels_last)
QK_DIM, EPS = 16, 1e-5


def parameters(C: int, P: int, dtype: torch.dtype) -> dict[str, Tensor]:
    O = 2 * QK_DIM + P
    shapes = {
        "norm_weight": (P,),
        "norm_bias": (P,),
        "weight": (O, P),
        "bias": (O,),
        "bn_weight": (O,),
        "bn_bias": (O,),
        "bn_mean": (O,),
        "bn_var": (O,),
        "proj_weight": (C, C),
        "proj_bias": (C,),
    }
    # Drawn and changed on the CPU: on the device only our kernels are of interest.
    return {k: (torch.rand(s) / s[-1] ** 0.5).to(dtype).cuda().requires_grad_() for k, s in shapes.items()}


def calls(backend: str, x: Tensor, p: dict[str, Tensor], P: int, tf32: bool) -> dict[str, Callable[[], object]]:
    module = backends.get(backend)
    norm = p["norm_weight"], p["norm_bias"]
    projection = p["weight"], p["bias"]
    trained = [p[k] for k in ("weight", "bn_weight", "bn_bias")]
    statistics = [p[k] for k in ("bn_weight", "bn_bias", "bn_mean", "bn_var")]
    settings = QK_DIM**-0.5, True, tf32, tf32

    def backward(outputs: tuple[Tensor, ...], *inputs: Tensor) -> None:
        torch.autograd.grad(outputs, inputs, [torch.rand(t.shape).to(t.dtype).cuda() for t in outputs])

    def shsa() -> None:
        backward((module.shsa(x, *norm, *projection, QK_DIM, EPS, *settings),), x, *norm, *projection)

    def partial_moments() -> None:
        backward(module.partial_moments(x, *norm, P, EPS), x, *norm)

    def shsa_train() -> None:
        y, *_ = module.shsa_train(x, *norm, *trained, QK_DIM, EPS, EPS, *settings)
        backward((y,), x, *norm, *trained)

    @torch.no_grad()
    def shsa_eval() -> None:
        module.shsa_eval(x, *norm, *projection, *statistics, QK_DIM, EPS, EPS, *settings)

    @torch.no_grad()
    def shsa_mixer() -> None:
        last = p["proj_weight"], p["proj_bias"]
        module.shsa_mixer(x, *norm, *projection, *last, QK_DIM, EPS, QK_DIM**-0.5, tf32, tf32)

    def update_running_statistics() -> None:
        batches, (mean, variance) = torch.zeros((), dtype=torch.int64).cuda(), torch.rand(2, len(p["bias"])).cuda()
        running = p["bn_mean"].detach(), p["bn_var"].detach()
        module.update_running_statistics(*running, batches, mean, variance, x.shape[0], 0.1)

    operators = (shsa, partial_moments, shsa_train, shsa_eval, shsa_mixer, update_running_statistics)
    return {f.__name__: f for f in operators}


def main(backend: str) -> None:
    reason = backends.get(backend).why_unavailable()
    if reason is not None:
        sys.exit(f"{backend} cannot run: {reason}")
    torch.manual_seed(0)
    failed = False
    for dtype, (P, C, height, width, B), layout in itertools.product(DTYPES, SHAPES, FORMATS):
        x = torch.randn(B, C, height, width).to(dtype).contiguous(memory_format=layout).cuda().requires_grad_()
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            for name, call in calls(backend, x, parameters(C, P, dtype), P, tf32).items():
                what = f"{name}: {dtype}, {list(x.shape)}, {layout}, TF32 {tf32}"
                try:
                    call()
                    torch.cuda.synchronize()
                    print(what, flush=True)
                except RuntimeError as error:  # the others are still worth a look
                    failed = True
                    print(f"{what}: {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1])
