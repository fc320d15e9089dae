"""Batches of one task as a CoCa takes them."""

from typing import NamedTuple

import torch
from torch import Tensor

from optima.data.pictograms.stream import Pictograms, Task
from optima.data.pictures import normalise
from optima.data.tokenizer import Tokenizer
from optima.tasks.spec import TEXT_LENGTH


class TaskBatch(NamedTuple):
    """images: float [B, pictures, 3, S, S] in -1..1. tokens: int64 [B, L]. targets: int64 [B], -1 for captioning."""

    images: Tensor
    tokens: Tensor
    targets: Tensor


def load_batch(
    data: Pictograms, task: Task, start: int, size: int, tokenizer: Tokenizer, device: torch.device
) -> TaskBatch:
    """Items start, ..., start + size - 1 of the task."""
    found = data.batch(task, start, size)
    tokens = tokenizer.encode(found.texts, TEXT_LENGTH)
    return TaskBatch(normalise(found.images.to(device)), tokens.to(device), found.targets.to(device))
