"""Ways of choosing what to distil: the options in which each one's runs differ from the settings that all share."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optima.coca import MODULES
from optima.commands.distill_hf.config import DistillHfConfig

Options = Mapping[str, Any]
"""Option of a run -> its value."""

_NO_LAYERS = {"engine.objective.hidden": 0.0, "engine.objective.attention": 0.0}


def _policy(name: str, **options: float) -> dict[str, Any]:
    return {"engine.bandit.policy": name, "engine.bandit.options": options, "engine.bandit.arms": None}


def _at(weight: float) -> dict[str, Any]:
    return {"engine.balance": "none", "engine.objective.hidden": weight, "engine.objective.attention": weight}


def methods_of(modules: Sequence[str]) -> dict[str, Options]:
    """Method -> options, for models of any modules; those that choose among modules, where there are several."""
    found: dict[str, Options] = {
        "task_loss": {"engine.objective.logits": 0.0, **_NO_LAYERS},
        "task_loss_and_logits": _NO_LAYERS,
        **{f"all_modules_at_{weight}": _policy("all_modules") | _at(weight) for weight in (10, 30, 100)},
    }
    if len(modules) > 1:
        found |= {f"only_{module}": _policy("fixed_arm", arm=arm) for arm, module in enumerate(modules)}
        found |= {
            "round_robin": _policy("round_robin"),
            "uniform_subset": _policy("uniform") | {"engine.bandit.arms": "subsets"},
        }
    return found | {"linear_thompson": _policy("linear_thompson"), "optima": {}}


def _subset(*modules: str) -> dict[str, Any]:
    arm = sum(1 << MODULES.index(module) for module in modules) - 1
    return _policy("fixed_arm", arm=arm) | {"engine.bandit.arms": "subsets"}


METHODS = methods_of(MODULES) | {
    "all_modules_evenly": {"engine.strength_first": 1.0, "engine.strength_last": 1.0},
    "all_modules_at_3": _policy("all_modules") | _at(3),
    "image_and_text": _subset("image_encoder", "text_decoder"),
    "image_and_multimodal": _subset("image_encoder", "multimodal_decoder"),
    "image_and_multimodal_at_30": _subset("image_encoder", "multimodal_decoder") | _at(30),
    "text_and_multimodal": _subset("text_decoder", "multimodal_decoder"),
    "uniform": _policy("uniform"),
    "discounted_ucb": _policy("discounted_ucb"),
    "discounted_thompson": _policy("discounted_thompson"),
}
"""Those of CoCa."""


def methods_of_models(config: DistillHfConfig) -> dict[str, Options]:
    """The methods that a distillation of models of transformers has, by their configurations alone.

    Raises OptimaError if transformers is not installed, or a configuration cannot be read.
    """
    from optima.commands.distill_hf.batches import is_labelled
    from optima.commands.distill_hf.models import make_empty, require_transformers

    require_transformers()
    from optima_core.integrations.huggingface import find_modules

    teacher, student = make_empty(config.teacher, "teacher"), make_empty(config.student, "student")
    theirs = find_modules(teacher)
    found = methods_of(config.modules or [name for name in find_modules(student) if name in theirs])
    if not is_labelled(student):
        del found["task_loss"]
        if student.base_model is student:  # nor has it a head
            del found["task_loss_and_logits"]
    return found


def option_words(options: Options) -> list[str]:
    """The options as words of a command line."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words
