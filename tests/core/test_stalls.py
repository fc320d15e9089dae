"""A run that makes no progress ends, and says which rank holds up the others."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import stalled_ranks

from optima_core.parallel import Ranks
from optima_core.stalls import StallWatch, who_holds_up


@pytest.mark.parametrize(
    ("reports", "line"),
    [
        (
            {0: "7 learns in step 4, at a.py:3 in f", 1: "6 loads a batch of step 4, at b.py:5 in g"},
            "rank 1 loads a batch of step 4, at b.py:5 in g; it is waited for: rank 0 learns in step 4, at a.py:3 in f",
        ),
        ({0: "7 learns, at a.py:3 in f"}, "rank 1 does not answer; it is waited for: rank 0 learns, at a.py:3 in f"),
        (
            {0: "7 learns, at a.py:3 in f", 1: "7 learns, at b.py:5 in g"},
            "no rank is behind the others: rank 0 learns, at a.py:3 in f; rank 1 learns, at b.py:5 in g",
        ),
    ],
)
def test_the_rank_that_is_behind_is_named(reports: dict[int, str], line: str) -> None:
    assert who_holds_up(reports, 2) == line


def test_a_hang_ends_in_a_line_that_names_the_rank_and_the_step_and_slowness_does_not() -> None:
    done = subprocess.run(
        [sys.executable, stalled_ranks.__file__],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert json.loads(done.stdout) == [2, 2, 0, 0], done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("optima: ")]
    assert len(lines) == 1, lines
    assert re.fullmatch(
        r"optima: no progress for 4 s: rank 1 loads a batch of step 12, at core/stalled_ranks\.py:\d+ in load; "
        r"it is waited for: rank 0 learns in step 12, at distributed/distributed_c10d\.py:\d+ in all_reduce",
        lines[0],
    ), lines[0]


def test_a_process_of_its_own_waits_for_nobody() -> None:
    with StallWatch(Ranks(), 0.01):
        time.sleep(0.1)
