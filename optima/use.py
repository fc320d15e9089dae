"""What a distilled student is for: captions of one's own pictures, and answers about them.

>>> from optima.use import load_student
>>> load_student("runs/distill").caption(["picture.png"])  # doctest: +SKIP
['two pizzas to the right of a dog']
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca
from optima.coca.config import GenerationConfig
from optima.coca.generate import generate
from optima.data.config import TransformConfig
from optima.data.images import inspect
from optima.data.normalise import normalise
from optima.data.record import ImageSource, Unusable
from optima.data.transform import evaluation_window, picture
from optima.words import NAME, Words, read_words
from optima_core.errors import OptimaError


class Student:
    """A student and its words."""

    def __init__(self, model: CoCa, words: Words) -> None:
        self.model = model.eval().requires_grad_(False)
        self.words = words

    def caption(self, pictures: Sequence[str | Path], generation: GenerationConfig | None = None) -> list[str]:
        """A caption a picture file.

        Raises OptimaError if the student was not taught captioning, or a file is no picture.
        """
        self._refuse_other_task(captioning=True)
        tokenizer = self.words.tokenizer
        tokens = generate(
            self.model,
            self._images(pictures),
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            length=self.words.text_length,
            config=generation,
        )
        return tokenizer.decode(tokens)

    def answer(self, text: str, pictures: Sequence[str | Path]) -> dict[str, float]:
        """Probabilities of all answers to a question, statement or hypothesis about one picture (nlvr2: two).

        They are in descending order. Raises OptimaError if the student was taught captioning, the text is too long,
        the number of pictures is wrong, or a file is no picture. Words that the student does not know are warned about.
        """
        self._refuse_other_task(captioning=False)
        task, tokenizer = self.words.task, self.words.tokenizer
        wanted = self.model.head_specs[task].pictures
        if len(pictures) != wanted:
            raise OptimaError(f"{task} takes {wanted} picture{'s' if wanted > 1 else ''} a text, got {len(pictures)}")
        if unknown := tokenizer.unknown_words(text):
            warnings.warn(f"the student does not know {', '.join(unknown)}", stacklevel=2)
        try:
            tokens = tokenizer.encode([text], self.words.text_length)
        except ValueError as error:
            raise OptimaError(f"the text is too long for this student: {error}") from None
        output = self.model(self._images(pictures)[None], tokens)
        probabilities = self.model.class_logits(task, output)[0].softmax(dim=-1)
        order = probabilities.argsort(descending=True).tolist()
        return {self.words.classes[index]: float(probabilities[index]) for index in order}

    def _refuse_other_task(self, captioning: bool) -> None:
        if captioning != (self.words.task == "captioning"):
            command = "answer" if captioning else "caption"
            raise OptimaError(f"this student was taught {self.words.task}; use `{command}`")

    def _images(self, pictures: Sequence[str | Path]) -> Tensor:
        """Picture files -> normalised [pictures, 3, S, S]."""
        config = TransformConfig(image_size=self.model.config.image_encoder.image_size)
        squares = []
        for path in map(Path, pictures):
            try:
                content = ImageSource(str(path)).read()
                header = inspect(content)
                squares.append(picture(content, header, evaluation_window(header.width, header.height, config), config))
            except Unusable as error:
                raise OptimaError(f"picture {path}: {error}") from None
        return normalise(torch.stack(squares))


def load_student(run: str | Path) -> Student:
    """The student of a finished run. Raises OptimaError if the directory holds none, or words of another model."""
    model, words = load_coca(Path(run) / "student.safetensors"), read_words(Path(run))
    spec = model.head_specs.get(words.task)
    classes = 0 if spec is None else spec.classes
    longest, vocabulary = model.config.text_decoder.context_length, model.config.text_decoder.vocab_size
    complaint = ""
    if words.task != "captioning" and len(words.classes) != classes:
        complaint = f"{len(words.classes)} answers to {words.task}; the student has a head of {classes}"
    elif words.text_length > longest:
        complaint = f"texts of {words.text_length} tokens; the student takes {longest}"
    elif words.tokenizer.vocab_size > vocabulary:
        complaint = f"a vocabulary of {words.tokenizer.vocab_size} tokens; the student knows {vocabulary}"
    if complaint:
        raise OptimaError(f"{Path(run) / NAME} is of another model: it has {complaint}")
    return Student(model, words)


@dataclass(frozen=True)
class CaptionConfig:
    """Captions pictures with the student of a captioning run: `caption picture.png --run runs/distill`.

    Attributes:
        picture: Picture files: JPEG, PNG, WebP, GIF, BMP, TIFF.
        run: Directory of a finished run.
        generation: How words are chosen.
    """

    picture: list[Path]
    run: Path = Path("runs/distill")
    generation: GenerationConfig = field(default_factory=GenerationConfig)


@dataclass(frozen=True)
class AnswerConfig:
    """Answers a question about a picture, or judges a statement: `answer picture.png --run runs/vqa --text "..."`.

    Attributes:
        picture: The picture file; two for nlvr2.
        text: The question (vqa), statement (nlvr2) or hypothesis (snli_ve).
        run: Directory of a finished run.
        show: Most answers that are shown, most probable first.
    """

    picture: list[Path]
    text: str
    run: Path = Path("runs/distill")
    show: int = 3

    def __post_init__(self) -> None:
        if self.show < 1:
            raise ValueError(f"show must be at least 1, got {self.show}")


def run_caption(config: CaptionConfig) -> None:
    """Prints a line a picture."""
    if not config.picture:
        raise OptimaError("no picture given: `caption picture.png --run runs/distill`")
    captions = load_student(config.run).caption(config.picture, config.generation)
    for path, caption in zip(config.picture, captions, strict=True):
        print(f"{path}: {caption}")


def run_answer(config: AnswerConfig) -> None:
    """Prints a line an answer."""
    answers = load_student(config.run).answer(config.text, config.picture)
    for answer, probability in list(answers.items())[: config.show]:
        print(f"{answer}  {100 * probability:.1f} %")
