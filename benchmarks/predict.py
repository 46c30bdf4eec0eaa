"""Predicts the time of each GPU kernel on an H100 from bytes, operations and launches, and prints the Markdown tables.

    python -m benchmarks.predict > benchmarks/results/predictions.md

The times are a model of what the operators must do, written before any measurement on a GPU. What a kernel asks for is
read off the kernels. CUDA: blocks, threads and shared memory from their launches, noted by the hosted tier, and
registers from their builds by nvcc, kept by the compiled tier. Triton: launches from calls of the operators on tensors
without memory, registers and shared memory from builds of what was launched at the largest batch.

A kernel takes ``launch + max(bytes / bandwidth, operations / rate, waves * chain)``: one launch inside a CUDA graph,
the memory traffic that cannot be avoided, the tensor cores, and the serial path of one block (load, reductions,
products, store) times the number of times that the multiprocessors must be filled. The largest term is the limiter.

What the kernels replace is predicted alike from the operators that the stock layer calls (:mod:`benchmarks.aten`), with
the serial path of a copy for each.

Outside a graph the host makes every launch, and a call takes ``max(sum of its kernels, HOST)``. The host's times need
no GPU: ``python -m benchmarks.predict host`` measures them.
"""

from __future__ import annotations

import math
import sys
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from shvit_kernels import backends, ops
from shvit_kernels.bench import cases
from shvit_kernels.models.shvit import IMAGE_SIZE, VARIANTS
from tests.support import cuda_builds, cuda_hosted, triton_builds

from . import aten

QK_DIM = 16

MULTIPROCESSORS = 132
BANDWIDTH = 3.0e6  # bytes per microsecond, read plus written: a large copy on this device
TENSOR_RATE = 300e6  # 16-bit operations per microsecond that short chains of mma.sync reach: 0.3 of the peak
SPLIT_RATE = TENSOR_RATE / 6  # nearly exact products: three in TF32, each at half the rate
SIMPLE_RATE = 30e6  # float32 operations per microsecond outside tensor cores, 0.5 of the peak
LAUNCH = 2.0  # microseconds between two dependent small kernels of a graph
ROUND = 0.7  # microseconds of a round of loads from L2; the sums of parts take 64 of them a round
COPY = 1.5  # microseconds in which a block loads and stores
HALF, FLOAT = 2, 4  # bytes
BATCHES = (1, 32, 256)
SHOWN = BATCHES[-1]
ARCHITECTURE, TRITON_TARGET = "90a", "sm_90"
OPERATIONS = {
    "shsa": ("shsa_forward",),
    "evaluation": ("shsa_eval",),
    "training step": ("shsa_train_forward", "shsa_train_backward"),
    "shsa_mixer": ("shsa_mixer",),
}
"""Those that the backends are compared in, from split to ReLU but for the last, with their operators."""
HOST = {
    "cuda": {"shsa": 10, "evaluation": 7, "training step": 45, "shsa_mixer": 7},
    "triton": {"shsa": 44, "evaluation": 39, "training step": 216, "shsa_mixer": 55},
}
"""Microseconds of the host for a call, from :func:`host` on a Zen 4 core; the driver's part is missing."""

CASES = {
    "evaluation": ("op", cases.EVALUATION),
    "training step": ("op", cases.TRAINING),
    "shsa_mixer": ("mixer", cases.EVALUATION),
}
"""Suite and mode of the operations that are compared with PyTorch's."""
PEERS = {"eager": cases.EAGER, "compile": cases.FOLDED}
"""The contender whose operators are noted; compilation for evaluation folds the batch normalisation as well."""
SOUGHT = {
    "triton": {("evaluation", "eager"): 3, ("evaluation", "compile"): 1.5, ("training step", "eager"): 2},
    "cuda": {("shsa_mixer", "eager"): 5, ("shsa_mixer", "compile"): 2, ("training step", "eager"): 2.5},
}
"""How many times the time of ours the peer's is to be at the largest batch, by backend, operation and peer."""


