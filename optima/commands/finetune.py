"""Trains a CoCa on one task: how a task teacher is made of imported or pre-trained weights before it is distilled."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optima.coca import CoCa
from optima.coca.checkpoint import load_coca, save_coca
from optima.coca.language import in_language
from optima.data.config import HELD
from optima.data.tokenizer import word_tokenizer
from optima.runs.config import FinetuneConfig
from optima.runs.directory import REJECTED, RunDirectory
from optima.runs.memory import peak_mib
from optima.runs.reading import SUMMARY
from optima.runs.summary import count_parameters
from optima.runs.training import train
from optima.runs.words import refuse_other_words, words_beside, write_words
from optima.tasks.choose import OWN_TEXTS, open_data
from optima.tasks.data import TaskData, head_spec
from optima.tasks.evaluate import evaluate
from optima.tasks.fit import refuse_misfit, refuse_unscorable
from optima.tasks.forward import TaskForward
from optima_core.recompute import recompute_activations


def finetune(config: FinetuneConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains the model, writes model.safetensors and words.json, and returns what summary.json holds."""
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with RunDirectory(config.run, resume=config.resume, keep=2) as directory:
        start = load_coca(config.model)
        data = open_data(
            config.data, config.task, start.config, seed=config.seed, device=device, rejected=config.run / REJECTED
        )
        with contextlib.closing(data):
            return finetune_on(data, config, directory, start, device, say, started)


def finetune_on(
    data: TaskData,
    config: FinetuneConfig,
    directory: RunDirectory,
    start: CoCa,
    device: torch.device,
    say: Callable[[str], None],
    started: float,
) -> dict[str, Any]:
    """The same on data that is open, from weights that are loaded, in a directory that is held.

    started: when it began, by time.monotonic.
    """
    if config.data.tokenizer == OWN_TEXTS:
        start = in_words_of(data, start, config.model, config.seed)
    else:
        refuse_other_words(config.model, data)
    for split in HELD:
        refuse_unscorable(data, split)
    model = with_head(start, f"model {config.model}", data, config.seed).to(device)
    if config.recompute:
        recompute_activations(model.transformer_layers())
    forward = TaskForward(model, config.task)

    def losses(step: int) -> dict[str, Tensor]:
        loss = forward(data.training_batch(step, config.batch_size), {}).task_loss
        assert loss is not None  # a task of ours has labels
        return {config.task: loss}

    def after_step(step: int) -> None:
        if config.evaluate_every and step % config.evaluate_every == 0:
            scores = evaluate(
                model, data, "validation", limit=config.evaluate_items, batch_size=config.evaluate_batch
            ).scores
            say(f"step {step}: validation {data.headline} {scores[data.headline]:.1f}")

    train(model, config.steps, losses, config, directory, say, after_step)
    save_coca(model, config.run / "model.safetensors", torch.float16 if config.stored == "fp16" else torch.float32)
    write_words(directory, data, config.data.loader.transform)
    evaluation = evaluate(model, data, "test", limit=config.test_items, batch_size=config.evaluate_batch)
    summary = {
        "task": config.task,
        "scores": evaluation.scores,
        "headline_metric": data.headline,
        "test_items": len(evaluation.predictions),
        "parameters": count_parameters(model),
        "seconds": time.monotonic() - started,
        "peak_mib": peak_mib(),
    }
    directory.write_json(SUMMARY, summary)
    return summary


def in_words_of(data: TaskData, model: CoCa, path: Path, seed: int) -> CoCa:
    """The model of a weights file with the data's vocabulary and length of texts; words that it knew, it still knows.

    What it knew, the words.json beside the file says, or, of a model without one, the size of its vocabulary.
    """
    beside, ours = words_beside(path), data.tokenizer
    theirs = beside.tokenizer if beside is not None else None
    if theirs is None and model.config.text_decoder.vocab_size == word_tokenizer().vocab_size:
        theirs = word_tokenizer()
    known = {} if theirs is None else {new: theirs.id_of(word) for word, new in ours.words().items()}
    kept = {new: old for new, old in known.items() if old is not None}
    return in_language(model, ours.vocab_size, data.text_length, ours.pad_id, kept, seed)


def with_head(model: CoCa, name: str, data: TaskData, seed: int) -> CoCa:
    """The model, and if it lacks the head that the task wants, the same weights with a fresh one.

    Raises OptimaError, calling the model `name`, if it cannot be run on the data or its head is for other classes.
    """
    refuse_misfit(model, name, data)
    head = head_spec(data)
    if head is None or data.task in model.head_specs:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = CoCa(model.config, model.head_specs | {data.task: head})
    grown.load_state_dict(grown.state_dict() | model.state_dict())
    return grown


def run_finetune(config: FinetuneConfig) -> None:
    """Trains, then prints the scores."""
    summary = finetune(config, lambda line: print(line, flush=True))
    for name, value in summary["scores"].items():
        print(f"test {name} {value:.1f}")
    print(f"wrote {config.run / 'model.safetensors'}")
