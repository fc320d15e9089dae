"""The command line: `python -m optima.run [COMMAND] [OPTIONS]`.

A command is a dataclass of options and a function that takes it; `COMMANDS` lists them. Mistakes end in one line on
standard error and exit status 2.
"""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from optima.command_line import Command, parse
from optima.commands.plan import PlanConfig, plan
from optima.compare import CompareConfig, compare
from optima.data.config import PrepareConfig
from optima.data.prepare import prepare
from optima.distill import DistillConfig, distill
from optima.doctor import DoctorConfig, doctor
from optima.evaluate import EvaluateConfig, run_evaluate
from optima.exchange import ExportConfig, ImportConfig, run_export, run_import
from optima.finetune import FinetuneConfig, run_finetune
from optima.interruption import terminate_as_interrupt
from optima.pretrain import PretrainConfig, pretrain
from optima.report import write_comparison, write_report
from optima.simulate import SimulateConfig, simulate
from optima.use import AnswerConfig, CaptionConfig, run_answer, run_caption
from optima_core.errors import OptimaError
from optima_core.processes import leave, several, speaks


@dataclass(frozen=True)
class ReportConfig:
    """Writes report.html anew, or one page that sets several runs side by side.

    Attributes:
        run: Run directory of a finished distillation, or several: `report runs/a runs/b`.
        output: The page to write; of one run it is report.html in its directory, of several side_by_side.html here.
    """

    run: list[Path]
    output: Path | None = None

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run must name one run directory or more: `report runs/distill`")


def run_distill(config: DistillConfig) -> None:
    """Distils, then prints the scores."""
    summary = distill(config)
    if not summary:
        return
    table = Table(title=f"{config.task}, {summary['test_items']} test items", title_justify="left", header_style="bold")
    table.add_column("score, %")
    for heading in ("teacher", "student before", "student after"):
        table.add_column(heading, justify="right")
    scores = summary["scores"]
    for name in scores["teacher"]:
        table.add_row(name, *(f"{scores[model][name]:.1f}" for model in ("teacher", "before", "after")))
    sizes = summary["parameters"]
    table.add_row(
        "parameters, M",
        *(f"{sizes[model] / 1e6:.2f}" for model in ("teacher", "student", "student")),
    )
    Console().print(table)
    left = f"Report: {config.run / 'report.html'}" if config.report else f"Run: {config.run}"
    Console().print(
        f"{summary['seconds']:.0f} s, peak memory {summary['peak_mib']:.0f} MiB. {left}",
        highlight=False,
        soft_wrap=True,
    )


def run_pretrain(config: PretrainConfig) -> None:
    """Trains a model from scratch."""
    print(f"wrote {pretrain(config, lambda line: print(line, flush=True))}")


def run_report(config: ReportConfig) -> None:
    """Renders the report of one run, or of several."""
    if len(config.run) > 1:
        page = write_comparison(config.run, config.output or Path("side_by_side.html"))
    else:
        page = write_report(config.run[0], config.output)
    print(f"wrote {page}")


def run_simulate(config: SimulateConfig) -> None:
    """Compares policies."""
    simulate(config)


def run_prepare(config: PrepareConfig) -> None:
    """Checks and packs a data set."""
    prepare(config)


COMMANDS = {
    "distill": Command("Distil a teacher into a student on one task.", DistillConfig, run_distill),
    "pretrain": Command("Train a CoCa from scratch on pictograms.", PretrainConfig, run_pretrain),
    "finetune": Command("Train a CoCa on one task, to be its teacher.", FinetuneConfig, run_finetune),
    "evaluate": Command("Score a model on a held-out split.", EvaluateConfig, run_evaluate),
    "import": Command("Read an open_clip CoCa checkpoint.", ImportConfig, run_import),
    "export": Command("Write a model for other programs: open_clip, ONNX, torch.export.", ExportConfig, run_export),
    "compare": Command("Compare ways of choosing the module, over tasks and seeds.", CompareConfig, compare),
    "caption": Command("Caption pictures with a run's student.", CaptionConfig, run_caption, bare="picture"),
    "answer": Command("Answer a text about a picture with a run's student.", AnswerConfig, run_answer, bare="picture"),
    "report": Command(
        "Write a finished run's report.html anew, or several runs side by side.", ReportConfig, run_report, bare="run"
    ),
    "simulate": Command("Compare bandit policies in simulated environments.", SimulateConfig, run_simulate),
    "prepare": Command("Check a data set's files and pack them into tar shards.", PrepareConfig, run_prepare),
    "plan": Command("Say what a distillation will need, before a GPU is rented.", PlanConfig, plan),
    "doctor": Command("Say what this machine offers and what will be used of it.", DoctorConfig, doctor),
}
DEFAULT = "distill"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 2 after a mistake, 130 when stopped by Ctrl-C or SIGTERM."""
    resumable = False
    try:
        with terminate_as_interrupt(), _warnings_in_a_line():
            command, config = parse(sys.argv[1:] if arguments is None else arguments, COMMANDS, DEFAULT)
            resumable = hasattr(config, "resume") and not isinstance(config, PlanConfig)
            command.run(config)
    except BrokenPipeError:
        # The reader of a pipe has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OptimaError, ValueError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}")
    except KeyboardInterrupt:
        _complain("stopped; continue with the same command and --resume" if resumable else "stopped")
        return 130
    return 0


def _complain(message: str) -> int:
    if several():
        # A process that ends makes torchrun end the others, which may have something to tell.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if speaks():
        print(f"optima: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Shows a warning without the line of code that gave it."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"optima: warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


if __name__ == "__main__":
    exit_status = main()
    if several():
        leave(exit_status)
    sys.exit(exit_status)
