"""The main job under torchrun, with gloo: a lost rank, a request to stop, and going on with another number of ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from launched_ranks import rank_process, rows_of, start, told, wait_for_rounds

from optima.coca.checkpoint import load_coca
from optima.run import main
from optima.tasks.evaluate import evaluate
from optima.tasks.pictograms import PictogramTask
from optima_core import CheckpointStore

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")

KILLS = int(os.environ.get("OPTIMA_TEST_KILLS", "0"))
"""Of ranks of each strategy; 0 kills none."""


def ended(process: subprocess.Popen[str]) -> str:
    """What the processes said, when all went well."""
    try:
        output, errors = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        raise
    assert process.returncode == 0, errors
    return output


def test_lost_ranks_and_requests_to_stop_cost_nothing_and_others_go_on_with_any_number_of_ranks(
    brief: list[str], tmp_path: Path
) -> None:
    run, rounds = tmp_path / "run", 40
    options = [*brief, "--engine.rounds", str(rounds), "--engine.steps_per_round", "1", "--report", "false"]
    assert main([*options, "--run", str(tmp_path / "whole")]) == 0

    process = start([*(word for word in options if word != "--quiet"), "--run", str(run)])
    wait_for_rounds(run, 3, process)
    os.kill(rank_process(process, 1), signal.SIGKILL)
    output, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert len(told(errors)) == 1, errors
    assert "a process of the run was lost" in told(errors)[0]
    numbers = [line.split()[1] for line in output.splitlines() if line.startswith("round ")]
    assert numbers == [f"{i}/{rounds}" for i in range(1, len(numbers) + 1)], "more than one rank speaks"
    state = CheckpointStore(run / "checkpoints").load()
    assert state is not None

    process = start([*options, "--run", str(run), "--resume", "--parallel", "fsdp"])
    wait_for_rounds(run, state["distiller"]["round"] + 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert told(errors) == ["optima: stopped; continue with the same command and --resume"], errors
    state = CheckpointStore(run / "checkpoints").load()
    assert state is not None
    assert state["distiller"]["round"] == len(rows_of(run)) < rounds
    assert {path.name for path in run.iterdir()} <= {
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "start.safetensors",
    }

    assert main([*options, "--run", str(run), "--resume"]) == 0
    ours, theirs = rows_of(run), rows_of(tmp_path / "whole")
    assert [row["arm"] for row in ours] == [row["arm"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        # The order of sums differs, by some 1e-7 a step, and what a step differs by grows in those that follow.
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-5 * one["round"])
        assert one["probe"] == pytest.approx(other["probe"], rel=1e-5 * one["round"])


@pytest.mark.parametrize("ranks", [2, 4] if os.environ.get("OPTIMA_TEST_LONG") else [2])
def test_ranks_score_together_what_one_process_scores(
    ranks: int, brief: list[str], teacher_file: Path, tmp_path: Path
) -> None:
    """Of sharded weights and their running average: captions of 11 and 8 items in batches of 3."""
    run = tmp_path / "run"
    sharing = ["--parallel", "fsdp"] if ranks == 2 else ["--parallel", "hsdp", "--shard_over", "2"]
    items = ["--evaluate_items", "8", "--test_items", "11", "--evaluate_batch", "3", "--samples", "11"]
    short = ["--engine.rounds", "2", "--engine.ema", "0.5", "--report", "false"]
    output = ended(start([*brief, "--run", str(run), *items, *short, *sharing], ranks))
    assert output.count("student before") == 1, "more than one rank shows the table"

    data, summary = PictogramTask("captioning"), json.loads((run / "summary.json").read_text())
    models = {"teacher": teacher_file, "before": run / "start.safetensors", "after": run / "student.safetensors"}
    said = {row["images"][0]: row for row in json.loads((run / "samples.json").read_text())}
    for name, weights in models.items():
        alone = evaluate(load_coca(weights), data, "test", limit=11, batch_size=3)
        assert summary["scores"][name] == alone.scores
        assert [said[f"samples/{index:04d}-0.png"][name] for index in alone.indices] == alone.predictions
    last = evaluate(load_coca(models["after"]), data, "validation", limit=8, batch_size=3)
    assert summary["learning_curve"][-1][data.headline] == last.scores[data.headline]
    assert len(summary["learning_curve"]) == 2


def test_evaluate_shares_the_batches_too(teacher_file: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--model", str(teacher_file), "--tasks", "vqa", "--items", "10", "--batch_size", "3"]
    assert main([*words, "--predictions", str(tmp_path / "alone")]) == 0
    output = ended(start([*words, "--predictions", str(tmp_path / "together")]))
    assert output.count("score, %") == 1, "more than one rank shows the table"
    (ours,), (theirs,) = ([path.read_bytes() for path in (tmp_path / name).iterdir()] for name in ("together", "alone"))
    assert ours == theirs


@pytest.mark.skipif(not KILLS, reason="OPTIMA_TEST_KILLS says how many ranks to kill; each kill takes half a minute")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_changes_no_bit(strategy: str, brief: list[str], tmp_path: Path, seed: int) -> None:
    kills = KILLS
    words = f"--parallel {strategy} --engine.rounds {5 * kills + 5} --engine.steps_per_round 1 --evaluate_every 0"
    options = [*brief, *words.split(), "--test_items", "4", "--samples", "1", "--report", "false"]
    whole, run, draws = tmp_path / "whole", tmp_path / "run", Random(seed)
    process = start([*options, "--run", str(whole)])
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    for _ in range(kills):
        process = start([*options, "--run", str(run), *(["--resume"] if run.exists() else [])])
        wait_for_rounds(run, len(rows_of(run)) + draws.randint(1, 3), process)
        time.sleep(draws.uniform(0, 0.05))
        os.kill(rank_process(process, draws.randrange(2)), signal.SIGKILL)
        process.communicate(timeout=600)
        assert process.returncode != 0
    assert not (run / "student.safetensors").exists(), "it was over before it was killed"
    process = start([*options, "--run", str(run), "--resume"])
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert (run / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    clock = {"seconds", "step_seconds"}
    found, expected = (
        [{name: value for name, value in row.items() if name not in clock} for row in rows_of(place)]
        for place in (run, whole)
    )
    assert found == expected


def test_a_loss_that_explodes_is_told_once(brief: list[str], tmp_path: Path) -> None:
    rate = ["--engine.optimiser.learning_rate", "1e30", "--engine.optimiser.warmup", "0"]
    process = start([*brief, "--run", str(tmp_path / "run"), *rate])
    _, errors = process.communicate(timeout=150)
    assert process.returncode != 0
    assert len(told(errors)) == 1, errors
    assert "became NaN or infinite in round 1" in told(errors)[0]


def test_a_batch_that_cannot_be_shared_is_refused(
    brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib
    from collections.abc import Iterator

    from optima_core.parallel import Ranks

    @contextlib.contextmanager
    def three(*_: object) -> Iterator[Ranks]:
        yield Ranks(0, 3)

    monkeypatch.setattr("optima.commands.distill.join_ranks", three)
    assert main([*brief, "--run", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "optima: batch_size must be a multiple of the 3 ranks, got 4\n"