@dataclass(frozen=True)
class Shape:
    name: str
    C: int
    P: int
    side: int

    @property
    def N(self) -> int:
        return self.side**2

    @property
    def projected(self) -> int:
        return 2 * QK_DIM + self.P

    @property
    def images_per_block(self) -> int:
        return 4 if self.N <= 16 else 1

    @property
    def rows(self) -> int:
        """Token rows of an image, in tiles of 16."""
        return math.ceil(self.N / 16) * 16

    @property
    def columns(self) -> int:
        return math.ceil(self.P / 16) * 16

    def attention_operations(self) -> int:
        """Of one image's forward, on padded tiles."""
        return 2 * self.rows * ((2 * QK_DIM + self.columns) * self.columns + self.rows * (QK_DIM + self.columns))


@dataclass(frozen=True)
class Work:
    """What a launch must do. ``chain`` is the serial path of one block in microseconds; ``blocks`` are those on which
    the launch waits, all of them unless given."""

    bytes: float
    operations: float
    chain: float
    rate: float = TENSOR_RATE
    blocks: int | None = None


def copy_microseconds(s: Shape, B: int) -> float:
    """Of ``y.copy_(x)``."""
    return LAUNCH + max(2 * HALF * B * s.C * s.N / BANDWIDTH, COPY)


def rounds(values: int) -> float:
    """Microseconds in which a block of 8 warps sums that many rows."""
    return ROUND * math.ceil(values / 64)


def work(s: Shape, B: int, blocks: dict[str, int]) -> dict[str, Work]:
    """By kernel, of a call that starts so many blocks of each. The parts of a sum count as traffic where they are
    written and where they are read, although L2 may hold them."""
    P, O, strips = s.P, s.projected, math.ceil(s.P / 32)
    attending = math.ceil(B / s.images_per_block)
    image, x1, weight = B * s.C * s.N, B * P * s.N, O * P
    forward = B * s.attention_operations()
    triangle = B * s.rows * s.columns**2  # of the products of all channels
    dweight_parts, moment_parts = min(attending, 256), blocks.get("accumulate_kernel", 0)
    dnorm_parts = min(attending, 512)
    # Behind the blocks of images are those that write the zeros beyond P of a gradient of all channels.
    zeros = HALF * (image - x1) if blocks.get("norm_backward_kernel", 0) > dnorm_parts else 0
    moments, dweights = FLOAT * moment_parts * P**2 / 2, FLOAT * dweight_parts * (weight + O)
    return {
        "shsa_forward_kernel": Work(2 * HALF * image, forward, 3.0, blocks=attending),
        "shsa_mixer_kernel": Work(HALF * (2 * image + s.C**2), forward + 2 * B * s.rows * s.C**2, 6.0),
        "accumulate_kernel": Work(2 * HALF * x1 + moments, triangle, 3.0, SPLIT_RATE),
        "merge_kernel": Work(
            moments + FLOAT * P**2, 2 * moment_parts * P**2, 1.0 + 2 * rounds(moment_parts), SIMPLE_RATE
        ),
        "project_kernel": Work(FLOAT * (P**2 + 2 * O) + HALF * weight, 2 * P * weight, 1.5, SIMPLE_RATE),
        # dy, y and x1 are read, dx beyond P and dz are written.
        "shsa_backward_kernel": Work(
            3 * HALF * image + FLOAT * x1 + dweights,
            4 * forward,
            8.0 * math.ceil(attending / dweight_parts),
            blocks=dweight_parts,
        ),
        "fold_rows_kernel": Work(
            dweights + FLOAT * P**2 + 2 * HALF * weight,
            dweight_parts * weight + 2 * P * weight,
            1.0 + strips * (rounds(dweight_parts) + rounds(P)),
            SIMPLE_RATE,
        ),
        "fold_moments_kernel": Work(
            FLOAT * P**2 + HALF * weight, 3 * P * weight, 1.0 + strips * rounds(O), SIMPLE_RATE
        ),
        "norm_backward_kernel": Work(
            (FLOAT + 2 * HALF) * x1 + zeros, 2 * triangle, 3.0, SPLIT_RATE, blocks=dnorm_parts
        ),
        "symmetrise_kernel": Work(2 * FLOAT * P**2, P**2, 1.5, SIMPLE_RATE),
        "reduce_kernel": Work(FLOAT * dnorm_parts * 2 * P, dnorm_parts * 2 * P, 1.0 + rounds(dnorm_parts), SIMPLE_RATE),
    }


