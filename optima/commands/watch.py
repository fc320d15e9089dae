"""The command `watch`: the report of a run while it goes on, for a browser on this machine.

The page is that of report.html, without scripts: the browser is told to ask again, until the run has ended and the page
is the report itself. It is drawn when the run's files have changed.
"""

import html
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

from optima.commands.local import LocalHandler, listen, serve
from optima.commands.options import WatchConfig
from optima.report.page import render_report, render_running
from optima.runs.directory import LOCK
from optima.runs.reading import CONFIG, METRICS, SUMMARY, read_run, read_running
from optima.runs.usage import Usage
from optima_core.errors import OptimaError

USED = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands in a drawn page for what the run uses, which is another every time."""

Page = tuple[str, bool]
"""HTML, and whether the run goes on."""


def run_watch(config: WatchConfig) -> None:
    """Serves until Ctrl-C."""
    serve(make_server(config), str(config.run[0]))


def make_server(config: WatchConfig) -> ThreadingHTTPServer:
    """The server, which listens already. Raises OptimaError if the port is taken."""
    return listen(config.port, _handler(_Drawn(config.run[0], config.every), config.every))


class _Drawn:
    """The page of a run, drawn anew when its files have changed."""

    def __init__(self, run: Path, every: int) -> None:
        self.run, self.every, self.used = run, every, Usage(run / LOCK)
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
                    render_report(read_run(self.run))
                    if ended
                    else render_running(read_running(self.run), self.every, USED)
                )
                self._seen, self._page = now, (page, not ended)
            page, goes_on = self._page
            used = "; ".join(f"{name}: {text}" for name, text in self.used().items()) if goes_on else ""
            return page.replace(USED, html.escape(used)), goes_on


def _handler(page: Callable[[], Page], every: int) -> type[LocalHandler]:
    class Handler(LocalHandler):
        def do_GET(self) -> None:
            if self.refused(self.path):
                return
            try:
                content, goes_on = page()
            except OptimaError as error:
                content, goes_on = f"<!doctype html><title>OPTIMA</title><pre>{html.escape(str(error))}</pre>", True
            self.reply(content, refresh=every if goes_on else None)

    return Handler
