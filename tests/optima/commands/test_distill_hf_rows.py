"""Rows of `distill_hf`: whatever file or processor they go through, the answer is what is labelled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

hf = pytest.importorskip("transformers", reason="pip install 'optima-distill[hf]'")
datasets = pytest.importorskip("datasets", reason="pip install 'optima-distill[hf]'")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

from tiny_hf import (  # noqa: E402
    WORDS,
    labelled,
    make_listener,
    make_tokenizer,
    make_whisper,
    question,
    write_llama,
    write_rows,
)

from optima.commands.distill_hf.batches import Batches  # noqa: E402
from optima.commands.distill_hf.models import load_model, load_processor  # noqa: E402
from optima.commands.distill_hf.source import Rows, Stream  # noqa: E402
from optima_core import OptimaError  # noqa: E402


@pytest.mark.parametrize("template", [False, True])
def test_what_is_to_be_said_is_labelled(template: bool, tmp_path: Path) -> None:
    place = write_llama(tmp_path / "teacher", 1, template)

    def chat(i: int) -> dict[str, Any]:
        asked = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a pig"}]
        return {"messages": [*asked, {"role": "user", "content": "two"}, {"role": "assistant", "content": "the dog"}]}

    def made(row: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        rows = Rows(write_rows(tmp_path / "rows.jsonl", row), held_every=10, seed=0)
        model = load_model(place, "student")
        batches = Batches(rows, load_processor(place), model, size=4, max_length=64)
        assert batches.held == 4
        assert torch.equal(batches.load(5)["input_ids"], batches.load(5)["input_ids"])
        return batches.probe(4)

    batch = made(lambda i: question(i // 10))
    assert labelled(batch, 0) == ["a", "dog", "</s>"]
    assert labelled(batch, 1) == ["the", "cat", "</s>"]
    assert WORDS[batch["input_ids"][0, 0]] == "<s>" != WORDS[batch["input_ids"][0, 1]]
    assert labelled(made(lambda i: {"text": "the big dog"}), 0) == ["the", "big", "dog", "</s>"]
    if template:
        assert labelled(made(chat), 0) == ["the", "dog", "</s>"]


def llava() -> Any:
    pil = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return hf.LlavaProcessor(pil, make_tokenizer(), **options)


def idefics3() -> Any:
    marks = ["<fake_token_around_image>", "<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))]
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(marks, special_tokens=True)
    try:
        pil = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    except ImportError:  # of transformers 5.16
        pytest.skip("this transformers needs torchvision to scale images of Idefics 3")
    return hf.Idefics3Processor(pil, tokenizer, image_seq_len=3)


def paligemma() -> Any:
    pil = hf.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    pil.image_seq_length = 4
    return hf.PaliGemmaProcessor(pil, make_tokenizer())


class Model:
    """What `Batches` asks of a model."""

    main_input_name = "input_ids"

    def __init__(self, is_encoder_decoder: bool = False) -> None:
        self.config = hf.PretrainedConfig(is_encoder_decoder=is_encoder_decoder)

    def can_generate(self) -> bool:
        return True


@pytest.mark.parametrize("make", [llava, idefics3, paligemma])
def test_whatever_stands_for_an_image_the_answer_alone_is_labelled_and_images_are_seen_once(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = make()
    for i in range(20):
        Image.new("RGB", (16 + 8 * (i % 3), 24), (12 * i, 0, 99)).save(tmp_path / f"{i}.png")
    answers = ("a dog", "the big red cat", "pig")
    data = write_rows(
        tmp_path / "rows.jsonl", lambda i: question(i) | {"image": f"{i}.png", "answer": answers[i % 3]}, 20
    )
    batches = Batches(Rows(data, held_every=10, seed=0), processor, Model(), size=6, max_length=512)
    seen, kind = [], type(processor.image_processor)
    preprocess = kind.preprocess

    def counting(self: Any, images: Any, *given: Any, **named: Any) -> Any:
        seen.append(images)
        return preprocess(self, images, *given, **named)

    monkeypatch.setattr(kind, "preprocess", counting)
    batch = batches.load(0)
    assert len(seen) == 1
    rows = batches._rows.train(0, 6)
    for i, row in enumerate(rows):
        assert labelled(batch, i, processor.tokenizer) == [*row.answer.split(), "</s>"]
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert processor.tokenizer.convert_ids_to_tokens(ids.tolist())[-1] == "</s>"
    assert len({len(row.answer) for row in rows}) > 1


@pytest.mark.parametrize("streaming", [False, True])
def test_sounds_of_files_and_of_parquet_become_what_the_model_hears(streaming: bool, tmp_path: Path, seed: int) -> None:
    soundfile = pytest.importorskip("soundfile")
    draws = torch.Generator().manual_seed(seed)
    sounds = [0.1 * torch.randn(3000 + 700 * i, 2, generator=draws) for i in range(12)]
    texts = [("a dog", "the big cat")[i // 10] for i in range(12)]
    for i, sound in enumerate(sounds):
        soundfile.write(tmp_path / f"{i}.flac", sound.numpy(), 16000)
    files = write_rows(tmp_path / "rows.jsonl", lambda i: {"audio": f"{i}.flac", "text": texts[i]}, 12)
    held = [{"path": None, "bytes": (tmp_path / f"{i}.flac").read_bytes()} for i in range(12)]
    features = datasets.Features(audio=datasets.Audio(), text=datasets.Value("string"))
    table = pyarrow.Table.from_pydict({"audio": held, "text": texts}, features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    processor, model = make_listener(), make_whisper(1)
    mono = [soundfile.read(tmp_path / f"{i}.flac")[0].mean(1) for i in (0, 10)]
    expected = processor.feature_extractor(mono, sampling_rate=16000, return_tensors="pt")["input_features"]
    for data in (files, tmp_path / "rows.parquet"):
        found: Rows | Stream = (
            Stream(data, held_every=10, held=2, seed=0) if streaming else Rows(data, held_every=10, seed=0)
        )
        batch = Batches(found, processor, model, size=4, max_length=64).probe(2)
        torch.testing.assert_close(batch["input_features"], expected, rtol=1e-4, atol=1e-4)
        said = (labelled(batch, i, processor.tokenizer) for i in (0, 1))
        assert list(said) == [
            ["<|notimestamps|>", *text, "<|endoftext|>"] for text in ("a\u0120dog", "the\u0120big\u0120cat")
        ]
    labels, start = batch["labels"], processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    # A decoder looks back alone: what stands in the place of padding says nothing of the words before it.
    shown = torch.cat([torch.full((2, 1), start), labels[:, :-1].clamp(min=0)], dim=1)
    logits = model.eval()(input_features=batch["input_features"], decoder_input_ids=shown).logits
    own = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
    torch.testing.assert_close(model(**batch).loss, own)


def test_sounds_that_cannot_be_heard_are_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile = pytest.importorskip("soundfile")
    for name, seconds, rate in (("fast", 1, 8000), ("long", 2, 16000), ("fit", 1, 16000)):
        soundfile.write(tmp_path / f"{name}.wav", [0.0] * (seconds * rate), rate)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")

    def rows(**row: Any) -> Path:
        return write_rows(tmp_path / "rows.jsonl", lambda i: {"text": "a dog"} | row, 12)

    for row, message in (
        ({"audio": "fast.wav"}, "audio of 8000 samples a second, and the model hears 16000; resample"),
        ({"audio": "long.wav"}, "audio of 2.0 s, and the model hears 1 s; cut it"),
        ({"audio": "broken.wav"}, "row 0: the audio cannot be read"),
        ({"audio": "none.wav"}, "row 0: the audio cannot be read"),
        ({}, "rows of audio and text are needed"),
    ):
        source = Rows(rows(**row), held_every=10, seed=0)
        batches = Batches(source, make_listener(), make_whisper(1), size=4, max_length=64)
        with pytest.raises(OptimaError, match=message):
            batches.probe(1)
    with monkeypatch.context() as patch:
        patch.setattr("optima.commands.distill_hf.rows.MAX_SOUND_SAMPLES", 15_999)
        with pytest.raises(OptimaError, match="row 0: the audio is of 16,000 samples, at most 15,999 are read"):
            Rows(rows(audio="fit.wav"), held_every=10, seed=0).held_rows(0, 1)
    place = write_llama(tmp_path / "teacher", 1)
    reader = Rows(rows(audio="fit.wav"), held_every=10, seed=0)
    with pytest.raises(OptimaError, match="rows have audio, which the model does not hear"):
        Batches(reader, load_processor(place), load_model(place, "student"), size=4, max_length=64).probe(1)


def test_a_long_row_is_cut_and_nothing_of_its_prompt_is_labelled(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", lambda i: {"question": "what is " * (i % 3), "answer": "the big dog"})
    rows = Rows(data, held_every=10, seed=0)
    batches = Batches(rows, make_tokenizer(), Model(), size=12, max_length=6)
    batch = batches.load(0)
    assert batch["input_ids"].shape == (12, 6)
    for i, row in enumerate(rows.train(0, 12)):
        said = ["the", "big", "dog", "</s>"]
        asked = 1 + len(row.asked[0]["content"][0]["text"].split())
        assert labelled(batch, i) == said[: 6 - asked]


def test_an_encoder_reads_the_question_and_the_decoder_says_the_answer(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", lambda i: question(i) | {"answer": ("a", "the big cat")[i % 2]})
    rows, tokenizer = Rows(data, held_every=10, seed=0), make_tokenizer()
    batch = Batches(rows, tokenizer, Model(is_encoder_decoder=True), size=6, max_length=64).load(1)
    for i, row in enumerate(rows.train(6, 6)):
        read = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert [WORDS[word] for word in read] == row.asked[0]["content"][0]["text"].split()
        assert labelled(batch, i) == row.answer.split()
        assert batch["decoder_attention_mask"][i].sum() == len(row.answer.split())
    texts = Rows(write_rows(tmp_path / "texts.jsonl", lambda i: {"text": "a dog"}), held_every=10, seed=0)
    with pytest.raises(OptimaError, match="reads a question and says an answer"):
        Batches(texts, tokenizer, Model(is_encoder_decoder=True), size=6, max_length=64).load(0)
    heard = Model(is_encoder_decoder=True)
    heard.main_input_name = "input_features"
    with pytest.raises(OptimaError, match="Model reads input_features"):
        Batches(texts, tokenizer, heard, size=6, max_length=64)


def test_rows_are_the_same_whatever_they_are_in(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    count = 50
    data = [question(i) | {"answer": f"the {i}"} for i in range(count)]
    whole = write_rows(tmp_path / "rows.jsonl", lambda i: data[i], count)
    parquet, parts = tmp_path / "rows.parquet", tmp_path / "parts"
    parts.mkdir()
    write_table(Table.from_pylist(data), parquet)
    for part in range(2):
        write_table(Table.from_pylist(data[25 * part : 25 * part + 25]), parts / f"{part}.parquet")
    held, train = ([row["answer"] for i, row in enumerate(data) if (i % 10 == 0) == wanted] for wanted in (True, False))
    first = Rows(whole, held_every=10, seed=3).train(0, 2 * len(train))
    for place in (whole, parquet, parts):
        for rows in (Rows(place, held_every=10, seed=3), Stream(place, held_every=10, held=count, seed=3)):
            assert rows.held == len(held)
            assert [row.answer for row in rows.held_rows(0, count)] == held
            epochs = [row.answer for row in rows.train(0, 2 * len(train))]
            assert sorted(epochs[: len(train)]) == sorted(epochs[len(train) :]) == sorted(train)
            assert epochs[: len(train)] not in (train, epochs[len(train) :])
            # Whatever was asked for before, a place holds the same row.
            for start in (70, 3, 44, 44):
                assert [row.answer for row in rows.train(start, 5)] == epochs[start : start + 5]
            if isinstance(rows, Rows):
                assert [row.answer for row in first] == epochs


def test_a_stream_longer_than_its_buffer_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.commands.distill_hf.source.BUFFER", 7)
    data = write_rows(tmp_path / "rows.jsonl", lambda i: {"text": f"word {i}"}, 40)
    rows = Stream(data, held_every=10, held=2, seed=0)
    found = [row.answer for row in rows.train(0, 36)]
    assert sorted(found) == sorted(f"word {i}" for i in range(40) if i % 10)
    assert found != sorted(found)
    assert rows.held == 2
