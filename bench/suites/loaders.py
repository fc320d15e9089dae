"""The loaders of JPEG files beside a plain torch DataLoader over Pillow, without worker processes: one core's work.

Every image of a made-up folder once, its central square resampled to 224 x 224 by an antialiased bicubic filter, uint8.
Images are smooth at two scales, as photographs are; decoders and resamplers round differently, so pixels may differ by
two in a hundred. "Pillow, crop first" crops, then resamples; "Pillow, resize first" is what most pipelines do, the
whole image first: its squares lie up to a pixel off and are not compared.

Three things make the difference: libjpeg-turbo without Pillow around it, torch's antialiased uint8 resampling, and
decoding into memory that is kept. On a CPU, DALI decodes and torch resamples: with DALI's own bicubic filter it stayed
below the plain DataLoader.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.harness.contest import Bar, Contest, Run, Sweep, Unavailable
from optima.data.config import EngineName, LoaderConfig, TransformConfig
from optima.data.loader import make_loader
from optima.data.record import ImageSource, Record, Records
from optima_core.errors import OptimaError

PLAIN = "Pillow, crop first"
Sides = tuple[int, int]
"""Smallest and largest side of an image, pixels."""


def contests(device: torch.device) -> list[Contest]:
    """Of thumbnails, of COCO's sizes, and of a camera's."""
    if device.type != "cpu":
        return []
    return [contest(128, (256, 480), 224), contest(64, (480, 640), 224), contest(32, (1200, 1200), 224)]


def sweeps(device: torch.device) -> list[Sweep]:
    return []


def contest(count: int, sides: Sides, size: int, batch: int = 32) -> Contest:
    """`count` JPEGs, whose sides are drawn from `sides`."""
    contenders: dict[str, Callable[[], Run]] = {
        PLAIN: lambda: plain(files(count, sides), size, batch, resize_first=False),
        "Pillow, resize first": lambda: plain(files(count, sides), size, batch, resize_first=True),
    }
    engines: dict[str, EngineName] = {"optima": "torch", "optima, DALI": "dali"}
    for name, engine in engines.items():
        contenders[name] = partial(ours, engine, count, sides, size, batch)
    return Contest(
        suite="loaders",
        name=f"{count} JPEGs with sides of {sides[0]} to {sides[1]}, to {size}, batch {batch}",
        contenders=contenders,
        unequal=("Pillow, resize first",),
        tolerance=2e-2,
        memory=False,
        bars=(Bar("optima", PLAIN, "time", 0.5), Bar("optima, DALI", PLAIN, "time", 0.9)),
    )


@cache
def files(count: int, sides: Sides) -> list[str]:
    """Images of random colours, coarse and fine, in a folder that is removed at exit."""
    folder = tempfile.mkdtemp(prefix="optima-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    draws = np.random.default_rng(0)
    paths = []
    for i in range(count):
        width, height = (int(side) for side in draws.integers(sides[0], sides[1] + 1, 2))
        layers = [
            Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for side in (4, 24)
        ]
        paths.append(str(Path(folder) / f"{i:04d}.jpg"))
        Image.blend(*layers, 0.3).save(paths[-1], quality=90)
    return paths


def ours(engine: EngineName, count: int, sides: Sides, size: int, batch: int) -> Run:
    items = [Record(str(i), (ImageSource(path),), ("",)) for i, path in enumerate(files(count, sides))]
    config = LoaderConfig(engine=engine, workers=0 if engine == "torch" else 1, transform=TransformConfig(size))
    try:
        loader = make_loader(Records("folder", "test", "captioning", items), config, batch_size=batch)
    except OptimaError as missing:
        raise Unavailable(f"not installed: {missing}") from missing
    return lambda: [found.images[:, 0].float() for found in loader.once()]


class Images(Dataset[Tensor]):
    """Crops and resizes with Pillow, in either order."""

    def __init__(self, paths: Sequence[str], size: int, resize_first: bool) -> None:
        self.paths, self.size, self.resize_first = paths, size, resize_first

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        side = min(image.size)
        if self.resize_first:
            sides = (round(image.width * self.size / side), round(image.height * self.size / side))
            image, side = image.resize(sides, Image.Resampling.BICUBIC), self.size
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        if not self.resize_first:
            square = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def plain(paths: Sequence[str], size: int, batch: int, resize_first: bool) -> Run:
    loader = DataLoader(Images(paths, size, resize_first), batch_size=batch)
    return lambda: [images.float() for images in loader]
