"""From a folder of captioned images to a student that captions them: `optima --config own_images`."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from optima import load_student
from optima.coca.checkpoint import load_coca
from optima.data.tokenizer import START, word_tokenizer
from optima.data.vocabulary import text_tokenizer, unknown_words
from optima.run import main
from optima.runs.words import read_words

COLOURS = ("crimson", "gold", "navy", "olive", "orchid", "teal")
SHAPES = ("ellipse", "rectangle", "triangle")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 108 PNG files of a coloured shape each, and their captions: words that no pictogram has."""
    root = tmp_path_factory.mktemp("own images")
    lines = ["filename\tcaption"]
    for number in range(108):
        colour, shape = COLOURS[number % 6], SHAPES[number // 6 % 3]
        image = Image.new("RGB", (80 + number % 7, 64), "white")
        pencil = ImageDraw.Draw(image)
        box = (10 + number % 5, 10, 60, 50)
        if shape == "triangle":
            pencil.polygon([(box[0], 50), (60, 50), (35, 10)], fill=colour)
        else:
            getattr(pencil, shape)(box, fill=colour)
        image.save(root / f"{number:03}.png")
        lines.append(f"{number:03}.png\tA drawn {colour} {shape}.")
    (root / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def short(shapes: Path) -> list[str]:
    """The recipe on that folder, with as few steps as show that every stage works."""
    steps = "--teach.steps 3 --teach.batch_size 8 --engine.rounds 2 --engine.steps_per_round 2 --batch_size 4"
    rest = "--probe_size 4 --evaluate_items 4 --threads 1 --data.loader.workers 0 --seed 1"
    return ["--config", "own_images", *steps.split(), *rest.split(), "--data.root", str(shapes)]


def test_a_folder_of_captions_is_all_it_takes(
    short: list[str], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*short, "--run", str(run)]) == 0
    words = {*COLOURS, *SHAPES, "a", "drawn"}
    assert set(read_words(run).tokenizer.words()) - {"<pad>", START, "<end>", "<unk>"} == words
    assert read_words(run).text_length == 6
    shown = capsys.readouterr().out
    assert "teacher: step 3/3" in shown
    sample = json.loads((run / "samples.json").read_text())[0]
    assert f"{sample['images'][0]}: {sample['after']} ({sample['reference']})" in shown
    caption = load_student(run, "cpu").caption([shapes / "000.png"])[0]
    assert set(caption.split()) <= words
    assert main(["evaluate", "--model", f"{run}/student.safetensors", "--data.name", "folder", "--data.root",
                 str(shapes), "--data.loader.workers", "0"]) == 0  # fmt: skip
    scored = json.loads((run / "summary.json").read_text())["scores"]["after"]["rouge_l"]
    assert f"{scored:.1f}" in capsys.readouterr().out


def test_a_lesson_that_was_interrupted_goes_on_and_is_held_once(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optima.commands import distill, finetune

    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main([*short, "--run", str(whole), "--quiet"]) == 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill, "finetune_on", interrupt)
        assert main([*short, "--run", str(run), "--quiet"]) == 130
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "write_words", interrupt)
        assert main(["--run", str(run), "--resume"]) == 130
    assert main(["--run", str(run), "--resume"]) == 0
    assert read_words(run / "teacher").tokenizer.words() == read_words(whole / "teacher").tokenizer.words()
    assert (run / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    taught = (run / "teacher" / "model.safetensors").stat().st_mtime_ns
    assert main(["--run", str(run), "--resume"]) == 0
    assert (run / "teacher" / "model.safetensors").stat().st_mtime_ns == taught


def test_a_taught_teacher_keeps_what_it_knew_of_words(short: list[str], tmp_path: Path) -> None:
    from optima.assets import TEACHER

    run = tmp_path / "run"
    assert main([*short, "--run", str(run), "--quiet", "--teach.learning_rate", "1e-12"]) == 0
    before, after = load_coca(TEACHER), load_coca(run / "teacher" / "model.safetensors")
    old, new = word_tokenizer().id_of("a"), read_words(run).tokenizer.id_of("a")
    for rows in ("text_decoder.token_embedding.weight", "multimodal_decoder.head.weight"):
        torch.testing.assert_close(after.state_dict()[rows][new], before.state_dict()[rows][old], atol=1e-6, rtol=0)
    ours, theirs = after.text_decoder.position, before.text_decoder.position
    torch.testing.assert_close(ours[:6], theirs[:6], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-6, rtol=0)


def test_texts_of_unknown_words_are_refused_above_a_share_and_warned_of_below(
    short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*short, "--data.tokenizer", "words", "--run", str(tmp_path / "run")]
    assert main(options) == 2
    refused = capsys.readouterr().err
    assert "75.0 % of all, are not in the vocabulary and read as unknown: drawn" in refused
    assert "give --data.tokenizer texts" in refused
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="folder train: 10 of 11 different words, 75.0 % of all"):
        assert main([*options, "--data.max_unknown", "0.8", "--teach.steps", "0", "--data.text_length", "14"]) == 0


def test_a_teacher_of_other_words_is_refused(
    short: list[str], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*short, "--run", str(tmp_path / "run"), "--quiet"]) == 0
    (shapes / "train.tsv").write_text("000.png\ta crimson hexagon and ellipse\n", encoding="utf-8")
    try:
        options = [*short, "--teacher", str(tmp_path / "run/teacher/model.safetensors"), "--teach.steps", "0"]
        assert main([*options, "--run", str(tmp_path / "other"), "--quiet"]) == 2
    finally:
        (shapes / "train.tsv").unlink()
    assert "was trained with the vocabulary of" in capsys.readouterr().err


def test_a_vocabulary_of_texts_depends_on_the_texts_alone(seed: int) -> None:
    texts = ["a cat, a dog", "A cat!", "the owl"]
    tokenizer, length = text_tokenizer(texts)
    assert tokenizer.words() == text_tokenizer(reversed(texts))[0].words()
    assert list(tokenizer.words())[4:] == ["a", "cat", "dog", "owl", "the"]
    assert length == 6
    found = unknown_words(tokenizer, ["a cat and a bat", "and the owl"])
    assert found.different == ("and", "bat")
    assert found.share == 3 / 8
