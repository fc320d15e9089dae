"""Distils a model of transformers, and writes a student that from_pretrained loads."""

import contextlib
import copy
import shlex
import sys
import time
from collections import defaultdict
from typing import Any

import torch

from optima.commands.console import make_console, make_table
from optima.commands.distill_hf.config import DistillHfConfig
from optima.commands.distill_hf.models import (
    load_model,
    load_processor,
    recompute_layers,
    require_transformers,
    with_adapters,
    write_student,
)
from optima.runs.config import told_in_a_line
from optima.runs.directory import CHECKPOINTS, RunDirectory, fingerprint, flat
from optima.runs.display import Tracked, make_display
from optima.runs.interruption import StopRequest
from optima.runs.memory import peak_mib
from optima.runs.reading import SUMMARY
from optima.runs.rows import MODELS, TRANSFORMERS, Round, Summary, plain
from optima.runs.summary import count_parameters, environment, layer_work
from optima.runs.tracking import make_trackers
from optima_core.checkpoint import CheckpointStore, Saved
from optima_core.engine import Distiller
from optima_core.errors import OptimaError
from optima_core.parallel import Ranks, join_ranks
from optima_core.stalls import StallWatch

STATE = {"distiller": dict, "config": str, "before": dict, "command": str, "seconds": float}
"""What a checkpoint holds: key -> type."""

Losses = dict[str, float]


def run_distill_hf(config: DistillHfConfig) -> None:
    """Distils, then prints the losses on held-out rows."""
    require_transformers()
    summary = distill_hf(config)
    if summary is None:
        return
    scores = summary.scores
    table = make_table("loss on held-out rows", *scores, title=f"{config.student} from {config.teacher}")
    for name in scores["before"]:
        table.add_row(name, *(f"{found[name]:.4f}" if name in found else "" for found in scores.values()))
    console = make_console()
    console.print(table)
    left = f" Report: {config.run / 'report.html'}" if config.report else ""
    console.print(f"Student: {config.run / 'student'}.{left}", soft_wrap=True)


def distill_hf(config: DistillHfConfig) -> Summary | None:
    """Runs the job and returns what summary.json holds; None on ranks other than the first, which write nothing."""
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with join_ranks(config.parallel, timeout=2 * config.patience) as ranks, contextlib.ExitStack() as stack:
        if config.batch_size % ranks.count:
            raise OptimaError(f"batch_size must be a multiple of the {ranks.count} ranks, got {config.batch_size}")
        directory = None
        if ranks.first:
            directory = stack.enter_context(RunDirectory(config.run, resume=config.resume, keep=config.keep))
        checkpoints = CheckpointStore(config.run / CHECKPOINTS, config.keep, ranks, asynchronous=True)
        stack.enter_context(contextlib.closing(checkpoints))
        saved = checkpoints.newest(STATE)
        if directory is not None and saved is not None:
            directory.refuse_other_run(config, saved.state["config"])
        processor = load_processor(config.teacher)
        teacher = load_model(config.teacher, "teacher").to(ranks.device).eval().requires_grad_(False)
        student = load_model(config.student, "student").to(ranks.device)
        sizes = {"teacher": count_parameters(teacher), "student": count_parameters(student)}
        batches = _make_batches(config, processor, student, ranks)
        if config.lora:
            student = with_adapters(student, config.lora)
        if config.recompute:
            recompute_layers(student)
        whole = copy.deepcopy(student) if ranks.sharded else None
        ranks.shard(teacher)
        watch = StallWatch(ranks, config.patience)
        with told_in_a_line():
            distiller = _make_distiller(config, student.train(), teacher, batches, watch)
        job = _Job(config, directory, checkpoints, distiller, batches, watch, started)
        rounds = job.train(saved)
        job.score()
        result = distiller.result if whole is None else distiller.gather_result(whole)
        return None if directory is None else job.finish(directory, result, processor, sizes, rounds)


def _make_batches(config: DistillHfConfig, processor: Any, student: Any, ranks: Ranks) -> Any:
    from optima.commands.distill_hf.batches import Batches
    from optima.commands.distill_hf.source import Rows, Source, Stream

    how: dict[str, Any] = {"held_every": config.held_every, "seed": config.seed}
    rows: Source
    if config.streaming:
        rows = Stream(config.data, held=max(config.held_rows, config.probe_size), **how)
    else:
        rows = Rows(config.data, least=config.batch_size, **how)
    return Batches(rows, processor, student, size=config.batch_size, max_length=config.max_length, ranks=ranks)


def _make_distiller(
    config: DistillHfConfig, student: Any, teacher: Any, batches: Any, watch: StallWatch
) -> Distiller[dict[str, Any]]:
    from optima_core.integrations.huggingface import TransformersAdaptor, TransformersForward, pair_modules

    ranks = watch.ranks
    ours, theirs = TransformersAdaptor(student), TransformersAdaptor(teacher)
    probe = _on(batches.probe(config.probe_size), ranks.device)
    pairs = pair_modules(ours, theirs, probe, names=config.modules or None, layer_map=config.layer_map)
    if ranks.first and not config.quiet:
        named = {pair.name for pair in pairs}
        print("\n".join(f"{module}" for name, module in ours.modules.items() if name in named), flush=True)

    def load(number: int) -> dict[str, Any]:
        return _on(batches.load(number), ranks.device)

    forwards = TransformersForward(ours), TransformersForward(theirs)
    watched = watch.loading(load, config.engine.accumulate)
    return Distiller(student, *forwards, pairs, watched, probe, config.engine, config.seed, ranks)


