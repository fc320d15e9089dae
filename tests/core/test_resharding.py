"""What several ranks saved, read by fewer: to the last bit, and a run to its end.

OPTIMA_TEST_LONG=1 takes four ranks and every strategy, read by one, two and three, which takes a minute more.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resharded_runs
import torch
from padded_models import distil

from optima_core import CheckpointStore
from optima_core.parallel import Ranks

PLACES = [
    f"{count}-{strategy}-from-{written}"
    for count in resharded_runs.READERS
    for strategy in resharded_runs.read_with(count)
    for written in resharded_runs.WRITTEN
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `resharded_runs` leaves."""
    directory = tmp_path_factory.mktemp("resharded")
    done = subprocess.run(
        [sys.executable, resharded_runs.__file__, str(directory)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run of one process."""
    return state_at_the_end(distil(Ranks(), tmp_path_factory.mktemp("whole")))


def state_at_the_end(run: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = run["state"]
    return state


def loaded(path: Path) -> dict[str, Any]:
    state = CheckpointStore(path).load()
    assert state is not None
    return state


def assert_equal(ours: Any, theirs: Any, place: str = "") -> None:
    """To the last bit, however deep."""
    assert type(ours) is type(theirs), place
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, place
        assert torch.equal(ours, theirs), place
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for name in ours:
            assert_equal(ours[name], theirs[name], f"{place}/{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), place
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(one, other, f"{place}/{number}")
    else:
        assert ours == theirs, place


@pytest.mark.parametrize("place", PLACES)
def test_what_ranks_saved_is_restored_bit_for_bit_by_fewer(place: str, directory: Path) -> None:
    written = loaded(directory / f"written-{place.rpartition('-')[2]}")
    restored = loaded(directory / "restored" / place)
    # Every rank has random numbers of its own.
    assert_equal(written.pop("random")[: len(restored["random"])], restored.pop("random"))
    assert_equal(written, restored)


@pytest.mark.parametrize("strategy", resharded_runs.WRITTEN)
def test_every_rank_writes_a_share(strategy: str, directory: Path) -> None:
    (checkpoint,) = CheckpointStore(directory / f"written-{strategy}").paths()
    sizes = [path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))]
    assert len(sizes) == resharded_runs.WRITERS
    assert max(sizes) < 2 * sum(sizes) / len(sizes)


@pytest.mark.parametrize("place", PLACES)
def test_what_ranks_began_fewer_end(place: str, directory: Path, whole: dict[str, Any]) -> None:
    """Sums in another order differ by some 1e-7, which 18 steps of descent multiply by less than 100."""
    ended = loaded(directory / "ended" / place)
    assert torch.equal(ended["pulls"], whole["pulls"])
    for part in ("student", "objective"):
        assert ended[part].keys() == whole[part].keys()
        for name, tensor in ended[part].items():
            # Softmax ignores what is added to all keys: the gradient of k's bias is rounding alone.
            if not name.endswith("k.bias"):
                torch.testing.assert_close(tensor, whole[part][name], rtol=1e-4, atol=1e-5)
