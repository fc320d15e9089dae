"""Sample predictions for the report: what teacher, old student and new student said of the same images."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from optima.coca import CoCa
from optima.runs.directory import RunDirectory
from optima.runs.looking import attention_over_image
from optima.runs.reading import CROSS_ATTENTION, SAMPLES
from optima.runs.rows import CrossAttention, Model, Sample
from optima.tasks.data import Evaluation, TaskData
from optima_core.checkpoint import write_atomically


def write_samples(directory: RunDirectory, data: TaskData, evaluations: Mapping[Model, Evaluation], count: int) -> None:
    """Writes samples.json and the images: up to half of them mended by distillation, then the first others.

    The evaluations are those of "teacher", "before" and "after" on the test split.
    """
    before, after = evaluations["before"].correct, evaluations["after"].correct
    changed = [i for i in range(len(after)) if after[i] and not before[i]][: count // 2]
    others = [i for i in range(len(after)) if not (after[i] and not before[i])][: count - len(changed)]
    samples: list[Sample] = []
    (directory.path / "samples").mkdir(exist_ok=True)
    for place in changed + others:
        index = evaluations["after"].indices[place]
        shown = data.shown("test", index)
        images = []
        for side, image in enumerate(shown.images):
            name = f"samples/{index:04d}-{side}.png"
            _write_image(directory.path / name, image)
            images.append(name)
        samples.append(
            Sample(
                tuple(images),
                shown.prompt,
                shown.reference,
                **{name: evaluation.predictions[place] for name, evaluation in evaluations.items()},
                correct={name: evaluation.correct[place] for name, evaluation in evaluations.items()},
            )
        )
    directory.write_json(SAMPLES, samples)


@torch.no_grad()
def write_cross_attention(directory: RunDirectory, model: CoCa, data: TaskData, evaluation: Evaluation) -> None:
    """Writes cross_attention.json: where the student looked for each word of its longest right caption.

    The map of a word (of a piece of one, if the tokenizer cuts words) is the attention of the position that predicted
    it (`optima.runs.looking`). A student without a right caption writes none, nor does one whose
    pooler hides which patch a token stands for.
    """
    right = [i for i, good in enumerate(evaluation.correct) if good]
    if not right:
        return
    longest = max(right, key=lambda i: len(evaluation.predictions[i].split()))
    index = evaluation.indices[longest]
    tokenizer = data.tokenizer
    device = next(model.parameters()).device
    images = data.held_batch("test", [index]).images
    tokens = tokenizer.encode([evaluation.predictions[longest]], data.text_length).to(device)
    written = [token for token in tokens[0, 1:].tolist() if token not in (tokenizer.end_id, tokenizer.pad_id)]
    words = tokenizer.decode([[token] for token in written])
    maps = attention_over_image(model, images[:, 0], tokens)
    if maps is None:
        return
    name = f"samples/attention-{index:04d}.png"
    image = data.shown("test", index).images[0]
    _write_image(directory.path / name, image)
    table: Any = maps[0, : len(words)].tolist()
    directory.write_json(CROSS_ATTENTION, CrossAttention(name, tuple(words), table, tuple(maps.shape[2:])))


def _write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """image: [3, H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
