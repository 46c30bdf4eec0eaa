"""Train a small SHViT on scikit-learn's handwritten digits: `python examples/train_digits.py [--compare]`.

The attention layers run on the library's operator, forward and backward. `--compare` trains the stock layers beside
them, from the same weights and with the same batches.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import shvit_kernels
from shvit_kernels.stock import with_stock_layers

SIDE = 64  # of the upsampled digits: 4 x 4, 2 x 2 and 1 token in the three stages
BATCH = 64
LEARNING_RATE = 3e-3


@dataclass
class Curve:
    """Accuracy on the held-out digits after each epoch, and the seconds that all of them took."""

    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[B, 1, SIDE, SIDE]`` and labels, for training and held out (a quarter of the 1797 digits)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - 0.5
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear")
    labels = torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def small_shvit() -> nn.Module:
    return shvit_kernels.SHViT(
        in_chans=1,
        num_classes=10,
        embed_dim=(32, 64, 96),
        partial_dim=(16, 16, 24),
        depth=(1, 2, 1),
        types=("s", "s", "s"),
    )


def train(model: nn.Module, epochs: int, label: str) -> Iterator[Curve]:
    """Train in place with AdamW and one cycle of the learning rate; the curve so far after each epoch."""
    images, labels, test_images, test_labels = digits()
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(0)
    curve = Curve()
    for epoch in range(epochs):
        start = time.perf_counter()
        model.train()
        order = torch.randperm(len(images), generator=generator)[: steps * BATCH]
        for batch in tqdm(order.split(BATCH), desc=f"{label}, epoch {epoch + 1} of {epochs}", leave=False):
            loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(dim=1) == test_labels).float().mean().item()
        tqdm.write(f"{label}, epoch {epoch + 1} of {epochs}: {accuracy:.2%} of the held-out digits")
        curve.accuracy.append(accuracy)
        curve.seconds += time.perf_counter() - start
        yield curve


def main(arguments: list[str] | None = None) -> dict[str, Curve]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="train the stock layers too, and print both curves")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")

    torch.manual_seed(options.seed)
    model = small_shvit()
    models = {"shvit_kernels": model}
    if options.compare:
        models["stock"] = with_stock_layers(model)
    runs = {name: train(model, options.epochs, name) for name, model in models.items()}
    for _ in range(options.epochs):  # epoch by epoch, so that both meet the same machine
        curves = {name: next(run) for name, run in runs.items()}

    table = Table("epoch", *curves, title="accuracy on held-out digits")
    for epoch, accuracies in enumerate(zip(*(curve.accuracy for curve in curves.values()), strict=True)):
        table.add_row(str(epoch + 1), *(f"{accuracy:.2%}" for accuracy in accuracies))
    table.add_section()
    table.add_row("seconds", *(f"{curve.seconds:.1f}" for curve in curves.values()))
    Console().print(table)
    return curves


if __name__ == "__main__":
    main()
