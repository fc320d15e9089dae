"""All tokenizers by name, and from what was stored of them: words, CLIP's byte pairs, SentencePiece."""

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HuggingFaceTokenizer

from optima.data.clip import CleanedTexts, clip_tokenizer
from optima.data.sentencepiece import SentencePieceModel, sentencepiece_tokenizer
from optima.data.tokenizer import Backend, Tokenizer, word_tokenizer
from optima_core.errors import OptimaError


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a recipe names: `words`, `clip`, or a file.

    A file is a SentencePiece `.model`, CLIP's byte pairs (`.txt.gz`), or a word-level vocabulary (`.json`).

    Raises OptimaError if there is no such file, or it is none of these.
    """
    if name == "words":
        return word_tokenizer()
    if name == "clip":
        return clip_tokenizer()
    path = Path(name)
    if not path.is_file():
        raise OptimaError(f"tokenizer {name} is neither words nor clip nor a file")
    if path.suffix == ".model":
        return sentencepiece_tokenizer(path)
    if path.suffix == ".gz":
        return clip_tokenizer(path)
    try:
        return word_tokenizer(path)
    except (ValueError, TypeError, OverflowError) as error:
        raise OptimaError(f"tokenizer {name} is no vocabulary: a JSON object from word to id ({error})") from error


def tokenizer_from_json(values: dict[str, Any]) -> Tokenizer:
    """The inverse of `Tokenizer.to_json`. Raises KeyError or ValueError if the values are not one's."""
    if not isinstance(values, dict) or not isinstance(values["backend"], dict):
        raise ValueError("no tokenizer: it and its backend must be objects")
    stored = values["backend"]
    backend: Backend
    try:
        if "clip" in stored:
            backend = CleanedTexts(HuggingFaceTokenizer.from_str(json.dumps(stored["clip"])))
        elif "sentencepiece" in stored:
            backend = SentencePieceModel(base64.b64decode(stored["sentencepiece"]))
        else:
            backend = HuggingFaceTokenizer.from_str(json.dumps(stored))
    except OptimaError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"no tokenizer: {error}") from error
    return Tokenizer(backend, values["pad"], values["start"], values["end"], values.get("pad_is_word", False))
