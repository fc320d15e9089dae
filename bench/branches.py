"""Does a reward tell early which modules will have been right? `python -m bench.branches --seeds 100 --out FILE`.

One run distils all modules. At some of its rounds it branches: from the same state every set of modules is distilled to
the end of the run, on the same batches, and scored. Each branch is a line of the file. `--table FILE` then tells, for
each reward and horizon, how the branches of a state rank by reward and by final score: Spearman's correlation, a mean
over states with its 95 % interval, and how far the score of the branch that the reward likes best is from the best.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.lockstep import Lockstep, add_arguments
from optima.coca import MODULES
from optima.report.intervals import mean_interval
from optima.runs.rows import plain
from optima.tasks.batches import TaskBatch
from optima_core import Distiller, RoundRecord

SETS = {
    "+".join(name for i, name in enumerate(MODULES) if arm + 1 >> i & 1): arm for arm in range(2 ** len(MODULES) - 1)
}
"""The sets of modules by their arms."""

Rounds = Sequence[Mapping[str, Any]]
"""The records of a branch, the trunk's round before it first."""


def run(task: str, seed: int, settings: argparse.Namespace) -> None:
    """Trunk and branches of a task and a seed."""
    lockstep = Lockstep(task, seed, settings)
    trunk = lockstep.distiller([])
    branches: dict[tuple[int, str], Distiller[TaskBatch]] = {}
    records: dict[tuple[int, str], list[RoundRecord]] = {}
    last: list[RoundRecord] = []
    for number in range(settings.rounds):
        if number in settings.at:
            for modules, arm in SETS.items():
                branches[number, modules] = _branch(lockstep, trunk, arm)
                records[number, modules] = list(last)
        found = lockstep.run_round([trunk, *branches.values()])
        last = found[:1]
        for key, record in zip(branches, found[1:], strict=True):
            records[key].append(record)
    for (at, modules), distiller in branches.items():
        score = lockstep.score(distiller)
        row = {"task": task, "seed": seed, "at": at, "modules": modules, "score": score, "split": settings.split}
        with open(settings.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"rounds": [plain(record) for record in records[at, modules]]}) + "\n")
        print(f"{task}  seed {seed}  from round {at}  {modules}: {score:.2f} %", flush=True)


def _branch(lockstep: Lockstep, trunk: Distiller[TaskBatch], arm: int) -> Distiller[TaskBatch]:
    """A run in the trunk's state that distils one set of modules from here on."""
    words = ["--engine.bandit.policy", "fixed_arm", "--engine.bandit.arms", "subsets"]
    branch = lockstep.distiller([*words, "--engine.bandit.options", json.dumps({"arm": arm})])
    own = {name: branch.state_dict()[name] for name in ("bandit", "pulls")}
    branch.load_state_dict(trunk.state_dict() | own)
    return branch


def _fall(kinds: Sequence[str], share: bool) -> Callable[[Rounds, int], float]:
    """How far the probe's losses of these kinds have fallen in the first rounds; as a logarithm if as a share."""

    def reward(rounds: Rounds, horizon: int) -> float:
        before, after = rounds[0]["probe"], rounds[horizon]["probe"]
        names = [name for name in before if name.split("/")[0] in kinds]
        if share:
            return math.fsum(math.log(before[name] / after[name]) for name in names) / len(names)
        return math.fsum(before[name] - after[name] for name in names)

    return reward


def _engine(rounds: Rounds, horizon: int) -> float:
    return math.fsum(record["reward"] for record in rounds[1 : horizon + 1])


def _agreement(rounds: Rounds, horizon: int) -> float:
    """The cosines of the gradients of what was distilled with that of the predictions, summed over parts."""
    return math.fsum(cosine for record in rounds[1 : horizon + 1] for cosine in record["agreement"].values())


REWARDS: dict[str, Callable[[Rounds, int], float]] = {
    "total loss": _fall(["task", "logits", "hidden", "attention"], share=False),
    "the engine's own": _engine,
    "layer losses, relative": _fall(["hidden", "attention"], share=True),
    "every loss, relative": _fall(["task", "logits", "hidden", "attention"], share=True),
    "held-out predictions": _fall(["task", "logits"], share=False),
    "held-out predictions, relative": _fall(["task", "logits"], share=True),
    "held-out logits, relative": _fall(["logits"], share=True),
    "agreement of gradients": _agreement,
}
"""Of a branch's records and a number of rounds. Less an expected curve they would rank a state's branches alike."""


def table(path: Path, horizons: Sequence[int] = (1, 2, 4, 8)) -> str:
    """The rewards of a file of branches, as Markdown."""
    states: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        states[row["task"], row["seed"], row["at"]].append(row)
    lines = [f"| reward | {' | '.join(f'{h} rounds' for h in horizons)} |", f"|---|{'---:|' * len(horizons)}"]
    for name, reward in REWARDS.items():
        lines.append(f"| {name} | {' | '.join(_judged(reward, h, list(states.values())) for h in horizons)} |")
    return "\n".join([*lines, "", f"{len(states)} states, {len(SETS)} branches each."])


def _judged(reward: Callable[[Rounds, int], float], horizon: int, states: Sequence[Sequence[dict[str, Any]]]) -> str:
    correlations, regrets = [], []
    for branches in states:
        rewards = [reward(branch["rounds"], horizon) for branch in branches]
        scores = [branch["score"] for branch in branches]
        correlations.append(spearman(rewards, scores))
        regrets.append(max(scores) - scores[rewards.index(max(rewards))])
    found = mean_interval(correlations)
    return f"{found.mean:+.2f} ± {found.half_width:.2f}; {math.fsum(regrets) / len(regrets):.1f}"


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """The correlation of ranks; equal values share the mean of theirs. 0 where one side does not vary."""
    varies = len(set(left)) > 1 and len(set(right)) > 1
    return statistics.correlation(_ranks(left), _ranks(right)) if varies else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(y < x for y in values) + (sum(y == x for y in values) - 1) / 2 for x in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.set_defaults(split="validation")
    parser.add_argument("--at", nargs="+", type=int, default=[2, 6, 12], help="rounds, from 0, before which to branch")
    parser.add_argument("--out", type=Path, default=Path("branches.jsonl"))
    settings, options = parser.parse_known_args()
    settings.options = options
    if settings.table:
        print(table(settings.table))
        return
    if min(settings.at) < 1 or max(settings.at) >= settings.rounds:
        parser.error(f"--at must be rounds from 1 to {settings.rounds - 1}, got {settings.at}")
    for seed in settings.seeds:
        for task in settings.tasks:
            run(task, seed, settings)


if __name__ == "__main__":
    main()
