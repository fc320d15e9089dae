"""Captions and answers about image files: the same as evaluation gives, and one line for what cannot be done."""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from optima.coca.checkpoint import load_coca
from optima.coca.generate import generate
from optima.data.config import TransformConfig
from optima.data.pictograms.stream import Pictograms
from optima.data.tokenizer import word_tokenizer
from optima.data.tokenizers import tokenizer_from_json
from optima.run import main
from optima.runs.directory import RunDirectory
from optima.runs.student import load_student
from optima.runs.words import write_words
from optima.task import Task
from optima.tasks.evaluate import evaluate
from optima.tasks.pictograms import PictogramTask
from optima_core import OptimaError

ITEMS = 6


@pytest.fixture(scope="module")
def runs(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory a task, as far as `use` looks at it, and the test split's first images as files."""
    root = tmp_path_factory.mktemp("runs")
    for task in get_args(Task):
        directory = RunDirectory(root / task, resume=False, keep=1)
        (root / task / "student.safetensors").write_bytes(teacher_file.read_bytes())
        write_words(directory, PictogramTask(task, 0, torch.device("cpu")), TransformConfig())
        images = Pictograms("test").batch(task, 0, ITEMS).images
        for number, pair in enumerate(images):
            for side, pixels in enumerate(pair):
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / task / f"{number}-{side}.png")
    return root


def test_captions_are_those_of_the_evaluation(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = PictogramTask("captioning", 0, torch.device("cpu"))
    expected = evaluate(load_coca(runs / "captioning" / "student.safetensors"), data, "test", limit=ITEMS).predictions
    files = [str(runs / "captioning" / f"{number}-0.png") for number in range(ITEMS)]
    assert load_student(runs / "captioning").caption(files) == expected
    assert main(["caption", *files, "--run", str(runs / "captioning")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("  ")[0] for line in lines] == [
        f"{file}: {caption}" for file, caption in zip(files, expected, strict=True)
    ]


def test_a_caption_is_as_probable_as_its_tokens_are_one_by_one(runs: Path) -> None:
    """Against the teacher-forced logits of ever longer beginnings, without a cache and without a batch."""
    student = load_student(runs / "captioning", device="cpu")
    tokenizer, model = student.words.tokenizer, student.model
    files = [runs / "captioning" / f"{number}-0.png" for number in range(3)]
    for file, (caption, probability) in zip(files, student.probable_captions(files), strict=True):
        row = generate(
            model,
            student._images([file]),
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            length=student.words.text_length,
        )[0].tolist()
        row = row[: row.index(tokenizer.end_id) + 1] if tokenizer.end_id in row else row
        logs = []
        for place in range(1, len(row)):
            output = model(student._images([file])[:, None], torch.tensor([row[:place]]))
            logits = model.caption_logits(output.states)[0, -1].double()
            logits[tokenizer.pad_id] = -math.inf
            logs.append(float(logits.log_softmax(-1)[row[place]]))
        assert probability == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)
        assert caption == student.caption(file)


@pytest.mark.parametrize(("usual", "warned"), [(1.0, True), (0.0, False), (None, False)])
def test_a_caption_that_is_less_probable_than_usual_is_warned_of(
    usual: float | None, warned: bool, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs / "captioning", tmp_path / "run"))
    words = json.loads((run / "words.json").read_text()) | {"usual": usual}
    (run / "words.json").write_text(json.dumps(words))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main(["caption", str(run / "0-0.png"), "--run", str(run)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(" %")
    assert any("less sure of" in str(one.message) for one in told) == warned


def test_a_image_may_be_a_path_a_name_pixels_or_a_pil_image(runs: Path, tmp_path: Path) -> None:
    student = load_student(runs / "captioning", device="cpu")
    files = [runs / "captioning" / f"{number}-0.png" for number in range(3)]
    expected = student.caption(files)
    opened = [Image.open(file) for file in files]
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened]
    assert student.caption(opened) == student.caption(pixels) == student.caption(torch.stack(pixels)) == expected
    for single in (files[0], str(files[0]), opened[0], pixels[0]):
        assert student.caption(single) == expected[0]
    answerer = load_student(runs / "vqa", device="cpu")
    assert answerer.answer("is there a dog", opened[0]) == answerer.answer("is there a dog", [str(files[0])])


@pytest.mark.parametrize("given", [3, torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)])
def test_what_is_no_image_is_refused_by_what_it_is(given: object, runs: Path) -> None:
    with pytest.raises(OptimaError, match=r"image number 1 must be a path, a PIL image or a uint8 tensor \[3, H, W]"):
        load_student(runs / "captioning", device="cpu").caption([given])  # type: ignore[list-item]


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "snli_ve"])
def test_answers_are_those_of_the_evaluation(task: Task, runs: Path) -> None:
    data = PictogramTask(task, 0, torch.device("cpu"))
    expected = evaluate(load_coca(runs / task / "student.safetensors"), data, "test", limit=ITEMS).predictions
    student = load_student(runs / task)
    for number, answer in enumerate(expected):
        example = Pictograms("test").example(task, number)
        files = [runs / task / f"{number}-{side}.png" for side in range(len(example.scenes))]
        probabilities = student.answer(example.text, files)
        assert next(iter(probabilities)) == answer
        assert set(probabilities) == set(data.classes)
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)


