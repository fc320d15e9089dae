"""The main job: distils a CoCa teacher into a student on one task, scores both, and writes the run directory."""

import contextlib
import math
import platform
import shlex
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca, save_coca
from optima.coca.pairs import module_pairs
from optima.coca.presets import is_preset, preset
from optima.coca.start import project_teacher, truncate_teacher
from optima.data.config import HELD, DataConfig
from optima.display import Display, WithEvents, make_display
from optima.interruption import StopRequest
from optima.memory import peak_mib
from optima.report import write_report
from optima.run_directory import RunDirectory, fingerprint
from optima.samples import write_cross_attention, write_samples
from optima.task import Task
from optima.tasks.batches import TaskBatch
from optima.tasks.choose import open_data
from optima.tasks.data import Evaluation, TaskData, head_spec
from optima.tasks.evaluate import evaluate
from optima.tasks.fit import refuse_headless, refuse_misfit, refuse_unscorable
from optima.tasks.forward import TaskForward
from optima.words import write_words
from optima_core.config import DistillerConfig
from optima_core.engine import Distiller
from optima_core.errors import OptimaError
from optima_core.parallel import Ranks, join_ranks
from optima_core.processes import Strategy
from optima_core.recompute import recompute_activations
from optima_core.records import PendingRecord, RoundRecord

ASSETS = Path(__file__).with_name("assets")

Initialisation = Literal["checkpoint", "scratch", "teacher_truncate", "teacher_pca"]
INITIALISING_ITEMS = 256
"""Training items whose activations show a teacher's principal components."""

STATE = {"distiller": dict, "config": str, "learning_curve": list, "seconds": float}
"""What a checkpoint holds: key -> type."""


@dataclass(frozen=True)
class DistillConfig:
    """One distillation run.

    Attributes:
        task: What the student is to learn.
        data: Which pictures and texts.
        run: Run directory, new or empty; see also resume.
        teacher: Teacher weights (.safetensors); null takes the shipped teacher.
        student: Weights (.safetensors), or the name of a preset, such as tiny12, which has sizes alone; null takes the
            shipped student.
        init: Where the student's weights come from: its checkpoint, fresh random numbers, the teacher's leading
            features, or the teacher's principal components on a training batch; but for the first, `student` gives the
            sizes alone. null takes the checkpoint of a `student` that is a file, else teacher_pca.
        batch_size: Items a batch, over all ranks; a step takes engine.accumulate of them.
        probe_size: Items of the held batch that rewards are measured on.
        layer_map: "uniform" spreads the student's layers over the teacher's, "last" pairs them with the last ones; or
            by module the teacher layer (from 0) of each student layer, as in "{text_decoder: [0, 3]}", the modules
            left out being "uniform".
        recompute: Keep no activations inside the student's layers, but compute them again in the backward pass: less
            memory, about a third more time.
        engine: Rounds, losses, optimiser, bandit and reward.
        evaluate_every: Rounds between points of the learning curve; 0 draws none.
        evaluate_items: Validation items a point of the learning curve.
        evaluate_batch: Items a forward pass of an evaluation.
        test_items: Test items that the final scores are measured on; 0 takes all.
        samples: Sample predictions kept for the report.
        report: Draw report.html at the end; `report` draws it later from the same files.
        checkpoint_every: Rounds between checkpoints.
        keep: Checkpoints that stay on disk.
        seed: Seed of the data stream, the projections and the bandit.
        threads: CPU threads; 0 takes what torch chooses.
        resume: Continue the run in the run directory.
        quiet: Show nothing but the final table.
        parallel: How the processes that torchrun starts, one a device, share the work: "ddp" keeps a whole student on
            each, "fsdp" (FSDP2) spreads the parameters of both models over them. Without torchrun of no effect.
        tensorboard: Also write TensorBoard event files, into the run directory's tensorboard folder.
    """

    task: Task = "captioning"
    data: DataConfig = field(default_factory=DataConfig)
    run: Path = Path("runs/distill")
    teacher: Path | None = None
    student: Path | None = None
    init: Initialisation | None = None
    batch_size: int = 32
    probe_size: int = 128
    layer_map: Literal["uniform", "last"] | dict[str, list[int]] = "uniform"
    recompute: bool = False
    engine: DistillerConfig = field(default_factory=DistillerConfig)
    evaluate_every: int = 10
    evaluate_items: int = 250
    evaluate_batch: int = 250
    test_items: int = 0
    samples: int = 24
    report: bool = True
    checkpoint_every: int = 5
    keep: int = 2
    seed: int = 0
    threads: int = 0
    resume: bool = False
    quiet: bool = False
    parallel: Strategy = "ddp"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "probe_size", "evaluate_batch", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "evaluate_items", "test_items", "samples", "seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def distill(config: DistillConfig) -> dict[str, Any]:
    """Runs the job and returns what summary.json holds; nothing on ranks other than the first, which write nothing."""
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with join_ranks(config.parallel) as ranks:
        teacher = load_coca(config.teacher or ASSETS / "teacher.safetensors")
        data = open_data(
            config.data,
            config.task,
            teacher.config,
            seed=config.seed,
            device=ranks.device,
            rank=ranks.rank,
            world_size=ranks.count,
            report=config.run / "rejected.jsonl",
        )
        with contextlib.closing(data):
            return _distill(config, ranks, teacher, data, started)


