"""The command `demo`: what a run's student and its teacher say of an image, side by side, in a browser."""

import base64
import json
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from optima.assets import TEACHER
from optima.coca.checkpoint import load_coca
from optima.commands.local import LocalHandler, listen, serve
from optima.commands.options import DemoConfig
from optima.limits import MAX_IMAGE_BYTES
from optima.report.images import spotlight
from optima.report.page import render
from optima.runs.reading import read_run
from optima.runs.student import Student, load_student
from optima.runs.summary import count_parameters
from optima_core.errors import OptimaError

SHOWN = 3
"""Answers of each model that are shown, most probable first."""


def run_demo(config: DemoConfig) -> None:
    """Serves until Ctrl-C."""
    serve(make_server(config), f"the student of {config.run[0]} beside its teacher")


def make_server(config: DemoConfig) -> ThreadingHTTPServer:
    """The server, which listens already. Raises OptimaError if the run or the port cannot be used."""
    pair = _load(config.run[0], config.device)
    return listen(config.port, _handler(pair, _page(config.run[0], pair)))


@dataclass(frozen=True)
class _Pair:
    teacher: Student
    student: Student
    lock: threading.Lock

    def said(self, images: list[bytes], text: str) -> dict[str, Any]:
        """What each says of the images, how probable it is, in how many milliseconds, and where each word looks."""
        found = {}
        with self.lock:
            for name, model in (("teacher", self.teacher), ("student", self.student)):
                captions = model.words.task == "captioning"
                begun = time.monotonic()
                lines = model.probable_captions(images) if captions else [*model.answer(text, images).items()][:SHOWN]
                seconds = time.monotonic() - begun
                texts = [caption for caption, _ in lines] if captions else [text] * len(images)
                found[name] = {
                    "lines": lines,
                    "milliseconds": 1000 * seconds,
                    "unsure": captions and name == "student" and lines[0][1] < (model.words.usual or 0),
                    "looks": [_lit(model, words, image) for words, image in zip(texts, images, strict=True)],
                }
        return found


def _lit(model: Student, text: str, image: bytes) -> list[tuple[str, str]]:
    """Each word, and the image lit where the model looks for it."""
    seen, words = model.looks(text, image)
    return [(word, spotlight(seen, weights)) for word, weights in words]


def _load(run: Path, device: str | None) -> _Pair:
    student = load_student(run, device)
    named = read_run(run).config.get("teacher")
    taught = run / "teacher" / "model.safetensors"
    path = taught if taught.exists() else Path(named) if named else TEACHER
    teacher = Student(load_coca(path).to(student.device), student.words)
    return _Pair(teacher, student, threading.Lock())


def _page(run: Path, pair: _Pair) -> str:
    words = pair.student.words
    spec = pair.student.model.head_specs.get(words.task)
    return render(
        "demo.html",
        title=f"{run.resolve().name}: try it",
        task=words.task,
        images=spec.images if spec is not None else 1,
        prompt="" if words.task == "captioning" else _example(run),
        sizes={name: count_parameters(getattr(pair, name).model) for name in ("teacher", "student")},
        samples=[sample.images for sample in read_run(run).samples[:12]],
    )


def _example(run: Path) -> str:
    return next((sample.prompt for sample in read_run(run).samples if sample.prompt), "")


def _handler(pair: _Pair, page: str) -> type[LocalHandler]:
    class Handler(LocalHandler):
        def do_GET(self) -> None:
            if not self.refused(self.path):
                self.reply(page)

        def do_POST(self) -> None:
            asked = urlsplit(self.path)
            if self.refused(asked.path, "/say"):
                return
            size = int(self.headers.get("Content-Length") or 0)
            if not 0 < size <= 2 * MAX_IMAGE_BYTES:
                self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                return
            text = parse_qs(asked.query).get("text", [""])[0]
            try:
                given = json.loads(self.rfile.read(size))
                images = [base64.b64decode(image, validate=True) for image in given]
                self.reply(json.dumps(pair.said(images, text)), "application/json")
            except OptimaError as error:
                self.reply(json.dumps({"error": str(error)}), "application/json")
            except (ValueError, TypeError, RecursionError):
                self.reply(json.dumps({"error": "a list of images in base64 is wanted"}), "application/json")

    return Handler
