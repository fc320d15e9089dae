"""What is saved is never lost: rotation, damage, crashes in the middle of a write, a full disk."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_disks
import pytest
import torch
from padded_models import make_distiller

from optima_core import CheckpointStore, OptimaError
from optima_core.checkpoint import MANIFEST, write_atomically
from optima_core.parallel import Ranks


def store_with(directory: Path, steps: list[int], keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(directory, keep)
    for step in steps:
        store.save(step, {"step": step, "weights": torch.full((50,), float(step))})
    return store


def files_of(checkpoint: Path) -> list[Path]:
    """The manifest, and the file of tensors."""
    return sorted(checkpoint.iterdir(), key=lambda path: path.suffix)


def test_the_newest_is_loaded_and_the_oldest_are_dropped(tmp_path: Path) -> None:
    store = store_with(tmp_path / "checkpoints", [1, 2, 30, 4, 500], keep=3)
    assert [path.name for path in store.paths()] == ["step-000000004", "step-000000030", "step-000000500"]
    assert sorted(store.directory.iterdir()) == store.paths()
    state = store.load()
    assert state is not None
    assert state["step"] == 500
    assert torch.equal(state["weights"], torch.full((50,), 500.0))


def test_what_a_kill_left_beyond_those_that_are_kept_goes_at_the_end(tmp_path: Path) -> None:
    store_with(tmp_path, [1, 2, 3, 4], keep=4)
    (tmp_path / "step-000000005").mkdir()
    store = CheckpointStore(tmp_path, keep=2)
    assert store.load() is not None
    assert len(list(tmp_path.iterdir())) == 5, "who reads drops nothing"
    store.tidy()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000003", "step-000000004"]


def test_every_value_comes_back_as_it_was(tmp_path: Path, seed: int) -> None:
    whole = torch.randn(7, 6)
    state = {
        "types": {str(dtype): whole.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int16, torch.bool)},
        "views": [whole.T, whole[1:3, ::2], torch.tensor(2.5), torch.empty(0, 3), torch.ones(3, 1).expand(3, 2)],
        "numbers": [1, True, None, -0.0, 0.1 + 0.2, 1e300, float("inf"), 2**60],
        "texts": {"": "ü\n", "a/b": ""},
        "steps": ({"a": 1}, []),
    }
    store = CheckpointStore(tmp_path)
    store.save(1, state)
    found = store.load()
    assert found is not None
    assert found["texts"] == state["texts"]
    assert found["numbers"] == state["numbers"]
    assert [type(number) for number in found["numbers"]] == [type(number) for number in state["numbers"]]
    assert found["steps"] == [{"a": 1}, []]
    for ours, theirs in zip(found["views"], state["views"], strict=True):
        assert torch.equal(ours, theirs)
    assert found["types"].keys() == state["types"].keys()
    for name, tensor in found["types"].items():
        assert tensor.dtype == state["types"][name].dtype
        assert torch.equal(tensor, state["types"][name])


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {1, 2}}, object(), b"bytes", 1j])
def test_what_is_no_plain_value_is_not_saved(value: object, tmp_path: Path) -> None:
    store = store_with(tmp_path, [1])
    with pytest.raises(ValueError, match=r"part(/a)? is"):
        store.save(2, {"part": value})
    state = store.load()
    assert state is not None
    assert state["step"] == 1


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "nowhere").load() is None


def test_a_part_is_read_into_tensors_that_are_there(tmp_path: Path, seed: int) -> None:
    weights = torch.randn(4, 3)
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": {"weights": weights, "step": torch.tensor(3)}, "other": 5})
    saved = store.newest({"model": dict})
    assert saved is not None
    assert saved.state["other"] == 5
    assert saved.state["model"]["weights"].device.type == "meta"
    given = torch.nn.Parameter(torch.zeros(4, 3))
    state = saved.part("model").read({"weights": given})
    assert state["weights"].data_ptr() == given.data_ptr()
    assert torch.equal(given, weights)
    assert state["step"] == 3
    with pytest.raises(ValueError, match="Size mismatch"):
        saved.part("model").read({"weights": torch.zeros(3, 4)})


@pytest.mark.parametrize("which", [0, 1], ids=["manifest", "tensors"])
def test_any_truncation_of_the_newest_falls_back_with_a_warning(which: int, tmp_path: Path, seed: int) -> None:
    store = store_with(tmp_path, [1, 2])
    newest = store.paths()[-1]
    damaged = files_of(newest)[which]
    whole = damaged.read_bytes()
    for length in [0, 1, len(whole) - 1, *random.Random(seed).sample(range(len(whole)), 8)]:
        damaged.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=newest.name):
            state = store.load()
        assert state is not None
        assert state["step"] == 1, f"truncated to {length} bytes"


@pytest.mark.parametrize("which", [0, 1], ids=["manifest", "tensors"])
def test_a_flipped_bit_never_becomes_a_weight(which: int, tmp_path: Path, seed: int) -> None:
    store = store_with(tmp_path, [1, 2])
    damaged = files_of(store.paths()[-1])[which]
    whole, draws = damaged.read_bytes(), random.Random(seed)
    fell_back = 0
    for _ in range(150):
        content, place = bytearray(whole), draws.randrange(len(whole))
        content[place] ^= 1 << draws.randrange(8)
        damaged.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = store.load()
        assert state is not None
        fell_back += state["step"] == 1
        assert torch.equal(state["weights"], torch.full((50,), float(state["step"]))), f"byte {place}"
    assert fell_back > 100


def test_a_file_that_is_lost_or_of_another_checkpoint_falls_back(tmp_path: Path) -> None:
    store = store_with(tmp_path, [1, 2])
    (_, ours), (_, theirs) = (files_of(path) for path in store.paths())
    theirs.write_bytes(ours.read_bytes())
    with pytest.warns(UserWarning, match=r"digest of .*\.safetensors is wrong"):
        assert store.load() is not None
    theirs.unlink()
    with pytest.warns(UserWarning, match=r"its .*\.safetensors is no plain file"):
        assert store.load() is not None


def test_when_all_are_damaged_the_error_says_so_in_one_line(tmp_path: Path) -> None:
    store = store_with(tmp_path, [1, 2])
    for path in store.paths():
        (path / MANIFEST).write_bytes(b"garbage")
    warnings.simplefilter("error")  # pytest restores the filters after each test
    with pytest.raises(OptimaError, match="none of the 2 checkpoints") as caught:
        store.load()
    assert "\n" not in str(caught.value)


def test_checkpoints_of_the_earlier_layout_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "step-000000001.pt").write_bytes(b"")
    with pytest.raises(OptimaError, match="of a version of optima that kept each in one file") as caught:
        CheckpointStore(tmp_path).load()
    assert "\n" not in str(caught.value)


class Crash(BaseException):
    """An end that no code of ours handles."""


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waited for", "meanwhile"])
@pytest.mark.parametrize("call", range(20))
def test_a_crash_at_any_call_to_the_system_leaves_a_checkpoint_whole(
    call: int, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that change the disk, in the order in which a save makes them: one of them is the last."""
    store_with(tmp_path, [1, 2])
    store = CheckpointStore(tmp_path, asynchronous=asynchronous)
    left = call

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if not left:
                raise Crash
            left -= 1
            return function(*arguments, **options)

        return called

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        try:
            store.save(3, {"step": 3, "weights": torch.full((50,), 3.0)})
            store.wait()
            assert call > 8, "a save makes more calls than that"
        except Crash:
            pass
    store.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = store.load()
    assert state is not None
    assert state["step"] in (2, 3)
    store = store_with(tmp_path, [3, 4])
    assert [path.name for path in store.paths()] == ["step-000000003", "step-000000004"]
    assert sorted(tmp_path.iterdir()) == store.paths(), "what the crash left is removed"
    assert [len(files_of(path)) for path in store.paths()] == [2, 2]


