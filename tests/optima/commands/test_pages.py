"""Pages served to this machine alone: a run while it goes on, then its report; student and teacher side by side."""

import base64
import http.client
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from optima import load_student
from optima.commands.demo import make_server as make_demo
from optima.commands.options import DemoConfig, WatchConfig
from optima.commands.watch import USED, make_server
from optima.report.page import render_report
from optima.run import main
from optima.runs.reading import read_run


@contextmanager
def served(run: Path) -> Iterator[int]:
    with make_server(WatchConfig([run], port=0, every=3)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def asked(port: int, path: str = "/", host: str = "127.0.0.1") -> tuple[int, str | None, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.getheader("Refresh"), answer.read().decode()


def test_a_running_run_is_shown_as_far_as_it_is_and_then_its_report(running: Path, finished: Path) -> None:
    with served(running) as port:
        status, again, page = asked(port)
        assert (status, again) == (200, "3")
        assert "2 of 4 rounds" in page
        assert "The student is learning" in page
        assert "<script" not in page
        with open(running / "metrics.jsonl", "a") as file:
            file.write((finished / "metrics.jsonl").read_text().splitlines(keepends=True)[2][40:])
        assert "3 of 4 rounds" in asked(port)[2]
        (running / ".lock").write_text(str(os.getpid()))
        page = asked(port)[2]
        assert f"of {os.cpu_count()} cores" in page
        assert "<dt>left</dt>" in page
        assert USED not in page
        for name in ("metrics.jsonl", "summary.json"):
            (running / name).write_bytes((finished / name).read_bytes())
        _, again, page = asked(port)
        assert again is None
        assert page == render_report(read_run(running))


def test_a_run_without_a_round_says_so(running: Path) -> None:
    (running / "metrics.jsonl").unlink()
    with served(running) as port:
        assert "The first round is not over" in asked(port)[2]


def test_a_broken_row_is_told_and_escaped(running: Path) -> None:
    (running / "metrics.jsonl").write_text("<b>\n")
    with served(running) as port:
        page = asked(port)[2]
    assert "metrics.jsonl line 1" in page
    assert "<b>" not in page


@pytest.mark.parametrize(("path", "host", "status"), [("/config.yaml", "localhost", 404), ("/", "evil.example", 403)])
def test_nothing_else_is_served_and_to_nobody_else(path: str, host: str, status: int, running: Path) -> None:
    with served(running) as port:
        assert asked(port, path, host)[0] == status


def test_mistakes_are_a_line(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(running / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with served(running) as port:
        assert main(["watch", str(running), "--port", str(port)]) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().err
    assert json.loads((running / "metrics.jsonl").read_text().splitlines()[0])["round"] == 1


def test_the_demo_says_what_student_and_teacher_say(finished: Path, teacher_file: Path) -> None:
    samples = json.loads((finished / "samples.json").read_text())
    image = (finished / samples[0]["images"][0]).read_bytes()
    with make_demo(DemoConfig([finished], port=0, device="cpu")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            port = server.server_address[1]
            status, _, page = asked(port)
            assert status == 200
            assert page.count("data:image/png") == len(samples)
            said = posted(port, [base64.b64encode(image).decode()])
            assert said["teacher"]["lines"][0][0] == samples[0]["teacher"]
            (caption, probability), *_ = said["student"]["lines"]
            assert [(caption, pytest.approx(probability))] == load_student(finished, "cpu").probable_captions([image])
            for model in ("teacher", "student"):
                looks = said[model]["looks"][0]
                assert " ".join(word for word, _ in looks) == said[model]["lines"][0][0]
                assert all(address.startswith("data:image/png") for _, address in looks)
            assert "error" in posted(port, ["no image"])
            assert "error" in posted(port, [base64.b64encode(b"no image").decode()])
            assert posted(port, [], origin="http://evil.example") == {}
        finally:
            server.shutdown()
            thread.join()


def posted(port: int, images: list[str], origin: str | None = None) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Origin": origin} if origin else {}
    connection.request("POST", "/say?text=", json.dumps(images), headers)
    answer = connection.getresponse()
    found: dict[str, Any] = json.loads(answer.read()) if answer.status == 200 else {}
    return found
