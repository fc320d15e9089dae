"""SentencePiece models behind the same class as the other tokenizers."""

import io
import json
import sys
from pathlib import Path

import pytest

from optima.data.pictograms.stream import Pictograms
from optima.data.sentencepiece import SentencePieceModel, sentencepiece_tokenizer
from optima.data.tokenizers import named_tokenizer, tokenizer_from_json
from optima_core import OptimaError

sentencepiece = pytest.importorskip("sentencepiece", reason="SentencePiece models need sentencepiece")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 120 pieces, trained on captions."""
    captions = [Pictograms("train").example("captioning", index).text for index in range(200)]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=trained, vocab_size=120, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sentencepiece") / "captions.model"
    path.write_bytes(trained.getvalue())
    return path


def test_rows_are_the_librarys_pieces_between_start_and_end(model: Path) -> None:
    tokenizer = named_tokenizer(str(model))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.vocab_size == 120
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (0, 1, 2)
    texts = ["two dogs above a cat", "a cat", "żółć 😀"]
    for text, row in zip(texts, tokenizer.encode(texts, 40).tolist(), strict=True):
        pieces = processor.encode(text)
        assert row == [1, *pieces, 2] + [0] * (38 - len(pieces))
    assert tokenizer.decode(tokenizer.encode(texts[:2], 40)) == texts[:2]


def test_it_is_kept_with_a_run(model: Path) -> None:
    tokenizer = sentencepiece_tokenizer(model)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    texts = ["two dogs above a cat", "żółć"]
    assert again.encode(texts, 30).equal(tokenizer.encode(texts, 30))


def test_what_is_wrong_with_a_file_is_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(OptimaError, match="is no SentencePiece model"):
        sentencepiece_tokenizer(tmp_path / "text.model")
    with pytest.raises(OptimaError, match="does not exist"):
        sentencepiece_tokenizer(tmp_path / "nowhere.model")
    with pytest.raises(OptimaError, match=r"captions\.model: pad: a token of the vocabulary, got '<filler>'"):
        sentencepiece_tokenizer(model, pad="<filler>")


def test_without_sentencepiece_the_package_and_the_extra_are_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(OptimaError, match=r"need the package sentencepiece.*pip install sentencepiece"):
        SentencePieceModel(model.read_bytes())
