"""What is saved is never lost: rotation, damage, crashes in the middle of a write, a full disk."""

import errno
import hashlib
import io
import os
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from optima_core import CheckpointStore, OptimaError
from optima_core.checkpoint import write_atomically


def store_with(directory: Path, steps: list[int], keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(directory, keep)
    for step in steps:
        store.save(step, {"step": step, "weights": torch.full((50,), float(step))})
    return store


def test_the_newest_is_loaded_and_the_oldest_are_dropped(tmp_path: Path) -> None:
    store = store_with(tmp_path / "checkpoints", [1, 2, 30, 4, 500], keep=3)
    assert [path.name for path in store.paths()] == ["step-000000004.pt", "step-000000030.pt", "step-000000500.pt"]
    state = store.load()
    assert state is not None
    assert state["step"] == 500
    assert torch.equal(state["weights"], torch.full((50,), 500.0))


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "nowhere").load() is None


def test_any_truncation_of_the_newest_falls_back_with_a_warning(tmp_path: Path, seed: int) -> None:
    store = store_with(tmp_path, [1, 2])
    newest = store.paths()[-1]
    whole = newest.read_bytes()
    for length in [0, 1, len(whole) - 1, *random.Random(seed).sample(range(len(whole)), 8)]:
        newest.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=newest.name):
            state = store.load()
        assert state is not None
        assert state["step"] == 1, f"truncated to {length} bytes"


def test_a_flipped_bit_never_becomes_a_weight(tmp_path: Path, seed: int) -> None:
    store = store_with(tmp_path, [1, 2])
    newest = store.paths()[-1]
    whole, draws = newest.read_bytes(), random.Random(seed)
    fell_back = 0
    for _ in range(150):
        damaged, place = bytearray(whole), draws.randrange(len(whole))
        damaged[place] ^= 1 << draws.randrange(8)
        newest.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = store.load()
        assert state is not None
        fell_back += state["step"] == 1
        assert torch.equal(state["weights"], torch.full((50,), float(state["step"]))), f"byte {place}"
    assert fell_back, "no flip was noticed"


def test_when_all_are_damaged_the_error_says_so_in_one_line(tmp_path: Path) -> None:
    store = store_with(tmp_path, [1, 2])
    for path in store.paths():
        path.write_bytes(b"garbage")
    warnings.simplefilter("error")  # pytest restores the filters after each test
    with pytest.raises(OptimaError, match="none of the 2 checkpoints") as caught:
        store.load()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "harm",))

    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, {"payload": Malicious()})
    with pytest.raises(OptimaError):
        store.load()
    assert not (tmp_path / "harm").exists()


def test_a_crash_between_writing_and_renaming_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path, [1])

    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(Crash):
        store.save(2, {"step": 2, "weights": torch.zeros(1)})
    with pytest.raises(Crash):
        write_atomically(store.paths()[0], b"other")
    monkeypatch.undo()
    state = store.load()
    assert state is not None
    assert state["step"] == 1
    store.save(2, {"step": 2})
    assert [path.name for path in store.paths()] == ["step-000000001.pt", "step-000000002.pt"]


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, [1])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptimaError, match="No space left on device") as caught:
        store.save(2, {"step": 2})
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptimaError, match="Not a directory"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, {})


def sealed(store: CheckpointStore, content: object, step: int = 9) -> Path:
    """A checkpoint of any content whose digest is right."""
    target = io.BytesIO()
    torch.save(content, target)
    store.directory.mkdir(parents=True, exist_ok=True)
    path = store.directory / f"step-{step:09d}.pt"
    path.write_bytes(target.getvalue() + hashlib.sha256(target.getvalue()).digest())
    return path


@pytest.mark.parametrize("content", [[1, 2], 3, None, {}, {"step": "3", "weights": torch.zeros(2)}, {"step": 3}])
def test_a_state_without_what_is_wanted_is_passed_over(content: object, tmp_path: Path) -> None:
    store = store_with(tmp_path, [1])
    sealed(store, content)
    with pytest.warns(UserWarning, match="step-000000009"):
        state = store.load({"step": int, "weights": torch.Tensor})
    assert state is not None
    assert state["step"] == 1


def test_a_refused_pickle_is_said_without_advice_to_read_it_nonetheless(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "harm",))

    store = CheckpointStore(tmp_path / "checkpoints")
    sealed(store, Malicious())
    with pytest.raises(OptimaError, match="holds more than tensors and plain values") as caught:
        store.load()
    assert "weights_only" not in str(caught.value)


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = sealed(store, {"step": 1, "weights": torch.zeros(10_000_000)})
    target = io.BytesIO()
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part.filename))
    path.write_bytes(target.getvalue() + hashlib.sha256(target.getvalue()).digest())
    with pytest.raises(OptimaError, match="it is compressed"):
        store.load()


def test_a_pipe_or_a_folder_in_the_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    store = store_with(tmp_path, [1], keep=9)
    os.mkfifo(tmp_path / "step-000000002.pt")
    (tmp_path / "step-000000003.pt").mkdir()
    with pytest.warns(UserWarning, match="no plain file"):
        state = store.load()
    assert state is not None
    assert state["step"] == 1
