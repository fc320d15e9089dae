"""Bytes at an address: `s3://`, `https://`, and what else fsspec knows, by ranges of bounded size.

Nobody at the other end is trusted to be there, to be quick, or to send what was asked for: a range that does not come
whole is asked for again, `MAX_TRIES` times in all, with growing pauses; a try ends after `MAX_WAIT_SECONDS`; and no
more is kept of an answer than was asked for. Credentials, endpoints and proxies are fsspec's own settings
(`~/.config/fsspec`, `FSSPEC_*`) and those of the store's client, such as `AWS_*`.
"""

import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from optima.limits import MAX_JSON_BYTES, MAX_TRIES, MAX_WAIT_SECONDS
from optima.untrusted import shown
from optima_core.errors import OptimaError

PAUSE = 0.2
"""Seconds before the second try of a read; each further one waits twice as long."""

AT_ONCE = 32
"""Ranges that a process asks for at a time."""

_BLOCK = 2**22  # bytes that a pass over a tar asks for at a time
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")
MAGIC = re.compile(r"[*?\[]")
"""What makes a pattern of a name, braces apart."""
T = TypeVar("T")


class Unreachable(Exception):
    """An address that did not give what it should, however often it was asked; the text is for people."""


def is_address(place: object) -> bool:
    """Whether this names something on a network, and no file."""
    return "://" in str(place)


def joined(root: str, name: str) -> str:
    """The address of a name below a root that is an address."""
    return f"{root.rstrip('/')}/{name}"


def fetch(address: str, start: int, size: int, checksum: int | None = None, *, exact: bool = True) -> bytes:
    """`size` bytes from `start` on.

    Args:
        address: what to read.
        start: the first byte.
        size: number of bytes.
        checksum: their CRC-32, if it is known; others are asked for again, and returned if they stay as they are.
        exact: whether the object is known to have that many; fewer are asked for again, and returned at last.

    Raises:
        FileNotFoundError: if there is no such object.
        Unreachable: if it cannot be read.
        OptimaError: if a package is missing.
    """

    def whole(data: bytes, _: int | None) -> bool:
        return (len(data) == size or not exact) and checksum in (None, zlib.crc32(data))

    return _tried(address, lambda: _range(address, start, start + size), whole)[0] if size else b""


def length_of(address: str) -> int:
    """Bytes of an object. Raises as `fetch` does."""
    total = _tried(address, lambda: _length(address), lambda _, total: total is not None)[1]
    if total is None:
        raise Unreachable(f"the server of {shown(address)} does not say how long it is")
    return total


