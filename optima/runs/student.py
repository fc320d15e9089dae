"""What a distilled student is for: captions of one's own images, and answers about them.

>>> from optima import load_student
>>> load_student("runs/distill").caption(["image.png"])  # doctest: +SKIP
['two pizzas to the right of a dog']
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca
from optima.coca.config import GenerationConfig
from optima.coca.generate import generate, token_probability
from optima.data.images import inspect
from optima.data.normalise import normalise
from optima.data.record import ImageSource, Unusable
from optima.data.transform import evaluation_window, make_square, resample
from optima.runs.looking import attention_over_image
from optima.runs.words import NAME, Words, read_words
from optima_core.errors import OptimaError

ShownImage = str | Path | bytes | Image.Image | Tensor
"""A file, or its content; a PIL image, or uint8 [3, H, W]."""


class Student:
    """A student and its words; it works on the device that the model is on."""

    def __init__(self, model: CoCa, words: Words) -> None:
        self.model = model.eval().requires_grad_(False)
        self.words = words
        self.device = model.logit_scale.device

    @overload
    def caption(  # type: ignore[overload-overlap]  # a str is a sequence of them
        self, images: ShownImage, generation: GenerationConfig | None = None
    ) -> str: ...
    @overload
    def caption(self, images: Sequence[ShownImage], generation: GenerationConfig | None = None) -> list[str]: ...
    def caption(
        self, images: ShownImage | Sequence[ShownImage], generation: GenerationConfig | None = None
    ) -> str | list[str]:
        """The caption of an image, or a list of them for a list.

        Raises OptimaError if the student was not taught captioning, or something is no image.
        """
        listed, single = _listed(images)
        captions = self.words.tokenizer.decode(self._captions(self._images(listed), generation))
        return captions[0] if single else captions

    def probable_captions(
        self, images: Sequence[ShownImage], generation: GenerationConfig | None = None
    ) -> list[tuple[str, float]]:
        """The captions of images, and how probable the student holds a token of each: the geometric mean, 0 to 1.

        Raises OptimaError if the student was not taught captioning, or something is no image.
        """
        shown = self._images(images)
        tokens = self._captions(shown, generation)
        probabilities = token_probability(self.model, shown, tokens).tolist()
        return list(zip(self.words.tokenizer.decode(tokens), probabilities, strict=True))

    def _captions(self, shown: Tensor, generation: GenerationConfig | None) -> Tensor:
        self._refuse_other_task(captioning=True)
        tokenizer = self.words.tokenizer
        return generate(
            self.model,
            shown,
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            length=self.words.text_length,
            config=generation,
        )

    def answer(self, text: str, images: ShownImage | Sequence[ShownImage]) -> dict[str, float]:
        """Probabilities of all answers to a question, statement or hypothesis about one image (nlvr2: a list of two).

        They are in descending order. Raises OptimaError if the student was taught captioning, the text is too long,
        the number of images is wrong, or a file is no image. Words that the student does not know are warned about.
        """
        self._refuse_other_task(captioning=False)
        task, tokenizer = self.words.task, self.words.tokenizer
        shown, _ = _listed(images)
        wanted = self.model.head_specs[task].images
        if len(shown) != wanted:
            raise OptimaError(f"{task} takes {wanted} image{'s' if wanted > 1 else ''} a text, got {len(shown)}")
        if unknown := tokenizer.unknown_words(text):
            warnings.warn(f"the student does not know {', '.join(unknown)}", stacklevel=2)
        try:
            tokens = tokenizer.encode([text], self.words.text_length).to(self.device)
        except ValueError as error:
            raise OptimaError(f"the text is too long for this student: {error}") from None
        output = self.model(self._images(shown)[None], tokens)
        probabilities = self.model.class_logits(task, output)[0].softmax(dim=-1)
        order = probabilities.argsort(descending=True).tolist()
        return {self.words.classes[index]: float(probabilities[index]) for index in order}

    def looks(self, text: str, image: ShownImage) -> tuple[Image.Image, list[tuple[str, list[list[float]]]]]:
        """Where the student looks for each word of its caption, or of a question about the image.

        Returns the square it sees, and for each word (a piece of one, if the tokenizer cuts words) weights over the
        square, rows of columns, which sum to 1. They are empty where a pooler hides which part of the image a token
        stands for.
        """
        tokenizer, told = self.words.tokenizer, int(self.words.task == "captioning")
        square = self._square(image, "number 1")
        # A caption may fill the whole row; its words are told by the positions before them, which see no end.
        tokens = tokenizer.encode([text], self.words.text_length, end=not told, truncate=True)
        maps = attention_over_image(self.model, normalise(square[None]).to(self.device), tokens.to(self.device))
        seen = Image.fromarray(square.permute(1, 2, 0).numpy())
        if maps is None:
            return seen, []
        places = [place for place, token in enumerate(tokens[0].tolist()) if token not in self._silent()]
        named = tokenizer.decode([[int(tokens[0, place])] for place in places])
        return seen, [(word, maps[0, place - told].tolist()) for word, place in zip(named, places, strict=True)]

    def _silent(self) -> set[int]:
        """Tokens that are no words."""
        tokenizer = self.words.tokenizer
        return {tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id}

    def _refuse_other_task(self, captioning: bool) -> None:
        if captioning != (self.words.task == "captioning"):
            command = "answer" if captioning else "caption"
            raise OptimaError(f"this student was taught {self.words.task}; use `{command}`")

    def _images(self, images: Sequence[ShownImage]) -> Tensor:
        """Images -> normalised [images, 3, S, S]."""
        squares = [self._square(found, f"number {place + 1}") for place, found in enumerate(images)]
        return normalise(torch.stack(squares)).to(self.device)

    def _square(self, given: ShownImage, name: str) -> Tensor:
        """uint8 [3, S, S]. Raises OptimaError, calling an image that is no file `name`."""
        config = self.words.transform
        if isinstance(given, str | Path | bytes):
            try:
                content = given if isinstance(given, bytes) else ImageSource(str(given)).read()
                header = inspect(content)
                return make_square(content, header, evaluation_window(header.width, header.height, config), config)
            except Unusable as error:
                raise OptimaError(f"image {name if isinstance(given, bytes) else given}: {error}") from None
        pixels = _pixels(given, name)
        window = evaluation_window(pixels.shape[1], pixels.shape[0], config)
        part = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
        return resample(part, config.image_size, config.interpolation, mirrored=False)


def _listed(images: ShownImage | Sequence[ShownImage]) -> tuple[Sequence[ShownImage], bool]:
    """The images in a list, and whether it was a single one."""
    if isinstance(images, str | Path | bytes | Image.Image):
        return [images], True
    if isinstance(images, Tensor):
        return ([images], True) if images.ndim == 3 else (list(images), False)
    return images, False


def _pixels(given: Any, name: str) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] of an image in memory."""
    if isinstance(given, Image.Image):
        return np.asarray(ImageOps.exif_transpose(given).convert("RGB"))
    if isinstance(given, Tensor) and given.dtype == torch.uint8 and given.ndim == 3 and given.shape[0] == 3:
        return given.permute(1, 2, 0).cpu().numpy()
    found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    raise OptimaError(f"image {name} must be a path, a PIL image or a uint8 tensor [3, H, W], got {found}")


def load_student(run: str | Path, device: str | torch.device | None = None) -> Student:
    """The student of a finished run, on `device`; None takes the GPU if there is one.

    Raises OptimaError if the directory holds none, or words of another model, or the device cannot be used.
    """
    model, words = load_coca(Path(run) / "student.safetensors"), read_words(Path(run))
    size, most = model.config.image_encoder.image_size, model.config.text_decoder.context_length
    if not 2 <= words.text_length <= most:
        raise OptimaError(f"{run}: the student reads texts of {most} tokens, {NAME} says {words.text_length}")
    if words.transform.image_size != size:
        raise OptimaError(f"{run}: the student takes images of {size} pixels, {NAME} says {words.transform.image_size}")
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
