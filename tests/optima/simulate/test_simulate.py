import io
import json

import pytest
import torch
from rich.console import Console

from optima.simulate.config import SimulateConfig
from optima.simulate.environments import ENVIRONMENTS
from optima.simulate.run import run_trial
from optima.simulate.simulate import simulate
from optima_core.bandit import count_arms, make_policy
from optima_core.errors import OptimaError


def test_default_policy_meets_its_bars_on_fewer_seeds(seed):
    """The bars of the full run (bench/BANDITS.md) are 110 and 0.8; with 24 seeds the standard errors are 4 and 0.02."""
    policies = [make_policy("discounted_thompson", arms=7)]
    abrupt = run_trial(ENVIRONMENTS["abrupt"](7, 2000), policies, seeds=24, seed=seed)
    assert abrupt.final_regret[0].mean() < 130
    distil = run_trial(ENVIRONMENTS["distil_a"](7, 500), policies, seeds=24, seed=seed)
    assert distil.early_gap_closed[0] > 0.7


def test_uniform_regret_is_known_in_expectation(seed):
    """The largest of K means from U[0, 1] is K / (K + 1) on average; uniform choice loses that less 1/2 a round."""
    trial = run_trial(ENVIRONMENTS["abrupt"](4, 100), [make_policy("all_modules", arms=4)], seeds=4000, seed=seed)
    error = trial.final_regret_error[0].item()
    assert trial.final_regret.mean().item() == pytest.approx(100 * (4 / 5 - 1 / 2), abs=6 * error)
    assert trial.early_gap_closed.abs().item() < 1e-9


def test_fixed_arm_on_the_best_module_has_no_regret(seed):
    policies = [make_policy("fixed_arm", arms=3, arm=arm) for arm in range(3)]
    trial = run_trial(ENVIRONMENTS["abrupt"](3, 5), policies, seeds=50, seed=seed)
    ranks = trial.choices[:, 0].sum(dim=0)
    # In every world each module has one rank, so three fixed arms cover each rank once.
    assert torch.allclose(ranks, torch.ones(3, dtype=ranks.dtype))
    assert (trial.final_regret >= 0).all()
    assert (trial.regret[:, 1:] >= trial.regret[:, :-1]).all()


def test_policies_meet_the_same_noise_whoever_else_runs(seed):
    policy, other = make_policy("discounted_ucb", arms=3), make_policy("uniform", arms=3)
    environment = ENVIRONMENTS["distil_c"](3, 60)
    alone = run_trial(environment, [policy], seeds=8, seed=seed)
    beside = run_trial(environment, [other, policy], seeds=8, seed=seed)
    assert torch.equal(alone.final_regret[0], beside.final_regret[1])


def test_arms_may_be_sets_of_modules(seed):
    names = ("discounted_thompson", "all_modules", "round_robin")
    policies = [make_policy(name, arms=count_arms(3, "subsets")) for name in names]
    trial = run_trial(ENVIRONMENTS["sine"](3, 200), policies, ["subsets"] * len(policies), seeds=16, seed=seed)
    assert torch.allclose(trial.choices.sum(dim=-1), torch.ones((), dtype=torch.float64))
    assert trial.final_regret[0].mean() < trial.final_regret[1].mean()


def test_simulation_prints_tables_and_writes_plots_and_numbers(tmp_path):
    printed = io.StringIO()
    config = SimulateConfig(
        policies=["discounted_thompson", "discounted_thompson:gamma=0.9,nu=0.5", "uniform"],
        environments=["abrupt", "distil_b"],
        modules=3,
        rounds=30,
        seeds=4,
        early_round=10,
        output=tmp_path / "new" / "directory",
    )
    trials = simulate(config, Console(file=printed, width=100))
    assert list(trials) == ["abrupt", "distil_b"]
    text = printed.getvalue()
    assert "Regret after 30 rounds" in text
    assert "closed by round 10" in text
    assert "gamma=0.9,nu=0.5" in text
    for image in ("regret.png", "choices.png"):
        assert (config.output / image).read_bytes().startswith(b"\x89PNG")
    results = json.loads((config.output / "simulation.json").read_text())["results"]
    assert results["abrupt"]["uniform"]["regret"] == trials["abrupt"].final_regret[2].mean().item()


def test_the_same_seed_gives_the_same_regret():
    config = SimulateConfig(policies=["exp3s"], environments=["sine"], rounds=20, seeds=3, output=None)
    first, second = (simulate(config, Console(file=io.StringIO()))["sine"].final_regret for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ["unifrom"]}, "policies: unknown policy 'unifrom'; did you mean 'uniform'"),
        ({"policies": ["discounted_thompson:gamma"]}, "gamma of discounted_thompson must be a number"),
        ({"policies": ["discounted_thompson:gamma=2"]}, "gamma must be a number in"),
        ({"policies": []}, "policies is empty"),
        ({"environments": ["cosine"]}, "environments: unknown 'cosine'; known: abrupt"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"modules": 0}, "modules must be at least 1, got 0"),
        ({"modules": 13, "arms": "subsets"}, "at most 12 modules"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
    ],
)
def test_mistake_is_one_line(changes, message):
    with pytest.raises(OptimaError, match=message) as caught:
        simulate(SimulateConfig(output=None, **changes))
    assert "\n" not in str(caught.value)


def test_output_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OptimaError, match="cannot be made a directory"):
        simulate(SimulateConfig(rounds=1, output=tmp_path / "taken"))
