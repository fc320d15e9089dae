"""The main job: distils a CoCa teacher into a student on one task, scores both, and writes the run directory."""

import contextlib
import copy
import json
import shlex
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optima.assets import TEACHER
from optima.coca import CoCa
from optima.coca.checkpoint import load_coca, save_coca
from optima.coca.pairs import module_pairs
from optima.commands.console import make_console, make_table
from optima.commands.finetune import finetune_on
from optima.data.config import HELD
from optima.runs.confidence import usual_probability
from optima.runs.config import DistillConfig, FinetuneConfig, told_in_a_line
from optima.runs.directory import CHECKPOINTS, REJECTED, RunDirectory, fingerprint
from optima.runs.display import Display, Tracked, make_display
from optima.runs.interruption import StopRequest
from optima.runs.memory import peak_mib
from optima.runs.reading import CONFIG, SAMPLES, SUMMARY
from optima.runs.rows import Model, Round, Summary
from optima.runs.samples import write_cross_attention, write_samples
from optima.runs.start import find_start
from optima.runs.summary import count_parameters, environment, layer_work, measure_speed, score_models
from optima.runs.tracking import make_trackers
from optima.runs.words import refuse_other_words, write_words
from optima.tasks.batches import TaskBatch
from optima.tasks.choose import open_data
from optima.tasks.data import TaskData
from optima.tasks.evaluate import evaluate
from optima.tasks.fit import refuse_headless, refuse_misfit, refuse_unscorable
from optima.tasks.forward import TaskForward
from optima_core.checkpoint import CheckpointStore, Saved
from optima_core.compilation import compile_layers
from optima_core.config import OptimiserConfig
from optima_core.engine import Distiller
from optima_core.errors import OptimaError
from optima_core.parallel import Ranks, join_ranks
from optima_core.processes import several
from optima_core.recompute import recompute_activations
from optima_core.records import PendingRecord
from optima_core.stalls import StallWatch

SHOWN = 4
"""Captions that the end of a run shows, with what would be right in brackets."""

STATE = {"distiller": dict, "config": str, "learning_curve": list, "seconds": float, "command": str}
"""What a checkpoint holds: key -> type."""


@dataclass(frozen=True)
class _Job:
    """One distillation, as one of its ranks sees it; only the first has a directory."""

    config: DistillConfig
    ranks: Ranks
    directory: RunDirectory | None
    checkpoints: CheckpointStore
    watch: StallWatch
    data: TaskData
    teacher: Path
    started: float


@dataclass
class _Progress:
    """What a run has come to beside its weights; `seconds` and `command` are those of its earlier parts."""

    curve: list[dict[str, float]]
    rounds: list[Round]
    seconds: float
    command: str


def distill(config: DistillConfig) -> Summary | None:
    """Runs the job and returns what summary.json holds; None on ranks other than the first, which write nothing."""
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    # The watch, which can say which rank it was, comes before the time limit of the messages.
    joined = join_ranks(config.parallel, config.shard_over, 2 * config.patience)
    with joined as ranks, contextlib.ExitStack() as stack:
        if config.batch_size % ranks.count:
            raise OptimaError(f"batch_size must be a multiple of the {ranks.count} ranks, got {config.batch_size}")
        directory = None
        if ranks.first:
            directory = stack.enter_context(RunDirectory(config.run, resume=config.resume, keep=config.keep))
        checkpoints = CheckpointStore(config.run / CHECKPOINTS, config.keep, ranks, asynchronous=True)
        stack.enter_context(contextlib.closing(checkpoints))
        saved = checkpoints.newest(STATE)
        if directory is not None and saved is not None:
            _refuse_other_run(config, directory, saved.state)

        say = _sayer(config, speaks=ranks.first)
        say(f"task {config.task}, data {config.data.name}: reading the teacher and the data")
        teacher = load_coca(config.teacher or TEACHER).to(ranks.device).requires_grad_(False)
        data = open_data(
            config.data,
            config.task,
            teacher.config,
            seed=config.seed,
            device=ranks.device,
            rank=ranks.rank,
            world_size=ranks.count,
            rejected=config.run / REJECTED,
        )
        stack.enter_context(contextlib.closing(data))
        path = config.teacher or TEACHER
        if config.teach.steps:
            path = _taught(config, directory, data, teacher)
            teacher = load_coca(path).to(ranks.device).requires_grad_(False)
        watch = StallWatch(ranks, config.patience)
        return _distill(_Job(config, ranks, directory, checkpoints, watch, data, path, started), teacher, saved)