class TritonCall(NamedTuple):
    """A launch of the Triton backend."""

    kernel: Any
    grid: tuple[int, ...]
    given: tuple
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.given, strict=False)) | self.options

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def threads(self) -> int:
        return 32 * self.options.get("num_warps", 4)  # Triton's own choice

    def build(self) -> dict[str, int]:
        """Registers of a thread and shared memory of a block, as Triton compiles it."""
        kernel = self.kernel.run(*self.given, grid=self.grid, warmup=True, **self.options)
        return triton_builds.usage(kernel)


@dataclass(frozen=True)
class Prediction:
    name: str
    launch: cuda_hosted.Launch
    registers: int
    work: Work

    @property
    def residents(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        device = cuda_builds.DEVICES[ARCHITECTURE]
        return device.resident_blocks(self.registers, self.launch.threads, self.launch.shared)

    @property
    def occupancy(self) -> float:
        return cuda_builds.DEVICES[ARCHITECTURE].occupancy(self.registers, self.launch.threads, self.launch.shared)

    def terms(self) -> dict[str, float]:
        waves = math.ceil((self.work.blocks or self.launch.blocks) / (MULTIPROCESSORS * self.residents))
        return {
            "memory": self.work.bytes / BANDWIDTH,
            "arithmetic": self.work.operations / self.work.rate,
            "latency": waves * self.work.chain,
        }

    @property
    def limiter(self) -> str:
        return max(self.terms(), key=self.terms().get)

    @property
    def microseconds(self) -> float:
        return LAUNCH + max(self.terms().values())


class Operation(list[Prediction]):
    """The launches of one call."""

    @property
    def microseconds(self) -> float:
        """In a graph."""
        return sum(p.microseconds for p in self)

    @property
    def limiter(self) -> str:
        """What limits the launches for most of the time."""
        times = Counter()
        for p in self:
            times[p.limiter] += p.microseconds - LAUNCH
        return max(times, key=times.get)

    def amounts(self) -> list[str]:
        """Launches, KiB moved and millions of operations."""
        moved, operations = sum(p.work.bytes for p in self), sum(p.work.operations for p in self)
        return [str(len(self)), f"{moved / 1024:.0f}", f"{operations / 1e6:.1f}"]


def triton_work(s: Shape, B: int, call: TritonCall) -> Work:
    """As :func:`work`, of a launch of the Triton backend. A step of a loop waits for its loads, ROUND, where the launch
    does not ask for a pipeline of them."""
    P, O, blocks, a = s.P, s.projected, call.blocks, call.arguments
    tokens, image, x1, weight = B * s.N, B * s.C * s.N, B * P * s.N, O * P
    forward = B * s.attention_operations()
    match call.name:
        case "attend_short":  # into all channels, or into the P that the projection reads
            return Work(2 * HALF * tokens * a["Y_CHANNELS"], forward, 3.0, blocks=a["attention_blocks"])
        case "project_and_add":
            steps = math.ceil(P / a["CHANNELS"]) + math.ceil((s.C - P) / a["CHANNELS"])
            products = 2 * blocks * a["TOKENS"] * a["OUTS"] * steps * a["CHANNELS"]
            pipelined = math.ceil(steps / (a["num_stages"] - 1))
            # x is read for the product and, out of L2, for the sum.
            return Work(HALF * (2 * image + x1 + s.C**2), products, 1.0 + ROUND * (pipelined + 1))
        case "_measure_projection":
            steps = math.ceil(P / a["BK"])
            products = 2 * 2 * blocks * a["IMAGES"] * a["PITCH"] * a["BO"] * steps * a["BK"]  # z is two numbers
            tiles = call.grid[0]
            return Work(2 * HALF * x1 + 2 * FLOAT * tiles * O, products, 3.0 + ROUND * steps)
        case "_merge_projection":
            tiles = a["tiles"]
            moved = FLOAT * (2 * tiles * O + P**2 + 2 * O) + HALF * weight
            chain = 1.0 + ROUND * (2 * math.ceil(tiles / a["BT"]) + math.ceil(P / a["BK"]))
            return Work(moved, 4 * tiles * O + 2 * weight, chain, SIMPLE_RATE)
        case "_attend_short":
            projection = 2 * QK_DIM + s.columns
            products = 2 * B * s.rows * (projection * s.columns + s.rows * (3 * QK_DIM + 2 * s.columns))
            # dy, y and x1 are read, the projection's gradient and its normalised values are written.
            moved = HALF * (3 * x1 + 2 * tokens * O) + 2 * FLOAT * B * O
            return Work(moved, products, 3.0 + ROUND * math.ceil(P / a["BP"]))
        case "_batch_means":
            sums = 2 * a["rows"] * O
            return Work(FLOAT * sums, sums, 1.0 + ROUND * math.ceil(a["rows"] / a["ROWS"]), SIMPLE_RATE)
        case "_through_projection":
            rows, columns = a["tiles"] * a["IMAGES"] * a["PITCH"], math.ceil(P / a["BP"]) * a["BP"]
            of_weight = 2 * rows * math.ceil(O / a["WEIGHT_O"]) * a["WEIGHT_O"] * columns
            of_input = 2 * 2 * rows * a["BO"] * columns  # made twice
            parts = math.ceil(a["tiles"] / a["steps"])
            moved = HALF * (2 * tokens * O + 2 * x1) + FLOAT * (parts * weight + 2 * a["tiles"] * P)
            chain = max(1.0 + ROUND * a["steps"], 3.0 + 2 * ROUND * columns / a["BP"])
            return Work(moved, of_weight + of_input, chain)
        case "_reduce_parts":
            sums = a["matrix_rows"] * weight + 2 * a["tiles"] * P
            moved = FLOAT * sums + HALF * (weight + 3 * (image - x1))  # dx beyond P from dy and y
            steps = math.ceil(max(a["matrix_rows"], a["tiles"]) / a["ROWS"])
            return Work(moved, sums, 1.0 + ROUND * steps, SIMPLE_RATE, blocks=a["reductions"])
    raise ValueError(f"no model of {call.name}")


def shapes_of_the_family() -> list[Shape]:
    """Each attention stage once."""
    found = {}
    for variant, sizes in VARIANTS.items():
        for i in (1, 2):
            side = math.ceil(IMAGE_SIZE[variant] / (16 << i))
            C, P = sizes["embed_dim"][i], sizes["partial_dim"][i]
            found.setdefault((C, P, side), Shape(f"{variant} stage {i + 1}", C, P, side))
    return list(found.values())


def triton_calls(s: Shape, B: int) -> dict[str, list[TritonCall]]:
    """What the Triton backend launches, by operation; nothing is run."""
    noted: list[TritonCall] = []
    found = {}

    def note(kernel, grid, *arguments, **options) -> None:
        noted.append(TritonCall(kernel, grid, arguments, options))

    with triton_builds.instead_of_launches(note) as operators:
        for name, arguments in triton_builds.calls(triton_builds.Case(s.C, s.P, s.side, s.side, batch=B), operators):
            noted.clear()  # of what was called for the arguments
            operators[name](*arguments)
            found[name] = noted.copy()
    return {operation: [c for name in names for c in found[name]] for operation, names in OPERATIONS.items()}


def triton_predictions(s: Shape, B: int, builds: dict[str, list[dict[str, int]]]) -> dict[str, Operation]:
    """By operation, of each launch of the Triton backend, with the registers and shared memory of its build."""
    found = {}
    for operation, calls in triton_calls(s, B).items():
        found[operation] = Operation()
        for call, build in zip(calls, builds[operation], strict=True):
            launch = cuda_hosted.Launch(call.name, call.blocks, call.threads, build["shared"])
            found[operation].append(Prediction(call.name, launch, build["registers"], triton_work(s, B, call)))
    return found


def launches(s: Shape, B: int) -> dict[str, list[cuda_hosted.Launch]]:
    """What each operator launches, by operator; nothing is run."""
    functions, harness, O = cuda_hosted.load(), cuda_hosted.harness(), 2 * QK_DIM + s.P

    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float16, requires_grad=True)

    x, norm, bn = tensor(B, s.C, s.side, s.side), (tensor(s.P), tensor(s.P)), (tensor(O), tensor(O))
    weight, settings = tensor(O, s.P), (0.25, True, False, False)

    @torch.no_grad()
    def infer() -> None:
        functions.shsa(x, *norm, weight, tensor(O), QK_DIM, 1e-5, *settings)

    @torch.no_grad()
    def evaluate() -> None:
        functions.shsa_eval(x, *norm, weight, None, *bn, *bn, QK_DIM, 1e-5, 1e-5, *settings)

    @torch.no_grad()
    def mix() -> None:
        projection = (tensor(s.C, s.C), tensor(s.C))
        functions.shsa_mixer(x, *norm, weight, tensor(O), *projection, QK_DIM, 1e-5, 0.25, False, False)

    def train() -> None:
        functions.shsa_train(x, *norm, weight, *bn, QK_DIM, 1e-5, 1e-5, *settings)[0].sum().backward()

    def take_moments() -> None:
        sum(t.sum() for t in functions.partial_moments(x, *norm, s.P, 1e-5)).backward()

    calls = {"shsa": infer, "evaluation": evaluate, "training step": train, "shsa_mixer": mix}
    calls["partial_moments"] = take_moments
    found = {}
    for name, call in calls.items():
        with harness.noted_launches() as noted:
            call()
        found[name] = noted
    return found


