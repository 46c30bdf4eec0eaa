"""Predicts the time of each GPU kernel on an H100 from bytes, operations and launches, and prints the Markdown tables.

    python -m benchmarks.predict > benchmarks/results/predictions.md

The times are a model of what the operators must do, written before any measurement on a GPU. What a block asks for is
read off the kernels: their launches, noted by the hosted tier. How many blocks are resident is what threads and shared
memory allow; the compiled tier reports what registers leave of that.

A kernel takes ``launch + max(bytes / bandwidth, operations / rate, waves * chain)``: one launch inside a CUDA graph,
the memory traffic that cannot be avoided, the tensor cores, and the serial path of one block (load, reductions,
products, store) times the number of times that the multiprocessors must be filled. The largest term is the limiter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shvit_kernels.models.shvit import IMAGE_SIZE, VARIANTS
from tests.support import cuda_builds, cuda_hosted

QK_DIM = 16

MULTIPROCESSORS = 132
BANDWIDTH = 3.0e6  # bytes per microsecond, read plus written: a large copy on this device
TENSOR_RATE = 300e6  # 16-bit operations per microsecond that short chains of mma.sync reach: 0.3 of the peak
SIMPLE_RATE = 30e6  # float32 operations per microsecond outside tensor cores, 0.5 of the peak
LAUNCH = 2.0  # microseconds between two dependent small kernels of a graph
HALF, FLOAT = 2, 4  # bytes
BATCHES = (1, 32, 256)
FEWEST_REGISTERS = 32


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
class Kernel:
    """Costs of one launch. ``chain`` is the serial path of one block in microseconds, ``residents`` the blocks that a
    multiprocessor holds at a time."""

    name: str
    bytes: float
    operations: float
    blocks: int
    chain: float
    residents: int
    rate: float = TENSOR_RATE

    def terms(self) -> dict[str, float]:
        waves = math.ceil(self.blocks / (MULTIPROCESSORS * self.residents))
        return {
            "memory": self.bytes / BANDWIDTH,
            "arithmetic": self.operations / self.rate,
            "latency": waves * self.chain,
        }

    @property
    def limiter(self) -> str:
        return max(self.terms(), key=self.terms().get)

    @property
    def microseconds(self) -> float:
        return LAUNCH + max(self.terms().values())


def forward(s: Shape, B: int) -> Kernel:
    """x read once, y written once; the projection's weights come from L2."""
    blocks = math.ceil(B / s.images_per_block)
    return Kernel("shsa_forward", 2 * HALF * B * s.C * s.N, B * s.attention_operations(), blocks, 3.0, 4)


def mixer(s: Shape, B: int) -> Kernel:
    """As the forward, and the projection [C, C] of every token out of shared memory; its weights from L2."""
    blocks = math.ceil(B / s.images_per_block)
    operations = B * (s.attention_operations() + 2 * s.rows * s.C * s.C)
    return Kernel("shsa_mixer", HALF * (2 * B * s.C * s.N + s.C**2), operations, blocks, 6.0, 1)


def training(s: Shape, B: int) -> list[Kernel]:
    """Launches of a forward and a backward with batch statistics."""
    blocks = math.ceil(B / s.images_per_block)
    parts = min(B, 64)
    x1 = B * s.P * s.N
    covariance = 2 * B * s.rows * s.columns**2
    per_part = FLOAT * parts * (s.projected * s.P + s.projected)
    return [
        Kernel("moments, partial", HALF * x1, covariance, parts, 2.5 * math.ceil(B / parts), 4),
        Kernel("moments, merged", FLOAT * parts * s.P**2, parts * s.P**2 * 3, 32, 2.5, 4, SIMPLE_RATE),
        Kernel(
            "batch statistics",
            FLOAT * s.P * (s.P + s.projected),
            2 * s.projected * s.P**2,
            s.projected,
            1.5,
            8,
            SIMPLE_RATE,
        ),
        forward(s, B),
        Kernel(
            "shsa_backward",
            HALF * B * (2 * s.C + s.P) * s.N + FLOAT * x1,
            4 * B * s.attention_operations(),
            min(blocks, 4 * parts),
            8.0 * math.ceil(blocks / (4 * parts)),
            2,
        ),
        Kernel("gradients, reduced", per_part, per_part / FLOAT, 64, 2.5, 4, SIMPLE_RATE),
        Kernel(
            "fold, backward",
            FLOAT * (3 * s.projected * s.P + s.P**2),
            4 * s.projected * s.P**2,
            64,
            2.5,
            4,
            SIMPLE_RATE,
        ),
        Kernel("norm, backward", FLOAT * x1 + 2 * HALF * x1, 2 * covariance, blocks, 3.0, 4),
        Kernel("norm's gradients, reduced", FLOAT * 2 * blocks * s.P, blocks * s.P, 8, 2.0, 4, SIMPLE_RATE),
    ]