def _taught(config: DistillConfig, directory: RunDirectory | None, data: TaskData, teacher: CoCa) -> Path:
    """The weights of the teacher after it learnt the data, in the run's folder `teacher`; they are made once."""
    run = config.run / "teacher"
    weights = run / "model.safetensors"
    if (run / SUMMARY).exists():  # written last
        return weights
    if directory is None or several():
        raise OptimaError(
            "teach.steps needs a process of its own: run `optima finetune` first, and give what it writes as --teacher"
        )
    data.training_batch(0, config.teach.batch_size)  # what cannot be read is told before the run has begun
    directory.write_config(config)
    say = _sayer(config, "teacher: ")
    lesson = FinetuneConfig(
        model=config.teacher or TEACHER,
        task=config.task,
        data=config.data,
        run=run,
        steps=config.teach.steps,
        batch_size=config.teach.batch_size,
        optimiser=OptimiserConfig(learning_rate=config.teach.learning_rate),
        precision="fp32" if config.engine.precision == "fp32" else "bf16",
        evaluate_every=0,
        evaluate_batch=config.evaluate_batch,
        test_items=config.test_items,
        seed=config.seed,
        resume=(run / CONFIG).exists(),
    )
    device = teacher.logit_scale.device
    with RunDirectory(run, resume=lesson.resume, keep=1) as place:
        finetune_on(data, lesson, place, teacher.requires_grad_(True), device, say, time.monotonic())
    return weights


def _sayer(config: DistillConfig, prefix: str = "", speaks: bool = True) -> Callable[[str], None]:
    """What shows a line to a person who wants to see some, if this process is the one that speaks."""

    def say(line: str) -> None:
        if speaks and not config.quiet:
            print(prefix + line, flush=True)

    return say


def _distill(job: _Job, teacher: CoCa, saved: Saved | None) -> Summary | None:
    config, ranks = job.config, job.ranks
    _refuse_misfits(job.teacher, teacher, job.data)
    with told_in_a_line():
        student = find_start(config, teacher, job.data, job.directory, resumed=saved is not None).train()
    whole = copy.deepcopy(student) if ranks.sharded else None
    if config.recompute:
        recompute_activations(student.transformer_layers())
    if config.engine.compile and ranks.count > 1:
        compile_layers(teacher)
    ranks.shard(teacher)
    with told_in_a_line():
        distiller = _make_distiller(job, student, teacher)
    progress = _train(job, distiller, whole, saved)
    student = _result(distiller, whole)
    if ranks.sharded:
        teacher = load_coca(job.teacher).to(ranks.device)
    if job.directory is None:
        before = copy.deepcopy(student)  # to be filled by the first rank, whose directory holds it
    else:
        before = find_start(config, teacher, job.data, job.directory, resumed=True)
    ranks.align(before)
    return _finish(job, {"teacher": teacher, "before": before, "after": student}, progress)


def _refuse_misfits(path: Path, teacher: CoCa, data: TaskData) -> None:
    name = f"teacher {path}"
    refuse_other_words(path, data)
    refuse_misfit(teacher, name, data)
    refuse_headless(teacher, name, data)
    for split in HELD:
        refuse_unscorable(data, split)


