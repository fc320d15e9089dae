"""Pages for a browser on this machine: a server of 127.0.0.1 that answers nobody else.

A page of another origin that a browser was led here by is refused by the host's name, and by its origin.
"""

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from optima_core.errors import OptimaError

ADDRESS = "127.0.0.1"


class LocalHandler(BaseHTTPRequestHandler):
    """Answers requests that come from this machine's own pages."""

    server_version, sys_version = "optima", ""

    def refused(self, path: str, wanted: str = "/") -> bool:
        """Whether the request was turned away: it comes from elsewhere, or `path` is not the one `wanted`."""
        assert isinstance(self.server, ThreadingHTTPServer)
        here = [f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")]
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in here or origin not in (None, *(f"http://{name}" for name in here)):
            self.send_error(HTTPStatus.FORBIDDEN)
            return True
        if path != wanted:
            self.send_error(HTTPStatus.NOT_FOUND)
            return True
        return False

    def reply(self, content: str, kind: str = "text/html", refresh: int | None = None) -> None:
        """Sends a text; refresh: seconds after which the browser is to ask again."""
        body = content.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if refresh is not None:
            self.send_header("Refresh", str(refresh))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A line a request would bury what matters."""


def listen(port: int, handler: type[LocalHandler]) -> ThreadingHTTPServer:
    """A server that listens already; port 0 takes a free one. Raises OptimaError if the port is taken."""
    try:
        return ThreadingHTTPServer((ADDRESS, port), handler)
    except OSError as error:
        raise OptimaError(f"port {port} cannot be used ({error.strerror}); give another with --port") from error


def serve(server: ThreadingHTTPServer, what: str) -> None:
    """Serves until Ctrl-C."""
    with server:
        print(f"http://{ADDRESS}:{server.server_port} shows {what}; Ctrl-C ends it", flush=True)
        server.serve_forever()
