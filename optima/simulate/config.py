"""The options of the simulation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SimulateConfig:
    """Which policies meet which worlds, and how often.

    Attributes:
        policies: Names of policies, each with changed hyper-parameters after a colon, as in
            "discounted_thompson:gamma=0.99,nu=0.5"; null takes all.
        environments: Worlds to run them in: abrupt, sine, distil_a, distil_b, distil_c, company; null takes all.
        modules: Number of modules K.
        arms: Whether an arm is one module or any non-empty set of modules, among which a round's work is then divided.
            Policies that keep a belief a module (linear_thompson) have a strength for each in any case.
        rounds: Number of rounds T.
        seeds: Independent worlds, run as one batch.
        early_round: Number of rounds after which the share of the gap closed is told.
        seed: Seed of worlds, noise and policies; the same numbers give the same table.
        device: Where the bandits live, such as "cpu" or "cuda".
        output: Directory for regret.png, choices.png and simulation.json; what is there from before is replaced. null
            writes nothing.
    """

    policies: list[str] | None = None
    environments: list[str] | None = None
    modules: int = 7
    arms: Literal["modules", "subsets"] = "modules"
    rounds: int = 2000
    seeds: int = 512
    early_round: int = 500
    seed: int = 0
    device: str = "cpu"
    output: Path | None = Path("runs/simulate")
