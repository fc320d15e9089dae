"""Whether the bandit is worth it: ways of choosing what to distil, at equal steps, from the same start, over seeds."""

from optima.commands.compare.methods import METHODS, methods_of_models
from optima.commands.compare.runs import Asked, Comparison, run_comparison
from optima.commands.distill_hf.config import CompareHfConfig
from optima.commands.options import CompareConfig
from optima.data.records import FORMATS
from optima.runs.rows import TRANSFORMERS
from optima.task import TASKS, Task
from optima_core.errors import OptimaError

__all__ = ["compare", "compare_hf"]


def compare(config: CompareConfig) -> None:
    """Runs what is missing, prints a table a task, and writes comparison.html and comparison.md."""
    asked = Asked(tuple(_served(config)), tuple(config.method), config.seeds, config.split)
    run_comparison(Comparison(config.run, asked, "distill", config.distill, METHODS, config.jobs))


def compare_hf(config: CompareHfConfig) -> None:
    """The same of models of transformers, whose held-out losses are compared."""
    methods = methods_of_models(config.distill)
    for method in config.method:
        if method not in methods:
            raise OptimaError(f"method must be among {', '.join(methods)}, got {method}")
    asked = Asked((TRANSFORMERS,), tuple(config.method or methods), config.seeds, "held-out rows")
    run_comparison(Comparison(config.run, asked, "distill_hf", config.distill, methods, config.jobs))


def _served(config: CompareConfig) -> list[Task]:
    """The tasks to compare on: of all four, which are the default, a data set other than pictograms serves one."""
    name = config.distill.data.name
    if name == "pictograms":
        return config.task
    served = FORMATS[name].task
    if set(config.task) not in ({served}, set(TASKS)):
        raise OptimaError(f"data {name} serves task {served}, not {', '.join(config.task)}; give --task {served}")
    return [served]