def shapes_of_the_family() -> list[Shape]:
    """Each attention stage once."""
    found = {}
    for variant, sizes in VARIANTS.items():
        for i in (1, 2):
            side = math.ceil(IMAGE_SIZE[variant] / (16 << i))
            C, P = sizes["embed_dim"][i], sizes["partial_dim"][i]
            found.setdefault((C, P, side), Shape(f"{variant} stage {i + 1}", C, P, side))
    return list(found.values())


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(shapes: list[Shape], kernel) -> list[str]:
    head = ["stage", "bytes an image", "operations an image"]
    head += [f"us at batch {B} (limiter)" for B in BATCHES]
    lines = [row(head), row(["---"] * len(head))]
    for s in shapes:
        one = kernel(s, 1)
        cells = [s.name, f"{one.bytes / 1024:.1f} KiB", f"{one.operations / 1e6:.2f} M"]
        cells += [f"{k.microseconds:.1f} ({k.limiter})" for k in (kernel(s, B) for B in BATCHES)]
        lines.append(row(cells))
    return lines


def launches(s: Shape, B: int) -> dict[str, list[cuda_hosted.Launch]]:
    """What each operator launches, by operator; nothing is run."""
    functions, harness, O = cuda_hosted.load(), cuda_hosted.harness(), 2 * QK_DIM + s.P

    def tensor(*size: int, grad: bool = False) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float16, requires_grad=grad)

    x, norm, bn = tensor(B, s.C, s.side, s.side), (tensor(s.P), tensor(s.P)), (tensor(O), tensor(O))
    weight, settings = tensor(O, s.P), (0.25, True, False, False)

    def train() -> None:
        functions.shsa_train(x.requires_grad_(), *norm, weight, *bn, QK_DIM, 1e-5, 1e-5, *settings)[0].sum().backward()

    calls = {
        "shsa": lambda: functions.shsa(x, *norm, weight, tensor(O), QK_DIM, 1e-5, *settings),
        "shsa_mixer": lambda: functions.shsa_mixer(
            x, *norm, weight, tensor(O), tensor(s.C, s.C), tensor(s.C), QK_DIM, 1e-5, 0.25, False, False
        ),
        "training step": train,
    }
    found = {}
    for name, call in calls.items():
        with harness.noted_launches() as noted:
            call()
        found[name] = noted
    return found


def launch_table(s: Shape, B: int) -> list[str]:
    device = cuda_builds.DEVICES["90a"]
    head = ["operator", "kernel", "blocks", "threads", "shared memory", "most resident blocks", "most occupancy"]
    lines = [row(head), row(["---"] * len(head))]
    for operator, noted in launches(s, B).items():
        for launch in noted:
            most = device.resident_blocks(FEWEST_REGISTERS, launch.threads, launch.shared)
            occupancy = device.occupancy(FEWEST_REGISTERS, launch.threads, launch.shared)
            cells = [operator, f"`{cuda_builds.plain(launch.kernel)}`", launch.blocks, launch.threads]
            cells += [f"{launch.shared / 1024:.1f} KiB", most, f"{occupancy:.0%}"]
            lines.append(row(list(map(str, cells))))
    return lines


def training_table(shapes: list[Shape], B: int) -> list[str]:
    names = [k.name for k in training(shapes[0], B)]
    lines = [row(["stage", *names, "sum, us"]), row(["---"] * (len(names) + 2))]
    for s in shapes:
        kernels = training(s, B)
        times = [f"{k.microseconds:.1f} ({k.limiter[0]})" for k in kernels]
        lines.append(row([s.name, *times, f"{sum(k.microseconds for k in kernels):.0f}"]))
    return lines


def main() -> None:
    shapes = shapes_of_the_family()
    print("# Predictions for an H100, float16, NCHW\n")
    print("Predicted, not measured; `python -m benchmarks.predict` prints this page from the model in its docstring.")
    print(f"Assumed: {BANDWIDTH / 1e6:.1f} TB/s, {TENSOR_RATE / 1e6:.0f} TFLOP/s in short chains of 16-bit tensor-core")
    print(f"products, {LAUNCH:.0f} us a launch inside a graph, {MULTIPROCESSORS} multiprocessors.\n")
    print("## shsa, forward: one launch\n")
    print("\n".join(table(shapes, forward)))
    print("\n## shsa_mixer: one launch\n")
    print("\n".join(table(shapes, mixer)))
    for B in (256, 1):
        print(f"\n## Forward and backward with batch statistics, batch {B}, by launch\n")
        print("(m)emory, (a)rithmetic or (l)atency limits a launch.\n")
        print("\n".join(training_table(shapes, B)))
    for s in shapes:
        print(f"\n## Launches of the CUDA kernels at {s.name}, batch 256, sm_90a\n")
        print("\n".join(launch_table(s, 256)))


if __name__ == "__main__":
    main()
