"""Text to token ids and back.

A thin layer over HuggingFace `tokenizers`: fixed-length int64 rows with start, end and padding, which is all a CoCa
wants to know about text. `word_tokenizer` reads the shipped word-level vocabulary of the embedded data set;
`optima.data.clip` and `optima.data.sentencepiece` put CLIP's byte pairs and SentencePiece behind the same class, and
any other `tokenizers` model fits there too. `optima.data.tokenizers` has all of them by name.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Regex
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from optima.limits import MAX_VOCABULARY, MAX_VOCABULARY_BYTES
from optima.sizes import whole_number
from optima.untrusted import read_json

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unk>"
VOCABULARY = Path(__file__).with_name("vocabulary.json")


class Encoded(Protocol):
    """The ids of one text."""

    @property
    def ids(self) -> list[int]: ...


class Backend(Protocol):
    """What cuts texts into tokens; a `tokenizers.Tokenizer` is one."""

    def token_to_id(self, token: str, /) -> int | None: ...
    def get_vocab_size(self) -> int: ...
    def encode_batch(self, texts: list[str], /) -> Sequence[Encoded]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool, /) -> str: ...
    def to_str(self) -> str: ...


class Tokenizer:
    """Encodes texts into rows of equal length.

    Args:
        backend: the `tokenizers` model that splits a text into ids.
        pad: token that fills a row up.
        start: token put before a text.
        end: token put after a text.
        pad_is_word: whether the padding token stands in texts, too, as CLIP's does; then only those at the end of a row
            are padding.

    Raises:
        ValueError: if one of the three tokens is not in the backend's vocabulary.
    """

    def __init__(
        self, backend: Backend, pad: str = PAD, start: str = START, end: str = END, pad_is_word: bool = False
    ) -> None:
        self._backend = backend
        self._pad_is_word = pad_is_word
        self._ids: dict[str, int] = {}
        for role, token in (("pad", pad), ("start", start), ("end", end)):
            number = backend.token_to_id(token)
            if number is None:
                raise ValueError(f"{role}: a token of the vocabulary, got {token!r}")
            self._ids[role] = number
        self._special = frozenset(self._ids.values()) - ({self.pad_id} if pad_is_word else set())
        self._tokens = {"pad": pad, "start": start, "end": end, "pad_is_word": pad_is_word}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._backend.get_vocab_size())

    @property
    def pad_id(self) -> int:
        """Id that fills a row up."""
        return self._ids["pad"]

    @property
    def start_id(self) -> int:
        """Id put before a text."""
        return self._ids["start"]

    @property
    def end_id(self) -> int:
        """Id put after a text."""
        return self._ids["end"]

    def to_json(self) -> dict[str, Any]:
        """All there is to it, for `tokenizer_from_json`."""
        return {"backend": json.loads(self._backend.to_str()), **self._tokens}

    def unknown_words(self, text: str) -> list[str]:
        """Words of the text, between spaces, that hold the unknown token, each once."""
        return self.unknown(list(dict.fromkeys(text.split())))

    def unknown(self, words: Sequence[str]) -> list[str]:
        """Those of the words that hold the unknown token; none if there is no such token."""
        unknown = self._backend.token_to_id(UNKNOWN)
        if unknown is None:
            return []
        encoded = self._backend.encode_batch(list(words))
        return [word for word, found in zip(words, encoded, strict=True) if unknown in found.ids]

    def words(self) -> dict[str, int]:
        """The ids of a word-level tokenizer's words; of another, which has none, nothing."""
        model = json.loads(self._backend.to_str()).get("model", {})
        return dict(model["vocab"]) if model.get("type") == "WordLevel" else {}

    def id_of(self, token: str) -> int | None:
        """The id of a token; None if there is no such token."""
        return self._backend.token_to_id(token)

    def encode(
        self, texts: Sequence[str], length: int, start: bool = True, end: bool = True, truncate: bool = False
    ) -> Tensor:
        """Token ids, int64 [texts, length]: start, the text, end, then padding.

        Args:
            texts: the texts; a word outside the vocabulary becomes the unknown token.
            length: tokens in a row, special ones included.
            start: whether a row begins with the start token.
            end: whether the text is followed by the end token.
            truncate: whether a longer text loses its last words; the end token stays.

        Raises:
            ValueError: if a text does not fit into `length` tokens and is not to be cut.
        """
        before = [self.start_id] if start else []
        after = [self.end_id] if end else []
        rows = []
        for text, encoding in zip(texts, self._backend.encode_batch(list(texts)), strict=True):
            kept = encoding.ids[: length - len(before) - len(after)] if truncate else encoding.ids
            row = before + kept + after
            if len(row) > length:
                raise ValueError(f"length: {text!r} takes {len(row)} tokens, got {length}")
            rows.append(row + [self.pad_id] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of token ids [texts, tokens]; a row ends at its first end token, special tokens are skipped."""
        rows = ids.tolist() if isinstance(ids, Tensor) else [list(row) for row in ids]
        texts = []
        for row in rows:
            kept = row[: row.index(self.end_id)] if self.end_id in row else row
            if self._pad_is_word and self.end_id not in row:
                while kept and kept[-1] == self.pad_id:
                    kept = kept[:-1]
            texts.append(str(self._backend.decode([i for i in kept if i not in self._special], False)))
        return texts


@cache
def word_tokenizer(vocabulary: Path = VOCABULARY) -> Tokenizer:
    """The word-level tokenizer of a vocabulary file: a JSON object from word to id, `<unk>` among them.

    Case and the marks that end a sentence are dropped, so that a person's "Is there a dog?" is understood.
    """
    words: dict[str, int] = read_json(vocabulary, "vocabulary", MAX_VOCABULARY_BYTES)
    if not isinstance(words, dict):
        raise ValueError(f"an object is wanted, got {words!r:.80}")
    for word, number in words.items():
        whole_number(number, f"the id of {word!r:.80}", 0, MAX_VOCABULARY)
    return tokenizer_of_words(words)


def tokenizer_of_words(words: dict[str, int]) -> Tokenizer:
    """The word-level tokenizer of these words and ids."""
    backend = HuggingFaceTokenizer(WordLevel(words, unk_token=UNKNOWN))
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = WhitespaceSplit()
    return Tokenizer(backend)


def split_words(text: str) -> list[str]:
    """The words of a text as word-level tokenizers cut and even them out."""
    return str(_normalizer().normalize_str(text)).split()


@cache
def _normalizer() -> Normalizers:
    return Normalizers([Lowercase(), Replace(Regex("[.,;:?!]"), "")])
