"""The commands: what each does in a line, and where its options and its work are, to be imported when it is called."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """A word after `optima`.

    options: "module:class" of its options, a dataclass. work: "module:function" that takes them. bare: the option, a
    list, that words without an option's name before them go to. recipes: the command whose recipes `--config` takes.
    resumes: whether `--resume` goes on with the run of a directory. matter: the options that `--help` shows, where
    there are too many to show all.
    """

    summary: str
    options: str
    work: str
    bare: str = ""
    recipes: str = ""
    resumes: bool = False
    matter: tuple[str, ...] = ()

    def config(self) -> type[Any]:
        """The class of its options."""
        found: type[Any] = _named(self.options)
        return found

    def function(self) -> Callable[[Any], None]:
        """What it does with them."""
        found: Callable[[Any], None] = _named(self.work)
        return found


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


_RUNS, _OPTIONS = "optima.runs.config:", "optima.commands.options:"
_HERE = "optima.commands."

_DATA = ("task", "data.name", "data.root", "run", "resume")
_TEACHING = (
    *_DATA, "teacher", "student", "batch_size", "engine.rounds", "engine.steps_per_round", "engine.bandit.policy",
    "engine.optimiser.learning_rate", "threads",
)  # fmt: skip

COMMANDS = {
    "distill": Command(
        "Distil a teacher into a student on one task.",
        _RUNS + "DistillConfig", _HERE + "distill:run_distill", recipes="distill", resumes=True,
        matter=_TEACHING,
    ),
    "distill_hf": Command(
        "Distil a model of transformers, layer by layer, on your texts and images.",
        _HERE + "distill_hf.config:DistillHfConfig", _HERE + "distill_hf.work:run_distill_hf", resumes=True,
        matter=(
            "teacher", "student", "data", "run", "resume", "modules", "batch_size", "engine.rounds",
            "engine.steps_per_round", "engine.bandit.policy", "engine.optimiser.learning_rate", "lora", "threads",
        ),
    ),
    "pretrain": Command(
        "Train a CoCa from scratch on pictograms.",
        _RUNS + "PretrainConfig", _HERE + "pretrain:run_pretrain", recipes="pretrain", resumes=True,
        matter=("run", "resume", "caption_steps", "task_steps", "images", "optimiser.learning_rate", "threads"),
    ),
    "finetune": Command(
        "Train a CoCa on one task, to be its teacher.",
        _RUNS + "FinetuneConfig", _HERE + "finetune:run_finetune", resumes=True,
        matter=("model", *_DATA, "steps", "batch_size", "optimiser.learning_rate", "threads"),
    ),
    "evaluate": Command(
        "Score a model on a held-out split.", _OPTIONS + "EvaluateConfig", _HERE + "evaluate:run_evaluate",
        matter=("model", "tasks", "data.name", "data.root", "split", "items", "batch_size", "predictions", "threads"),
    ),
    "import": Command(
        "Read an open_clip CoCa checkpoint.", _OPTIONS + "ImportConfig", _HERE + "exchange:run_import"
    ),
    "export": Command(
        "Write a model for other programs: open_clip, ONNX, torch.export.",
        _OPTIONS + "ExportConfig", _HERE + "exchange:run_export",
    ),
    "compare": Command(
        "Compare ways of choosing the module, over tasks and seeds.",
        _OPTIONS + "CompareConfig", _HERE + "compare:compare",
        matter=("run", "task", "method", "seeds", "split", "jobs", "distill.engine.rounds", "distill.threads"),
    ),
    "compare_hf": Command(
        "Compare ways of choosing the module, on models of transformers.",
        _HERE + "distill_hf.config:CompareHfConfig", _HERE + "compare:compare_hf",
        matter=(
            "run", "method", "seeds", "jobs", "distill.teacher", "distill.student", "distill.data",
            "distill.batch_size", "distill.engine.rounds", "distill.threads",
        ),
    ),
    "caption": Command(
        "Caption images with a run's student.",
        _OPTIONS + "CaptionConfig", _HERE + "use:run_caption", bare="image",
    ),
    "answer": Command(
        "Answer a text about an image with a run's student.",
        _OPTIONS + "AnswerConfig", _HERE + "use:run_answer", bare="image",
    ),
    "report": Command(
        "Write the page of a finished run or comparison anew, or several runs side by side.",
        _OPTIONS + "ReportConfig", _HERE + "report:run_report", bare="run",
    ),
    "watch": Command(
        "Serve the report of a run while it goes on, for a browser on this machine.",
        _OPTIONS + "WatchConfig", _HERE + "watch:run_watch", bare="run",
    ),
    "demo": Command(
        "Try a run's student beside its teacher, in a browser on this machine.",
        _OPTIONS + "DemoConfig", _HERE + "demo:run_demo", bare="run",
    ),
    "simulate": Command(
        "Compare bandit policies in simulated environments.",
        "optima.simulate.config:SimulateConfig", "optima.simulate.simulate:simulate",
    ),
    "prepare": Command(
        "Check a data set's files and pack them into tar shards.",
        "optima.data.config:PrepareConfig", _HERE + "prepare:prepare",
    ),
    "plan": Command(
        "Say what a distillation will need, before a GPU is rented.",
        _OPTIONS + "PlanConfig", _HERE + "plan:plan", recipes="distill",
        matter=(
            "teacher", "student", "batch_size", "stage", "chip", "gpus", "parallel", "shard_over", "memory",
            "utilisation", "json",
        ),
    ),
    "plan_hf": Command(
        "Say what a distillation of models of transformers will need.",
        _HERE + "distill_hf.config:PlanHfConfig", _HERE + "plan:plan_hf",
        matter=(
            "teacher", "student", "data", "modules", "batch_size", "max_length", "recompute", "lora", "chip", "memory",
            "utilisation", "json",
        ),
    ),
    "doctor": Command(
        "Say what this machine offers and what will be used of it.",
        _OPTIONS + "DoctorConfig", _HERE + "doctor:doctor",
    ),
}  # fmt: skip
DEFAULT = "distill"
"""The command of words that name none."""