@pytest.mark.parametrize(("fit", "edge"), [("crop", (0, 255, 0)), ("squash", (255, 0, 0))])
def test_a_image_is_shown_as_the_student_was_trained_to_see_it(
    fit: Literal["crop", "squash"], edge: tuple[int, int, int], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs / fit
    shutil.copytree(runs / "captioning", run)
    write_words(
        RunDirectory(run / "words", resume=False, keep=1), PictogramTask("captioning"), TransformConfig(fit=fit)
    )
    (run / "words" / "words.json").replace(run / "words.json")
    wide = Image.new("RGB", (256, 128), (0, 255, 0))
    wide.paste((255, 0, 0), (0, 0, 64, 128))
    wide.save(run / "wide.png")
    seen: list[torch.Tensor] = []

    def look(_: object, images: torch.Tensor, **__: object) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(1, 1, dtype=torch.int64)

    monkeypatch.setattr("optima.runs.student.generate", look)
    load_student(run, device="cpu").caption([run / "wide.png"])
    left = seen[0][0, :, 32, 0]
    torch.testing.assert_close(left, torch.tensor(edge) / 127.5 - 1, atol=0.02, rtol=0)


def test_a_device_that_is_not_there_is_one_line(runs: Path) -> None:
    assert load_student(runs / "vqa", device="cpu").device.type == "cpu"
    with pytest.raises(OptimaError, match="device 'gpu' cannot be used"):
        load_student(runs / "vqa", device="gpu")


def test_case_and_punctuation_of_a_question_do_not_matter(runs: Path) -> None:
    student, file = load_student(runs / "vqa"), runs / "vqa" / "0-0.png"
    assert student.answer("How many objects are there?", [file]) == student.answer("how many objects are there", [file])


def test_a_word_the_student_does_not_know_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["answer", str(runs / "vqa" / "0-0.png"), "--run", str(runs / "vqa"), "--show", "2"]
    with pytest.warns(UserWarning, match="the student does not know quokka"):
        assert main([*words, "--text", "is there a quokka"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["caption", "0-0.png", "--run", "vqa"], "taught vqa; use `answer`"),
        (["answer", "0-0.png", "--run", "captioning", "--text", "a dog"], "taught captioning; use `caption`"),
        (["answer", "0-0.png", "--run", "nlvr2", "--text", "a dog"], "nlvr2 takes 2 images a text, got 1"),
        (["answer", "0-0.png", "--run", "vqa", "--text", "is there a dog " * 9], "the text is too long"),
        (["caption", "missing.png", "--run", "captioning"], "there is no "),
        (["caption", "words.json", "--run", "captioning"], "words.json: "),
        (["caption", "0-0.png", "--run", "nowhere"], "nowhere/student.safetensors does not exist"),
        (["caption", "--run", "captioning"], "image"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], said: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / arguments[arguments.index("--run") + 1]
    placed = [str(run / word) if word.endswith((".png", ".json")) else word for word in arguments]
    placed[placed.index("--run") + 1] = str(run)
    assert main(placed) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("vqa", {"text_length": "x"}, "text_length must be a whole number"),
        ("vqa", {"text_length": 10**9}, "text_length must be a whole number"),
        ("vqa", {"text_length": 999}, "says 999"),
        ("vqa", {"classes": None}, "classes must be a list of texts"),
        ("vqa", {"classes": ["yes"]}, "words.json has 1"),
        ("vqa", {"task": ["vqa"]}, "unknown task"),
        ("vqa", {"tokenizer": 3}, "no tokenizer"),
        ("vqa", {"tokenizer": {"backend": []}}, "no tokenizer"),
        ("vqa", {"tokenizer": {"backend": {"model": {}}}}, "no tokenizer"),
    ],
)
def test_words_of_another_shape_are_refused_in_one_line(
    task: str, change: dict[str, object], said: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student.safetensors").symlink_to(runs / task / "student.safetensors")
    (tmp_path / "words.json").write_text(json.dumps(json.loads((runs / task / "words.json").read_text()) | change))
    assert main(["answer", str(runs / task / "0-0.png"), "--run", str(tmp_path), "--text", "is there a dog"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["[" * 200_000, "3", "[]", "null", "{", ""])
def test_words_that_are_none_are_refused_in_one_line(
    content: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student.safetensors").symlink_to(runs / "vqa" / "student.safetensors")
    (tmp_path / "words.json").write_text(content)
    assert main(["caption", str(runs / "vqa" / "0-0.png"), "--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "words.json" in error
    assert error.count("\n") == 1


def test_a_tokenizer_survives_being_written() -> None:
    tokenizer = word_tokenizer()
    again = tokenizer_from_json(tokenizer.to_json())
    texts = ["three cats above a dog", "Quokka?"]
    assert torch.equal(again.encode(texts, 9), tokenizer.encode(texts, 9))
    assert (again.pad_id, again.start_id, again.end_id) == (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)
