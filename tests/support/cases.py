"""The cases of the parity tests: a pairwise covering set and named corners, and their tensors."""

import itertools
import random
import zlib
from dataclasses import astuple, dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from shvit_kernels import backends, functional
from shvit_kernels.ops import sum_dtype

from .numerics import Call, Results, unit_roundoff

# Every pair of values of two axes occurs in a case; the first value of each is the plainest.
AXES = {
    "P": (48, 1, 7, 32, 66, 68, 75, 96, 130),
    "D": (16, 1, 8, 24, 64),
    "N": (49, 1, 16, 64, 196, 256, 257, 1050, 4096),
    "beyond": (37, 0),
    "B": (2, 0, 1, 17),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
    "layout": ("nchw", "channels_last"),
    "strides": ("dense", "sliced", "expanded", "permuted"),
    "needs": ("all", "x", "parameters", "norm", "qkv_weight", "qkv_bias"),
    "norm": ("affine", "weight", "none"),
    "bias": (True, False),
    "relu": (True, False),
    "autocast": (False, True),
}
STRIDES = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "sliced": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}
"""A parameter in memory as kernels do not read it."""
MOST_LOGITS = 2**25  # B * N^2: what the reference can hold

_SIDES = {n * n: (n, n) for n in (1, 4, 7, 8, 14, 16, 64)} | {1050: (25, 42)}


