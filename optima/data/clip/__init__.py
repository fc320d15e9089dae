"""CLIP's byte-pair tokenizer, on HuggingFace `tokenizers` and with CLIP's own vocabulary file, which is shipped.

The ids are those of open_clip's `SimpleTokenizer`, whose cleaning is followed to the letter since released weights saw
no other text: `ftfy` mends encodings and uncurls quotes, HTML entities are resolved twice, white space becomes single
spaces, all is lower case. Two things are otherwise: `<start_of_text>` and `<end_of_text>` within a text are text here,
so that no caption can end its own row; and letters newer than the Unicode tables of `tokenizers` are no letters.
"""

import gzip
import html
import io
import json
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Regex
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Replace
from tokenizers.decoders import Sequence as DecoderSequence
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence

from optima.data.tokenizer import Encoded, Tokenizer
from optima.limits import MAX_VOCABULARY_BYTES
from optima.untrusted import read_file
from optima_core.errors import OptimaError

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = 48894
"""Byte pairs of the file that CLIP uses: with 2 x 256 bytes and two special tokens they make 49408."""
START, END = "<start_of_text>", "<end_of_text>"
_WORD_END = "</w>"
# U+0345, a Greek accent whose capital is a letter, fits no part of CLIP's case-insensitive pattern, and so is lost.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"


class CleanedTexts:
    """A `tokenizers` model whose texts are cleaned first."""

    def __init__(self, model: HuggingFaceTokenizer) -> None:
        self._model = model

    def to_str(self) -> str:
        """JSON that `tokenizer_from_json` knows."""
        return json.dumps({"clip": json.loads(self._model.to_str())})

    def token_to_id(self, token: str, /) -> int | None:
        return self._model.token_to_id(token)

    def get_vocab_size(self) -> int:
        return int(self._model.get_vocab_size())

    def encode_batch(self, texts: list[str], /) -> Sequence[Encoded]:
        found: Sequence[Encoded] = self._model.encode_batch([clean(text) for text in texts])
        return found

    def decode(self, ids: list[int], skip_special_tokens: bool, /) -> str:
        return str(self._model.decode(ids, skip_special_tokens)).strip()


def clean(text: str) -> str:
    """The text as CLIP's tokenizers see it. Raises OptimaError if `ftfy` is not installed."""
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise OptimaError(
            "CLIP's tokenizer needs the package ftfy, which mends texts as its training did; "
            "install it with: pip install ftfy"
        ) from error
    return " ".join(html.unescape(html.unescape(fix_text(text))).split()).lower()


@cache
def clip_tokenizer(vocabulary: Path = VOCABULARY) -> Tokenizer:
    """The tokenizer of a file of byte pairs: 49408 tokens, of which 0 fills rows up and is "!" as well.

    vocabulary: `bpe_simple_vocab_16e6.txt.gz` or a file like it: a heading, then a pair a line, frequent ones first.

    Raises OptimaError if the file is missing or holds no such pairs.
    """
    packed = read_file(vocabulary, "vocabulary", MAX_VOCABULARY_BYTES)
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            lines = file.read(MAX_VOCABULARY_BYTES).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise OptimaError(f"vocabulary {vocabulary} is no gzip file of byte pairs ({error})") from error
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines[1 : MERGES + 1])]
    if len(merges) < MERGES or any(not left or not right or " " in right for left, right in merges):
        raise OptimaError(f"vocabulary {vocabulary} holds no {MERGES} byte pairs, a heading above them")
    letters = _byte_letters()
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *("".join(pair) for pair in merges), START, END]
    ids = {token: number for number, token in enumerate(tokens)}
    model = HuggingFaceTokenizer(BPE(ids, merges, end_of_word_suffix=_WORD_END))
    model.pre_tokenizer = PreTokenizerSequence(
        [Split(Regex(_WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = DecoderSequence([Replace(_WORD_END, "Ġ"), ByteLevelDecoder()])  # Ġ is the letter of the space
    return Tokenizer(CleanedTexts(model), pad="!", start=START, end=END, pad_is_word=True)


def _byte_letters() -> list[str]:
    """The letters that stand for bytes, in the vocabulary's order: printable bytes as they are, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(others)]
