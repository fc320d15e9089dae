"""Images per CPU-second of the loaders beside a plain torch DataLoader with Pillow, JPEGs of 256 to 480 px to 224.

    python bench/bench_loaders.py [--images 192] [--repeats 7]

All give the same squares: the central square, bicubic with antialiasing, uint8 [3, 224, 224], in batches of 32; the
first lines say how far each one's pixels are from Pillow's. `pillow` resamples the square in one go, `pillow resize,
crop` is what most pipelines do: the whole image first, then the crop (its squares lie up to a pixel off). Time is CPU
time of the process and its children, one thread, so that idle waiting counts for nobody; runs take turns, and the
ratios are those of each turn: median, smallest, largest. Asked for: torch at least 2.0 of `pillow`, DALI at least 1.1.
"""

import argparse
import importlib.util
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from optima.data.config import LoaderConfig
from optima.data.loader import make_loader
from optima.data.pictograms.render import render
from optima.data.pictograms.stream import Pictograms
from optima.data.record import ImageSource, Record, Records

SIDE, BATCH = 224, 32
Run = Callable[[], Iterator[Tensor]]


def make_images(folder: Path, count: int) -> list[Path]:
    """JPEGs about as large as photographs of their size: four scenes each, with coarse noise."""
    draws = np.random.default_rng(0)
    scenes = Pictograms("train", 1)
    paths = []
    for number in range(count):
        width, height = (int(side) for side in draws.integers(256, 481, 2))
        image = Image.new("RGB", (width, height))
        for quarter in range(4):
            scene = render(scenes.example("captioning", 4 * number + quarter).scenes[0]).transpose(1, 2, 0)
            part = Image.fromarray(scene).resize((width // 2 + 1, height // 2 + 1), Image.Resampling.BICUBIC)
            image.paste(part, (quarter % 2 * (width // 2), quarter // 2 * (height // 2)))
        noise = np.kron(draws.normal(0, 12, (height // 4 + 1, width // 4 + 1, 3)), np.ones((4, 4, 1)))
        pixels = np.clip(np.asarray(image) + noise[:height, :width], 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=92)
    return paths


class PlainImages(Dataset[Tensor]):
    """What a plain pipeline does with an image."""

    def __init__(self, paths: list[Path], resize_first: bool) -> None:
        self.paths = paths
        self.resize_first = resize_first

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if self.resize_first:
            image = image.resize(
                (round(image.width * SIDE / side), round(image.height * SIDE / side)), Image.Resampling.BICUBIC
            )
            left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
            image = image.crop((left, top, left + SIDE, top + SIDE))
        else:
            box = (left, top, left + side, top + side)
            image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare(make_images(Path(folder), options.images), options.repeats)


def compare(paths: list[Path], repeats: int) -> None:
    """Checks that all give the same, and prints their speeds."""
    items = [Record(path.name, (ImageSource(str(path)),), ("an image",)) for path in paths]
    records = Records("folder", "test", "captioning", items)

    def plain(resize_first: bool) -> Run:
        return lambda: iter(DataLoader(PlainImages(paths, resize_first), BATCH))

    def ours(engine: str, workers: int) -> Run:
        loader = make_loader(records, LoaderConfig(engine, workers), batch_size=BATCH)  # type: ignore[arg-type]
        return lambda: (batch.images[:, 0] for batch in loader.once())

    runs = {"pillow": plain(False), "pillow resize, crop": plain(True), "optima torch": ours("torch", 0)}
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        runs["optima dali"] = ours("dali", 1)
    else:
        print("DALI is not installed and not measured")
    size = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    print(f"{len(paths)} JPEGs of {size:.0f} kB on average, torch {torch.__version__}, one thread, {repeats} repeats")
    squares = {name: torch.cat(list(run())).float() for name, run in runs.items()}
    for name, found in squares.items():
        error = (found - squares["pillow"]).abs()
        print(f"{name:20} pixels differ by {error.mean():.2f} of 255 on average, {error.max():.0f} at most")
        assert name == "pillow resize, crop" or error.mean() < 0.5, f"{name} gives other squares than Pillow"

    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = cpu_seconds()
            count = sum(len(batch) for batch in run())
            speeds[name].append(count / (cpu_seconds() - start))
    print(f"{'':20} {'images / CPU s':>14}   of pillow, and its spread   of pillow resize, crop")
    for name in runs:
        texts = []
        for peer in ("pillow", "pillow resize, crop"):
            ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds[peer], strict=True)]
            texts.append(f"{statistics.median(ratios):10.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"{name:20} {statistics.median(speeds[name]):14.0f}   {'   '.join(texts)}")


if __name__ == "__main__":
    main()
