"""Sample predictions for the report: what teacher, old student and new student said of the same pictures."""

from typing import Any

from PIL import Image

from optima.data.pictograms.captions import references
from optima.data.pictograms.render import render
from optima.data.pictograms.stream import Pictograms, Task
from optima.run_directory import RunDirectory
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
