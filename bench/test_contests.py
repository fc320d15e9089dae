"""The contests of `python -m bench` under pytest-benchmark: `python -m pytest bench --benchmark-only`.

Equality is checked first, as there; memory and exponents are that command's own.
"""

import pytest
import torch

from bench.harness.contest import Contest, Unavailable
from bench.harness.measure import difference
from bench.suites import CONTESTS as SUITES
from bench.suites import suite

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTESTS = {f"{name}: {contest.name}": contest for name in SUITES for contest in suite(name).contests(DEVICE)}
EXPECTED: dict[str, list[torch.Tensor]] = {}


def expected(name: str, contest: Contest) -> list[torch.Tensor]:
    if name not in EXPECTED:
        EXPECTED.clear()  # gradients of the contest before
        EXPECTED[name] = [x.detach().clone() for x in next(iter(contest.contenders.values()))()()]
    return EXPECTED[name]


@pytest.mark.parametrize(("name", "contender"), [(n, who) for n, c in CONTESTS.items() for who in c.contenders])
def test_contest(benchmark, name: str, contender: str) -> None:
    contest = CONTESTS[name]
    benchmark.group = name
    try:
        run = contest.contenders[contender]()
        result = [x.detach().clone() for x in run()]
    except Unavailable as reason:
        pytest.skip(str(reason))
    if contender not in contest.unequal:
        assert difference(result, expected(name, contest)) <= contest.tolerance
    benchmark.pedantic(finished(run), rounds=contest.rounds, warmup_rounds=1)


def finished(run):
    """`run`, and the wait until the device has done it."""

    def whole() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return whole
