"""The simulation as the command line runs it: progress, table, plots, and the numbers as JSON."""

import io
import json
from dataclasses import asdict, replace

import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from optima.simulate.config import SimulateConfig
from optima.simulate.environments import ENVIRONMENTS
from optima.simulate.plots import plot_choices, plot_regret
from optima.simulate.run import Trial, run_trial
from optima.simulate.table import gap_table, regret_table
from optima_core.bandit import POLICIES, ArmKind, Policy, count_arms, make_policy
from optima_core.bandit.catalogue import FACTORED
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError


def simulate(config: SimulateConfig, console: Console | None = None) -> dict[str, Trial]:
    """Run the simulation, print its tables, write its files, and return the trial of each environment.

    Raises:
        OptimaError: a policy, hyper-parameter, environment or number is not valid, or `output` cannot be written.
    """
    console = console or Console()
    if config.policies is None:
        config = replace(config, policies=list(POLICIES))
    if config.environments is None:
        config = replace(config, environments=list(ENVIRONMENTS))
    policies = _make_policies(config)
    _check(config)
    if config.output is not None:
        try:
            config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptimaError(f"output {config.output} cannot be made a directory: {error.strerror}") from error

    trials: dict[str, Trial] = {}
    with Progress(console=console, transient=True) as progress:
        for name in config.environments or ():
            task = progress.add_task(f"{name}, {len(policies)} policies", total=config.rounds)
            trials[name] = run_trial(
                ENVIRONMENTS[name](config.modules, config.rounds),
                list(policies.values()),
                [_kind(description, config) for description in policies],
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
        for name, figure in (("regret", plot_regret(names, trials)), ("choices", plot_choices(names, trials))):
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png")
            write_atomically(config.output / f"{name}.png", drawn.getvalue())
        numbers = json.dumps(_summary(config, names, trials), indent=2) + "\n"
        write_atomically(config.output / "simulation.json", numbers.encode())
        console.print(f"Plots and numbers: {config.output}", markup=False, highlight=False, soft_wrap=True)
    return trials


def _make_policies(config: SimulateConfig) -> dict[str, Policy]:
    policies = {}
    for description in config.policies or ():
        name, _, changes = description.partition(":")
        pairs = [change.partition("=") for change in changes.split(",") if change]
        hyper_parameters = {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
        for key, value in hyper_parameters.items():
            if not isinstance(value, int | float):
                raise OptimaError(f"policies: {key} of {name} must be a number, as in {name}:{key}=0.5; got {value!r}")
        try:
            arms = count_arms(config.modules, _kind(description, config))
            policies[description] = make_policy(name, arms, **hyper_parameters)
        except ValueError as error:
            raise OptimaError(f"policies: {error}") from error
    return policies


def _kind(description: str, config: SimulateConfig) -> ArmKind:
    """What the arms of a policy stand for; those that keep a belief a module know strengths alone."""
    return "strengths" if description.partition(":")[0] in FACTORED else config.arms


def _check(config: SimulateConfig) -> None:
    if not config.policies:
        raise OptimaError(f"policies is empty; name some of {', '.join(POLICIES)}")
    for name in config.environments or ():
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
