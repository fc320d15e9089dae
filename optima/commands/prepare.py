"""`optima prepare`: checks a data root image by image, and packs it into tar shards.

Leaves in the output folder

    rejected.jsonl     what cannot be used, a line each: id, where, kind, reason
    converted.jsonl    images that are used, but not as they are: grey, CMYK, 16-bit, turned by EXIF, ...
    <split>.json, <split>-*.tar, <split>-*.idx    the shards (`optima.data.shards`), unless `--pack false`
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress, TimeRemainingColumn

from optima.commands.console import make_console, make_table
from optima.data.config import LoaderConfig, PrepareConfig
from optima.data.find_shards import is_pattern
from optima.data.images import decode, inspect
from optima.data.packing import Tokens, pack
from optima.data.record import ImageSource, Records, Rejection, Unusable, write_rejections
from optima.data.records import FORMATS, open_records
from optima.data.remote import is_address
from optima.data.tokenizers import named_tokenizer
from optima.data.vocabulary import text_tokenizer, unknown_words
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError

_CHUNK = 1024  # images that are handed to the threads at a time


class ImageReport(NamedTuple):
    """What the check found of an image: its size in bytes, what is unusual, and what makes it unusable."""

    bytes: int
    traits: tuple[str, ...]
    fault: Unusable | None


@dataclass(frozen=True)
class SplitReport:
    """The outcome of one split: the usable records, and what the check found.

    Attributes:
        records: Usable records; `rejected` has all that was lost.
        images: Distinct usable images.
        bytes: Their size together.
        converted: (image, traits) of those that are not plain RGB that lies upright.
        shards: Tars that were written.
    """

    records: Records
    images: int
    bytes: int
    converted: tuple[tuple[str, tuple[str, ...]], ...]
    shards: tuple[Path, ...] = ()


def prepare(config: PrepareConfig) -> list[SplitReport]:
    """Checks, prints what was found, and packs.

    Raises OptimaError if a split that was asked for is missing, none is there, or too much of one is unusable; the
    lists in the output folder are written before.
    """
    tokens = None
    if config.tokenizer is not None:
        tokens = Tokens(
            config.tokenizer,
            named_tokenizer(config.tokenizer),
            config.text_length,
        )
    opened, missing = _open(config)
    config.out.mkdir(parents=True, exist_ok=True)
    if not is_address(config.root) and config.out.resolve() == Path(config.root).resolve():
        raise OptimaError(f"out {config.out} is the data root; give another folder with --out")
    reports = [check(records, config.workers) for records in opened]
    write_rejections((found for report in reports for found in report.records.rejected), config.out / "rejected.jsonl")
    converted = [{"where": where, "traits": traits} for report in reports for where, traits in report.converted]
    lines = "".join(json.dumps(row) + "\n" for row in converted)
    write_atomically(config.out / "converted.jsonl", lines.encode())
    _print(reports, missing, config)
    for report in reports:
        report.records.refuse_above(config.max_rejected)
    if config.pack:
        try:
            reports = [
                replace(report, shards=tuple(pack(report.records, config.out, config.shard_mib * 2**20, tokens)))
                for report in reports
            ]
        except Unusable as fault:
            raise OptimaError(f"{config.root} changed while it was packed: {fault.reason}; start again") from fault
        except OSError as error:
            raise OptimaError(f"{config.out} cannot be written to: {error.strerror}; start again") from error
        count = sum(len(report.shards) for report in reports)
        print(f"packed {count} shards into {config.out}; use them with the same data name and this folder as root")
    return reports


def check(records: Records, workers: int) -> SplitReport:
    """Decodes every image of the records in full; those of unusable images become rejections."""
    sources = list(dict.fromkeys(source for record in records.items for source in record.images))
    reports = dict(zip(sources, _look(sources, f"{records.name} {records.split}", workers), strict=True))
    kept, lost = [], []
    for record in records.items:
        faulty = next((source for source in record.images if reports[source].fault), None)
        fault = reports[faulty].fault if faulty is not None else None
        if fault is None:
            kept.append(record)
        else:
            lost.append(Rejection(record.id, str(faulty), fault.kind, fault.reason))
    usable = {source: report for source, report in reports.items() if report.fault is None}
    return SplitReport(
        replace(records, items=kept, rejected=(*records.rejected, *lost)),
        len(usable),
        sum(report.bytes for report in usable.values()),
        tuple((str(source), report.traits) for source, report in usable.items() if report.traits),
    )


def look(source: ImageSource) -> ImageReport:
    """Reads and decodes an image."""
    try:
        data = source.read()
        header = inspect(data)
        decode(data, header, reuse=True)
    except Unusable as fault:
        return ImageReport(0, (), fault)
    return ImageReport(len(data), header.traits, None)


def _look(sources: Sequence[ImageSource], title: str, workers: int) -> Iterator[ImageReport]:
    threads = max(1, LoaderConfig(workers=workers).worker_count())
    console = make_console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with (
        ThreadPoolExecutor(threads) as pool,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(title, total=len(sources))
        left = iter(sources)
        while chunk := list(islice(left, _CHUNK)):
            yield from pool.map(look, chunk)
            progress.advance(task, len(chunk))


def _open(config: PrepareConfig) -> tuple[list[Records], dict[str, str]]:
    """The splits that are there, and why the others are not."""
    if config.data not in FORMATS:
        raise OptimaError(f"data {config.data!r} is unknown; known are {', '.join(FORMATS)}")
    patterns = [split for split in config.splits or () if is_pattern(split)]
    if config.pack and patterns:
        raise OptimaError(
            f"splits {patterns[0]}: shards are named after their split, and a pattern is none; --pack false"
        )
    opened, missing = [], {}
    for split in config.splits or FORMATS[config.data].splits:
        try:
            opened.append(_open_split(config, split))
        except OptimaError as error:
            if config.splits:
                raise
            missing[split] = str(error)
    if not opened:
        raise OptimaError(f"no split of {config.data} is whole: " + "; ".join(missing.values()))
    return opened, missing


def _open_split(config: PrepareConfig, split: str) -> Records:
    return open_records(config.data, config.root, split, max_rejected=1, answers=config.answers, index=config.index)


def _print(reports: Sequence[SplitReport], missing: dict[str, str], config: PrepareConfig) -> None:
    headings = ("split", "records", "images", "MiB", "rejected", "left out", "converted")
    table = make_table(*headings, title=f"{config.data} in {config.root}")
    for report in reports:
        table.add_row(
            report.records.split,
            *(f"{number:,}" for number in (len(report.records), report.images, round(report.bytes / 2**20))),
            f"{len(report.records.rejected):,}",
            f"{sum(report.records.left_out.values()):,}",
            f"{len(report.converted):,}",
        )
    console = make_console()
    console.print(table)
    for split, reason in missing.items():
        console.print(f"{split}: not there: {reason}", soft_wrap=True)
    _print_counts("rejected", Counter(found.kind for report in reports for found in report.records.rejected), config)
    converted = Counter(trait for report in reports for _, traits in report.converted for trait in traits)
    _print_counts("converted", converted, config)
    for report in reports:
        for reason, count in report.records.left_out.items():
            print(f"left out of {report.records.split}: {count:,} with {reason}")
    for line in _told_of_words([report.records for report in reports], config.tokenizer):
        print(line)


def _told_of_words(splits: Sequence[Records], named: str | None) -> Iterator[str]:
    """What a vocabulary lacks of each split's texts: that of the named tokenizer, or else of training's own words."""
    texts = {records.split: [text for record in records.items for text in record.texts] for records in splits}
    if named is not None:
        tokenizer, whose = named_tokenizer(named), f"the tokenizer {named}"
    elif "train" in texts:
        tokenizer, whose = text_tokenizer(texts.pop("train"))[0], "the words of train"
    else:
        return
    for split, found in ((split, unknown_words(tokenizer, own)) for split, own in texts.items()):
        if found.different:
            yield f"{split}, read with {whose}: {found}"


def _print_counts(what: str, counts: Counter[str], config: PrepareConfig) -> None:
    if counts:
        named = ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())
        print(f"{what}: {named}; each is named in {config.out / f'{what}.jsonl'}")