def fetch_whole(address: str, what: str) -> bytes | None:
    """A small object; None if there is none. Raises OptimaError, calling it `what`, if it cannot be read."""
    try:
        data = fetch(address, 0, MAX_JSON_BYTES + 1, exact=False)
    except FileNotFoundError:
        return None
    except Unreachable as error:
        raise OptimaError(f"{what}: {error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise OptimaError(f"{what} {shown(address)} has more than {MAX_JSON_BYTES} bytes, which are the most")
    return data


def found(pattern: str) -> dict[str, tuple[int, int]]:
    """The objects of a pattern with * or ?: address -> bytes and a number that changes with the content.

    Raises OptimaError if they cannot be listed.
    """
    scheme = pattern.partition("://")[0]
    if scheme in ("http", "https"):
        raise OptimaError(
            f"{shown(pattern)}: a web server lists no files; name them, as in --data.train 'shard-{{00000..00099}}.tar'"
        )
    filesystem, path = _opened(pattern)
    try:
        listed = filesystem.glob(path, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as error:  # each store's client raises types of its own
        raise OptimaError(f"{shown(pattern)} cannot be listed: {type(error).__name__}: {error!s:.200}") from error
    folder = MAGIC.split(pattern)[0].rpartition("/")[0]
    base = filesystem._strip_protocol(folder)
    return {
        folder + name.removeprefix(base): (int(facts["size"]), zlib.crc32(str(facts.get("ETag", "")).encode()))
        for name, facts in sorted(listed.items())
        if facts.get("type") == "file"
    }


class Readable(Protocol):
    """What a pass over a tar reads: a file, or something at an address."""

    def seek(self, place: int, /) -> Any: ...
    def read(self, size: int, /) -> bytes: ...


class RemoteFile:
    """An object at an address for one pass from its beginning to its end, in blocks of which the last two are kept.

    Raises OptimaError if it cannot be read: what a network hides for a while is no damage of the data.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._blocks: dict[int, bytes] = {}
        self._place = 0
        try:
            self.length = length_of(address)
        except FileNotFoundError as error:
            raise OptimaError(f"there is no {shown(address)}") from error
        except Unreachable as error:
            raise OptimaError(str(error)) from error

    def seek(self, place: int, /) -> None:
        """As a file's."""
        self._place = place

    def read(self, size: int, /) -> bytes:
        """As a file's."""
        data = self.at(self._place, size)
        self._place += len(data)
        return data

    def at(self, place: int, size: int) -> bytes:
        """The bytes of a range, fewer at the end of the object."""
        end = min(place + size, self.length)
        if end <= place:
            return b""
        pieces = [self._block(number) for number in range(place // _BLOCK, (end - 1) // _BLOCK + 1)]
        first = place - place % _BLOCK
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces))[place - first : end - first]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * _BLOCK
            size = min(_BLOCK, self.length - start)
            try:
                data = fetch(self.address, start, size)
            except FileNotFoundError as error:
                raise OptimaError(f"there is no {shown(self.address)} any more") from error
            except Unreachable as error:
                raise OptimaError(str(error)) from error
            if len(data) != size:
                raise OptimaError(f"{shown(self.address)} ends at byte {start + len(data)} of {self.length}")
            while len(self._blocks) > 1:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[number] = data
        return self._blocks[number]


def in_turn(work: Any, items: Iterable[T], at_once: bool) -> Iterator[Any]:
    """`work` of each item, in order; at_once: many at a time, for work that waits for a network."""
    return _pool(os.getpid()).map(work, items) if at_once else map(work, items)


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of the process that forked it are not in it."""
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix=f"optima-fetch-{process}")


Answer = tuple[bytes, int | None]
"""Bytes of a range, and how many the object has, where the answer says so."""


def _tried(address: str, ask: Callable[[], Answer], good: Callable[[bytes, int | None], bool]) -> Answer:
    """The first good answer, or the last one. Raises as `fetch` does."""
    answer: Answer | None = None
    reason = ""
    for attempt in range(MAX_TRIES):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            answer = ask()
        except (FileNotFoundError, OptimaError, Unreachable):
            raise
        except PermissionError as error:
            raise Unreachable(f"{shown(address)} may not be read: {error}") from error
        except Exception as error:  # each store's client raises types of its own
            answer, reason = None, f"{type(error).__name__}: {error!s:.200}"
        else:
            if good(*answer):
                break
    if answer is None:
        raise Unreachable(f"{shown(address)} cannot be read in {MAX_TRIES} tries; the last: {reason}")
    return answer


def _length(address: str) -> Answer:
    """One try to learn how long an object is; a web server says it beside a range."""
    filesystem, path = _opened(address)
    if filesystem.protocol == ("http", "https"):
        return _range(address, 0, 1)
    return b"", int(filesystem.info(path)["size"])


def _range(address: str, start: int, end: int) -> Answer:
    """One try to read the bytes from start to end; with the length of the object, of a web server that says it."""
    from fsspec.asyn import sync

    filesystem, path = _opened(address)
    if filesystem.protocol == ("http", "https"):
        answer: Answer = sync(filesystem.loop, _http, filesystem, path, start, end)
        return answer
    if filesystem.async_impl:
        work = filesystem._cat_file
        data: bytes = sync(filesystem.loop, work, path, start=start, end=end, timeout=MAX_WAIT_SECONDS)
    else:
        data = filesystem.cat_file(path, start=start, end=end)
    if len(data) > end - start:
        raise OSError(f"{len(data)} bytes came where {end - start} were asked for")
    return data, None


async def _http(filesystem: Any, url: str, start: int, end: int) -> Answer:
    """A range of a web server's object; fsspec's own reading takes all that a server sends."""
    from aiohttp import ClientTimeout

    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options["headers"] = dict(options.get("headers") or {}) | asked
    options["timeout"] = ClientTimeout(total=MAX_WAIT_SECONDS)
    async with session.get(filesystem.encode_url(url), **options) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(url)
        if answer.status in (401, 403, 407):
            raise PermissionError(f"the server answers {answer.status} {answer.reason}")
        said = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        total = int(said[2]) if said and said[2] != "*" else None
        if answer.status == 416:
            return b"", total
        if answer.status == 200 and (start or (answer.content_length or 0) > end - start):
            raise Unreachable(f"the server of {shown(url)} ignores ranges of bytes, without which no part can be read")
        if answer.status == 206 and not (said and said[1] and int(said[1]) == start):
            raise OSError("the server sends another range")
        if answer.status not in (200, 206):
            raise OSError(f"the server answers {answer.status} {answer.reason}")
        if answer.status == 200:
            total = answer.content_length
        data = bytearray()
        async for piece in answer.content.iter_chunked(2**16):
            data += piece
            if len(data) > end - start:
                raise OSError("the server sends more than was asked for")
        return bytes(data), total


def _opened(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and its path there."""
    scheme, _, rest = address.partition("://")
    filesystem = _file_system(os.getpid(), f"{scheme}://{rest.partition('/')[0]}/")
    return filesystem, filesystem._strip_protocol(address)


@lru_cache(maxsize=64)
def _file_system(process: int, root: str) -> Any:
    """One a process and host: what a process that was forked has of its parent's connections is of no use to it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(root)[0]
    except ImportError as error:
        raise OptimaError(f"{shown(root)} needs what `pip install -e '.[cloud]'` brings ({error})") from error
    except Exception as error:  # an unknown scheme, credentials that are no JSON, a host that is none
        raise OptimaError(f"{shown(root)} is no address that can be read: {error!s:.200}") from error