def predictions(s: Shape, B: int, registers: dict[str, int]) -> dict[str, Operation]:
    """By operator, of each launch of the CUDA backend."""
    found = {}
    for operator, noted in launches(s, B).items():
        names = [cuda_builds.plain(launch.kernel) for launch in noted]
        plain = [name.partition("<")[0] for name in names]
        of_kernel = work(s, B, {name: launch.blocks for name, launch in zip(plain, noted, strict=True)})
        found[operator] = Operation(
            Prediction(short, launch, registers[name], of_kernel[short])
            for short, name, launch in zip(plain, names, noted, strict=True)
        )
    return found


@cache
def all_cases() -> list[cases.Case]:
    return cases.cases({suite for suite, _ in CASES.values()}, VARIANTS, BATCHES, [torch.float16])


def case_of(operation: str, s: Shape, B: int) -> cases.Case:
    wanted = (*CASES[operation], (B, s.C, s.side, s.side))
    return next(case for case in all_cases() if (case.suite, case.mode, case.shape) == wanted)


def peer(name: str, operation: str, s: Shape, B: int) -> list[aten.Launch]:
    """What a peer launches in an operation."""
    case = case_of(operation, s, B)
    x, dy = (torch.empty(case.shape, dtype=case.dtype, device="meta") for _ in range(2))
    x.requires_grad_(case.mode == cases.TRAINING)
    launches = aten.noted(partial(case.step(PEERS[name], "meta"), x, dy))
    return aten.merged(launches) if name == "compile" else launches


