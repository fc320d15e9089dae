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


class Rows:
    """The rows of a file or folder, by number.

    Raises OptimaError if it is missing, is of no known kind, or its columns are of no known shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = _open(path)
        columns = set(self._rows.column_names)
        shapes = ({"messages"}, {"question", "answer"}, {"caption"}, {"text"})
        if not any(shape <= columns for shape in shapes):
            raise OptimaError(
                f"data {path} has the columns {', '.join(sorted(columns))}; one of these is needed: messages; question "
                "and answer; caption; text"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        """Raises OptimaError, naming the row, if it cannot be read."""
        row = self._rows[number]
        where = f"data {self.path}, row {number}"
        images = row.get("images") or ([] if row.get("image") is None else [row["image"]])
        images = tuple(_image(image, self.path, where) for image in images)
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


def _open(path: Path) -> Any:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    if not path.exists():
        raise OptimaError(f"data {path} does not exist; give a JSON Lines or parquet file, or a folder of images")
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if path.is_dir():
        kind, given = "imagefolder", {"data_dir": str(path)}
    elif path.suffix in kinds:
        kind, given = kinds[path.suffix], {"data_files": str(path)}
    else:
        raise OptimaError(f"data {path} is neither .jsonl nor .parquet nor a folder of images")
    try:
        return load_dataset(kind, split="train", **given)
    except Exception as error:  # the library raises many kinds of what is wrong with a file
        lines = str(error.__cause__ or error).strip().splitlines()
        raise OptimaError(f"data {path} cannot be read: {lines[0] if lines else type(error).__name__}") from error


def _image(image: Any, path: Path, where: str) -> Any:
    try:
        if isinstance(image, str):
            image = Image.open(path.parent / image)
        elif isinstance(image, dict):
            data = image.get("bytes")
            image = Image.open(io.BytesIO(data) if data else path.parent / image["path"])
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
