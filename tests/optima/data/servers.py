"""A server on this machine that serves a folder by ranges as a web server and as an object store, and misbehaves."""

import contextlib
import email.utils
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Server(ThreadingHTTPServer):
    """Serves `root`.

    asked: path and Range of each request. drops: how many of the next answers break off half-way. broken: (path, first
    byte) of ranges that always do. lengths: path -> bytes after which the object ends. ignores_ranges, floods, status:
    whole objects in place of ranges, bodies without end, a status for everything.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.asked: list[tuple[str, str]] = []
        self.drops = 0
        self.broken: set[tuple[str, int]] = set()
        self.lengths: dict[str, int] = {}
        self.ignores_ranges = False
        self.floods = False
        self.status = 0
        self.sent = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are expected."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        server, url = self.server, urlsplit(self.path)
        query, name = parse_qs(url.query, keep_blank_values=True), unquote(url.path).lstrip("/")
        asked = self.headers.get("Range", "")
        server.asked.append((name, asked))
        if server.status:
            return self.head(server.status, 0)
        if "list-type" in query:
            return self.body(200, listing(server.root, name.rstrip("/"), query), with_body)
        path = server.root / name
        if not path.is_file():
            return self.head(404, 0)
        data = path.read_bytes()[: server.lengths.get(name)]
        tag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Last-Modified": email.utils.formatdate(0, usegmt=True)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if wanted is None or server.ignores_ranges:
            return self.body(200, data, with_body, tag)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first >= len(data):
            return self.head(416, 0, {"Content-Range": f"bytes */{len(data)}"})
        tag["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        breaks = (name, first) in server.broken or server.drops > 0
        server.drops -= 1 if breaks and server.drops else 0
        return self.body(206, data[first : last + 1], with_body, tag, breaks)

    def head(self, status: int, length: int, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def body(
        self, status: int, data: bytes, with_body: bool, more: dict[str, str] | None = None, breaks: bool = False
    ) -> None:
        self.head(status, 2**50 if self.server.floods else len(data), more)
        if not with_body:
            return
        if breaks:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        with contextlib.suppress(OSError):
            self.wfile.write(data)
            while self.server.floods:
                self.wfile.write(bytes(2**16))
                self.server.sent += 2**16


def listing(root: Path, bucket: str, query: dict[str, list[str]]) -> bytes:
    """ListObjectsV2 of a bucket, which is a folder below the root."""
    prefix = query.get("prefix", [""])[0]
    keys = sorted(str(path.relative_to(root / bucket)) for path in (root / bucket).rglob("*") if path.is_file())
    rows, folders = [], set()
    for key in keys:
        if not key.startswith(prefix):
            continue
        rest = key[len(prefix) :]
        if query.get("delimiter") and "/" in rest:
            folders.add(prefix + rest.partition("/")[0] + "/")
            continue
        data = (root / bucket / key).read_bytes()
        tag = hashlib.md5(data).hexdigest()
        rows.append(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{tag}&quot;</ETag><Size>{len(data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    rows += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)]
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount>"
        f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>"
    ).encode()


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Server]:
    """A server of the folder while the block runs."""
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
