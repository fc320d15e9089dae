"""One item of a data set, the set itself, and what could not be used of it.

A record names its images, it does not hold them: an image is a run of bytes in a file, be it the whole of a JPEG
or a member of a tar shard, so loaders read both alike. What is wrong with a data set is collected, not raised: every
unusable item becomes a `Rejection` that says which, where and why, and `Records.refuse_above` stops a run that would
lose too much.
"""

import fcntl
import json
import os
import re
import stat
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from optima.data.remote import Unreachable, fetch, is_address
from optima.limits import MAX_IMAGE_BYTES, MAX_TEXT_CHARACTERS
from optima.task import Task
from optima.untrusted import shown
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError


class ImageSource(NamedTuple):
    """Where the bytes of an image are: `size` bytes of the file from `offset` on; size -1 takes the whole file.

    path: of a file, or an address, whose size must be known. checksum: CRC-32 of the bytes, where it is known.
    """

    path: str
    offset: int = 0
    size: int = -1
    checksum: int | None = None

    def read(self) -> bytes:
        """The encoded image. Raises Unusable if there is none, it ends early, or it is too large to be one."""
        return self._fetch() if self.remote else self._read_file()

    @property
    def remote(self) -> bool:
        """Whether reading waits for a network."""
        return is_address(self.path)

    def _read_file(self) -> bytes:
        name = shown(self.path)
        try:
            # A pipe that is opened without O_NONBLOCK waits for a writer.
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise Unusable("image-unreadable", f"{name} is no file")
                size = self.size if self.size >= 0 else status.st_size
                if size > MAX_IMAGE_BYTES:
                    raise Unusable("image-bomb", f"{name} has {size} bytes; {MAX_IMAGE_BYTES} are the most")
                data = os.pread(file.fileno(), size, self.offset)
        except FileNotFoundError as error:
            raise Unusable("image-missing", f"there is no {name}") from error
        except OSError as error:
            raise Unusable("image-unreadable", f"{name} cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise Unusable("image-truncated", f"{name} ends within the image at byte {self.offset}")
        return data

    def _fetch(self) -> bytes:
        try:
            data = fetch(self.path, self.offset, self.size, self.checksum)
        except FileNotFoundError as error:
            raise Unusable("image-missing", f"there is no {shown(self.path)}") from error
        except Unreachable as error:
            raise Unusable("image-unreachable", str(error)) from error
        if len(data) != self.size:
            raise Unusable("image-truncated", f"{shown(self.path)} ends within the image at byte {self.offset}")
        if self.checksum not in (None, zlib.crc32(data)):
            name = f"{shown(self.path)} at byte {self.offset}"
            raise Unusable("image-changed", f"{name} are other bytes than when it was first read; read it again")
        return data

    def __str__(self) -> str:
        return self.path if self.size < 0 else f"{self.path} at byte {self.offset}"


@dataclass(frozen=True, slots=True)
class Record:
    """One item of a task.

    Attributes:
        id: The benchmark's own id, as its submission format wants it: COCO's image id, VQAv2's question id, NLVR2's
            identifier, SNLI-VE's pairID, a folder's file name.
        images: The images, one, or two for NLVR2 (left, right).
        texts: Captioning: all captions of the image, the references of an evaluation. Otherwise one text: the
            question, the statement (by which NLVR2's consistency groups), the hypothesis.
        target: Class in `Records.classes`; -1 for captioning, and where the answer is unknown or not in the vocabulary.
        answers: VQAv2: the ten annotators' answers as they gave them.
    """

    id: str
    images: tuple[ImageSource, ...]
    texts: tuple[str, ...]
    target: int = -1
    answers: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The first text; "" if there is none, as in a captioning test split without references."""
        return self.texts[0] if self.texts else ""

    def text_at(self, epoch: int) -> str:
        """The text to train on in an epoch: n consecutive epochs go through all n texts, every record from its own."""
        return self.texts[(zlib.crc32(self.id.encode()) + epoch) % len(self.texts)] if self.texts else ""


@dataclass(frozen=True)
class Rejection:
    """An item that cannot be used.

    Attributes:
        id: The record's id, or "" if not even that is known.
        where: File, with line, tar member or entry where there is one.
        kind: What is wrong, one of a fixed set of words such as "image-truncated".
        reason: The same for people, with what was found.
    """

    id: str
    where: str
    kind: str
    reason: str

    def line(self) -> str:
        """The line of rejected.jsonl."""
        return json.dumps(asdict(self)) + "\n"


class Unusable(Exception):
    """Raised while a record is read or an image decoded; becomes a `Rejection`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class Records:
    """The usable records of one split, in the order of the files, and what was left of the rest.

    Attributes:
        name: Format, such as "vqav2".
        split: "train", "validation", "test", or a benchmark's further split.
        task: Which task the records are of.
        items: The records; loaders and predictions refer to them by their place here.
        classes: Words of the classes; () for captioning.
        rejected: What cannot be used.
        left_out: Items that the benchmark's rules leave out, such as SNLI-VE's pairs without a gold label: reason ->
            number.
    """

    name: str
    split: str
    task: Task
    items: Sequence[Record]
    classes: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        return self.items[index]

    def texts(self, most: int) -> Iterator[str]:
        """The texts of all records, or, of more than `most`, of as many at even distances."""
        for number in range(0, len(self.items), max(1, -(-len(self.items) // most))):
            yield from self.items[number].texts

    def refuse_above(self, share: float) -> None:
        """Raises OptimaError if more than `share` (0 to 1) of the items was rejected, or nothing is left."""
        total = len(self.items) + len(self.rejected)
        lost = len(self.rejected)
        if not self.items or lost > share * total:
            named = counted_kinds(self.rejected) or "the split is empty"
            first = f"; the first: {self.rejected[0].where}: {self.rejected[0].reason}" if self.rejected else ""
            raise OptimaError(
                f"{self.name} {self.split}: {lost} of {total} items cannot be used ({named}), more than the share of "
                f"{share:g} that is allowed{first}; mend them, or raise max_rejected"
            )


def counted_kinds(rejected: Iterable[Rejection]) -> str:
    """The three most frequent kinds with their numbers: "image-missing 3, row-broken 1"."""
    kinds = Counter(rejection.kind for rejection in rejected).most_common(3)
    return ", ".join(f"{kind} {count}" for kind, count in kinds)


def write_rejections(rejected: Iterable[Rejection], path: Path) -> None:
    """Writes rejected.jsonl: an object a line, with the fields of `Rejection`."""
    write_atomically(path, "".join(rejection.line() for rejection in rejected).encode())


class RejectionLog:
    """rejected.jsonl of a run: what it finds unusable, each item once, however often the run is resumed.

    Args:
        path: the file; None keeps no list. It is made, and its folder, at the first rejection.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._written: set[str] | None = None

    def add(self, rejected: Iterable[Rejection]) -> None:
        """Appends those that are not in the file yet."""
        lines = dict.fromkeys(rejection.line() for rejection in rejected)
        if self._path is None or not lines:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ranks have one list
            if self._written is None:
                file.seek(0)
                content = file.read()
                whole = content[: content.rfind(b"\n") + 1]
                file.truncate(len(whole))  # half a line is of a run that was killed
                self._written = set(whole.decode("utf-8", "replace").splitlines(keepends=True))
            new = [line for line in lines if line not in self._written]
            self._written.update(new)
            file.write("".join(new).encode())


class Collector:
    """Gathers the records of one split; unusable ones and second ones of an id become rejections."""

    def __init__(self) -> None:
        self.items: list[Record] = []
        self.rejected: list[Rejection] = []
        self.left_out: Counter[str] = Counter()
        self._ids: set[str] = set()

    def take(self, where: str, name: str, make: Callable[..., Record | None], *arguments: Any) -> None:
        """Adds what `make` returns; None leaves the item out without a word. `name`: its id, as far as known."""
        try:
            record = make(*arguments)
            if record is not None and record.id in self._ids:
                name = record.id
                raise Unusable("duplicate-id", f"id {record.id!r} was seen before")
        except Unusable as fault:
            self.reject(where, fault, name)
        else:
            if record is not None:
                self._ids.add(record.id)
                self.items.append(record)

    def reject(self, where: str, fault: Unusable, name: str = "") -> None:
        """Counts an item as lost."""
        self.rejected.append(Rejection(shown(name), shown(where), fault.kind, fault.reason))

    def records(self, name: str, split: str, task: Task, classes: tuple[str, ...] = ()) -> Records:
        """All that was gathered."""
        return Records(name, split, task, self.items, classes, tuple(self.rejected), dict(self.left_out))


class ImageFolder:
    """The images of a folder by their names; the folder is listed once, since a stat per image is slow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listed: dict[str, frozenset[str]] = {}

    def source(self, name: str) -> ImageSource:
        """The image of a name relative to the folder. Raises Unusable if it leaves the folder or is missing."""
        relative = safe_name(name)
        parent, _, leaf = relative.rpartition("/")
        path = os.path.join(self.path, relative)
        try:
            if parent not in self._listed:
                folder = self.path / parent
                self._listed[parent] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        except OSError as error:  # a name longer than the file system takes, a folder that may not be read
            reason = f"{shown(path)} cannot be looked for: {error.strerror or error}"
            raise Unusable("image-unreadable", reason) from error
        if leaf not in self._listed[parent]:
            raise Unusable("image-missing", f"there is no {shown(path)}")
        return ImageSource(path)


def safe_name(name: Any) -> str:
    """A relative file name that stays where it is put. Raises Unusable for anything else."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or "\\" in name:
        raise Unusable("unsafe-name", f"a file name is wanted, got {name!r:.80}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise Unusable("unsafe-name", f"a name within the folder is wanted, got {name!r:.200}")
    return str(path)


def clean_text(value: Any, what: str) -> str:
    """A text in NFC with its white space evened out. Raises Unusable if it is empty, overlong or no text."""
    if not isinstance(value, str):
        raise Unusable("text-type", f"{what} must be a text, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable("text-encoding", f"{what} holds half a surrogate pair: {value!r:.80}") from error
    if not (value.isascii() and value.isprintable()):
        # Control characters (Cc) count as spaces; format characters (Cf) stay: they join emoji and Arabic letters.
        value = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in value)
        value = unicodedata.normalize("NFC", value)
    text = " ".join(value.split())
    if all(unicodedata.category(letter)[0] in "CZ" for letter in text):
        raise Unusable("text-empty", f"{what} is empty")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise Unusable("text-overlong", f"{what} has {len(text)} characters, {MAX_TEXT_CHARACTERS} are the most")
    return text


def identifier(value: Any, what: str) -> str:
    """An id, given as a whole number or a text. Raises Unusable for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise Unusable("id-type", f"{what} must be a whole number or a text, got {value!r:.80}")
    return clean_text(str(value), what)


def entry(row: Any, name: str) -> Any:
    """A field of a JSON object. Raises Unusable if it is missing or `row` is no object."""
    if not isinstance(row, dict):
        raise Unusable("row-type", f"an object is wanted, got {row!r:.80}")
    if name not in row:
        raise Unusable("field-missing", f"field {name!r} is missing")
    return row[name]


def name_of(row: Any, field: str) -> str:
    """What a rejection calls a row: its id as it stands, "" if it has none."""
    return f"{row.get(field, '')!s:.2000}" if isinstance(row, dict) else ""
