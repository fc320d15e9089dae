"""SentencePiece models, such as the 64k vocabularies of CoCa's paper and of coca_base, behind our tokenizer."""

import base64
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from optima.data.tokenizer import Encoded, Tokenizer
from optima.limits import MAX_VOCABULARY_BYTES
from optima.untrusted import read_file
from optima_core.errors import OptimaError


class _Pieces(NamedTuple):
    ids: list[int]


class SentencePieceModel:
    """A SentencePiece model with the methods of a `tokenizers` model."""

    def __init__(self, content: bytes) -> None:
        """content: what a model file holds.

        Raises OptimaError if the package `sentencepiece` is missing, RuntimeError if the content is no model.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise OptimaError(
                "SentencePiece models need the package sentencepiece; "
                "install it with: pip install sentencepiece"
            ) from error
        self._processor: Any = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(content)

    def to_str(self) -> str:
        """JSON that `tokenizer_from_json` knows."""
        return json.dumps({"sentencepiece": base64.b64encode(self._processor.serialized_model_proto()).decode()})

    def token_to_id(self, token: str, /) -> int | None:
        number = int(self._processor.piece_to_id(token))
        return number if self._processor.id_to_piece(number) == token else None

    def get_vocab_size(self) -> int:
        return int(self._processor.get_piece_size())

    def encode_batch(self, texts: list[str], /) -> Sequence[Encoded]:
        return [_Pieces(ids) for ids in self._processor.encode(texts)]

    def decode(self, ids: list[int], skip_special_tokens: bool, /) -> str:
        return str(self._processor.decode(ids))


@cache
def sentencepiece_tokenizer(model: Path, pad: str = "<pad>", start: str = "<s>", end: str = "</s>") -> Tokenizer:
    """The tokenizer of a SentencePiece model file.

    Args:
        model: the file, usually `*.model`.
        pad: piece that fills rows up.
        start: piece put before a text.
        end: piece put after a text.

    Raises:
        OptimaError: if the package `sentencepiece` is missing, the file is missing or no model, or a piece is unknown.
    """
    if not model.is_file():
        raise OptimaError(f"vocabulary {model} does not exist; give a SentencePiece .model file")
    content = read_file(model, "vocabulary", MAX_VOCABULARY_BYTES)
    try:
        return Tokenizer(SentencePieceModel(content), pad, start, end)
    except RuntimeError as error:
        raise OptimaError(f"vocabulary {model} is no SentencePiece model") from error
    except ValueError as error:
        raise OptimaError(f"vocabulary {model}: {error}") from error