@dataclass(frozen=True)
class Case:
    """One call of ``shsa``; ``beyond`` = C - P."""

    P: int = 48
    D: int = 16
    N: int = 49
    beyond: int = 37
    B: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    strides: str = "dense"
    needs: str = "all"
    norm: str = "affine"
    bias: bool = True
    relu: bool = True
    autocast: bool = False

    def __str__(self) -> str:
        words = [f"B{self.B}-P{self.P}+{self.beyond}-D{self.D}-N{self.N}", str(self.dtype).removeprefix("torch.")]
        plain = Case()
        for name in ("layout", "strides", "needs"):
            if getattr(self, name) != getattr(plain, name):
                words.append(getattr(self, name))
        if self.norm != "affine":
            words.append({"weight": "norm_without_bias", "none": "no_norm"}[self.norm])
        words += ["no_bias"] * (not self.bias) + ["no_relu"] * (not self.relu) + ["autocast"] * self.autocast
        return "-".join(words)

    @property
    def sides(self) -> tuple[int, int]:
        return _SIDES.get(self.N, (self.N, 1))

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast and self.dtype != torch.float64 else self.dtype

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of the inputs whose gradient is asked for."""
        return {
            "all": ("x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias"),
            "parameters": ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias"),
            "norm": ("norm_weight", "norm_bias"),
        }.get(self.needs, (self.needs,))


def _fits(case: Case) -> bool:
    return case.B * case.N**2 <= MOST_LOGITS


def _pairs(case: Case) -> set:
    """The pairs of values that a case proves something about: without images, only those with B = 0."""
    values = list(zip(AXES, astuple(case), strict=True))
    pairs = set(itertools.combinations(values, 2))
    return pairs if case.B else {p for p in pairs if ("B", 0) in p}


def _possible_pairs() -> set:
    pairs = set()
    for (a, values_a), (b, values_b) in itertools.combinations(AXES.items(), 2):
        pairs |= {((a, u), (b, v)) for u in values_a for v in values_b if _fits(replace(Case(B=1), **{a: u, b: v}))}
    return pairs


def covering_set(**fixed) -> list[Case]:
    """Cases in which every possible pair of values of two axes occurs; greedy, the same in every run.

    ``fixed`` narrows axes to the values given.
    """
    axes = {name: fixed.get(name, values) for name, values in AXES.items()}
    allowed = {(name, value) for name, values in axes.items() for value in values}
    missing = {pair for pair in _possible_pairs() if set(pair) <= allowed}
    choose = random.Random(0)
    cases = []
    while missing:
        (a, u), (b, v) = min(missing, key=str)
        candidates = []
        while len(candidates) < 60:
            values = {name: choose.choice(values) for name, values in axes.items()} | {a: u, b: v}
            if ("B", 0) not in {(a, u), (b, v)} and not values["B"]:
                continue
            candidate = Case(**values)
            if _fits(candidate):
                candidates.append(candidate)
        # Among equally useful cases the one with the least work.
        best = max(candidates, key=lambda c: (len(_pairs(c) & missing), -c.B * c.N**2))
        missing -= _pairs(best)
        cases.append(best)
    return cases


CORNERS = {
    **{
        f"{name}_stage": Case(P=P, N=N, beyond=C - P, B=2)
        for name, C, P, N in (("s1_second", 224, 48, 49), ("s3_second", 352, 75, 49), ("s4_second", 336, 72, 64))
    },
    "third_stage_channels_last": Case(P=96, N=16, beyond=352, layout="channels_last"),
    "one_of_everything": Case(P=1, D=1, N=1, beyond=0, B=1),
    "one_channel_many_tokens": Case(P=1, D=1, N=1050, beyond=1, B=1),
    "one_token_float64": Case(P=7, N=1, B=17, dtype=torch.float64),
    "wide_query": Case(P=130, D=64, N=196, norm="none", bias=False, relu=False),
    "detection_tokens_bfloat16": Case(P=66, N=1050, dtype=torch.bfloat16, layout="channels_last"),
    "longest": Case(P=75, D=24, N=4096, B=1, beyond=0),
    "past_one_block": Case(P=68, N=257, B=17, strides="permuted", relu=False),
    "empty_batch": Case(B=0),
    "empty_batch_channels_last_float64": Case(B=0, dtype=torch.float64, layout="channels_last"),
    "autocast_float32": Case(autocast=True),
    "autocast_bfloat16": Case(autocast=True, dtype=torch.bfloat16, layout="channels_last"),
    "autocast_leaves_float64": Case(autocast=True, dtype=torch.float64),
    "all_channels_bfloat16": Case(P=75, beyond=0, dtype=torch.bfloat16, layout="channels_last", strides="sliced"),
}


def named(cases: list[Case]) -> dict[str, Case]:
    return {str(case): case for case in cases}


def strided(case: Case, generator: torch.Generator) -> Tensor:
    """Random ``x`` with the layout and strides of the case."""
    B, C, (H, W) = case.B, case.P + case.beyond, case.sides
    last = case.layout == "channels_last"

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(case.dtype)

    if case.strides == "dense":
        return random(B, H, W, C).permute(0, 3, 1, 2) if last else random(B, C, H, W)
    if case.strides == "sliced":
        if last:
            return random(B, H, W, C + 5).permute(0, 3, 1, 2)[:, 3 : C + 3]
        return random(B, C, H + 1, W + 2)[:, :, 1:, 1 : W + 1]
    if case.strides == "expanded":
        one = random(1, H, W, C).permute(0, 3, 1, 2) if last else random(1, C, H, W)
        return one.expand(B, C, H, W)
    # Permuted: no format of PyTorch, with and without neighbouring channels.
    return random(H, B, W, C).permute(1, 3, 0, 2) if last else random(B, W, C, H).permute(0, 2, 3, 1)


def parameters(case: Case, generator: torch.Generator) -> dict[str, Tensor | None]:
    """Random parameters under the names of ``shsa``; attention is neither uniform nor one-hot."""
    P, O = case.P, 2 * case.D + case.P

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = {
        "norm_weight": 0.5 + torch.rand(P, generator=generator, dtype=torch.float64),
        "norm_bias": 0.2 * random(P),
        "qkv_weight": 1.5 * random(O, P) / P**0.5,
        "qkv_bias": 0.2 * random(O),
    }
    absent = {"affine": (), "weight": ("norm_bias",), "none": ("norm_weight", "norm_bias")}[case.norm]
    absent += () if case.bias else ("qkv_bias",)
    return {k: None if k in absent else t.to(case.parameter_dtype) for k, t in values.items()}


def generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))


def shsa_call(case: Case, **changes) -> Call:
    """``functional.shsa`` on the tensors of the case; ``changes`` are further arguments."""
    source = generator(case)
    x = strided(case, source)
    inputs = {"x": x, **parameters(case, source)}
    dy = torch.randn(x.shape, generator=source, dtype=torch.float64).to(case.dtype)

    def function(x: Tensor, relu: bool = case.relu, **rest) -> Results:
        return {"y": functional.shsa(x, qk_dim=case.D, relu=relu, **changes, **rest)}

    call = Call(function, inputs, {"y": dy}, autocast=case.autocast)
    return away_from_the_edge(call, case)


def away_from_the_edge(call: Call, case: Case) -> Call:
    """The call without gradients where ReLU's input is nearly zero.

    Rounding decides there on which side a value falls, and the error of its gradient is then the gradient itself:
    eager's own such errors would make every bound too wide to show anything.
    """
    if case.relu and case.B:
        linear = replace(call, function=partial(call.function, relu=False)).to(torch.float64)
        before = linear.run("eager", ())["y"]
        call.upstream["y"][before.abs() <= 16 * unit_roundoff(case.dtype) * before.abs().max()] = 0.0
    return call


def train_inputs(case: Case, source: torch.Generator) -> dict[str, Tensor | None]:
    """Random tensors under the names of ``shsa_train``; its batch normalisation is affine if the case has a bias."""
    x = strided(case, source)
    drawn = parameters(case, source)
    inputs = {"x": x, **{k: drawn[k] for k in ("norm_weight", "norm_bias")}, "weight": drawn["qkv_weight"]}
    inputs["bn_weight"] = None if drawn["qkv_bias"] is None else drawn["qkv_bias"] + 1
    inputs["bn_bias"] = drawn["qkv_bias"]
    return inputs


def train_call(case: Case) -> Call:
    """``shsa_train``, the operator of a layer in training, on the tensors of the case; its ``bias`` is "affine"."""
    source = generator(case)
    inputs = train_inputs(case, source)
    dy = torch.randn(inputs["x"].shape, generator=source, dtype=torch.float64).to(case.dtype)

    def function(x: Tensor, backend: str, relu: bool = case.relu, **rest) -> Results:
        settings = (case.D, 1e-5, 1e-5, case.D**-0.5, relu, False, False)
        y, mean, variance = backends.get(backend).shsa_train(x, *rest.values(), *settings)
        return {"y": y, "mean": mean, "variance": variance}

    return away_from_the_edge(Call(function, inputs, {"y": dy}), case)


def mixer_train_call(case: Case, residual: bool = True, epsilons: tuple[float, float, float] = (1e-5,) * 3) -> Call:
    """``mixer_train``, the operator of a whole layer in training, on the tensors of the case; ``bias`` is "affine".

    Drawn anew until attention's output keeps away from zero, where rounding would decide about ReLU's gradient.
    """
    affine, C = case.bias, case.P + case.beyond
    source = generator(case)
    while True:
        inputs = train_inputs(case, source)
        settings = (case.D, 1e-5, 1e-5, case.D**-0.5, False, False, False)
        wide = [t if t is None else t.double() for t in inputs.values()]
        y1 = backends.get("eager").shsa_train(*wide, *settings)[0][:, : case.P]
        if not case.B or y1.abs().min() > 4 * unit_roundoff(case.dtype) * y1.abs().max():
            break
    drawn = {
        "proj_weight": torch.randn(C, C, generator=source, dtype=torch.float64) / C**0.5,
        "proj_bn_weight": 0.5 + torch.rand(C, generator=source, dtype=torch.float64) if affine else None,
        "proj_bn_bias": 0.2 * torch.randn(C, generator=source, dtype=torch.float64) if affine else None,
    }
    inputs |= {k: t if t is None else t.to(case.parameter_dtype) for k, t in drawn.items()}
    dout = torch.randn(inputs["x"].shape, generator=source, dtype=torch.float64).to(case.dtype)

    def function(x: Tensor, backend: str, **rest) -> Results:
        settings = (case.D, *epsilons, case.D**-0.5, residual)
        # With a momentum of 1, running statistics are those of the batch, but for the unbiased variance.
        sizes = (rest["weight"].shape[0], C)
        running = [[x.new_zeros(size, dtype=sum_dtype(x.dtype)) for _ in range(2)] for size in sizes]
        updated = (a for mean, var in running for a in (mean, var, None, 1.0))
        out = backends.get(backend).mixer_train(x, *rest.values(), *settings, *updated)
        biased = max(x[:, 0].numel() - 1, 0) / max(x[:, 0].numel(), 1)
        (mean, var), (proj_mean, proj_var) = running
        variances = {"variance": var * biased, "proj_variance": proj_var * biased}
        return {"out": out, "mean": mean, "proj_mean": proj_mean} | variances

    return Call(function, inputs, {"out": dout})


BATCH_NORMS = ("affine", "not_affine", "none")
"""What may stand behind the convolutions of a layer in evaluation; "none" in a fused layer."""


def running_norm(prefix: str, width: int, kind: str, source: torch.Generator) -> dict[str, Tensor | None]:
    """Random parameters and statistics of a batch normalisation, one of ``BATCH_NORMS``."""
    values = {
        "weight": 0.5 + torch.rand(width, generator=source, dtype=torch.float64),
        "bias": 0.2 * torch.randn(width, generator=source, dtype=torch.float64),
        "mean": torch.randn(width, generator=source, dtype=torch.float64),
        "var": 0.5 + torch.rand(width, generator=source, dtype=torch.float64),
    }
    absent = {"affine": (), "not_affine": ("weight", "bias"), "none": tuple(values)}[kind]
    return {f"{prefix}bn_{k}": None if k in absent else t for k, t in values.items()}


def eval_call(case: Case, batch_norm: str = "affine") -> Call:
    """``shsa_eval``, the operator of a layer in evaluation, on the tensors of the case.

    ``batch_norm`` is one of ``BATCH_NORMS``; ``bias`` is the convolution's.
    """
    source = generator(case)
    inputs = eval_inputs(case, batch_norm, source)
    dy = torch.randn(inputs["x"].shape, generator=source, dtype=torch.float64).to(case.dtype)

    def function(x: Tensor, backend: str, relu: bool = case.relu, **rest) -> Results:
        settings = (case.D, 1e-5, 1e-5, case.D**-0.5, relu, False, False)
        return {"y": backends.get(backend).shsa_eval(x, *rest.values(), *settings)}

    return away_from_the_edge(Call(function, inputs, {"y": dy}), case)


def eval_inputs(case: Case, batch_norm: str, source: torch.Generator) -> dict[str, Tensor | None]:
    """Random tensors under the names of ``shsa_eval``."""
    x = strided(case, source)
    drawn = parameters(case, source)
    inputs = {"x": x, **{k: drawn[k] for k in ("norm_weight", "norm_bias")}}
    inputs |= {"weight": drawn["qkv_weight"], "bias": drawn["qkv_bias"]}
    statistics = running_norm("", 2 * case.D + case.P, batch_norm, source)
    return inputs | {k: t if t is None else t.to(case.dtype) for k, t in statistics.items()}


def projection(case: Case, source: torch.Generator) -> dict[str, Tensor | None]:
    """Weight and bias of the projection behind the attention; a case without bias has none here either."""
    C = case.P + case.beyond
    return {
        "proj_weight": torch.randn(C, C, generator=source, dtype=torch.float64) / C**0.5,
        "proj_bias": 0.2 * torch.randn(C, generator=source, dtype=torch.float64) if case.bias else None,
    }


def mixer_eval_call(
    case: Case,
    batch_norm: str = "affine",
    proj_batch_norm: str = "affine",
    residual: bool = True,
    epsilons: tuple[float, float, float] = (1e-5,) * 3,
) -> Call:
    """``mixer_eval``, the operator of a whole layer in evaluation, on the tensors of the case."""
    source = generator(case)
    inputs = eval_inputs(case, batch_norm, source)
    more = projection(case, source) | running_norm("proj_", case.P + case.beyond, proj_batch_norm, source)
    inputs |= {k: t if t is None else t.to(case.dtype) for k, t in more.items()}
    dy = torch.randn(inputs["x"].shape, generator=source, dtype=torch.float64).to(case.dtype)

    def function(x: Tensor, backend: str, **rest) -> Results:
        settings = (case.D, *epsilons, case.D**-0.5, residual)
        return {"y": backends.get(backend).mixer_eval(x, *rest.values(), *settings)}

    return Call(function, inputs, {"y": dy})


def mixer_call(case: Case) -> Call:
    """``functional.shsa_mixer`` on the tensors of the case."""
    source = generator(case)
    x = strided(case, source)
    inputs = {"x": x, **parameters(case, source)}
    inputs |= {k: t if t is None else t.to(case.parameter_dtype) for k, t in projection(case, source).items()}
    dy = torch.randn(x.shape, generator=source, dtype=torch.float64).to(case.dtype)

    def function(**named) -> Results:
        return {"y": functional.shsa_mixer(qk_dim=case.D, **named)}

    return Call(function, inputs, {"y": dy}, autocast=case.autocast)


def moments_call(case: Case) -> Call:
    """``functional.partial_moments`` on the tensors of the case."""
    source = generator(case)
    x = strided(case, source)
    norm = {k: t for k, t in parameters(case, source).items() if k.startswith("norm")}
    dtype = torch.promote_types(case.dtype, torch.float32)
    upstream = {
        "mean": torch.randn(case.P, generator=source, dtype=torch.float64).to(dtype),
        "cov": torch.randn(case.P, case.P, generator=source, dtype=torch.float64).to(dtype),
    }

    def function(x: Tensor, **rest) -> Results:
        _, mean, cov = functional.partial_moments(x, pdim=case.P, **rest)
        return {"mean": mean, "cov": cov}

    return Call(function, {"x": x, **norm}, upstream, autocast=case.autocast)


assert [field.name for field in fields(Case)] == list(AXES)
