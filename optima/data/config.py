"""What a command may be told about its data: which, how it is loaded, how images become squares, how it is packed.

Imports the standard library alone, so that a command line is parsed before torch is loaded.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

DataName = Literal["coco", "coco_karpathy", "vqav2", "nlvr2", "snli_ve", "folder", "webdataset"]
"""Data sets that are files: the formats of `optima.data.records`."""
DataSetName = Literal["pictograms", DataName]

Held = Literal["validation", "test"]
HELD: tuple[Held, ...] = get_args(Held)
"""The two roles that held-out items play: points of the learning curve, and final scores."""

EngineName = Literal["auto", "torch", "dali"]
Interpolation = Literal["bicubic", "bilinear"]

ANSWERS = 3129
"""Size of VQAv2's answer vocabulary by default, the field's usual one."""


@dataclass(frozen=True)
class TransformConfig:
    """How images become squares.

    Attributes:
        image_size: Side of the square, pixels.
        fit: Evaluation: "crop" takes the central square, "squash" the whole image.
        interpolation: Filter, antialiased; "bicubic" is what CLIP's and CoCa's weights were trained with.
        least_area: Training: least share of an image's area that a random crop takes; 1 trains on the evaluation's
            window.
        most_stretch: Training: most that a crop's shape is stretched, width to height or height to width.
        mirror: Training: mirror every other image, where left and right do not matter: never for VQA and NLVR2, nor
            beside a text that names them.
    """

    image_size: int = 224
    fit: Literal["crop", "squash"] = "crop"
    interpolation: Interpolation = "bicubic"
    least_area: float = 0.5
    most_stretch: float = 4 / 3
    mirror: bool = True

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if not 0 < self.least_area <= 1:
            raise ValueError(f"least_area must be above 0 and at most 1, got {self.least_area}")
        if self.most_stretch < 1:
            raise ValueError(f"most_stretch must be at least 1, got {self.most_stretch}")


@dataclass(frozen=True)
class LoaderConfig:
    """How images are loaded.

    Attributes:
        engine: "torch", "dali", or "auto": DALI on a GPU where it is installed, else torch.
        workers: torch: processes that load ahead, 0 loads within the training process. DALI: its threads. -1 takes one
            for every CPU but one, at most 8.
        prefetch: Batches that are loaded ahead (torch: by each worker).
        max_rejected: Share of the records, 0 to 1, whose images may turn out unusable before the run ends.
        transform: From images to squares.
    """

    engine: EngineName = "auto"
    workers: int = -1
    prefetch: int = 2
    max_rejected: float = 0.01
    transform: TransformConfig = field(default_factory=TransformConfig)

    def __post_init__(self) -> None:
        if self.workers < -1 or self.prefetch < 1:
            raise ValueError(
                f"workers must be at least -1 and prefetch at least 1, got {self.workers} and {self.prefetch}"
            )
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected must be within 0..1, got {self.max_rejected}")

    def worker_count(self) -> int:
        """`workers`, with -1 resolved for this machine."""
        return self.workers if self.workers >= 0 else max(0, min(8, len(os.sched_getaffinity(0)) - 1))


@dataclass(frozen=True)
class DataConfig:
    """Which images and texts.

    Attributes:
        name: "pictograms" needs no files; the others are official data sets as downloaded, "folder" one's own images
            with captions, and "webdataset" tars of them. Each but pictograms serves one task.
        root: Data root of any but pictograms; `prepare` checks it. For tars also an address: s3://..., https://...
        index: Folder that keeps where the samples of tars lie, once it is known: of tars at an address, and of more
            than 1 GiB of them. null takes the user's cache; processes on many machines had better share one.
        train: Split to train on; of webdataset also a pattern of tars, such as "shard-{000..098}.tar".
        validation: Split of the learning curve and the probe.
        test: Split of the final scores; null takes "test", or "validation" where test answers are not published.
        tokenizer: "texts" is a word list made of the training split's texts, "clip" is CLIP's, "words" the word list of
            pictograms; or a file: a SentencePiece .model, CLIP's byte pairs (.txt.gz), a JSON object from word to id.
            null takes clip for a model of its 49408 tokens, else words. Pictograms have their own.
        text_length: Tokens in a row of text, start and end included; longer texts are cut. 0 takes the teacher's most,
            with the tokenizer "texts" those of the longest text, at most 64.
        max_unknown: Share of the words of the training texts, 0 to 1, that may be missing from the vocabulary.
        answers: Size of VQAv2's answer vocabulary, the most frequent ones of its training split.
        loader: How images are loaded; transform.image_size is replaced by the teacher's image size.
    """

    name: DataSetName = "pictograms"
    root: str | Path | None = None
    index: Path | None = None
    train: str = "train"
    validation: str = "validation"
    test: str | None = None
    tokenizer: str | None = None
    text_length: int = 0
    max_unknown: float = 0.1
    answers: int = ANSWERS
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if self.name == "pictograms" and self.root is not None:
            raise ValueError(f"root {self.root} is given, but pictograms have none; give a data name, too")
        if self.name != "pictograms" and self.root is None:
            raise ValueError(f"root, the folder that {self.name} was downloaded to, must be given")
        if self.text_length < 0 or self.answers < 1:
            raise ValueError(
                f"text_length must be at least 0 and answers at least 1, got {self.text_length} and {self.answers}"
            )
        if not 0 <= self.max_unknown <= 1:
            raise ValueError(f"max_unknown must be within 0..1, got {self.max_unknown}")


@dataclass(frozen=True)
class PrepareConfig:
    """What to check and pack.

    Attributes:
        data: Format of the data set.
        root: Where its files are, as they were downloaded; of tars also an address: s3://..., https://...
        index: Folder that keeps where the samples of tars lie, as `data.index` of the other commands.
        splits: Splits to prepare; null takes all that are there.
        out: Folder for the shards and the lists of rejected and converted items.
        pack: Write tar shards after the check.
        shard_mib: Size at which a shard is closed, MiB.
        tokenizer: Also pack the texts as tokens: of "words", "clip" or a tokenizer's file; null packs none.
        text_length: Tokens in a row of text.
        answers: Size of VQAv2's answer vocabulary.
        max_rejected: Share of a split, 0 to 1, that may be unusable; above it nothing is packed.
        workers: Threads that decode; -1 takes one for every CPU but one, at most 8.
    """

    data: DataName
    root: str | Path
    splits: list[str] | None = None
    out: Path = Path("prepared")
    pack: bool = True
    shard_mib: int = 512
    tokenizer: str | None = None
    text_length: int = 77
    answers: int = ANSWERS
    max_rejected: float = 0.01
    workers: int = -1
    index: Path | None = None

    def __post_init__(self) -> None:
        if self.shard_mib < 1 or self.text_length < 2 or self.answers < 1:
            raise ValueError(
                "shard_mib and answers must be at least 1 and text_length at least 2, "
                f"got {self.shard_mib}, {self.answers} and {self.text_length}"
            )
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected must be within 0..1, got {self.max_rejected}")
