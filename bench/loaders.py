"""The loaders of JPEG files beside a plain torch DataLoader over Pillow, without worker processes: one core's work.

Every image of a made-up folder once, its central square resampled to 224 x 224 by an antialiased bicubic filter,
uint8. The images are 640 x 480 and smooth, as photographs are; decoders and resamplers round differently, so pixels
may differ by two in a hundred. The plain way is what its users write: open, convert, crop, resize, stack.
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

from bench.contest import Contest, Run, Sweep, Unavailable
from optima.data.config import EngineName, LoaderConfig, TransformConfig
from optima.data.loader import make_loader
from optima.data.record import ImageSource, Record, Records
from optima_core.errors import OptimaError


def contests(device: torch.device) -> list[Contest]:
    return [contest(64, (640, 480), 224), contest(32, (1600, 1200), 224)] if device.type == "cpu" else []


def sweeps(device: torch.device) -> list[Sweep]:
    return []


def contest(count: int, shape: tuple[int, int], size: int, batch: int = 32) -> Contest:
    contenders: dict[str, Callable[[], Run]] = {"plain DataLoader": lambda: plain(files(count, shape), size, batch)}
    engines: dict[str, EngineName] = {"optima": "torch", "optima, DALI": "dali"}
    for name, engine in engines.items():
        contenders[name] = partial(ours, engine, count, shape, size, batch)
    return Contest(
        suite="loaders",
        name=f"{count} JPEGs of {shape[0]} x {shape[1]} to {size}, batch {batch}",
        contenders=contenders,
        tolerance=2e-2,
        memory=False,
    )


@cache
def files(count: int, shape: tuple[int, int]) -> list[str]:
    """Images of random colours, coarse and fine, in a folder that is removed at exit."""
    folder = tempfile.mkdtemp(prefix="optima-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    draws = np.random.default_rng(0)
    paths = []
    for i in range(count):
        layers = [
            Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
                shape, Image.Resampling.BICUBIC
            )
            for side in (4, 24)
        ]
        paths.append(str(Path(folder) / f"{i:04d}.jpg"))
        Image.blend(*layers, 0.3).save(paths[-1], quality=90)
    return paths


def ours(engine: EngineName, count: int, shape: tuple[int, int], size: int, batch: int) -> Run:
    items = [Record(str(i), (ImageSource(path),), ("",)) for i, path in enumerate(files(count, shape))]
    config = LoaderConfig(engine=engine, workers=0 if engine == "torch" else 1, transform=TransformConfig(size))
    try:
        loader = make_loader(Records("folder", "test", "captioning", items), config, batch_size=batch)
    except OptimaError as missing:
        raise Unavailable(f"not installed: {missing}") from missing
    return lambda: [found.images[:, 0].float() for found in loader.once()]


class Images(Dataset[Tensor]):
    """Crops and resizes with Pillow."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        square = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def plain(paths: Sequence[str], size: int, batch: int) -> Run:
    loader = DataLoader(Images(paths, size), batch_size=batch)
    return lambda: [images.float() for images in loader]
