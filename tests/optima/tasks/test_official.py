"""Miniatures of every official format, from the command line: prepared, trained for a few steps and evaluated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from miniatures import MAKERS

from optima.coca import HeadSpec
from optima.coca.checkpoint import save_coca
from optima.data.config import DataName, LoaderConfig
from optima.data.records import FORMATS, open_records
from optima.data.tokenizer import word_tokenizer
from optima.run import main
from optima.tasks.official import OfficialSplits, OfficialTask

PREDICTIONS = {
    "coco": "captions_val_optima_results.json",
    "coco_karpathy": "captions_karpathy_test_optima_results.json",
    "vqav2": "vqa_OpenEnded_mscoco_val2014_optima_results.json",
    "nlvr2": "nlvr2_test1_predictions.csv",
    "snli_ve": "snli_ve_test_predictions.jsonl",
    "folder": "folder_test_predictions.jsonl",
    "webdataset": "webdataset_test_predictions.jsonl",
}


def options(name: DataName, root: Path, engine: str = "torch") -> list[str]:
    return f"--data.name {name} --data.root {root} --data.loader.engine {engine} --data.loader.workers 0".split()


def distilled(name: DataName, root: Path, run: Path, make_coca, student: Path, engine: str) -> None:
    """Distils from a data root, official files or shards, that has been made."""
    records = open_records(name, root, "validation")
    images = 2 if name == "nlvr2" else 1
    heads = {records.task: HeadSpec(len(records.classes), images)} if records.classes else None
    torch.manual_seed(3)
    teacher = run.with_suffix(".teacher.safetensors")
    save_coca(make_coca(32, 2, heads), teacher)
    words = (
        f"--task {records.task} --teacher {teacher} --student {student} --run {run} "
        "--engine.rounds 2 --engine.steps_per_round 2 --batch_size 5 --probe_size 4 --evaluate_items 4 --samples 2 "
        "--threads 1 --quiet --report false"
    )
    assert main([*words.split(), *options(name, root, engine)]) == 0


def rows_but_for_time(run: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if "second" not in name} for row in rows]


@pytest.mark.parametrize("name", MAKERS)
def test_a_miniature_is_distilled_and_evaluated_from_its_files_and_alike_from_its_shards_alone(
    name: DataName, make_coca, student_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, root, run = MAKERS[name](tmp_path / "files"), tmp_path / "shards", tmp_path / "run"
    distilled(name, files, tmp_path / "from_files", make_coca, student_file, "torch")
    packing = ["prepare", "--data", name, "--root", str(files), "--out", str(root), "--workers", "1"]
    assert main(packing) == 0
    shutil.rmtree(files)
    distilled(name, root, run, make_coca, student_file, "torch")
    assert rows_but_for_time(run) == rows_but_for_time(tmp_path / "from_files")
    weights = [(path / "student.safetensors").read_bytes() for path in (run, tmp_path / "from_files")]
    assert weights[0] == weights[1]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["headline_metric"] == ("cider_d" if FORMATS[name].task == "captioning" else "accuracy")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(json.loads((run / "samples.json").read_text())) == 2
    capsys.readouterr()
    model = ["evaluate", "--model", str(run / "student.safetensors"), "--predictions", str(tmp_path / "said")]
    assert main([*model, *options(name, root)]) == 0
    text = capsys.readouterr().out
    for metric, value in summary["scores"]["after"].items():
        assert any(metric in line and f"{value:.1f}" in line for line in text.splitlines())
    content = (tmp_path / "said" / PREDICTIONS[name]).read_text(encoding="utf-8")
    rows = json.loads(content) if content.startswith("[") else content.splitlines()
    assert len(rows) == summary["test_items"]


def test_dali_distils_and_evaluates_the_same_items(make_coca, student_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is optional: pip install nvidia-dali-cuda130")
    distilled("vqav2", MAKERS["vqav2"](tmp_path / "data"), tmp_path / "run", make_coca, student_file, "dali")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_items"] == 12


def test_finetune_makes_the_teacher_of_official_data(make_coca, tmp_path: Path) -> None:
    root, start = tmp_path / "data", tmp_path / "start.safetensors"
    MAKERS["vqav2"](root)
    save_coca(make_coca(16, 1, None), start)
    words = f"finetune --model {start} --task vqa --run {tmp_path / 'run'} --steps 2 --batch_size 4 --threads 1"
    assert main([*words.split(), *options("vqav2", root)]) == 0
    assert "accuracy" in json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]


def test_every_other_command_reads_the_tars_of_other_programs_too(
    make_coca, student_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, start = MAKERS["webdataset"](tmp_path / "data"), tmp_path / "start.safetensors"
    save_coca(make_coca(16, 1, None), start)
    words = f"finetune --model {start} --run {tmp_path / 'run'} --steps 2 --batch_size 4 --threads 1"
    assert main([*words.split(), *options("webdataset", root)]) == 0
    assert "cider_d" in json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]
    capsys.readouterr()
    words = f"plan --teacher {start} --student {student_file} --json"
    assert main([*words.split(), *options("webdataset", root)]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["data"]["name"] == "webdataset"


def test_mistakes_are_one_line(
    brief: list[str], student_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    MAKERS["vqav2"](root)
    run = ["--run", str(tmp_path / "run")]
    for words, complaint in (
        (["--data.name", "vqav2"], "root, the folder that vqav2 was downloaded to"),
        (options("vqav2", root), "data vqav2 serves task vqa, not captioning"),
        ([*options("vqav2", tmp_path / "none"), "--task", "vqa"], "is not a folder"),
        ([*options("vqav2", root), "--task", "vqa"], "has a head for vqa"),
    ):
        assert main([*brief, *run, *words]) == 2
        line = capsys.readouterr().err
        assert complaint in line
        assert line.count("\n") == 1
    assert main(["evaluate", "--model", str(student_file), *options("vqav2", root), "--data.test", "test"]) == 2
    assert "has no head for vqa" in capsys.readouterr().err


def official(name: DataName, root: Path, rank: int = 0, world_size: int = 1, max_rejected: float = 0.0) -> OfficialTask:
    return OfficialTask(
        name,
        root,
        OfficialSplits(),
        LoaderConfig(engine="torch", workers=0, max_rejected=max_rejected),
        word_tokenizer(),
        image_size=32,
        text_length=9,
        answers=3129,
        max_unknown=1.0,
        rank=rank,
        world_size=world_size,
        report=root / "rejected.jsonl",
    )


def test_training_batches_are_a_function_of_their_number_and_ranks_share_them(tmp_path: Path) -> None:
    MAKERS["snli_ve"](tmp_path)
    data = official("snli_ve", tmp_path)
    batches = [data.training_batch(number, 4) for number in range(4)]
    again = data.training_batch(2, 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, batches[2], strict=True))
    assert again.images.shape == (4, 1, 3, 32, 32)
    assert again.tokens.shape == (4, 9)
    halves = [official("snli_ve", tmp_path, rank, 2).training_batch(1, 2) for rank in (0, 1)]
    for whole, *parts in zip(batches[1], *halves, strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_an_unusable_image_is_left_out_of_an_evaluation_and_named(tmp_path: Path) -> None:
    MAKERS["folder"](tmp_path)
    (tmp_path / "images/3.jpg").write_bytes(b"no image")
    data = official("folder", tmp_path, max_rejected=0.2)
    seen = [index for batch in data.held_batches("validation", 5) for index in batch.indices]
    assert seen == [index for index in range(12) if index != 3]
    assert len(data.probe_batch(12).tokens) == 11
    (line,) = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "images/3.jpg"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_ranks_share_the_batches_of_an_evaluation(count: int, tmp_path: Path) -> None:
    """Bit for bit, an unusable image included, which is as large a share of one rank's items as it may be of all."""
    MAKERS["folder"](tmp_path)
    (tmp_path / "images/3.jpg").write_bytes(b"no image")
    data = official("folder", tmp_path, max_rejected=0.1)
    alone = list(data.held_batches("validation", 4, 11))
    shares = [list(data.held_batches("validation", 4, 11, (rank, count))) for rank in range(count)]
    for number, whole in enumerate(alone):
        ours = shares[number % count].pop(0)
        assert ours.indices == whole.indices
        assert all(torch.equal(x, y) for x, y in zip(ours.batch, whole.batch, strict=True))
    assert shares == [[] for _ in range(count)]


