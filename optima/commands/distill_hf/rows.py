"""Rows of a data set as conversations: what is asked, with which images or which sound, and what is to be said."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optima.limits import MAX_SOUND_SAMPLES
from optima_core.errors import OptimaError

Message = dict[str, Any]


class Sound(NamedTuple):
    """samples: float32 [samples], the mean over channels. rate: samples a second."""

    samples: NDArray[np.float32]
    rate: int


class Row(NamedTuple):
    """asked: messages before the answer; empty where there is only a text. answer: what is to be said.

    images: those of all messages, in order. sound: what the answer says in words.
    """

    asked: tuple[Message, ...]
    answer: str
    images: tuple[Any, ...]
    sound: Sound | None = None


def read_row(row: dict[str, Any], path: Path, number: int) -> Row:
    """The row of that number in a data set, from its columns.

    Raises OptimaError, naming the row, if it cannot be read.
    """
    where = f"data {path}, row {number}"
    found = _shaped(row, path, where)
    return found if row.get("audio") is None else found._replace(sound=_sound(row["audio"], path, where))


def _shaped(row: dict[str, Any], path: Path, where: str) -> Row:
    images = row.get("images") or ([] if row.get("image") is None else [row["image"]])
    images = tuple(_image(image, path, where) for image in images)
    if row.get("messages"):
        return _chat(row["messages"], images, where)
    shown = [{"type": "image"} for _ in images]
    if row.get("question") is not None:
        asked = [*shown, {"type": "text", "text": str(row["question"])}]
        return Row(({"role": "user", "content": asked},), str(row["answer"]), images)
    text = row.get("caption") if row.get("caption") is not None else row.get("text")
    if not isinstance(text, str):
        raise OptimaError(f"{where}: has neither messages, nor a question, nor a caption, nor a text")
    return Row(({"role": "user", "content": shown},) if images else (), text, images)


def _content(given: Any, path: Path) -> Any:
    """What a cell of the data set at `path` stands for: a file's path, its content, or what the cell holds itself."""
    folder = path if path.is_dir() else path.parent
    if isinstance(given, dict):
        data = given.get("bytes")
        return io.BytesIO(data) if data else folder / given["path"]
    return folder / given if isinstance(given, str) else given


def _sound(sound: Any, path: Path, where: str) -> Sound:
    try:
        import soundfile
    except ImportError:
        raise OptimaError(f"{where}: has audio and soundfile is not installed; `pip install soundfile`") from None
    try:
        with soundfile.SoundFile(_content(sound, path)) as file:
            if (count := file.frames * file.channels) > MAX_SOUND_SAMPLES:
                raise OptimaError(f"{where}: the audio is of {count:,} samples, at most {MAX_SOUND_SAMPLES:,} are read")
            return Sound(file.read(dtype="float32", always_2d=True).mean(axis=1), file.samplerate)
    except (OSError, KeyError, TypeError, soundfile.SoundFileError) as error:
        raise OptimaError(f"{where}: the audio cannot be read: {error}") from error


def _image(image: Any, path: Path, where: str) -> Any:
    try:
        found = _content(image, path)
        return (Image.open(found) if isinstance(image, str | dict) else found).convert("RGB")
    except (OSError, KeyError, AttributeError, TypeError, Image.DecompressionBombError) as error:
        raise OptimaError(f"{where}: the image cannot be read: {error}") from error


def _chat(messages: list[Message], images: tuple[Any, ...], where: str) -> Row:
    *asked, last = messages
    if last.get("role") != "assistant":
        raise OptimaError(f"{where}: the last message must be the assistant's, whose words are learnt")
    found = []
    for message in asked:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{name: value for name, value in part.items() if value is not None} for part in parts]
        found.append({"role": message["role"], "content": parts})
    named = sum(part["type"] == "image" for message in found for part in message["content"])
    if named == 0 and images and found:
        user = next(message for message in found if message["role"] == "user")
        user["content"] = [*({"type": "image"} for _ in images), *user["content"]]
    elif named != len(images):
        raise OptimaError(f"{where}: the messages name {named} images, and {len(images)} are given")
    answer = last["content"] if isinstance(last["content"], str) else "".join(x["text"] for x in last["content"])
    return Row(tuple(found), answer, images)
