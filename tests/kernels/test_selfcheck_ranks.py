"""Ranks of a job agree on their kernels before one of them falls back: two processes, gloo between them."""

import json
import os
import subprocess
import sys

import pytest
import ranks_that_check
from ranks_that_check import PATIENCE, Choice

pytest.importorskip("triton")

Ranks = list[dict[str, Choice]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """By rank and case, what was chosen: one launch, since starting takes the most time."""
    directory = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in os.environ.items() if name != "OPTIMA_SELFCHECK"} | own
    done = subprocess.run(
        [*launcher, ranks_that_check.__file__, str(directory)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((directory / f"{rank}.json").read_text()) for rank in (0, 1)]
    return [{case: Choice(**choice) for case, choice in of_rank.items()} for of_rank in found]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("a process dies", ["on all ranks", "unusable", "of rank 1", "ended with status -6", "optima doctor --check"]),
        ("wrong on rank 0", ["on all ranks", "wrong", "of rank 0", "relative error of 5.0e-01", "OPTIMA_SELFCHECK"]),
        ("unusable on 0, wrong on 1", ["wrong", "of rank 1", "relative error of 5.0e-01"]),
    ],
)
def test_where_one_rank_fails_all_fall_back_and_one_says_so(ranks: Ranks, case: str, words: list[str]) -> None:
    assert [found[case].backend for found in ranks] == ["blocked", "blocked"]
    (message,) = [message for found in ranks for message in found[case].said]
    assert ranks[0][case].said == [message]
    for word in words:
        assert word in message


def test_where_all_are_right_all_use_them_and_nothing_is_said(ranks: Ranks) -> None:
    for found in ranks:
        assert (found["right"].backend, found["right"].said) == ("triton", [])


def test_what_one_rank_could_not_find_out_is_said_once(ranks: Ranks) -> None:
    case = "unknown on rank 1"
    assert [found[case].backend for found in ranks] == ["triton", "triton"]
    (message,) = [message for found in ranks for message in found[case].said]
    assert "used unchecked" in message
    assert "of rank 1: the memory is taken" in message


def test_a_rank_that_fails_when_the_others_waited_in_vain_says_so(ranks: Ranks) -> None:
    case = "unusable, late"
    assert (ranks[0][case].backend, ranks[0][case].said) == ("triton", [])
    for words in ("other ranks", "unusable: no compiler", 'backend="blocked" on all ranks'):
        assert words in ranks[1][case].backend


def test_a_rank_that_comes_late_follows_and_is_silent(ranks: Ranks) -> None:
    assert [found["right, late"].backend for found in ranks] == ["triton", "triton"]
    case = "right, late, of wrong ones"
    assert [found[case].backend for found in ranks] == ["blocked", "blocked"]
    assert [len(found[case].said) for found in ranks] == [1, 0]


def test_a_rank_waits_in_vain_once(ranks: Ranks) -> None:
    assert ranks[0]["unusable, late"].seconds >= PATIENCE
    assert ranks[0]["right, late"].seconds < PATIENCE
    assert ranks[1]["right, late"].seconds < PATIENCE
