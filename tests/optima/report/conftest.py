"""The run directories of these tests, written once a session and copied where a test changes them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from page_reader import Page
from synthetic_run import write_run

from optima.report import write_report


@pytest.fixture(scope="session")
def seed() -> int:
    return random.SystemRandom().randrange(2**31)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    """A run directory nobody may change."""
    return write_run(tmp_path_factory.mktemp("runs") / "captioning", seed=seed, rounds=10, samples=8)


@pytest.fixture(scope="session")
def page(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of `written`, as a browser reads it."""
    return Page(write_report(Path(shutil.copytree(written, tmp_path_factory.mktemp("page") / "captioning"))))


@pytest.fixture
def run_dir(written: Path, tmp_path: Path) -> Path:
    """A run directory of the test's own."""
    return Path(shutil.copytree(written, tmp_path / "run"))
