"""Start, memory and resume over the number of samples, of tars with an index.

    python bench/bench_streaming.py [--samples 100000 1000000 10000000] [--repeats 3]

The data are hard links to one real tar of 10,000 small JPEGs with captions, and to its index, so that ten million
samples take no room: an index does not know its tar's name. Each number is of a process of its own, which opens the
training split as a command does, and loads one batch of 32 in this process: "start" is the CPU time from `open_records`
to that batch (so that what else the machine does counts for nobody), "memory" what the process then has at its peak
beyond what importing took. For comparison the same with records in memory, which is how tars of up to 1 GiB are read.
Medians.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

from optima.data import shards
from optima.data.config import LoaderConfig, TransformConfig
from optima.data.find_shards import find_tars
from optima.data.loader import make_loader
from optima.data.pictograms.captions import references
from optima.data.pictograms.render import render
from optima.data.pictograms.stream import Pictograms
from optima.data.records import open_records
from optima.data.shard_index import index_path

SAMPLES, BATCH, STEP = 10_000, 32, 10**6


def make_tar(path: Path) -> None:
    """A tar of 10,000 samples; a hundred different images in turn."""
    examples = [Pictograms("train", 1).example("captioning", number) for number in range(100)]
    images = []
    for example in examples:
        encoded = io.BytesIO()
        Image.fromarray(render(example.scenes[0]).transpose(1, 2, 0)).save(encoded, "JPEG", quality=60)
        images.append(encoded.getvalue())
    texts = [references(example.scenes[0])[0].encode() for example in examples]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(SAMPLES):
            for ending, data in (("jpg", images[number % 100]), ("txt", texts[number % 100])):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def make_links(root: Path, tar: Path, index: Path, samples: int) -> None:
    """A folder of links to the tar, and of links to its index under the names that it has for each of them."""
    (root / "tars").mkdir(parents=True)
    (root / "index").mkdir()
    for number in range(samples // SAMPLES):
        os.link(tar, root / "tars" / f"train-{number:06d}.tar")
    for found in find_tars(root / "tars", "train"):
        os.link(index, index_path(root / "index", found, shards.READERS["webdataset"]))


def start(root: Path, step: int, in_memory: bool) -> None:
    """Prints the seconds from opening to a batch, and the MiB that came with it."""
    shards.IN_MEMORY = 2**60 if in_memory else 0
    config = LoaderConfig(engine="torch", workers=0, transform=TransformConfig(image_size=32))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    records = open_records("webdataset", root / "tars", "train", index=root / "index")
    with make_loader(records, config, batch_size=BATCH) as loader:
        assert len(loader.load(step).indices) == BATCH
    seconds = time.process_time() - began
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([seconds, memory, len(records)]))


def measured(root: Path, step: int, in_memory: bool, repeats: int) -> tuple[float, float]:
    """Median seconds and MiB of processes of their own."""
    words = [sys.executable, __file__, "--root", str(root), "--step", str(step), *(["--memory"] if in_memory else [])]
    runs = [subprocess.run(words, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
    found = [json.loads(run) for run in runs]
    return statistics.median(run[0] for run in found), statistics.median(run[1] for run in found)


def compare(sizes: list[int], repeats: int) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        once = Path(folder) / "once"
        once.mkdir()
        make_tar(once / "train-000000.tar")
        shards.IN_MEMORY = 0
        began = time.process_time()
        open_records("webdataset", once, "train", index=once / "index")
        each = 1e6 * (time.process_time() - began) / SAMPLES
        (index,) = (once / "index").iterdir()
        size = index.stat().st_size / SAMPLES
        print(f"an index is made once, in {each:.0f} us of CPU time a sample, and takes {size:.0f} bytes of each\n")
        print("| samples | shards | start at step 0, s | start at step 1,000,000, s | memory, MiB |")
        print("|---:|---:|---:|---:|---:|")
        for samples in sizes:
            root = Path(folder) / str(samples)
            make_links(root, once / "train-000000.tar", index, samples)
            first, memory = measured(root, 0, False, repeats)
            later, _ = measured(root, STEP, False, repeats)
            print(f"| {samples:,} | {samples // SAMPLES:,} | {first:.2f} | {later:.2f} | {memory:.0f} |", flush=True)
        seconds, memory = measured(Path(folder) / str(sizes[0]), 0, True, 1)
        print(f"| {sizes[0]:,}, records in memory | {sizes[0] // SAMPLES:,} | {seconds:.2f} | | {memory:.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.root is not None:
        start(options.root, options.step, options.memory)
    else:
        compare(options.samples, options.repeats)
