"""The simulation as the command line runs it: progress, table, plots, and the numbers as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from optima.simulate.environments import ENVIRONMENTS
from optima.simulate.plots import plot_choices, plot_regret
from optima.simulate.run import Trial, run_trial
from optima.simulate.table import gap_table, regret_table
from optima_core.bandit import POLICIES, Policy, count_arms, make_policy
from optima_core.errors import OptimaError


@dataclass(frozen=True)
class SimulateConfig:
    """Which policies meet which worlds, and how often.

    Attributes:
        policies: Names of policies, each with changed hyper-parameters after a colon, as in
            "discounted_thompson:gamma=0.99,nu=0.5".
        environments: Worlds to run them in: abrupt, sine, distil_a, distil_b, distil_c.
        modules: Number of modules K.
        arms: Whether an arm is one module or any non-empty set of modules, among which a round's work is then divided.
        rounds: Number of rounds T.
        seeds: Independent worlds, run as one batch.
        early_round: Number of rounds after which the share of the gap closed is told.
        seed: Seed of worlds, noise and policies; the same numbers give the same table.
        device: Where the bandits live, such as "cpu" or "cuda".
        output: Directory for regret.png, choices.png and simulation.json; what is there from before is replaced. null
            writes nothing.
    """

    policies: list[str] = field(default_factory=lambda: list(POLICIES))
    environments: list[str] = field(default_factory=lambda: list(ENVIRONMENTS))
    modules: int = 7
    arms: Literal["modules", "subsets"] = "modules"
    rounds: int = 2000
    seeds: int = 512
    early_round: int = 500
    seed: int = 0
    device: str = "cpu"
    output: Path | None = Path("runs/simulate")


def simulate(config: SimulateConfig, console: Console | None = None) -> dict[str, Trial]:
    """Run the simulation, print its tables, write its files, and return the trial of each environment.

    Raises:
        OptimaError: a policy, hyper-parameter, environment or number is not valid, or `output` cannot be written.
    """
    console = console or Console()
    policies = _make_policies(config)
    _check(config)
    if config.output is not None:
        try:
            config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptimaError(f"output {config.output} cannot be made a directory: {error.strerror}") from error

    trials: dict[str, Trial] = {}
    with Progress(console=console, transient=True) as progress:
        for name in config.environments:
            task = progress.add_task(f"{name}, {len(policies)} policies", total=config.rounds)
            trials[name] = run_trial(
                ENVIRONMENTS[name](config.modules, config.rounds),
                list(policies.values()),
                arms=config.arms,
                seeds=config.seeds,
                seed=config.seed,
                early_round=config.early_round,
                device=config.device,
                on_round=lambda task=task: progress.advance(task),  # type: ignore[misc]
            )

    names = list(policies)
    console.print(regret_table(names, trials, config.rounds))
    console.print(gap_table(names, trials, min(config.early_round, config.rounds)))
    if config.output is not None:
        plot_regret(names, trials).savefig(config.output / "regret.png")
        plot_choices(names, trials).savefig(config.output / "choices.png")
        (config.output / "simulation.json").write_text(json.dumps(_summary(config, names, trials), indent=2) + "\n")
        console.print(f"Plots and numbers: {config.output}")
    return trials


def _make_policies(config: SimulateConfig) -> dict[str, Policy]:
    policies = {}
    for description in config.policies:
        name, _, changes = description.partition(":")
        pairs = [change.partition("=") for change in changes.split(",") if change]
        hyper_parameters = {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
        for key, value in hyper_parameters.items():
            if not isinstance(value, int | float):
                raise OptimaError(f"policies: {key} of {name} must be a number, as in {name}:{key}=0.5; got {value!r}")
        try:
            policies[description] = make_policy(name, count_arms(config.modules, config.arms), **hyper_parameters)
        except ValueError as error:
            raise OptimaError(f"policies: {error}") from error
    return policies


def _check(config: SimulateConfig) -> None:
    if not config.policies:
        raise OptimaError(f"policies is empty; name some of {', '.join(POLICIES)}")
    for name in config.environments:
        if name not in ENVIRONMENTS:
            raise OptimaError(f"environments: unknown {name!r}; known: {', '.join(ENVIRONMENTS)}")
    for least, number in ((1, "rounds"), (2, "seeds"), (1, "early_round"), (0, "seed")):
        if getattr(config, number) < least:
            raise OptimaError(f"{number} must be at least {least}, got {getattr(config, number)}")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise OptimaError(f"device {config.device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _summary(config: SimulateConfig, names: list[str], trials: dict[str, Trial]) -> dict[str, object]:
    results = {
        environment: {
            name: {
                "regret": trial.final_regret[i].mean().item(),
                "regret_standard_error": trial.final_regret_error[i].item(),
                "early_gap_closed": trial.early_gap_closed[i].item(),
                "early_gap_closed_standard_error": trial.early_gap_closed_error[i].item(),
            }
            for i, name in enumerate(names)
        }
        for environment, trial in trials.items()
    }
    return {"config": asdict(config) | {"output": str(config.output)}, "results": results}