def test_rows_that_cannot_be_used_are_named_once_and_counted(tmp_path: Path) -> None:
    MAKERS["folder"](tmp_path)
    with open(tmp_path / "validation.tsv", "a") as file:
        file.write("no tab\n../up.jpg\ta cat\n")
    (tmp_path / "images/3.jpg").write_bytes(b"no image")
    for rank in (0, 1, 0):
        data = official("folder", tmp_path, rank, 2, max_rejected=0.2)
        if rank == 0:
            with pytest.warns(UserWarning, match="folder validation: 2 of 14 items cannot be used.*rejected.jsonl"):
                data.records("validation")
        assert data.unused("validation") == 2
    assert list(data.held_batches("validation", 5))
    assert data.unused("validation") == 3
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert sorted(row["kind"] for row in rows) == ["image-unrecognised", "row-type", "unsafe-name"]


def test_evaluate_says_how_many_items_its_score_leaves_out(
    student_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS["folder"](tmp_path)
    (tmp_path / "images/3.jpg").write_bytes(b"no image")
    with open(tmp_path / "test.tsv", "a") as file:
        file.write("no tab\n")
    words = ["evaluate", "--model", str(student_file), *options("folder", tmp_path)]
    with pytest.warns(UserWarning, match="1 of 13 items"):
        assert main([*words, "--data.loader.max_rejected", "0.2"]) == 0
    assert "11 items count; 2 that cannot be used are left out" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="1 of 13 items"):
        assert main([*words, "--data.loader.max_rejected", "0.2", "--predictions", str(tmp_path / "said")]) == 0
    assert len((tmp_path / "said" / "rejected.jsonl").read_text().splitlines()) == 2
