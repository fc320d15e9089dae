"""Official data sets, and folders of one's own, in the role of one task: records, loaded images, and tokens."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optima.data.config import DataName, Held, LoaderConfig
from optima.data.engine import ImageReader
from optima.data.loader import Loader, make_loader
from optima.data.normalise import normalise
from optima.data.order import Place
from optima.data.record import Records, RejectionLog, Unusable, counted_kinds
from optima.data.records import FORMATS, open_records
from optima.data.tokenizer import Tokenizer
from optima.data.vocabulary import unknown_words
from optima.task import TASKS, Task
from optima.tasks import scoring
from optima.tasks.batches import TaskBatch
from optima.tasks.data import Evaluation, HeldBatch, Shown
from optima_core.errors import OptimaError


@dataclasses.dataclass(frozen=True)
class OfficialSplits:
    """Which split of a data set plays which role."""

    train: str = "train"
    validation: str = "validation"
    test: str = "test"


class OfficialTask:
    """`optima.tasks.data.TaskData` over records of one of `optima.data.records.FORMATS`.

    Splits are read when they are first needed. Scores are those of `optima.tasks.scoring`.

    Args:
        name: the format.
        root: the data root.
        splits: which split plays which role.
        loader: how images are loaded; the size of the squares is `image_size`.
        tokenizer: of the texts.
        image_size: side of the squares, pixels.
        text_length: tokens in a row of text; longer texts are cut there.
        answers: size of VQAv2's answer vocabulary.
        max_unknown: share of the words of the training texts, 0 to 1, that the tokenizer may lack.
        seed: of order and windows of the training images.
        device: where batches are wanted.
        rank: this process.
        world_size: number of processes, which share the training records.
        report: rejected.jsonl, to which unusable rows and images are appended; None keeps no list.

    Raises OptimaError if the split or a file does not exist, or too many items are unusable.
    """

    def __init__(
        self,
        name: DataName,
        root: Path,
        splits: OfficialSplits,
        loader: LoaderConfig,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        text_length: int,
        answers: int,
        max_unknown: float,
        seed: int = 0,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
        report: Path | None = None,
    ) -> None:
        self.name: str = name
        self.task: Task = FORMATS[name].task
        self.headline = TASKS[self.task].headline
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.text_length = text_length
        self._format: DataName = name
        self._root = root
        self._splits = splits
        self._loader = dataclasses.replace(
            loader, transform=dataclasses.replace(loader.transform, image_size=image_size)
        )
        self._answers = answers
        self._max_unknown = max_unknown
        self._seed = seed
        self._device = device or torch.device("cpu")
        self._rank, self._world_size = rank, world_size
        self._report = RejectionLog(report)
        self._report_path = report
        self._read: dict[str, Records] = {}
        self._unused: dict[str, set[str]] = {}
        self._training: tuple[int, Loader] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        known = next(iter(self._read.values()), None) or self.records(self._splits.test)
        return known.classes

    def records(self, split: str) -> Records:
        """The records of a split of the data set."""
        if split not in self._read:
            known = next(iter(self._read.values()), None)
            records = open_records(
                self._format,
                self._root,
                split,
                max_rejected=self._loader.max_rejected,
                answers=self._answers,
                classes=known.classes if known is not None else None,
            )
            self._refuse_unknown(records)
            self._read[split] = records
            if self._rank == 0:
                self._tell(records)
        return self._read[split]

    def _refuse_unknown(self, records: Records) -> None:
        """Warns of words that the vocabulary lacks. Raises OptimaError if training would lose too many of them."""
        found = unknown_words(self.tokenizer, (text for record in records.items for text in record.texts))
        if not found.different:
            return
        if records.split == self._splits.train and found.share > self._max_unknown:
            raise OptimaError(
                f"{self.name} {records.split}: {found}; that is more than the share of {self._max_unknown:g} that is "
                "allowed: give --data.tokenizer texts, a vocabulary of these texts, or raise data.max_unknown"
            )
        if self._rank == 0:
            warnings.warn(f"{self.name} {records.split}: {found}", stacklevel=3)

    def _tell(self, records: Records) -> None:
        """Names the rows that cannot be used, and says how many there are."""
        if not records.rejected:
            return
        self._report.add(records.rejected)
        total = len(records) + len(records.rejected)
        listed = f"; each is named in {self._report_path}" if self._report_path is not None else ""
        warnings.warn(
            f"{self.name} {records.split}: {len(records.rejected)} of {total} items cannot be used "
            f"({counted_kinds(records.rejected)}){listed}",
            stacklevel=2,
        )

    def training_batch(self, number: int, size: int) -> TaskBatch:
        records = self.records(self._splits.train)
        if self._training is None or self._training[0] != size:
            self.close()
            self._training = (
                size,
                make_loader(
                    records,
                    self._loader,
                    batch_size=size,
                    seed=self._seed,
                    rank=self._rank,
                    world_size=self._world_size,
                    device=self._device,
                    report=self._report,
                ),
            )
        images, indices, epochs = self._training[1].load(number)
        places = list(zip(epochs.tolist(), indices.tolist(), strict=True))
        texts = [records[index].text_at(epoch) for epoch, index in places]
        return self._batch(images, texts, [records[index].target for _, index in places])

    def probe_batch(self, size: int) -> TaskBatch:
        records = self._held("validation")
        indices: list[int] = []
        squares: list[Tensor] = []
        for index in range(len(records)):
            if len(indices) == size:
                break
            if self.task == "captioning" or records[index].target >= 0:
                with contextlib.suppress(Unusable):
                    squares.append(self._squares(records, index))
                    indices.append(index)
        if not indices:
            raise OptimaError(f"{self.name} {records.split} has no usable item to probe with")
        return self._of_records(records, torch.stack(squares), indices)

    def held_batch(self, split: Held, indices: Sequence[int]) -> TaskBatch:
        records = self._held(split)
        return self._of_records(records, torch.stack([self._squares(records, i) for i in indices]), indices)

    def held_batches(
        self, split: Held, size: int, limit: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[HeldBatch]:
        records = self._held(split)
        total = min(len(records), limit or len(records))
        places = [place for place in range(total) if place // size % share[1] == share[0]]
        if not places:
            return
        if len(places) < len(records):
            records = dataclasses.replace(records, items=[records[place] for place in places])
        # As many unusable images are allowed as where one process takes all items.
        most = min(1.0, self._loader.max_rejected * total / len(places))
        loading = dataclasses.replace(self._loader, max_rejected=most)
        with make_loader(
            records, loading, batch_size=size, device=self._device, report=self._report, training=False
        ) as loader:
            for images, indices, _ in loader.once():
                found = indices.tolist()
                yield HeldBatch([places[index] for index in found], self._of_records(records, images, found))
            self._unused.setdefault(records.split, set()).update(found.id for found in loader.rejected.values())

    def unused(self, split: Held) -> int:
        records = self._held(split)
        return len(records.rejected) + len(self._unused.get(records.split, ()))

    def has_truth(self, split: Held) -> bool:
        return scoring.has_truth(self._held(split))

    def score(self, split: Held, indices: Sequence[int], predictions: Sequence[str]) -> Evaluation:
        return scoring.score(self._held(split), indices, predictions)

    def submission(self, split: Held, indices: Sequence[int], predictions: Sequence[str]) -> tuple[str, str]:
        return scoring.submission(self._held(split), indices, predictions)

    def shown(self, split: Held, index: int) -> Shown:
        records = self._held(split)
        record = records[index]
        images: tuple[NDArray[np.uint8], ...] = tuple(square.numpy() for square in self._squares(records, index))
        if self.task == "captioning":
            return Shown(images, None, record.text or "(not published)")
        if self.task == "vqa" and record.answers:
            return Shown(images, record.text, max(record.answers, key=record.answers.count))
        reference = records.classes[record.target] if record.target >= 0 else "(not published)"
        return Shown(images, record.text, reference)

    def close(self) -> None:
        if self._training is not None:
            self._training[1].close()
        self._training = None

    def _held(self, split: Held) -> Records:
        return self.records(self._splits.validation if split == "validation" else self._splits.test)

    def _squares(self, records: Records, index: int) -> Tensor:
        """The images of an item with the evaluation's windows, uint8 [images, 3, S, S]. Raises Unusable."""
        one = ImageReader(dataclasses.replace(records, items=[records[index]]), self._loader.transform, self._seed)
        return torch.stack([one.square(one.read(Place(0, 0), 0, side, training=False)) for side in range(one.sides)])

    def _of_records(self, records: Records, images: Tensor, indices: Sequence[int]) -> TaskBatch:
        found = [records[index] for index in indices]
        return self._batch(images, [record.text for record in found], [record.target for record in found])

    def _batch(self, images: Tensor, texts: Sequence[str], targets: Sequence[int]) -> TaskBatch:
        tokens = self.tokenizer.encode(texts, self.text_length, truncate=True)
        return TaskBatch(
            normalise(images.to(self._device, non_blocking=True)),
            tokens.to(self._device, non_blocking=True),
            torch.tensor(targets, dtype=torch.int64).to(self._device, non_blocking=True),
        )
