"""Files of others: plain ones of a bounded size are read, all else is refused in one line and at once."""

import os
from pathlib import Path

import pytest

from optima.plain_yaml import load_yaml, refuse_hostile_yaml
from optima.run import main
from optima.sizes import number_within, whole_number
from optima.untrusted import parse_json, read_file, read_json, shown
from optima_core.errors import OptimaError

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))


def test_a_plain_file_is_read_whole(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    assert read_file(tmp_path / "file", "thing") == content
    assert read_file(tmp_path / "file", "thing", 100_000) == content
    (tmp_path / "json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(tmp_path / "json", "thing") == {"a": [1]}


def test_what_is_no_plain_file_or_too_large_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(101))
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, complaint in {
        "pipe": "thing .*pipe is no plain file",
        "link": "no plain file",
        ".": "no plain file|cannot be read",
        "large": "has 101 bytes; 100 are the most",
        "nowhere": "thing .*nowhere does not exist",
        "a" * 5000: "File name too long",
        "a\0b": "cannot be read",
    }.items():
        with pytest.raises(OptimaError, match=complaint) as caught:
            read_file(tmp_path / name, "thing", 100)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 200_000, b"", b"1" * 5000])
def test_what_is_no_json_is_refused(content: bytes) -> None:
    with pytest.raises(OptimaError, match="thing is"):
        parse_json(content, "thing")


def test_long_names_are_cut_and_short_ones_kept() -> None:
    assert shown("a" * 300) == "a" * 300
    assert len(shown("a" * 10_000 + "b")) == 300 - 40 + 5 + 30
    assert shown("a" * 10_000 + "b").endswith("ab")


def test_numbers_are_whole_and_within_their_bounds() -> None:
    assert whole_number(3, "n", 1, 3) == 3
    assert number_within(1, "x", 0, 2) == 1.0
    for value in (0, 4, 2.0, True, "2", None, [1]):
        with pytest.raises(ValueError, match="n must be a whole number from 1 to 3"):
            whole_number(value, "n", 1, 3)
    for value in (float("nan"), float("inf"), -1, 3, True, "1", None):
        with pytest.raises(ValueError, match="x must be a number from 0 to 2"):
            number_within(value, "x", 0, 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (BOMB, "the YAML alias"),
        ("a: '" + "b: &b [1]   c: *b".replace("   ", "\n\n  ") + "'", "the YAML alias"),
        ("[" * 65, "nested more than 64"),
        ("a: '" + "[" * 100 + "'", "nested more than 64"),
        ("".join(" " * i + "a:\n" for i in range(70)), "nested more than 64"),
        ("x" * (2**20 + 1), "characters; 1048576 are the most"),
    ],
)
def test_hostile_yaml_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(OptimaError, match=complaint):
        load_yaml(text, "config")


@pytest.mark.parametrize("text", ["*.jpg", "a & b * c", "&x 1", "{a: [1, {b: 2}]}", "[1", "rock *n* roll", "a: '*b'"])
def test_stars_and_ampersands_that_repeat_nothing_pass(text: str) -> None:
    refuse_hostile_yaml(text, "config")


@pytest.mark.parametrize("option", ["--config", "--engine", "--data.loader"])
def test_a_hostile_configuration_is_refused_wherever_it_is_given(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bomb.yaml").write_text(BOMB)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "nested.yaml").write_text(
        f"engine: {tmp_path / 'pipe.yaml'}\nbandit: pipe.yaml\ntransform: pipe.yaml\n"
    )
    (tmp_path / "latin.yaml").write_bytes(b"run: K\xe4tzchen\n")
    for name in ("bomb", "pipe", "nested", "latin"):
        for words in ([option, str(tmp_path / f"{name}.yaml")], [f"{option}={tmp_path / name}.yaml"]):
            assert main(words) == 2
            said = capsys.readouterr().err
            assert said.startswith("optima: ")
            assert said.count("\n") == 1


def test_a_hostile_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("[" * 100_000, "{a: &a [1], b: *a}"):
        assert main(["--engine.bandit.options", value]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert len(said) < 500


def test_words_of_another_encoding_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are not UTF-8 come as halves of pairs, which no YAML takes."""
    for words in (["--engine.bandit.policy", "\udc80"], ["--run=\udcff/run"], ["caption", "\udc80.jpg"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "words must be UTF-8" in said
        assert said.count("\n") == 1