def beside(operation: str, s: Shape, B: int) -> list[aten.Launch]:
    """What our layer launches beside the operator: a training step updates the running statistics."""
    if operation != "training step":
        return []
    case = case_of(operation, s, B)
    layer, x = case.module().to("meta", case.dtype).train(), torch.empty(case.shape, dtype=case.dtype, device="meta")
    statistics = torch.empty(2, s.projected, device="meta")
    update = backends.cuda.update_running_statistics
    operators = SimpleNamespace(shsa_train=lambda x, *others: (x, *statistics), update_running_statistics=update)
    with patch.object(backends, "choose", lambda *arguments: operators):
        return aten.noted(partial(layer, x))


def microseconds(launches: list[aten.Launch]) -> float:
    return sum(LAUNCH + max(each.bytes / BANDWIDTH, each.operations / TENSOR_RATE, COPY) for each in launches)


Predicted = dict[str, dict[int, dict[str, Operation]]]
"""By backend, batch and operation."""


def winner(cuda: float, triton: float) -> str:
    """Whose time is shorter, and how many times the other's is."""
    name, ratio = ("cuda", triton / cuda) if cuda <= triton else ("triton", cuda / triton)
    return "equal" if ratio < 1.005 else f"{name} {ratio:.2f}"


def row(cells: list) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(cells: list[str]) -> list[str]:
    return [row(cells), row(["---"] * len(cells))]


def verdict(found: dict[Shape, Predicted]) -> list[str]:
    """Which backend wins in every operation, in a graph and call by call."""
    names = [f"{way}, batch {B}" for way in ("in a graph", "call by call") for B in BATCHES]
    lines = head(["operation", "stage", *names])
    for operation in OPERATIONS:
        for s, of in found.items():
            graph = [[of[name][B][operation].microseconds for name in HOST] for B in BATCHES]
            host = [own[operation] for own in HOST.values()]
            called = [map(max, pair, host) for pair in graph]
            lines.append(row([operation, s.name, *[winner(*pair) for pair in (*graph, *called)]]))
    return lines