def test_a_crash_between_writing_and_renaming_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def crash(*_: object) -> None:
        raise Crash

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(Crash):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, [1])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptimaError, match="No space left on device") as caught:
        store.save(2, {"step": 2})
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_what_one_rank_cannot_write_every_rank_is_told_of(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, full_disks.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first == second
    for not_begun, not_ended, *left in first:
        for step, said in ((1, not_begun), (2, not_ended)):
            where = f"cannot write .*/step-00000000{step}/00001-.*"
            assert re.fullmatch(f"{where}: No space left on device; what was saved before is intact", said)
        assert left == ["step-000000003"]


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptimaError, match="Not a directory"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, {})


def test_what_is_written_meanwhile_is_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, asynchronous=True)
    before, sync = threading.Event(), os.fsync

    def held_up(number: int) -> None:
        assert before.wait(60)
        sync(number)

    monkeypatch.setattr(os, "fsync", held_up)
    weights, curve = torch.zeros(5), [1.0]
    store.save(1, {"weights": weights, "curve": curve})
    weights += 1
    curve.append(2.0)
    assert store.load() is None, "it is not there before it is whole"
    before.set()
    store.wait()
    state = store.load()
    assert state is not None
    assert torch.equal(state["weights"], torch.zeros(5))
    assert state["curve"] == [1.0]
    store.close()


