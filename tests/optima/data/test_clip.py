"""CLIP's tokenizer: open_clip's ids on odd texts, rows, and the way back."""

import gzip
import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from open_clip_oracle import TEXTS, TOKENS, load_open_clip, token_ids

from optima.data.clip import VOCABULARY, clip_tokenizer
from optima.data.tokenizers import named_tokenizer, tokenizer_from_json
from optima_core import OptimaError

GOLDEN: dict[str, list[int]] = json.loads(TOKENS.read_text())


@pytest.fixture(autouse=True)
def _ftfy() -> None:
    pytest.importorskip("ftfy", reason="CLIP's tokenizer needs ftfy")


def ids(text: str) -> list[int]:
    row = clip_tokenizer().encode([text], 400)[0].tolist()
    return row[1 : row.index(clip_tokenizer().end_id)]


def test_ids_are_those_that_open_clip_gave() -> None:
    assert tuple(GOLDEN) == TEXTS
    for text, expected in GOLDEN.items():
        assert ids(text) == expected, text


def test_ids_are_open_clips_on_random_texts(seed: int) -> None:
    load_open_clip()
    draw = random.Random(seed)
    letters = "aeiou \t's!?.,<&;-_0189é\u0301İßſあ中😀\u200d🏽שع\u00a0"
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(300)]
    # What is unassigned here may be a letter in one library's Unicode tables and not in the other's.
    assigned = [chr(code) for code in range(1, 0xD800) if unicodedata.category(chr(code)) != "Cn"]
    texts += ["".join(draw.choices(assigned, k=20)) for _ in range(300)]
    for text, expected in zip(texts, token_ids(texts), strict=True):
        assert ids(text) == expected, ascii(text)


def test_rows_are_padded_with_the_token_that_is_an_exclamation_mark() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.vocab_size == 49408
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (0, 49406, 49407)
    assert tokenizer.encode(["a cat"], 6).tolist() == [[49406, 320, 2368, 49407, 0, 0]]


def test_texts_come_back_lower_case_with_single_spaces() -> None:
    tokenizer = clip_tokenizer()
    rows = tokenizer.encode(["Two  DOGS, café 😀", "wow!~"], 20)
    assert rows[1, 2] == tokenizer.pad_id  # the mark glued to the tilde is the padding token
    assert tokenizer.decode(rows) == ["two dogs , café 😀", "wow !~"]
    unfinished = torch.where(rows == tokenizer.end_id, 0, rows)
    assert tokenizer.decode(unfinished) == ["two dogs , café 😀", "wow !~"]


def test_it_is_kept_with_a_run() -> None:
    tokenizer = clip_tokenizer()
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    rows = again.encode(["A  caf&eacute;!~", "😀"], 20)
    assert rows.equal(tokenizer.encode(["A  caf&eacute;!~", "😀"], 20))
    assert again.decode(rows) == ["a café !~", "😀"]


def test_special_tokens_in_a_text_are_text() -> None:
    assert not {49406, 49407} & set(ids("a <start_of_text> b <end_of_text>"))


def test_a_file_without_byte_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.gz").write_bytes(gzip.compress(b"heading\na b\n"))
    (tmp_path / "text.gz").write_text("no gzip")
    for name, complaint in (("short.gz", "holds no 48894 byte pairs"), ("text.gz", "no gzip file"), ("no.gz", "exist")):
        with pytest.raises(OptimaError, match=complaint):
            clip_tokenizer(tmp_path / name)


def test_a_tokenizer_is_chosen_by_name_or_file(tmp_path: Path) -> None:
    assert named_tokenizer("words").vocab_size < 1000
    assert named_tokenizer("clip") is clip_tokenizer()
    assert named_tokenizer(str(VOCABULARY)).vocab_size == 49408
    (tmp_path / "list.json").write_text("[1, 2]")
    for name, complaint in (
        ("clpi", "neither words nor clip nor a file"),
        (str(tmp_path / "list.json"), "JSON object"),
    ):
        with pytest.raises(OptimaError, match=complaint):
            named_tokenizer(name)


def test_without_ftfy_the_package_and_the_extra_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(OptimaError, match=r"needs the package ftfy.*pip install ftfy"):
        clip_tokenizer().encode(["a"], 4)
