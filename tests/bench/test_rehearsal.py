"""The rehearsal's own parts: data in COCO's form, a command that is measured and ended in time, and the page."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bench.rehearsal import CAPTIONS, IMAGES, SIDES, Rehearsal, Stage, make_data, page
from optima.data.records import open_records


def test_the_data_are_read_in_both_of_cocos_forms(tmp_path: Path) -> None:
    make_data(tmp_path)
    held = IMAGES["val"] + IMAGES["test"]
    for name, counts in (
        ("coco", {"train": IMAGES["train"], "validation": held}),
        ("coco_karpathy", {"train": IMAGES["train"], "validation": IMAGES["val"], "test": IMAGES["test"]}),
    ):
        for split, count in counts.items():
            records = open_records(name, tmp_path, split)
            assert len(records) == count
            assert all(len(records[i].texts) == CAPTIONS for i in range(count))
    images = sorted(tmp_path.glob("*2014/*.jpg"))
    assert len(images) == IMAGES["train"] + held
    for path in images:
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", SIDES[::-1])


def test_a_command_is_measured_and_not_run_again(tmp_path: Path) -> None:
    run = Rehearsal(tmp_path, limit=4.0, threads=1)
    stage = run.optima("version", "--version")
    assert stage.text.startswith("optima ")
    assert 0 < stage.cpu < 60
    assert 5 < stage.resident < 1000
    again = Rehearsal(tmp_path, limit=4.0, threads=1)
    assert again.optima("version", "--no-such-option").text == stage.text
    for folder in (tmp_path / "done", tmp_path / "half"):
        folder.mkdir()
    again.clear("version", Path("done"))
    again.clear("other", Path("half"))
    assert [folder.exists() for folder in (tmp_path / "done", tmp_path / "half")] == [True, False]
    with pytest.raises(SystemExit, match="wrong ended with status 2"):
        run.optima("wrong", "plan", "--no-such-option")


def test_a_command_that_takes_too_much_memory_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hog = tmp_path / "hog.py"
    hog.write_text("import time\nheld = bytearray(2**28)\nheld[::4096] = b'x' * len(held[::4096])\ntime.sleep(600)\n")
    monkeypatch.setattr("bench.rehearsal.__file__", str(hog))
    run = Rehearsal(tmp_path, limit=0.1, threads=1)
    with pytest.raises(SystemExit, match="hog took more"):
        run.part("hog")


def test_the_page_sets_plans_beside_what_was_measured(tmp_path: Path) -> None:
    run = Rehearsal(tmp_path, limit=1.0, threads=1)
    run.stages = {
        "import": Stage("import", 12.0, 10.0, 3 * 1024, 2 * 1024),
        "finetune": Stage(
            "finetune", 90.0, 60.0, 9.9 * 1024, 9.8 * 1024, [(20.0, "step 1/2  x"), (27.5, "step 2/2  x")]
        ),
        "distil": Stage("distil", 80.0, 70.0, 4096.0, 4096.0, [(5.0, "step 0: validation"), (11.0, "round 1/1  x")]),
    }
    finetune = {"needs": {"peak": 9 * 2**30}, "seconds": 8.25}
    distil = {"needs": {"peak": 3.5 * 2**30}, "hours": 0.0025}
    for name, plan in (("plan of finetuning", finetune), ("plan of distillation", distil)):
        run.stages[name] = Stage(name, lines=[(0.0, json.dumps(plan))])
    found = page(run, "coca_ViT-L-14", "They agree.").splitlines()
    assert "| import | 12 | 10 | | 2.00 |  | 3.00 |" in found
    assert "| finetune | 90 | 60 | | 9.80 | 9.00 | 9.90 |" in found
    assert "| – its second step | | 7.5 | 8.2 | | | |" in found
    assert "| – its round and probe | | 6.0 | 9.0 | | | |" in found
    assert "| export | not measured | | | |  | |" in found
    assert found[-1] == "They agree."
