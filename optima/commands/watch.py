"""The command `watch`: the report of a run while it goes on, for a browser on this machine.

The page is that of report.html, without scripts: the browser is told to ask again, until the run has ended and the page
is the report itself. It is drawn when the run's files have changed, and served to this machine alone: a page of another
origin that a browser was led here by is refused by the host's name.
"""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from optima.commands.options import WatchConfig
from optima.report.page import render_report, render_running
from optima.runs.reading import CONFIG, METRICS, SUMMARY, read_run, read_running
from optima_core.errors import OptimaError

ADDRESS = "127.0.0.1"
Page = tuple[str, bool]
"""HTML, and whether the run goes on."""


def run_watch(config: WatchConfig) -> None:
    """Serves until Ctrl-C."""
    with make_server(config) as server:
        print(f"http://{ADDRESS}:{server.server_address[1]} shows {config.run[0]}; Ctrl-C ends it", flush=True)
        server.serve_forever()


def make_server(config: WatchConfig) -> ThreadingHTTPServer:
    """The server, which listens already. Raises OptimaError if the port is taken."""
    page = _Drawn(config.run[0], config.every)
    try:
        return ThreadingHTTPServer((ADDRESS, config.port), _handler(page, config.every))
    except OSError as error:
        raise OptimaError(f"port {config.port} cannot be used ({error.strerror}); give another with --port") from error


class _Drawn:
    """The page of a run, drawn anew when its files have changed."""

    def __init__(self, run: Path, every: int) -> None:
        self.run, self.every = run, every
        self._lock = threading.Lock()  # what draws is no friend of threads
        self._seen: object = None
        self._page: Page = ("", True)

    def __call__(self) -> Page:
        with self._lock:
            files = [self.run / name for name in (CONFIG, METRICS, SUMMARY, "report.html")]
            now = [(file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else None for file in files]
            if now != self._seen:
                ended = (self.run / SUMMARY).exists()
                page = (
                    render_report(read_run(self.run)) if ended else render_running(read_running(self.run), self.every)
                )
                self._seen, self._page = now, (page, not ended)
            return self._page


def _handler(page: Callable[[], Page], every: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "optima", ""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (ADDRESS, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            if self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                content, goes_on = page()
            except OptimaError as error:
                content, goes_on = f"<!doctype html><title>OPTIMA</title><pre>{_escaped(str(error))}</pre>", True
            body = content.encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            if goes_on:
                self.send_header("Refresh", str(every))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A line a request would bury what matters."""

    return Handler


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
