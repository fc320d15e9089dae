"""Rows as the keyword arguments of a model: what its processor makes of them, and labels for what is to be said."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch

from optima.commands.distill_hf.rows import Message, Row
from optima.commands.distill_hf.source import Source
from optima_core.errors import OptimaError
from optima_core.parallel import Ranks

IGNORED = -100


def is_labelled(model: Any) -> bool:
    """Whether batches of a student ask for its own loss."""
    return bool(model.config.is_encoder_decoder or model.can_generate() or _contrasts(model))


def _contrasts(model: Any) -> bool:
    return hasattr(model, "logit_scale")


class Batches:
    """Batches of rows by number.

    Args:
        rows: Training rows and held ones.
        processor: The teacher's processor or tokenizer.
        model: The student, which says what kind of arguments are needed: a causal language model with or without
            images gets labels; an encoder with a decoder reads what is asked or, of Whisper's kin, hears, and gets
            labels; a model of image and text (CLIP's kin) is asked for its own loss; any other model gets its inputs
            alone, and is distilled without labels.
        size: Rows a batch, of which this rank takes a slice.
        ranks: The processes of the run.
    """

    def __init__(
        self, rows: Source, processor: Any, model: Any, *, size: int, max_length: int, ranks: Ranks | None = None
    ) -> None:
        self._rows, self._processor, self._size, self._ranks = rows, processor, size, ranks or Ranks()
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._cut = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
        self.held = rows.held
        """How many rows are held out."""
        self._contrasts = _contrasts(model)
        self._arguments = self._kind(model)
        if self._contrasts and self._ranks.count > 1:
            raise OptimaError(
                f"{type(model).__name__} compares the rows of a batch with each other, which {self._ranks.count} ranks "
                "would each do with their own; run it in one process"
            )

    def load(self, number: int) -> dict[str, Any]:
        """This rank's slice of the training batch of that number."""
        return self.arguments(self._rows.train(*self._ranks.share(number * self._size, self._size)))

    def probe(self, size: int) -> dict[str, Any]:
        """This rank's slice of the first held rows."""
        return self.arguments(self._rows.held_rows(*self._ranks.share(0, min(size, self.held))))

    def held_batches(self, limit: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Held rows in batches, whole on every rank, with their sizes; at most `limit` rows if that is not 0."""
        count = min(limit, self.held) if limit else self.held
        for start in range(0, count, self._size):
            size = min(self._size, count - start)
            yield self.arguments(self._rows.held_rows(start, size)), size

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The keyword arguments of the model for these rows."""
        return self._arguments(rows)

    def _kind(self, model: Any) -> Callable[[Sequence[Row]], dict[str, Any]]:
        """How the model's arguments are made."""
        if model.config.is_encoder_decoder:
            windows = hasattr(getattr(self._processor, "feature_extractor", None), "chunk_length")
            if model.main_input_name == "input_features" and windows:
                return partial(self._heard_and_said, start=model.config.decoder_start_token_id)
            if model.main_input_name != "input_ids":
                raise OptimaError(
                    f"{type(model).__name__} reads {model.main_input_name}, and rows are made for encoders that read "
                    "input_ids, or sound as Whisper's does; take optima_core.integrations.huggingface with batches of "
                    "your own"
                )
            return self._read_and_said
        if not model.can_generate():
            return self._shown
        return self._joined if "suffix" in signature(type(self._processor).__call__).parameters else self._said

    def _shown(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Without labels."""
        found = self._processed([row.answer for row in rows], rows, one_image=True)
        return found | ({"return_loss": True} if self._contrasts else {})

    def _said(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What is asked and what is to be said as one text, the latter labelled."""
        asked = [self._asked(row) for row in rows]
        end = self._tokenizer.eos_token or ""
        said = [prompt + row.answer + end for prompt, row in zip(asked, rows, strict=True)]
        # A prompt begins with what texts begin with, and would otherwise get it twice.
        found = self._processed(said, rows, add_special_tokens=False)
        ids, valid = found["input_ids"], found["attention_mask"].bool()
        lengths = self._lengths(asked)
        if rows[0].images:
            # In place of an image a processor puts many words, all of them before the answer.
            lengths += valid.sum(1) - self._lengths(said)
        prompt = torch.arange(ids.shape[1])[None] < lengths[:, None]
        found["labels"] = ids.masked_fill(prompt | ~valid, IGNORED)
        return found

    def _joined(self, rows: Sequence[Row]) -> dict[str, Any]:
        """By a processor that joins the two itself, and labels what is to be said (PaliGemma's)."""
        image = self._processor.image_token
        asked = [image * len(row.images) + _words(row.asked) for row in rows]
        return self._processed(asked, rows, suffix=[row.answer for row in rows])

    def _read_and_said(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What an encoder reads, and what a decoder is to say."""
        if any(row.images or not row.asked for row in rows):
            raise OptimaError(
                "an encoder with a decoder reads a question and says an answer: rows of question and answer, or "
                "messages, are needed, without images"
            )
        return self._processed([_words(row.asked) for row in rows], rows) | self._targets(rows)

    def _heard_and_said(self, rows: Sequence[Row], start: int) -> dict[str, Any]:
        """Sounds as spectrograms of one length, and what a decoder is to say, behind the token `start`."""
        extractor = self._processor.feature_extractor
        sounds = [_heard(row, extractor.sampling_rate, extractor.chunk_length) for row in rows]
        found = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        said = self._targets(rows)
        if bool((said["labels"][:, 0] == start).all()):  # which the model puts before the labels itself
            said = {name: value[:, 1:] for name, value in said.items()}
        return {"input_features": found["input_features"], **said}

    def _targets(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The labels of a decoder, and which of them count."""
        said = self._written([row.answer for row in rows], as_target=True)
        valid = said["attention_mask"]
        return {"labels": said["input_ids"].masked_fill(valid == 0, IGNORED), "decoder_attention_mask": valid}

    def _lengths(self, texts: list[str]) -> torch.Tensor:
        """Words of each text, as they are written: int64 [rows]."""
        return torch.tensor([len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]])

    def _processed(self, texts: list[str], rows: Sequence[Row], one_image: bool = False, **more: Any) -> dict[str, Any]:
        if any(row.sound is not None for row in rows):
            raise OptimaError("rows have audio, which the model does not hear")
        images = [list(row.images) for row in rows]
        if not any(images):
            return self._written(texts, **more)
        if not all(images):
            raise OptimaError("some rows have images and others have none; a batch must be of one kind")
        if one_image:
            return dict(self._processor(images=[image for (image,) in images], text=texts, **self._cut, **more))
        # Cutting a row could cut its image's tokens, which processors refuse.
        return dict(self._processor(images=images, text=texts, padding=True, return_tensors="pt", **more))

    def _written(self, texts: list[str], as_target: bool = False, **more: Any) -> dict[str, Any]:
        return dict(self._tokenizer(**{"text_target" if as_target else "text": texts}, **self._cut, **more))

    def _asked(self, row: Row) -> str:
        """What comes before the answer, as text."""
        if getattr(self._processor, "chat_template", None) and row.asked:
            messages = list(row.asked) if row.images else [_as_text(message) for message in row.asked]
            return str(self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        start = self._tokenizer.bos_token or ""
        image = getattr(self._processor, "image_token", "")
        parts = [part for message in row.asked for part in message["content"]]
        return start + "".join(image if part["type"] == "image" else f"{part['text']}\n" for part in parts)


def _heard(row: Row, rate: int, seconds: int) -> Any:
    """The samples of a row's sound. Raises OptimaError if it has none, of another rate, or more than the seconds."""
    if row.sound is None or row.asked:
        raise OptimaError("a model that hears says what was said: rows of audio and text are needed")
    samples, found = row.sound
    if found != rate:
        raise OptimaError(f"audio of {found} samples a second, and the model hears {rate}; resample the files")
    if len(samples) > seconds * rate:
        raise OptimaError(f"audio of {len(samples) / rate:.1f} s, and the model hears {seconds} s; cut it into parts")
    return samples


def _as_text(message: Message) -> Message:
    """Templates of language models expect a message's words, not its parts."""
    return {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}


def _words(messages: Sequence[Message]) -> str:
    """All that messages say, a line each."""
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")