class _Job:
    """One distillation, as one of its ranks sees it; only the first has a directory."""

    def __init__(
        self,
        config: DistillHfConfig,
        directory: RunDirectory | None,
        checkpoints: CheckpointStore,
        distiller: Distiller[dict[str, Any]],
        batches: Any,
        watch: StallWatch,
        started: float,
    ) -> None:
        self.config, self.directory, self.checkpoints = config, directory, checkpoints
        self.distiller, self.batches, self.watch = distiller, batches, watch
        self.started = started
        self.seconds = 0.0
        """Those of earlier parts of the run."""
        self.command = "optima " + shlex.join(sys.argv[1:])
        self.scores: dict[str, Losses] = {}
        """On held rows, by model."""

    def train(self, saved: Saved | None) -> list[Round]:
        """Runs the rounds that are left, and returns all of the run."""
        config, distiller, directory = self.config, self.distiller, self.directory
        ranks = distiller.ranks
        if saved is None:
            self.scores["before"], _ = self._losses()
        else:
            distiller.restore(saved.part("distiller"))
            state = saved.state
            self.scores["before"], self.command, self.seconds = state["before"], state["command"], state["seconds"]
        rounds, done = config.engine.rounds, list[Round]()
        names = distiller.arm_names[: distiller.policy.arms]
        display = make_display(names, rounds, distiller.round, config.quiet or not ranks.first)
        if directory is not None:
            directory.write_config(config)
            done = directory.rounds(distiller.round)
            display = Tracked(display, make_trackers(config.track, directory.path, distiller.step, flat(plain(config))))
        with StopRequest() as stop, self.watch, contextlib.closing(display):
            while distiller.round < rounds:
                record = distiller.run_round()
                display.round(record)
                if directory is not None:
                    done.append(Round.of(record, self._spent()))
                    directory.append_round(done[-1])
                stopping = ranks.any(stop.made)
                if record.round % config.checkpoint_every == 0 or record.round == rounds or stopping:
                    self._save()
                if stopping:
                    self.checkpoints.wait()
                    raise KeyboardInterrupt
            self.checkpoints.tidy()
        return done

    def score(self) -> None:
        """Measures the student after, and the teacher, whose distance from itself is 0. All ranks must call this."""
        self.scores["after"], own = self._losses()
        self.scores["teacher"] = dict.fromkeys(self.scores["after"], 0.0) | own

    def finish(
        self, directory: RunDirectory, student: Any, processor: Any, sizes: dict[str, int], rounds: list[Round]
    ) -> Summary:
        """Writes the student, and what the report is drawn from."""
        from optima.commands.distill_hf.card import model_card

        config = self.config
        summary = Summary(
            task=TRANSFORMERS,
            scores={model: self.scores[model] for model in MODELS},
            headline_metric=next(iter(self.scores["after"])),
            parameters=sizes,
            images_per_second={},
            test_items=min(config.held_rows or self.batches.held, self.batches.held),
            seconds=self._spent(),
            peak_mib=peak_mib(),
            command=self.command,
            environment=environment(self.distiller.device),
            layer_work=layer_work(rounds),
            losses=True,
            scored_on="held-out rows",
        )
        card = model_card(config, summary)
        write_student(student, processor, directory.path / "student", card, config.push_to_hub)
        directory.write_json(SUMMARY, summary)
        if config.report and rounds:
            from optima.report import write_report  # what draws takes a second to load, which no run should wait for

            write_report(directory.path)
        return summary

    def _losses(self) -> tuple[Losses, Losses]:
        """The student's own loss, and how far it is from the teacher, a module as the mean over its layers; and the
        teacher's own loss, if it has one. Means over held rows, all of which all ranks see.
        """
        training, device = self.distiller.training, self.distiller.device
        students, teachers = _Mean(), _Mean()
        for given, size in self.batches.held_batches(self.config.held_rows):
            batch = _on(given, device)
            taught = training.teach(batch, training.names)
            found: dict[str, list[float]] = defaultdict(list)
            for name, value in training.measure(batch, taught).named().items():
                found["/".join(name.split("/")[:2])].append(value)
            students.add({name: sum(values) / len(values) for name, values in found.items()}, size)
            teachers.add({} if taught.task_loss is None else {"task": float(taught.task_loss)}, size)
        return students.values(), teachers.values()

    def _spent(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _save(self) -> None:
        state = {
            "distiller": self.distiller.state_dict(),
            "config": fingerprint(self.config),
            "before": self.scores["before"],
            "command": self.command,
            "seconds": self._spent(),
        }
        self.watch.at(f"saves step {self.distiller.step}")
        self.checkpoints.save(self.distiller.step, state)


class _Mean:
    """The mean of losses over rows, from batches of unequal sizes."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = defaultdict(float)
        self._rows = 0

    def add(self, losses: Losses, rows: int) -> None:
        self._rows += rows
        for name, value in losses.items():
            self._totals[name] += rows * value

    def values(self) -> Losses:
        return {name: total / self._rows for name, total in self._totals.items()}


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