def _distill(config: DistillConfig, ranks: Ranks, teacher: CoCa, data: TaskData, started: float) -> dict[str, Any]:
    device = ranks.device
    if config.batch_size % ranks.count:
        raise OptimaError(f"batch_size must be a multiple of the {ranks.count} ranks, got {config.batch_size}")
    student = fit_models(config, teacher, data)
    directory = RunDirectory(config.run, resume=config.resume, keep=config.keep) if ranks.first else None
    teacher.to(device).requires_grad_(False)
    student.to(device).train()
    if config.recompute:
        recompute_activations(student.transformer_layers())

    def load(step: int) -> TaskBatch:
        return data.training_batch(step, config.batch_size // ranks.count)

    probe = data.probe_batch(config.probe_size)
    first, size = ranks.share(0, len(probe.tokens))
    whole = load_start(config, teacher, data).to(device) if ranks.sharded else None
    ranks.shard(teacher)
    distiller = Distiller(
        student,
        TaskForward(student, config.task),
        TaskForward(teacher, config.task),
        module_pairs(student, teacher, config.layer_map),
        load,
        TaskBatch(*(part[first : first + size] for part in probe)),
        config.engine,
        config.seed,
        ranks,
    )
    curve, spent = _train(config, distiller, directory, data, whole)
    student = _result(distiller, whole)
    if directory is None:
        return {}
    if ranks.sharded:
        teacher = load_coca(config.teacher or ASSETS / "teacher.safetensors").to(device)
    before = load_start(config, teacher, data).to(device)

    save_coca(student, directory.path / "student.safetensors")
    write_words(directory, data)
    models = {"teacher": teacher, "before": before, "after": student}
    evaluations: dict[str, Evaluation] = {}
    seconds: dict[str, float] = {}
    for name, model in models.items():
        begun = time.monotonic()
        evaluations[name] = evaluate(model, data, "test", limit=config.test_items, batch_size=config.evaluate_batch)
        seconds[name] = time.monotonic() - begun
    write_samples(directory, data, evaluations, config.samples)
    if config.task == "captioning":
        write_cross_attention(directory, student, data, evaluations["after"])
    items = len(evaluations["after"].predictions)
    summary = {
        "task": config.task,
        "scores": {name: evaluation.scores for name, evaluation in evaluations.items()},
        "headline_metric": data.headline,
        "parameters": {
            name: count_parameters(models[key]) for name, key in (("teacher", "teacher"), ("student", "after"))
        },
        "images_per_second": {"teacher": items / seconds["teacher"], "student": items / seconds["after"]},
        "test_items": items,
        "seconds": spent + time.monotonic() - started,
        "peak_mib": peak_mib(),
        "command": "python -m optima.run " + shlex.join(sys.argv[1:]),
        "environment": environment(device),
        "layer_work": layer_work(directory.metrics_rows()),
        "learning_curve": curve,
    }
    directory.write_json("summary.json", summary)
    if config.report:
        write_report(directory.path)
    return summary


def fit_models(config: DistillConfig, teacher: CoCa, data: TaskData) -> CoCa:
    """The student start, after both models have been checked against the data and each other."""
    name = f"teacher {config.teacher or ASSETS / 'teacher.safetensors'}"
    refuse_misfit(teacher, name, data)
    refuse_headless(teacher, name, data)
    for split in HELD:
        refuse_unscorable(data, split)
    return load_start(config, teacher, data)


def load_start(config: DistillConfig, teacher: CoCa, data: TaskData) -> CoCa:
    """The student before distillation; it gets a fresh head if the task needs one that it lacks."""
    path = config.student or ASSETS / "student.safetensors"
    has_weights = path.exists() or not is_preset(str(path))
    init = config.init or ("checkpoint" if config.student and has_weights else "teacher_pca")
    if init == "checkpoint" and not has_weights:
        raise OptimaError(
            f"student {path} is a preset, which has sizes but no weights; "
            "give --init teacher_pca, teacher_truncate or scratch, or the path of weights"
        )
    start = load_coca(path) if has_weights else _sizes(str(path), teacher)
    refuse_misfit(start, f"student {path}", data)
    ours, theirs = start.config.text_decoder.vocab_size, teacher.config.text_decoder.vocab_size
    if ours != theirs:
        raise OptimaError(
            f"student has a vocabulary of {ours} tokens and the teacher one of {theirs}; they must be equal"
        )
    head = head_spec(data)
    missing = {data.task: head} if head is not None and data.task not in start.head_specs else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = CoCa(start.config, start.head_specs | missing)
    if init == "checkpoint":
        student.load_state_dict(student.state_dict() | start.state_dict())
    elif init == "teacher_truncate":
        truncate_teacher(student, teacher, config.layer_map)
    elif init == "teacher_pca":
        batch = data.training_batch(0, INITIALISING_ITEMS)
        project_teacher(student, teacher, batch.images, batch.tokens, config.layer_map)
    return student.eval()


def _sizes(name: str, teacher: CoCa) -> CoCa:
    """A model of the preset's sizes, without weights."""
    with torch.device("meta"):
        return CoCa(preset(name, teacher.config))


def count_parameters(model: CoCa) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run depend on beside its configuration."""
    return {
        "optima": version("optima-distill"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }


def _train(
    config: DistillConfig,
    distiller: Distiller[TaskBatch],
    directory: RunDirectory | None,
    data: TaskData,
    whole: CoCa | None,
) -> tuple[list[dict[str, float]], float]:
    """Runs the rounds that are left -> the learning curve, and the seconds that earlier parts of the run took."""
    curve: list[dict[str, float]] = []
    spent, ranks = 0.0, distiller.ranks
    state = directory.checkpoints.load(STATE) if directory is not None else None
    if directory is not None and state is not None:
        directory.refuse_other_run(config, state["config"])
        curve, spent = state["learning_curve"], state["seconds"]
    resumed, scored = ranks.broadcast((state is not None, bool(curve)))
    if resumed:
        distiller.load_state_dict({} if state is None else state["distiller"])
    rounds = config.engine.rounds
    names = distiller.arm_names[: distiller.policy.arms]
    display = make_display(names, rounds, distiller.round, config.quiet or not ranks.first)
    if directory is not None:
        directory.write_config(config)
        directory.cut_metrics(distiller.round)
        if config.tensorboard:
            display = WithEvents(display, directory.path / "tensorboard", distiller.step)
    started = time.monotonic()
    with StopRequest() as stop, contextlib.closing(display):
        if resumed:
            display.note(f"resumed after round {distiller.round} of {rounds}")
        if not scored:
            _add_point(config, curve, distiller, whole, data, display)
        pending: deque[PendingRecord] = deque()
        while distiller.round < rounds:
            pending.append(distiller.launch_round())
            number = distiller.round
            stopping = ranks.any(stop.made)
            save = number % config.checkpoint_every == 0 or number == rounds or stopping
            score = bool(config.evaluate_every) and number % config.evaluate_every == 0
            # A GPU works on the newest round while the one before is written down; what is saved has been looked at.
            while pending and (save or score or len(pending) > 1 or pending[0].ready()):
                record = pending.popleft().result()
                display.round(record)
                if directory is not None:
                    directory.append_metrics(_row(record, spent + time.monotonic() - started))
            if score:
                _add_point(config, curve, distiller, whole, data, display)
            if save:
                state = {
                    "distiller": distiller.state_dict(),
                    "config": fingerprint(config),
                    "learning_curve": curve,
                    "seconds": spent + time.monotonic() - started,
                }
                if directory is not None:
                    directory.checkpoints.save(distiller.step, state)
            if stopping:
                raise KeyboardInterrupt
    return curve, spent


def _result(distiller: Distiller[TaskBatch], whole: CoCa | None) -> CoCa:
    """The student to score and to keep; where it is sharded, `whole` with its weights, on the first rank."""
    found = distiller.result if whole is None else distiller.gather_result(whole)
    assert isinstance(found, CoCa)
    return found


def layer_work(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What choosing modules saved, from the rows of metrics.jsonl.

    layers_tapped: mean share of the student's layers that were tapped and went into layer losses; 1 would be all.
    step_seconds: median over rounds of the mean time of a step, by the modules distilled.
    """
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault("+".join(row["modules"]), []).append(row["step_seconds"])
    return {
        "layers_tapped": statistics.fmean(row["tapped"] for row in rows),
        "step_seconds": {modules: statistics.median(found) for modules, found in seconds.items()},
    }


def _add_point(
    config: DistillConfig,
    curve: list[dict[str, float]],
    distiller: Distiller[TaskBatch],
    whole: CoCa | None,
    data: TaskData,
    display: Display,
) -> None:
    """The first rank scores; the others wait for it in the next round."""
    if not config.evaluate_every or not config.evaluate_items:
        return
    student = _result(distiller, whole)
    if not distiller.ranks.first:
        return
    scores = evaluate(student, data, "validation", limit=config.evaluate_items, batch_size=config.evaluate_batch).scores
    headline = data.headline
    curve.append({"step": distiller.step, headline: scores[headline]})
    display.score(distiller.step, headline, scores[headline])


def _row(record: RoundRecord, seconds: float) -> dict[str, Any]:
    def finite(values: dict[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    return {
        "round": record.round,
        "step": record.step,
        "arm": record.arm,
        "modules": list(record.modules),
        "reward": record.reward,
        "posterior": {"mean": finite(record.mean), "std": finite(record.std)},
        "losses": record.losses,
        "probe": record.probe,
        "learning_rate": record.learning_rate,
        "tapped": record.tapped,
        "step_seconds": record.step_seconds,
        "seconds": seconds,
        "steps_per_second": record.step / seconds,
    }