def _refuse_other_run(config: DistillConfig, directory: RunDirectory, state: dict[str, Any]) -> None:
    """Raises OptimaError if the directory's run had other options, but for more rounds where that changes nothing."""
    saved, engine = json.loads(state["config"]), config.engine
    before = saved["engine.rounds"]
    if engine.rounds > before:
        asked = f"cannot resume {directory.path} for {engine.rounds} rounds in place of {before}"
        if engine.optimiser.schedule != "constant":
            raise OptimaError(
                f"{asked}: the learning rate follows a {engine.optimiser.schedule} over all rounds, so this is another "
                "run; give a new directory with --run (a run with --engine.optimiser.schedule constant can go on)"
            )
        if engine.balance == "gradient" and engine.strength_first != engine.strength_last:
            raise OptimaError(
                f"{asked}: the strength of layer losses goes from {engine.strength_first:g} to "
                f"{engine.strength_last:g} over all rounds, so this is another run; give a new directory with --run "
                "(a run with equal --engine.strength_first and --engine.strength_last can go on)"
            )
        warmup = engine.optimiser.warmup * engine.rounds * engine.steps_per_round
        if state["distiller"]["step"] < warmup:
            raise OptimaError(
                f"{asked}: the warm-up, a share of all steps, would be of {warmup:.0f} steps and has not ended; "
                "give a new directory with --run"
            )
        saved["engine.rounds"] = engine.rounds
    directory.refuse_other_run(config, json.dumps(saved))


