"""How sure of its captions a student usually is, so that one can be told where it is less so.

The measure is the mean probability of a caption's tokens (`optima.coca.generate.token_probability`). It is low for many
images that are unlike those of training, and for captions that are wrong; it says neither that a sure student is right,
nor that it knows what it sees.
"""

import torch

from optima.coca import CoCa
from optima.coca.generate import generate, token_probability
from optima.tasks.data import TaskData

ITEMS = 250
"""Validation items that are looked at."""

UNUSUAL = 0.05
"""Share of them whose captions the student is least sure of; below the surest of these a caption is warned of."""


@torch.no_grad()
def usual_probability(model: CoCa, data: TaskData, batch_size: int) -> float:
    """The mean token probability that all but the share `UNUSUAL` of the validation images' captions reach."""
    was_training = model.training
    model.eval()
    found = []
    for _, batch in data.held_batches("validation", batch_size, ITEMS):
        tokens = generate(
            model,
            batch.images[:, 0],
            start_id=data.tokenizer.start_id,
            end_id=data.tokenizer.end_id,
            length=data.text_length,
        )
        found.append(token_probability(model, batch.images[:, 0], tokens))
    model.train(was_training)
    return float(torch.cat(found).quantile(UNUSUAL))
