"""Arguments of the operators themselves, as their schemas have them."""

from collections.abc import Callable

import torch
from torch import Tensor

from shvit_kernels import ops

from .cases import Case, eval_call, mixer_call, moments_call, shsa_call, train_call
from .numerics import moved

EPS, SCALE = 1e-5, 0.5


class Arguments:
    """Arguments of each operator of a family, in one or more calls of a case, on a device; on CPUs none of
    ``shsa_mixer``, for which ``mixer_eval`` stands there."""

    def __init__(self, family: str, device: str = "cpu"):
        self.operators, self.device = ops.FAMILIES[family], device

    def of(self, name: str, case: Case) -> list[tuple]:
        return getattr(self, name)(case)

    def _inputs(self, make: Callable, *arguments) -> list[Tensor | None]:
        return [t if t is None else moved(t, self.device) for t in make(*arguments).inputs.values()]

    def shsa_forward(self, case: Case) -> list[tuple]:
        return [(*self._inputs(shsa_call, case), case.D, EPS, SCALE, case.relu, False, False)]

    def shsa_backward(self, case: Case) -> list[tuple]:
        ((x, *rest),) = self.shsa_forward(case)
        saved = self.operators["shsa_forward"](x, *rest)
        given = (torch.randn_like(x), copy_of_x1(x, case.P), *saved, *rest)
        return [(*given, needs) for needs in ([True] * 5, [True, False, True, False, True])]

    def partial_moments_forward(self, case: Case) -> list[tuple]:
        return [(*self._inputs(moments_call, case), case.P, EPS)]

    def partial_moments_backward(self, case: Case) -> list[tuple]:
        ((x, *norm, P, eps),) = self.partial_moments_forward(case)
        mean, cov, *images = self.operators["partial_moments_forward"](x, *norm, P, eps)
        given = (torch.randn_like(mean), torch.randn_like(cov), copy_of_x1(x, P), mean, *images, *norm, x.shape[1])
        return [(*given, needs) for needs in ([True] * 3, [False, True, False])]

    def shsa_train_forward(self, case: Case) -> list[tuple]:
        return [(*self._inputs(train_call, case), case.D, EPS, EPS, SCALE, case.relu, False, False)]

    def shsa_train_backward(self, case: Case) -> list[tuple]:
        ((x, *rest),) = self.shsa_train_forward(case)
        given = (torch.randn_like(x), *self.operators["shsa_train_forward"](x, *rest), *rest)
        return [(*given, needs) for needs in ([True] * 6, [False, True, False, True, False, True])]

    def shsa_eval(self, case: Case) -> list[tuple]:
        settings = (case.D, EPS, EPS, SCALE, case.relu, False, False)
        return [(*self._inputs(eval_call, case, kind), *settings) for kind in ("affine", "not_affine", "none")]

    def shsa_mixer(self, case: Case) -> list[tuple]:
        return [(*self._inputs(mixer_call, case), case.D, EPS, SCALE, False, False)]

    def update_running_statistics(self, case: Case) -> list[tuple]:
        O, dtype = 2 * case.D + case.P, ops.sum_dtype(case.dtype)
        running_mean, running_var, mean, variance = torch.rand(4, O, dtype=dtype, device=self.device)
        batches = torch.tensor([3], device=self.device)
        count = case.B * case.N
        return [(running_mean, running_var, batches, mean, variance, count, momentum) for momentum in (0.1, None)]


NAMES = [name for name in vars(Arguments) if not name.startswith("_") and name != "of"]
OF_IMAGES = [name for name in NAMES if name != "update_running_statistics"]


def copy_of_x1(x: Tensor, P: int) -> Tensor:
    return x[:, :P].clone(memory_format=ops.memory_format(x))


def operators_called(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> set[str]:
    """The operators of this library in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(x)
    return {event.name for event in profile.events() if event.name.startswith("shvit_kernels::")}