def compared() -> Iterator[tuple[str, str]]:
    """Operations, each with the peers that it is compared with."""
    for operation, (_, mode) in CASES.items():
        for name in PEERS:
            if name == "eager" or mode == cases.EVALUATION:
                yield operation, name


def against_the_peers(found: dict[Shape, Predicted]) -> dict[str, list[str]]:
    """By backend, how many times the time of ours each peer's is, in a graph."""
    names = ["operation", "against", "batch", "launches", *[s.name for s in found], "sought"]
    tables = {backend: head(names) for backend in HOST}
    for operation, name in compared():
        for B in BATCHES:
            theirs = [peer(name, operation, s, B) for s in found]
            added = [microseconds(beside(operation, s, B)) for s in found]
            for backend, lines in tables.items():
                ours = [of[backend][B][operation].microseconds for of in found.values()]
                ratios = [microseconds(t) / (us + more) for t, us, more in zip(theirs, ours, added, strict=True)]
                sought = SOUGHT[backend].get((operation, name), "") if B == SHOWN else ""
                cells = [operation, name, B, len(theirs[0]), *[f"{ratio:.2f}" for ratio in ratios], sought]
                lines.append(row(cells))
    return tables


def against_the_copy(s: Shape, of: Predicted) -> list[str]:
    """Every operation of the Triton backend, and the time of the CUDA backend's."""
    names = ["operation", "batch", "launches", "KiB moved", "M operations", "us", "limiter", "us of the copy"]
    lines = head([*names, "times the copy", "us of cuda", "times the copy"])
    for operation in OPERATIONS:
        for B in BATCHES:
            cuda, triton, copy = of["cuda"][B][operation], of["triton"][B][operation], copy_microseconds(s, B)
            cells = [operation, B, *triton.amounts(), f"{triton.microseconds:.1f}", triton.limiter, f"{copy:.1f}"]
            for each in (triton, cuda):
                cells += [f"{each.microseconds:.1f}"] * (each is cuda) + [f"{each.microseconds / copy:.2f}"]
            lines.append(row(cells))
    return lines


def kernels(of_batches: dict[int, dict[str, Operation]]) -> list[str]:
    """The launches of every operator of a backend, at the largest batch but for their times."""
    names = ["operator", "kernel", "least KiB", "M operations", "blocks", "threads", "registers", "KiB shared"]
    lines = head([*names, "occupancy", *[f"us at batch {B}" for B in BATCHES]])
    for operator, shown in of_batches[SHOWN].items():
        for i, p in enumerate(shown):
            cells = [operator, f"`{p.name}`", f"{p.work.bytes / 1024:.0f}", f"{p.work.operations / 1e6:.1f}"]
            cells += [p.launch.blocks, p.launch.threads, p.registers, f"{p.launch.shared / 1024:.1f}"]
            cells.append(f"{p.occupancy:.0%}")
            of_each = [of_batches[B][operator][i] for B in BATCHES]
            cells += [f"{each.microseconds:.1f} ({each.limiter})" for each in of_each]
            lines.append(row(cells))
        if len(shown) > 1:
            sums = [of_batches[B][operator].microseconds for B in BATCHES]
            lines.append(row([operator, "all", *[""] * 7, *[f"{us:.0f}" for us in sums]]))
    return lines


def host() -> dict[str, dict[str, float]]:
    """Microseconds of the host for every operation, as in ``HOST``; the CUDA backend is the hosted tier's with its
    checks, and Triton's has PyTorch's dispatcher left out."""

    def launch(kernel, grid, *arguments, **options) -> None:
        kernel.run(*arguments, grid=grid, warmup=True, **options)

    def timed(operators: dict[str, Callable]) -> dict[str, float]:
        times = {}
        for name, arguments in triton_builds.calls(case, operators):
            call = partial(operators[name], *arguments)
            times[name] = min(timeit.repeat(call, number=10, repeat=40)) / 10 * 1e6
        return {operation: sum(times[name] for name in names) for operation, names in OPERATIONS.items()}

    case = triton_builds.Case(336, 72, 8, 8, batch=2, device="cpu")
    with cuda_hosted.harness().noted_launches(), torch.no_grad():
        cuda = timed(ops.FAMILIES[cuda_hosted.FAMILY])
    with triton_builds.instead_of_launches(launch) as operators:
        return {"cuda": cuda, "triton": timed(operators)}


