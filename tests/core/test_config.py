"""Options are checked when a configuration is made, without torch, and messages say which option it is."""

import math
import subprocess
import sys
from typing import Any

import pytest

import optima_core
from optima_core import BanditConfig, DistillerConfig, ObjectiveConfig, OptimiserConfig, RewardConfig


@pytest.mark.parametrize(
    ("config", "options", "complaint"),
    [
        (ObjectiveConfig, {"task": -1.0}, "objective.task, a weight, must be a finite number of at least 0, got -1.0"),
        (ObjectiveConfig, {"hidden": math.inf}, "objective.hidden, a weight"),
        (ObjectiveConfig, {"attention": math.nan}, "objective.attention, a weight"),
        (ObjectiveConfig, {"temperature": 0.0}, "objective.temperature must be a finite number above 0, got 0.0"),
        (
            ObjectiveConfig,
            {"divergence": "backward"},
            "objective.divergence must be one of 'forward', ",
        ),
        (ObjectiveConfig, {"normalize": "rms"}, "objective.normalize must be one of 'layernorm', 'l2', got 'rms'"),
        (ObjectiveConfig, {"attention_heads": "relation"}, "objective.relation_heads must be given with"),
        (ObjectiveConfig, {"relation_heads": 4}, "objective.relation_heads must be given with"),
        (OptimiserConfig, {"learning_rate": -1.0}, "optimiser.learning_rate must be a number from 0 to inf, got -1.0"),
        (OptimiserConfig, {"learning_rate": math.nan}, "optimiser.learning_rate"),
        (OptimiserConfig, {"warmup": 1.5}, "optimiser.warmup must be a number from 0 to 1, got 1.5"),
        (OptimiserConfig, {"beta1": 2.0}, "optimiser.beta1"),
        (OptimiserConfig, {"clip": -1.0}, "optimiser.clip"),
        (RewardConfig, {"source": "prob"}, "reward.source must be one of 'probe', 'training', got 'prob'"),
        (RewardConfig, {"kind": "relativ"}, "reward.kind must be one of 'relative', 'absolute', got 'relativ'"),
        (RewardConfig, {"normaliser": "rank"}, "reward.normaliser must be one of"),
        (RewardConfig, {"floor": -1.0}, "reward.floor must be"),
        (RewardConfig, {"clip": 0}, "reward.clip must be positive, got 0"),
        (RewardConfig, {"gamma": 1.5}, "reward.gamma must be in (0, 1], got 1.5"),
        (RewardConfig, {"window": 0}, "reward.window must be at least 1 round, got 0"),
        (RewardConfig, {"smoothing": 1.0}, "reward.smoothing must be in [0, 1), got 1.0"),
        (BanditConfig, {"policy": "discounted_tompson"}, "bandit.policy: unknown policy 'discounted_tompson'; did you"),
        (BanditConfig, {"arms": "pairs"}, "bandit.arms must be 'modules', 'subsets' or 'strengths', got 'pairs'"),
        (BanditConfig, {"gamma": 0.2}, "bandit.gamma must be a number in [0.5, 1], got 0.2"),
        (BanditConfig, {"min_share": 2.0}, "bandit.min_share must be a number in [0, 1], got 2.0"),
        (
            BanditConfig,
            {"options": {"gama": 0.9}},
            "bandit.options.gama is no hyper-parameter of disc",
        ),
        (BanditConfig, {"options": {"nu": -1.0}}, "bandit.options.nu must be a number in [0, 100], got -1.0"),
        (DistillerConfig, {"rounds": 0}, "rounds must be at least 1, got 0"),
        (DistillerConfig, {"steps_per_round": 0}, "steps_per_round must be at least 1, got 0"),
        (DistillerConfig, {"accumulate": 0}, "accumulate must be at least 1, got 0"),
        (DistillerConfig, {"ema": -0.1}, "ema must be"),
        (DistillerConfig, {"ema": 1.0}, "ema must be"),
        (DistillerConfig, {"ema": math.nan}, "ema must be"),
    ],
)
def test_what_is_wrong_is_said_when_the_configuration_is_made(
    config: type[Any], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        config(**options)
    assert complaint in str(error.value)


def test_a_misspelt_option_of_a_policy_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'gamma'"):
        BanditConfig(options={"gama": 0.9})
    with pytest.raises(ValueError, match=r"did you mean 'discounted_thompson', .* or 'linear_thompson'"):
        BanditConfig("thomson")


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)


def test_configurations_and_the_door_of_the_command_line_import_no_torch() -> None:
    run(
        "import sys; from optima_core import BanditConfig, DistillerConfig, LossTerm, OptimaError; "
        "from optima_core.processes import several; from optima_core.bandit import CATALOGUE; "
        "DistillerConfig(bandit=BanditConfig('exp3s', options={'eta': 0.5})); "
        "assert 'torch' not in sys.modules"
    )


def test_importing_the_engine_does_not_import_torchs_compiler() -> None:
    run(
        "import sys, torch; before = 'torch._dynamo' in sys.modules; import optima_core.engine; "
        "assert ('torch._dynamo' in sys.modules) == before, 'torch._dynamo'"
    )


def test_every_public_name_is_there() -> None:
    for package in (optima_core, optima_core.bandit):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'Distillr'"):
            package.Distillr  # noqa: B018
