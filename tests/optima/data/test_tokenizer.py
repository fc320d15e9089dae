"""Texts become fixed rows of ids and come back unchanged."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from optima.data.pictograms import ANSWERS, Pictograms
from optima.data.pictograms.build_vocabulary import vocabulary
from optima.data.tokenizer import VOCABULARY, Tokenizer, word_tokenizer
from optima.task import LABELS, TASKS, TRUTHS


def test_rows_hold_start_words_end_and_padding() -> None:
    tokenizer = word_tokenizer()
    rows = tokenizer.encode(["a dog", "two dogs above a cat"], 8)
    assert rows.dtype == torch.int64
    assert rows.shape == (2, 8)
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (0, 1, 2)
    assert rows[0, 0] == 1
    assert rows[0, 3] == 2
    assert rows[0, 4:].eq(0).all()
    bare = tokenizer.encode(["a dog"], 3, start=False, end=False)
    assert bare[0].tolist() == [*rows[0, 1:3].tolist(), 0]
    assert tokenizer.encode([], 5).shape == (0, 5)


def test_every_text_of_the_data_set_is_known_and_comes_back_and_fits_twelve_tokens(seed: int) -> None:
    tokenizer = word_tokenizer()
    images = Pictograms("train", seed)
    for task in TASKS:
        texts = [images.example(task, index).text for index in range(1000)]
        rows = tokenizer.encode(texts, 12)
        assert not rows.eq(3).any()
        assert tokenizer.decode(rows) == texts
    words = [*ANSWERS, *LABELS, *TRUTHS]
    assert tokenizer.decode(tokenizer.encode(words, 3)) == words


def test_decoding_stops_at_the_first_end() -> None:
    tokenizer = word_tokenizer()
    (row,) = tokenizer.encode(["a dog"], 4).tolist()
    assert tokenizer.decode([row + row, row[:3]]) == ["a dog", "a dog"]


def test_an_unknown_word_is_the_unknown_token() -> None:
    assert word_tokenizer().encode(["a unicorn"], 4)[0, 2] == 3


def test_a_text_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("length: 'two dogs above a cat' takes 7 tokens, got 6")):
        word_tokenizer().encode(["a dog", "two dogs above a cat"], 6)


def test_a_text_that_is_to_be_cut_loses_its_last_words_and_keeps_its_end() -> None:
    tokenizer = word_tokenizer()
    cut = tokenizer.encode(["a dog", "two dogs above a cat"], 6, truncate=True)
    assert torch.equal(cut, tokenizer.encode(["a dog", "two dogs above a"], 6))


def test_a_vocabulary_without_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="pad: a token of the vocabulary, got '<pad>'"):
        Tokenizer(Backend(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")))


def test_the_shipped_vocabulary_is_the_one_the_language_gives() -> None:
    table = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    assert table == vocabulary()
    assert sorted(table.values()) == list(range(len(table)))
    assert len(table) == word_tokenizer().vocab_size <= 200
