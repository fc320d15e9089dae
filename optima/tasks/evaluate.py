"""Runs a model over a held-out split and scores what it says."""

import torch

from optima.coca import CoCa
from optima.coca.config import GenerationConfig
from optima.coca.generate import generate
from optima.data.config import Held
from optima.tasks.data import Evaluation, TaskData


@torch.no_grad()
def evaluate(
    model: CoCa,
    data: TaskData,
    split: Held,
    *,
    limit: int = 0,
    batch_size: int = 250,
    generation: GenerationConfig | None = None,
) -> Evaluation:
    """Scores the model on a held-out split; `limit` > 0 takes only that many items from its beginning.

    generation: How captions are generated; greedily by default.
    """
    was_training = model.training
    model.eval()
    tokenizer = data.tokenizer
    predictions: list[str] = []
    indices: list[int] = []
    for found, batch in data.held_batches(split, batch_size, limit):
        indices += found
        if data.task == "captioning":
            tokens = generate(
                model,
                batch.images[:, 0],
                start_id=tokenizer.start_id,
                end_id=tokenizer.end_id,
                length=data.text_length,
                config=generation,
            )
            predictions += tokenizer.decode(tokens)
        else:
            output = model(batch.images, batch.tokens)
            chosen = model.class_logits(data.task, output).argmax(dim=-1)
            predictions += [data.classes[index] for index in chosen.tolist()]
    model.train(was_training)
    return data.score(split, indices, predictions)
