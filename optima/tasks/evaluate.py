"""Runs a model over a held-out split and scores what it says."""

import torch

from optima.coca import CoCa
from optima.coca.config import GenerationConfig
from optima.coca.generate import generate
from optima.data.config import Held
from optima.tasks.batches import TaskBatch
from optima.tasks.data import Evaluation, TaskData
from optima_core.parallel import Ranks


@torch.no_grad()
def evaluate(
    model: CoCa,
    data: TaskData,
    split: Held,
    *,
    limit: int = 0,
    batch_size: int = 250,
    generation: GenerationConfig | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Scores the model on a held-out split; `limit` > 0 takes only that many items from its beginning.

    generation: How captions are generated; greedily by default.
    ranks: Processes that share the batches, each of which has the model; all must call this, and get the same. Batches
        are whole ones: what is predicted would depend, in the last bits, on what else is in a batch.
    """
    ranks = ranks or Ranks()
    was_training = model.training
    model.eval()
    predicted: list[tuple[int, str]] = []
    for indices, batch in data.held_batches(split, batch_size, limit, (ranks.rank, ranks.count)):
        predicted += zip(indices, _predict(model, data, batch, generation), strict=True)
    model.train(was_training)
    together = sorted(item for part in ranks.gather(predicted) for item in part)
    return data.score(split, [index for index, _ in together], [said for _, said in together])


def _predict(model: CoCa, data: TaskData, batch: TaskBatch, generation: GenerationConfig | None) -> list[str]:
    """What the model says of each item."""
    if data.task != "captioning":
        chosen = model.class_logits(data.task, model(batch.images, batch.tokens)).argmax(dim=-1)
        return [data.classes[index] for index in chosen.tolist()]
    tokenizer = data.tokenizer
    tokens = generate(
        model,
        batch.images[:, 0],
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        length=data.text_length,
        config=generation,
    )
    return tokenizer.decode(tokens)
