"""Every broken, hostile and odd thing gets the verdict that it must get, within bounds of memory and time."""

import re
from pathlib import Path
from random import Random

import pytest
from boxed import run_boxed
from cases import Case, Verdict
from corpus import CASES
from judge import READERS, judge

MORE_BYTES = 3 * 2**28
"""Address space of a reader beyond what the process begins with."""

SECONDS = 20.0
"""Time of a case on a machine that is shared; the slowest take about one."""


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(CASES) >= 250
    assert len({str(case) for case in CASES}) == len(CASES)
    assert {case.reader for case in CASES} == set(READERS)


def agrees(found: Verdict, expected: Verdict) -> bool:
    if found.outcome != expected.outcome:
        return False
    match = re.search if found.outcome == "refused" else re.fullmatch
    return match(expected.words, found.words) is not None


@pytest.mark.parametrize("reader", READERS)
def test_every_case_gets_its_verdict(reader: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in CASES if case.reader == reader]
    monkeypatch.chdir(tmp_path)

    def run(place: int) -> Verdict:
        case = cases[place]
        folder = tmp_path / str(place)
        folder.mkdir()
        case.make(folder / case.file, Random(f"{seed} {case}"))
        return judge(reader, folder / case.file)

    wrong = []
    for name, found in run_boxed([str(case) for case in cases], run, more_bytes=MORE_BYTES, seconds=SECONDS):
        case: Case = next(case for case in cases if str(case) == name)
        if isinstance(found, str) or not agrees(Verdict(*found), case.verdict):
            wrong.append(f"{name}: {tuple(case.verdict)} is wanted, got {found}")
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "harm").exists()


def test_a_case_is_a_function_of_the_seed(tmp_path: Path, seed: int) -> None:
    for place, case in enumerate(Random(seed).sample(CASES, 200)):
        made = []
        for copy in "ab":
            folder = tmp_path / f"{place}{copy}"
            folder.mkdir()
            case.make(folder / case.file, Random(f"{seed} {case}"))
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 2**22)
            made.append([(path.relative_to(folder), path.read_bytes()) for path in files if not path.is_symlink()])
        assert made[0] == made[1], case
