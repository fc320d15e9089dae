"""Distils a model of transformers, and writes a student that from_pretrained loads."""

import contextlib
import shlex
import sys
import time
from collections import defaultdict
from typing import Any

import torch

from optima.commands.console import make_console, make_table
from optima.commands.distill_hf.config import DistillHfConfig
from optima.runs.config import told_in_a_line
from optima.runs.directory import RunDirectory, fingerprint, flat
from optima.runs.display import Tracked, make_display
from optima.runs.interruption import StopRequest
from optima.runs.rows import Round, plain
from optima.runs.tracking import make_trackers
from optima_core.checkpoint import Saved
from optima_core.engine import Distiller
from optima_core.errors import OptimaError

Scores = dict[str, dict[str, float]]

STATE = {"distiller": dict, "config": str, "before": dict, "command": str, "seconds": float}
"""What a checkpoint holds: key -> type."""


def run_distill_hf(config: DistillHfConfig) -> None:
    """Distils, then prints the losses on held-out rows."""
    try:
        import transformers
    except ImportError:
        raise OptimaError("transformers is not installed; pip install 'optima-distill[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    scores = distill_hf(config)
    table = make_table("loss on held-out rows", *scores, title=f"{config.student} from {config.teacher}")
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        table.add_row(name, *(f"{found[name]:.4f}" if name in found else "" for found in scores.values()))
    console = make_console()
    console.print(table)
    console.print(f"Student: {config.run / 'student'}", soft_wrap=True)


def distill_hf(config: DistillHfConfig) -> Scores:
    """Runs the job; the losses on held-out rows, by model and name."""
    from optima.commands.distill_hf.batches import Batches
    from optima.commands.distill_hf.models import load_model, load_processor, with_adapters
    from optima.commands.distill_hf.rows import Rows

    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with RunDirectory(config.run, resume=config.resume, keep=config.keep) as directory:
        saved = directory.checkpoints.newest(STATE)
        if saved is not None:
            directory.refuse_other_run(config, saved.state["config"])
        processor, rows = load_processor(config.teacher), Rows(config.data)
        teacher = load_model(config.teacher, "teacher").to(device).eval().requires_grad_(False)
        student = load_model(config.student, "student").to(device)
        batches = Batches(
            rows, processor, student,
            size=config.batch_size, held_every=config.held_every, max_length=config.max_length, seed=config.seed,
        )  # fmt: skip
        if config.lora:
            student = with_adapters(student, config.lora)
        with told_in_a_line():
            distiller = _make_distiller(config, student.train(), teacher, batches, device)
        before = _losses(config, distiller, batches, device) if saved is None else saved.state["before"]
        command = "optima " + shlex.join(sys.argv[1:]) if saved is None else saved.state["command"]
        _train(config, directory, distiller, {"before": before, "command": command}, saved, started)
        scores = {"before": before, "after": _losses(config, distiller, batches, device)}
        _finish(config, directory, distiller, teacher, processor, scores, command)
    return scores


def _make_distiller(config: DistillHfConfig, student: Any, teacher: Any, batches: Any, device: Any) -> Distiller[Any]:
    from optima_core.integrations.huggingface import TransformersAdaptor, TransformersForward, pair_modules

    ours, theirs = TransformersAdaptor(student), TransformersAdaptor(teacher)
    probe = _on(batches.probe(config.probe_size), device)
    pairs = pair_modules(ours, theirs, probe, names=config.modules or None, layer_map=config.layer_map)
    if not config.quiet:
        named = {pair.name for pair in pairs}
        print("\n".join(f"{module}" for name, module in ours.modules.items() if name in named), flush=True)
    return Distiller(
        student,
        TransformersForward(ours),
        TransformersForward(theirs),
        pairs,
        lambda number: _on(batches.load(number), device),
        probe,
        config.engine,
        config.seed,
    )


def _train(
    config: DistillHfConfig,
    directory: RunDirectory,
    distiller: Distiller[Any],
    kept: dict[str, Any],
    saved: Saved | None,
    started: float,
) -> None:
    """Runs the rounds that are left; every checkpoint also holds `kept`."""
    seconds = 0.0
    if saved is not None:
        distiller.restore(saved.part("distiller"))
        seconds = saved.state["seconds"]
    directory.write_config(config)
    directory.rounds(distiller.round)
    rounds = config.engine.rounds
    shown = make_display(distiller.arm_names[: distiller.policy.arms], rounds, distiller.round, config.quiet)
    trackers = make_trackers(config.track, directory.path, distiller.step, flat(plain(config)))
    with StopRequest() as stop, contextlib.closing(Tracked(shown, trackers)) as display:
        while distiller.round < rounds:
            record = distiller.run_round()
            spent = seconds + time.monotonic() - started
            display.round(record)
            directory.append_round(Round.of(record, spent))
            if record.round % config.checkpoint_every == 0 or record.round == rounds or stop.made:
                state = {"distiller": distiller.state_dict(), "config": fingerprint(config), "seconds": spent, **kept}
                directory.checkpoints.save(distiller.step, state)
            if stop.made:
                raise KeyboardInterrupt


def _losses(config: DistillHfConfig, distiller: Distiller[Any], batches: Any, device: Any) -> dict[str, float]:
    """Mean losses of held rows: the student's own, and how far its predictions are from the teacher's."""
    training, rows = distiller.training, 0
    totals: dict[str, float] = defaultdict(float)
    for batch, size in batches.held_batches(config.held_rows):
        given = _on(batch, device)
        found = training.measure(given, training.teach(given, training.names)).named()
        layers: dict[str, list[float]] = defaultdict(list)
        for name, value in found.items():
            layers["/".join(name.split("/")[:2])].append(value)
        for name, values in layers.items():
            totals[name] += size * sum(values) / len(values)
        rows += size
    return {name: total / rows for name, total in totals.items()}


def _finish(
    config: DistillHfConfig,
    directory: RunDirectory,
    distiller: Distiller[Any],
    teacher: Any,
    processor: Any,
    scores: Scores,
    command: str,
) -> None:
    from optima.commands.distill_hf.card import model_card
    from optima.commands.distill_hf.models import write_student

    student = distiller.result
    sizes = [sum(x.numel() for x in model.parameters()) / 1e6 for model in (student, teacher)]
    parameters = "{:.2f} M parameters, the teacher {:.2f} M.".format(*sizes)
    card = model_card(config, command, scores, parameters)
    write_student(student, processor, directory.path / "student", card, config.push_to_hub)
    directory.write_json("summary.json", {"losses": scores, "parameters": sizes, "command": command})


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
