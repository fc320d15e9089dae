"""A rank needs next to no memory beside its share to save what is sharded, whether it waits or goes on meanwhile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import saving_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_no_rank_ever_holds_more_than_its_share(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, saving_memory.__file__, str(tmp_path), "6"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ranks) == 2
    for found in ranks:
        share = found["share"]
        assert share == pytest.approx(144, abs=1), "a half of 6 layers, and of two moments of each"
        # The other half would be as much again.
        assert found["save"] < 0.25 * share
        assert found["meanwhile"] < 0.25 * share
        assert found["turned"] < 0.25 * share
        assert found["load"] < 1.25 * share