def _make_distiller(job: _Job, student: CoCa, teacher: CoCa) -> Distiller[TaskBatch]:
    config, ranks = job.config, job.ranks

    def load(number: int) -> TaskBatch:
        return job.data.training_batch(number, config.batch_size // ranks.count)

    probe = job.data.probe_batch(config.probe_size)
    first, size = ranks.share(0, len(probe.tokens))
    return Distiller(
        student,
        TaskForward(student, config.task),
        TaskForward(teacher, config.task),
        module_pairs(student, teacher, config.layer_map, config.single_layer_maps),
        job.watch.loading(load, config.engine.accumulate),
        TaskBatch(*(part[first : first + size] for part in probe)),
        config.engine,
        config.seed,
        ranks,
    )


def _train(job: _Job, distiller: Distiller[TaskBatch], whole: CoCa | None, saved: Saved | None) -> _Progress:
    """Runs the rounds that are left."""
    config, ranks, directory = job.config, job.ranks, job.directory
    progress = _Progress([], [], 0.0, "optima " + shlex.join(sys.argv[1:]))
    if saved is not None:
        state = saved.state
        progress = _Progress([*state["learning_curve"]], [], state["seconds"], state["command"])
        distiller.restore(saved.part("distiller"))
    scored = bool(progress.curve)
    rounds = config.engine.rounds
    names = distiller.arm_names[: distiller.policy.arms]
    display = make_display(names, rounds, distiller.round, config.quiet or not ranks.first)
    if directory is not None:
        directory.write_config(config)
        progress.rounds = directory.rounds(distiller.round)
        if config.tensorboard:
            display = Tracked(display, make_trackers(["tensorboard"], directory.path, distiller.step, {}))
    started = time.monotonic()
    with StopRequest() as stop, job.watch, contextlib.closing(display):
        if saved is not None:
            display.note(f"resumed after round {distiller.round} of {rounds}")
        if not scored:
            _add_point(job, progress, distiller, whole, display)
        pending: deque[PendingRecord] = deque()
        while distiller.round < rounds:
            pending.append(distiller.launch_round())
            number = distiller.round
            stopping = ranks.any(stop.made)
            save = number % config.checkpoint_every == 0 or number == rounds or stopping
            score = bool(config.evaluate_every) and (number % config.evaluate_every == 0 or number == rounds)
            # A GPU works on the newest round while the one before is written down; what is saved has been looked at.
            while pending and (save or score or len(pending) > 1 or pending[0].ready()):
                record = pending.popleft().result()
                display.round(record)
                if directory is not None:
                    row = Round.of(record, progress.seconds + time.monotonic() - started)
                    directory.append_round(row)
                    progress.rounds.append(row)
            if score:
                _add_point(job, progress, distiller, whole, display)
            if save:
                job.watch.at(f"saves step {distiller.step}")
                job.checkpoints.save(
                    distiller.step,
                    {
                        "distiller": distiller.state_dict(),
                        "config": fingerprint(config),
                        "learning_curve": progress.curve,
                        "seconds": progress.seconds + time.monotonic() - started,
                        "command": progress.command,
                    },
                )
            if stopping:
                job.checkpoints.wait()
                raise KeyboardInterrupt
        job.checkpoints.tidy()
    return progress


def _result(distiller: Distiller[TaskBatch], whole: CoCa | None) -> CoCa:
    """The student to score and to keep; where it is sharded, `whole` with its weights."""
    found = distiller.result if whole is None else distiller.gather_result(whole)
    assert isinstance(found, CoCa)
    return found


def _add_point(
    job: _Job, progress: _Progress, distiller: Distiller[TaskBatch], whole: CoCa | None, display: Display
) -> None:
    """A point of the learning curve, by all ranks together."""
    config, data = job.config, job.data
    if not config.evaluate_every or not config.evaluate_items:
        return
    job.watch.at(f"scores the student of step {distiller.step}")
    scores = evaluate(
        _result(distiller, whole),
        data,
        "validation",
        limit=config.evaluate_items,
        batch_size=config.evaluate_batch,
        ranks=job.ranks,
    ).scores
    headline = data.headline
    progress.curve.append({"step": distiller.step, headline: scores[headline]})
    display.score(distiller.step, headline, scores[headline])


def _finish(job: _Job, models: dict[Model, CoCa], progress: _Progress) -> Summary | None:
    """Keeps the student, scores all models on the test split, and writes what the report is drawn from.

    All ranks score; the first one does the rest, and returns the summary.
    """
    config, data, directory, student = job.config, job.data, job.directory, models["after"]
    say = _sayer(config, speaks=job.ranks.first)
    if directory is not None:
        save_coca(student, directory.path / "student.safetensors")
        usual = usual_probability(student, data, config.evaluate_batch) if config.task == "captioning" else None
        write_words(directory, data, config.data.loader.transform, usual)
    say("scoring the teacher, and the student before and after, on the test split")
    evaluations = score_models(models, data, config.test_items, config.evaluate_batch, say, job.ranks)
    if directory is None:
        return None
    compared: tuple[Model, ...] = ("teacher", "after")
    speed = measure_speed({name: models[name] for name in compared}, data, config.test_items, config.evaluate_batch)
    write_samples(directory, data, evaluations, config.samples)
    if config.task == "captioning":
        write_cross_attention(directory, student, data, evaluations["after"])
    summary = Summary(
        task=config.task,
        scores={name: evaluation.scores for name, evaluation in evaluations.items()},
        headline_metric=data.headline,
        parameters={"teacher": count_parameters(models["teacher"]), "student": count_parameters(student)},
        images_per_second={"teacher": speed["teacher"], "student": speed["after"]},
        test_items=len(evaluations["after"].predictions),
        seconds=progress.seconds + time.monotonic() - job.started,
        peak_mib=peak_mib(),
        command=progress.command,
        environment=environment(job.ranks.device),
        layer_work=layer_work(progress.rounds),
        learning_curve=tuple(progress.curve),
    )
    directory.write_json(SUMMARY, summary)
    if config.report and progress.rounds:
        _draw_report(directory)
    elif config.report:
        warnings.warn(f"no report is drawn, since no row of {directory.metrics} is left", stacklevel=2)
    return summary


def _draw_report(directory: RunDirectory) -> None:
    from optima.report import write_report  # what draws takes a second to load, which no run should wait for

    write_report(directory.path)


def run_distill(config: DistillConfig) -> None:
    """Distils, then prints the scores."""
    summary = distill(config)
    if summary is None:
        return
    table = make_table(
        "score, %",
        *("teacher", "student before", "student after"),
        title=f"{config.task}, {summary.test_items} test items",
    )
    for name in summary.scores["teacher"]:
        table.add_row(name, *(f"{summary.scores[model][name]:.1f}" for model in ("teacher", "before", "after")))
    sizes = (summary.parameters[model] / 1e6 for model in ("teacher", "student", "student"))
    table.add_row("parameters, M", *(f"{size:.2f}" for size in sizes))
    console = make_console()
    console.print(table)
    if config.task == "captioning" and not config.quiet:
        for row in json.loads((config.run / SAMPLES).read_text(encoding="utf-8"))[:SHOWN]:
            console.print(f"{row['images'][0]}: {row['after']} ({row['reference']})", soft_wrap=True)
    left = f"Report: {config.run / 'report.html'}" if config.report else f"Run: {config.run}"
    console.print(f"{summary.seconds:.0f} s, peak memory {summary.peak_mib:.0f} MiB. {left}", soft_wrap=True)
