"""What a distilled student is for: captions of one's own pictures, and answers about them.

>>> from optima import load_student
>>> load_student("runs/distill").caption(["picture.png"])  # doctest: +SKIP
['two pizzas to the right of a dog']
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca
from optima.coca.config import GenerationConfig
from optima.coca.generate import generate
from optima.data.images import inspect
from optima.data.normalise import normalise
from optima.data.record import ImageSource, Unusable
from optima.data.transform import evaluation_window, picture
from optima.runs.words import NAME, Words, read_words
from optima_core.errors import OptimaError


class Student:
    """A student and its words; it works on the device that the model is on."""

    def __init__(self, model: CoCa, words: Words) -> None:
        self.model = model.eval().requires_grad_(False)
        self.words = words
        self.device = model.logit_scale.device

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
            tokens = tokenizer.encode([text], self.words.text_length).to(self.device)
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
        config = self.words.transform
        squares = []
        for path in map(Path, pictures):
            try:
                content = ImageSource(str(path)).read()
                header = inspect(content)
                squares.append(picture(content, header, evaluation_window(header.width, header.height, config), config))
            except Unusable as error:
                raise OptimaError(f"picture {path}: {error}") from None
        return normalise(torch.stack(squares)).to(self.device)


def load_student(run: str | Path, device: str | torch.device | None = None) -> Student:
    """The student of a finished run, on `device`; None takes the GPU if there is one.

    Raises OptimaError if the directory holds none, or words of another model, or the device cannot be used.
    """
    model, words = load_coca(Path(run) / "student.safetensors"), read_words(Path(run))
    size, most = model.config.image_encoder.image_size, model.config.text_decoder.context_length
    if not 2 <= words.text_length <= most:
        raise OptimaError(f"{run}: the student reads texts of {most} tokens, {NAME} says {words.text_length}")
    if words.transform.image_size != size:
        raise OptimaError(
            f"{run}: the student takes pictures of {size} pixels, {NAME} says {words.transform.image_size}"
        )
    spec, vocabulary = model.head_specs.get(words.task), model.config.text_decoder.vocab_size
    classes = 0 if spec is None else spec.classes
    if words.task != "captioning" and len(words.classes) != classes:
        raise OptimaError(f"{run}: the student has {classes} answers to {words.task}, {NAME} has {len(words.classes)}")
    if words.tokenizer.vocab_size > vocabulary:
        raise OptimaError(f"{run}: the student knows {vocabulary} tokens, {NAME} has {words.tokenizer.vocab_size}")
    try:
        return Student(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), words)
    except (RuntimeError, AssertionError) as error:
        raise OptimaError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
