"""Rows of a data set as conversations: what is asked, with which images, and what is to be said."""

import io
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from optima_core.errors import OptimaError

Message = dict[str, Any]


class Row(NamedTuple):
    """asked: messages before the answer; empty where there is only a text. answer: what is to be said.

    images: those of all messages, in order.
    """

    asked: tuple[Message, ...]
    answer: str
    images: tuple[Any, ...]


def read_row(row: dict[str, Any], path: Path, number: int) -> Row:
    """The row of that number in a data set, from its columns.

    Raises OptimaError, naming the row, if it cannot be read.
    """
    where = f"data {path}, row {number}"
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


def _image(image: Any, path: Path, where: str) -> Any:
    folder = path if path.is_dir() else path.parent
    try:
        if isinstance(image, str):
            image = Image.open(folder / image)
        elif isinstance(image, dict):
            data = image.get("bytes")
            image = Image.open(io.BytesIO(data) if data else folder / image["path"])
        return image.convert("RGB")
    except (OSError, KeyError, AttributeError, Image.DecompressionBombError) as error:
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