def test_what_is_learnt_while_a_state_is_saved_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = make_distiller(Ranks(), ema=0.8)
    distiller.run_round()
    waited, meanwhile = CheckpointStore(tmp_path / "waited"), CheckpointStore(tmp_path / "meanwhile", asynchronous=True)
    waited.save(distiller.step, distiller.state_dict())
    learnt, sync = threading.Event(), os.fsync

    def held_up(number: int) -> None:
        assert learnt.wait(600)
        sync(number)

    monkeypatch.setattr(os, "fsync", held_up)
    meanwhile.save(distiller.step, distiller.state_dict())
    distiller.run_round()
    assert not meanwhile.paths()
    learnt.set()
    meanwhile.wait()
    meanwhile.close()

    manifests = [json.loads((store.paths()[0] / MANIFEST).read_bytes()) for store in (waited, meanwhile)]
    digests = [[file["sha256"] for file in manifest["files"]] for manifest in manifests]
    assert digests[0] == digests[1]
    assert manifests[0]["state"] == manifests[1]["state"]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]


def test_an_error_of_what_is_written_meanwhile_is_told_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, asynchronous=True)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        store.save(1, {"step": 1})
        with pytest.raises(OptimaError, match="No space left on device"):
            store.save(2, {"step": 2})
    store.save(3, {"step": 3})
    store.wait()
    assert [path.name for path in store.paths()] == ["step-000000003"]
    store.close()


def sealed(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a checkpoint's manifest, and makes its digest right."""
    content = json.loads((checkpoint / MANIFEST).read_bytes())
    del content["sha256"]
    change(content)
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({"sha256": digest, **content}))


@pytest.mark.parametrize("content", [[1, 2], 3, None, {}, {"step": "3", "weights": None}, {"step": 3}])
def test_a_state_without_what_is_wanted_is_passed_over(content: object, tmp_path: Path) -> None:
    store = store_with(tmp_path, [1, 9])
    sealed(store.paths()[-1], lambda manifest: manifest.update(state=content, tensors={}))
    with pytest.warns(UserWarning, match="step-000000009"):
        state = store.load({"step": int, "weights": torch.Tensor})
    assert state is not None
    assert state["step"] == 1


HUGE = 2**50
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda manifest: manifest.update(format="optima checkpoint 3"),
    "a tensor larger than its pieces": lambda manifest: manifest["tensors"]["weights"].update(shape=[HUGE]),
    "a piece larger than its file": lambda manifest: manifest["tensors"]["weights"].update(
        shape=[HUGE], pieces=[[0, [0], [HUGE]]]
    ),
    "a piece beyond its tensor": lambda manifest: manifest["tensors"]["weights"].update(pieces=[[0, [10], [50]]]),
    "sizes below nothing": lambda manifest: manifest["tensors"]["weights"].update(
        shape=[-5, -10], pieces=[[0, [0, 0], [-5, -10]]]
    ),
    "a piece in no file": lambda manifest: manifest["tensors"]["weights"].update(pieces=[[7, [0], [50]]]),
    "another type": lambda manifest: manifest["tensors"]["weights"].update(type="I32"),
    "a file elsewhere": lambda manifest: manifest["files"][0].update(name="../x"),
    "no files": lambda manifest: manifest.update(files=[]),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_manifest_that_lies_is_passed_over(lie: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    store = store_with(tmp_path / "checkpoints", [1, 2])
    shutil.copy(files_of(store.paths()[-1])[1], store.directory / "x")
    sealed(store.paths()[-1], lie)
    with pytest.warns(UserWarning, match="step-000000002"):
        state = store.load()
    assert state is not None
    assert state["step"] == 1


def test_what_is_written_some_mib_at_a_time_comes_back_as_it_was(tmp_path: Path, seed: int) -> None:
    """In a row and not, with a last part that is smaller than the others, or one row larger than all of them."""
    whole = torch.randint(-(2**31), 2**31, (3000, 3001), dtype=torch.int32)
    state = {"row": whole, "turned": whole.T, "wide": whole.flatten().repeat(2)[::2][None], "odd": whole.bool()}
    store = CheckpointStore(tmp_path)
    store.save(1, state)
    found = store.load()
    assert found is not None
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_manifest_without_end_is_passed_over(tmp_path: Path) -> None:
    store = store_with(tmp_path, [1, 2])
    os.truncate(store.paths()[-1] / MANIFEST, 2**40)
    with pytest.warns(UserWarning, match="1099511627776 bytes; 1073741824 are the most"):
        state = store.load()
    assert state is not None
    assert state["step"] == 1


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_passed_over(tmp_path: Path) -> None:
    store = store_with(tmp_path, [1, 2, 3, 4], keep=9)
    (piped, _), (_, tensors), (folder, _) = (files_of(path) for path in store.paths()[1:])
    for path in (piped, tensors, folder):
        path.unlink()
    os.mkfifo(piped)
    os.mkfifo(tensors)
    folder.mkdir()
    with pytest.warns(UserWarning, match="no plain file"):
        state = store.load()
    assert state is not None
    assert state["step"] == 1