def print_peers(found: dict[Shape, Predicted]) -> None:
    print("\n## Predicted: against PyTorch\n")
    print("The time of PyTorch's stock layer over ours, graph against graph, by the model of this page; predicted, not")
    print(
        "measured. `shsa_mixer` is compared with the layer of folded weights. A launch of PyTorch takes its bytes, its"
    )
    print("products or the serial path of a copy. Launches are the peer's, and sought is what was asked for.")
    print(
        "The ratios lean towards PyTorch: its products and reductions are given no longer path than a copy, ours are.\n"
    )
    print("- `eager`: every operator of ATen is one launch, and views cost nothing. PyTorch starts several kernels for")
    print("  some operators, so that its time may be longer.")
    print(
        "- `compile`: a lower bound of what `torch.compile` launches, the batch normalisation folded. Matrix products"
    )
    print("  and convolutions stay one launch each, and every run of other operators between them is one launch that")
    print("  reads its inputs and writes its outputs once. Merging a run into a product is not considered.")
    print("- A training step of ours includes the launch by which the layer updates its running statistics; elsewhere")
    print("  on this page it is the operator alone. It stays below what was sought because of the long serial paths of")
    print("  the backward's kernels and sums.")
    print("- `shsa_mixer` of `cuda` stays below it where its tensor-core products, on padded tiles, are the limiter.")
    for backend, lines in against_the_peers(found).items():
        print(f"\n## Predicted: `{backend}` against PyTorch\n")
        print("\n".join(lines))


def main() -> None:
    builds = [build for source in cuda_builds.SOURCES for build in cuda_builds.built(source, ARCHITECTURE)]
    registers = {build.kernel: build.registers for build in builds}
    found: dict[Shape, Predicted] = {}
    for s in shapes_of_the_family():
        used = {operation: [call.build() for call in calls] for operation, calls in triton_calls(s, SHOWN).items()}
        found[s] = {
            "cuda": {B: predictions(s, B, registers) for B in BATCHES},
            "triton": {B: triton_predictions(s, B, used) for B in BATCHES},
        }
    print("# Predictions for an H100, float16, NCHW\n")
    print("Predicted, not measured; `python -m benchmarks.predict` prints this page from the model in its docstring.")
    print(f"Assumed: {BANDWIDTH / 1e6:.1f} TB/s, {TENSOR_RATE / 1e6:.0f} TFLOP/s in short chains of 16-bit tensor-core")
    print(
        f"products, {LAUNCH:.0f} us a launch inside a graph, {MULTIPROCESSORS} multiprocessors. `shsa` is its forward."
    )
    print("Evaluation and training step reach from split to ReLU; a training step is the forward and the backward with")
    print("batch statistics. `partial_moments` is shown with its backward.\n")
    print("## Predicted: which backend wins\n")
    print("By how many times the other backend's time is longer: in a graph, and call by call, where the host makes")
    print("every launch. The host's times were measured, on one core of a Zen 4 without a GPU: the driver's part is")
    print("missing.\n")
    for name, own in HOST.items():
        print(f"- `{name}`: " + ", ".join(f"{operation} {us} us" for operation, us in own.items()))
    print("\nAutomatic choice does not know what will be replayed from a graph and follows the times call by call. Who")
    print("wins a training step in a graph is open until a GPU has measured it: the model may be off by more.\n")
    print("\n".join(verdict(found)))
    print_peers(found)
    for s, of in found.items():
        print(f"\n## Predicted: {s.name}: C = {s.C}, P = {s.P}, {s.side} x {s.side}\n")
        print("`triton` in a graph beside `y.copy_(x)` and beside `cuda`:\n")
        print("\n".join(against_the_copy(s, of)))
        for name, of_batches in of.items():
            print(f"\nKernels of `{name}`; bytes, operations, launches and occupancy are those of batch {SHOWN}:\n")
            print("\n".join(kernels(of_batches)))


if __name__ == "__main__":
    triton.runtime.driver.set_active(triton_builds.Device(triton_builds.TARGETS[TRITON_TARGET]))
    if sys.argv[1:] == ["host"]:
        print(host())
    else:
        main()
