"""The demonstration: stock and accelerated models side by side on a photograph."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ._randomise import randomise
from .accelerate import accelerate
from .bench.timing import Spread, measure
from .models import create_model, load_checkpoint
from .models.checkpoints import describe, read_weights
from .models.shvit import IMAGE_SIZE, VARIANTS, SHViT
from .stock import with_stock_layers

TOLERANCE = 1e-4
"""Largest difference of the logits, relative to the largest logit, that float32 rounding explains."""

ROUNDS = 15
CROP = 0.875
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


@dataclass
class Comparison:
    """A model's logits ``[K]`` and seconds per image, stock and accelerated."""

    name: str
    stock: Tensor
    accelerated: Tensor
    stock_seconds: Spread
    accelerated_seconds: Spread
    ratio: Spread

    @property
    def difference(self) -> float:
        return (self.stock - self.accelerated).abs().max().item()

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE * self.stock.abs().max().item()  # False for NaN


def sample_photograph() -> Path:
    """The photograph of Grace Hopper that matplotlib ships."""
    from matplotlib.cbook import get_sample_data

    return Path(get_sample_data("grace_hopper.jpg", asfileobj=False))


def _of_8_bits(image: Image.Image) -> Image.Image:
    """An image of wider values, from 0 to 65535; Pillow would cut them off at 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    low, high = image.getextrema()
    if image.mode == "F" or low < 0 or high > 65535:
        raise OSError(f"its values of type {image.mode} from {low} to {high} are not those of a photograph")
    return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")


def read_image(path: Path) -> Image.Image:
    """The image in RGB, upright; ``ValueError`` with the path if it cannot be read."""
    try:
        with Image.open(path) as image:
            return _of_8_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def crop(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to ``side / 0.875`` and cut out the centre, as for ImageNet evaluation."""
    scale = int(side / CROP) / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def pixels(image: Image.Image) -> Tensor:
    """``[1, 3, H, W]``, normalised with ImageNet's mean and deviation."""
    width, height = image.size
    x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3) / 255
    x = (x - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return x.permute(2, 0, 1)[None].contiguous()


def _from_checkpoint(path: Path, variant: str | None) -> tuple[str, SHViT]:
    """The model that a checkpoint's names and shapes describe, with its weights."""
    described = describe(read_weights(path))
    variant = variant or described.variant
    if variant is None:
        raise ValueError(f"{path} shows no published model: name one with --variant ({', '.join(VARIANTS)})")
    model = create_model(variant, num_classes=described.num_classes, distillation=described.distillation)
    if described.fused:
        model.fuse()
    return variant, load_checkpoint(model, path)


def models(variants: list[str], checkpoint: Path | None) -> Iterator[tuple[str, SHViT]]:
    """The models to compare: the checkpoint's, or each of ``variants`` with random weights."""
    if checkpoint is not None:
        if len(variants) > 1:
            raise ValueError(f"a checkpoint holds one model, got --variant {' and '.join(variants)}")
        yield _from_checkpoint(checkpoint, variants[0] if variants else None)
        return
    for name in variants or VARIANTS:
        yield name, randomise(create_model(name), seed=0)


def compare(name: str, model: SHViT, image: Image.Image) -> Comparison:
    """Run ``model`` with stock layers, and an accelerated copy of that, on one image."""
    stock = with_stock_layers(model).eval()
    accelerated = accelerate(copy.deepcopy(stock))
    x = pixels(crop(image, IMAGE_SIZE[name]))
    with torch.inference_mode():
        outputs = stock(x)[0], accelerated(x)[0]
        seconds = measure({"stock": lambda: stock(x), "accelerated": lambda: accelerated(x)}, ROUNDS)
    ratio = [s / a for s, a in zip(seconds["stock"], seconds["accelerated"], strict=True)]
    return Comparison(name, *outputs, *(Spread.of(seconds[n]) for n in ("stock", "accelerated")), Spread.of(ratio))


def _top5(comparison: Comparison) -> Table:
    table = Table(title=f"{comparison.name}: top five of {len(comparison.stock)} classes", title_justify="left")
    for heading in ("class", "stock", "accelerated"):
        table.add_column(heading, justify="right")
    stock, accelerated = comparison.stock.softmax(0), comparison.accelerated.softmax(0)
    for i in accelerated.topk(min(5, len(accelerated))).indices.tolist():
        table.add_row(str(i), f"{stock[i]:.2%}", f"{accelerated[i]:.2%}")
    return table


def _table(comparisons: list[Comparison]) -> Table:
    table = Table(title="stock and accelerated, one image", title_justify="left")
    table.add_column("model")
    for heading in ("largest\nlogit", "largest\ndifference", "stock\nms", "accelerated\nms", "ratio"):
        table.add_column(heading, justify="right")
    for c in comparisons:
        table.add_row(
            c.name,
            f"{c.stock.abs().max():.3f}",
            f"{c.difference:.1e}",
            f"{1e3 * c.stock_seconds.median:.1f}",
            f"{1e3 * c.accelerated_seconds.median:.1f}",
            f"{c.ratio.median:.2f} ({c.ratio.low:.2f}-{c.ratio.high:.2f})",
        )
    return table


def _plot(comparisons: list[Comparison], image: Image.Image, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    photo, logits, times = figure.subplots(1, 3)
    photo.imshow(crop(image, 256))
    photo.set_axis_off()
    photo.set_title("input")

    for c in comparisons:
        scale = c.stock.abs().max()
        logits.plot(c.stock / scale, c.accelerated / scale, ".", markersize=3, label=f"{c.name}: {c.difference:.1e}")
    logits.axline((0, 0), slope=1, color="#999999", linewidth=0.8, zorder=0)
    logits.set_xticks([-1, -0.5, 0, 0.5, 1])
    logits.set_xlabel("stock")
    logits.set_ylabel("accelerated")
    logits.set_title("logits, over the largest")
    logits.legend(title="largest difference", fontsize="small", markerscale=3)

    for offset, label, colour, spreads in (
        (-0.2, "stock", "#999999", [c.stock_seconds for c in comparisons]),
        (0.2, "accelerated", "#0072b2", [c.accelerated_seconds for c in comparisons]),
    ):
        bars = times.bar(
            [i + offset for i in range(len(spreads))],
            [1e3 * s.median for s in spreads],
            0.4,
            yerr=[[1e3 * (s.median - s.low) for s in spreads], [1e3 * (s.high - s.median) for s in spreads]],
            color=colour,
            label=label,
        )
    times.bar_label(bars, [f"{c.ratio.median:.2f}x" for c in comparisons], padding=3)
    times.set_xticks(range(len(comparisons)), [c.name for c in comparisons])
    times.set_ylabel("ms per image (median, quartiles)")
    times.set_title(f"time, {torch.get_num_threads()} thread(s)")
    times.margins(y=0.2)
    times.legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=110)


def run(variants: list[str], image_path: Path | None, checkpoint: Path | None, out: Path, console: Console) -> bool:
    """Compare, print and plot. Returns whether all outputs agree; ``ValueError`` or ``OSError`` for bad input."""
    image = read_image(image_path or sample_photograph())
    comparisons = []
    with console.status("") as status:
        for name, model in models(variants, checkpoint):
            status.update(f"{name}: stock against accelerated")
            comparisons.append(compare(name, model, image))
    console.print(_table(comparisons))
    if checkpoint is None:
        console.print("The weights are random (give a checkpoint to see classes), so only agreement and time count.")
    elif model.num_classes:
        console.print(_top5(comparisons[0]))
    else:
        console.print("The checkpoint has no head: what is compared are pooled features.")
    out.mkdir(parents=True, exist_ok=True)
    plot = out / "stock_and_accelerated.png"
    _plot(comparisons, image, plot)
    console.print(f"plot: {plot}")
    differing = [c.name for c in comparisons if not c.agrees]
    if differing:
        console.print(f"The outputs of {', '.join(differing)} differ by more than float32 rounding.", style="bold red")
    else:
        console.print("The outputs agree to float32 rounding.")
    return not differing
