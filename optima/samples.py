"""Sample predictions for the report: what teacher, old student and new student said of the same pictures."""

from typing import Any

import torch
from PIL import Image

from optima.coca import CoCa
from optima.data.pictograms.captions import references
from optima.data.pictograms.render import render
from optima.data.pictograms.stream import Pictograms, Task
from optima.data.pictures import normalise
from optima.data.tokenizer import Tokenizer
from optima.run_directory import RunDirectory
from optima.tasks import TEXT_LENGTH
from optima.tasks.evaluate import Evaluation


def write_samples(
    directory: RunDirectory, task: Task, data: Pictograms, evaluations: dict[str, Evaluation], count: int
) -> None:
    """Writes samples.json and the pictures: up to half of them mended by distillation, then the first others."""
    before, after = evaluations["before"].correct, evaluations["after"].correct
    changed = [i for i in range(len(after)) if after[i] and not before[i]][: count // 2]
    others = [i for i in range(len(after)) if not (after[i] and not before[i])][: count - len(changed)]
    samples: list[dict[str, Any]] = []
    (directory.path / "samples").mkdir(exist_ok=True)
    for index in changed + others:
        example = data.example(task, index)
        images = []
        for side, scene in enumerate(example.scenes):
            name = f"samples/{index:04d}-{side}.png"
            Image.fromarray(render(scene).transpose(1, 2, 0)).save(directory.path / name)
            images.append(name)
        samples.append(
            {
                "images": images,
                "prompt": None if task == "captioning" else example.text,
                "reference": references(example.scenes[0])[0] if task == "captioning" else example.answer,
                **{name: evaluation.predictions[index] for name, evaluation in evaluations.items()},
                "correct": {name: evaluation.correct[index] for name, evaluation in evaluations.items()},
            }
        )
    directory.write_json("samples.json", samples)


@torch.no_grad()
def write_cross_attention(
    directory: RunDirectory, model: CoCa, data: Pictograms, evaluation: Evaluation, tokenizer: Tokenizer
) -> None:
    """Writes cross_attention.json: where the student looked for each word of its longest right caption.

    The map of a word is the attention of the position that predicted it, in the last layer, averaged over the heads. A
    student without a right caption writes none, nor does one whose pooler hides which patch a token stands for.
    """
    right = [i for i, good in enumerate(evaluation.correct) if good]
    if not right or model.config.image_encoder.pooler_queries:
        return
    index = max(right, key=lambda i: len(evaluation.predictions[i].split()))
    caption = evaluation.predictions[index]
    picture = render(data.example("captioning", index).scenes[0])
    last = model.config.multimodal_decoder.layers - 1
    device = next(model.parameters()).device
    images = normalise(torch.from_numpy(picture).to(device))[None, None]
    tokens = tokenizer.encode([caption], TEXT_LENGTH).to(device)
    cross = model(images, tokens, {"multimodal_decoder": (last,)}).taps["multimodal_decoder"][0].attention[1]
    scores = cross.q @ cross.k.transpose(-1, -2) * cross.q.shape[-1] ** -0.5
    maps = scores.softmax(dim=-1)[0].mean(dim=0)
    side = model.config.image_encoder.image_size // model.config.image_encoder.patch_size
    words = caption.split()
    name = f"samples/attention-{index:04d}.png"
    Image.fromarray(picture.transpose(1, 2, 0)).save(directory.path / name)
    table = maps[: len(words)].view(len(words), side, side).tolist()
    directory.write_json("cross_attention.json", {"image": name, "caption": words, "maps": table, "grid": [side, side]})
