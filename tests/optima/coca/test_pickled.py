"""Pickles of others: what could run code, or unpack to more than its file, is refused without being run."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

from optima.coca.pickled import load_plain
from optima_core import OptimaError


def test_a_pickle_that_would_run_code_is_refused_without_advice_to_run_it(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"payload": Malicious()}, tmp_path / "weights.pt")
    with pytest.raises(OptimaError, match="holds more than tensors and plain values") as caught:
        load_plain(tmp_path / "weights.pt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    whole, target = io.BytesIO(), io.BytesIO()
    torch.save({"step": 1, "weights": torch.zeros(10_000_000)}, whole)
    with zipfile.ZipFile(whole) as plain, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part.filename))
    (tmp_path / "weights.pt").write_bytes(target.getvalue())
    with pytest.raises(OptimaError, match="it is compressed"):
        load_plain(tmp_path / "weights.pt")
