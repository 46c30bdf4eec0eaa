"""Predicts the time of each CUDA kernel on an H100 from bytes, operations and launches, and prints the Markdown tables.

    python -m benchmarks.predict > benchmarks/results/predictions.md

The times are a model of what the operators must do, written before any measurement on a GPU. What a kernel asks for is
read off the kernels: blocks, threads and shared memory from their launches, noted by the hosted tier, and registers
from their builds by nvcc, kept by the compiled tier.

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
SPLIT_RATE = TENSOR_RATE / 6  # nearly exact products: three in TF32, each at half the rate
SIMPLE_RATE = 30e6  # float32 operations per microsecond outside tensor cores, 0.5 of the peak
LAUNCH = 2.0  # microseconds between two dependent small kernels of a graph
ROUND = 0.7  # microseconds of a round of loads from L2; the sums of parts take 64 of them a round
HALF, FLOAT = 2, 4  # bytes
BATCHES = (1, 32, 256)
SHOWN = BATCHES[-1]
ARCHITECTURE = "90a"


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


def shapes_of_the_family() -> list[Shape]:
    """Each attention stage once."""
    found = {}
    for variant, sizes in VARIANTS.items():
        for i in (1, 2):
            side = math.ceil(IMAGE_SIZE[variant] / (16 << i))
            C, P = sizes["embed_dim"][i], sizes["partial_dim"][i]
            found.setdefault((C, P, side), Shape(f"{variant} stage {i + 1}", C, P, side))
    return list(found.values())


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
    def mix() -> None:
        projection = (tensor(s.C, s.C), tensor(s.C))
        functions.shsa_mixer(x, *norm, weight, tensor(O), *projection, QK_DIM, 1e-5, 0.25, False, False)

    def train() -> None:
        functions.shsa_train(x, *norm, weight, *bn, QK_DIM, 1e-5, 1e-5, *settings)[0].sum().backward()

    def take_moments() -> None:
        sum(t.sum() for t in functions.partial_moments(x, *norm, s.P, 1e-5)).backward()

    calls = {"shsa": infer, "shsa_mixer": mix, "training step": train, "partial_moments": take_moments}
    found = {}
    for name, call in calls.items():
        with harness.noted_launches() as noted:
            call()
        found[name] = noted
    return found


def predictions(s: Shape, B: int, registers: dict[str, int]) -> dict[str, list[Prediction]]:
    """By operator, of each of its launches."""
    found = {}
    for operator, noted in launches(s, B).items():
        names = [cuda_builds.plain(launch.kernel) for launch in noted]
        plain = [name.partition("<")[0] for name in names]
        of_kernel = work(s, B, {name: launch.blocks for name, launch in zip(plain, noted, strict=True)})
        found[operator] = [
            Prediction(short, launch, registers[name], of_kernel[short])
            for short, name, launch in zip(plain, names, noted, strict=True)
        ]
    return found


def row(cells: list) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(s: Shape, registers: dict[str, int]) -> list[str]:
    """The launches of every operator, at the largest batch but for their times."""
    head = [
        "operator",
        "kernel",
        "least KiB",
        "M operations",
        "blocks",
        "threads",
        "registers",
        "KiB shared",
        "occupancy",
    ]
    head += [f"us at batch {B}" for B in BATCHES]
    lines = [row(head), row(["---"] * len(head))]
    of_batches = {B: predictions(s, B, registers) for B in BATCHES}
    for operator, shown in of_batches[SHOWN].items():
        for i, p in enumerate(shown):
            cells = [operator, f"`{p.name}`", f"{p.work.bytes / 1024:.0f}", f"{p.work.operations / 1e6:.1f}"]
            cells += [p.launch.blocks, p.launch.threads, p.registers, f"{p.launch.shared / 1024:.1f}"]
            cells.append(f"{p.occupancy:.0%}")
            of_each = [of_batches[B][operator][i] for B in BATCHES]
            cells += [f"{each.microseconds:.1f} ({each.limiter})" for each in of_each]
            lines.append(row(cells))
        if len(shown) > 1:
            sums = [sum(p.microseconds for p in of_batches[B][operator]) for B in BATCHES]
            lines.append(row([operator, "all", *[""] * 7, *[f"{us:.0f}" for us in sums]]))
    return lines


def main() -> None:
    builds = [build for source in cuda_builds.SOURCES for build in cuda_builds.built(source, ARCHITECTURE)]
    registers = {build.kernel: build.registers for build in builds}
    print("# Predictions for an H100, float16, NCHW\n")
    print("Predicted, not measured; `python -m benchmarks.predict` prints this page from the model in its docstring.")
    print(f"Assumed: {BANDWIDTH / 1e6:.1f} TB/s, {TENSOR_RATE / 1e6:.0f} TFLOP/s in short chains of 16-bit tensor-core")
    print(f"products, {LAUNCH:.0f} us a launch inside a graph, {MULTIPROCESSORS} multiprocessors. Bytes, operations,")
    print(f"launches and occupancy are those of batch {SHOWN}; behind each time stands what limits it. A training step")
    print("is the forward and the backward with batch statistics; `partial_moments` is shown with its backward.")
    for s in shapes_of_the_family():
        print(f"\n## {s.name}: C = {s.C}, P = {s.P}, {s.side} x {s.side}\n")
        print("\n".join(table(s, registers)))


if __name__ == "__main__":
    main()
