"""Recipes, for `--config NAME`: each says where a command's options differ from their defaults.

A run's config.yaml holds everything that came of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from optima.recipes.coca_large import BENCHMARKS, EPOCHS, coca_large

Options = dict[str, Any]
"""Options by name, nested as in a YAML file."""


@dataclass(frozen=True)
class Recipe:
    """The command that it is for, and where its options differ from their defaults."""

    command: str
    options: Callable[[], Options]


def pictograms(task: str) -> Options:
    """The shipped teacher into the shipped student: minutes on two CPU cores."""
    return {"task": task, "run": f"runs/pictograms_{task}"}


def own_images() -> Options:
    """Captioning of one's own images: a folder with captions.tsv or captions.jsonl, checked by `prepare`.

    The shipped teacher learns the captions' words and the images, and is distilled into the shipped student's sizes.
    For a larger one, `import` open_clip's coca_ViT-B-32 or coca_ViT-L-14 and give --teacher and --student tiny12.
    """
    return {
        "task": "captioning",
        "data": {
            "name": "folder",
            "root": "data/own_images",
            "tokenizer": "texts",
            "loader": {"max_rejected": 0.05, "transform": {"fit": "squash"}},
        },
        "run": "runs/own_images",
        "teach": {"steps": 2000},
        "probe_size": 64,
        "engine": {"rounds": 40},
    }


def pretrain_teacher() -> Options:
    """The shipped teacher: contrastive and captioning losses first, then the four tasks of pictograms jointly."""
    return {
        "run": "runs/teacher",
        "model": _shipped(128, 128, (5, 2, 3)),
        "caption_steps": 1000,
        "task_steps": 19000,
        "images": 32,
        "questions": 4,
        "optimiser": {"learning_rate": 1e-3, "warmup": 0.03},
        "compile": True,
        "threads": 1,
        "checkpoint_every": 500,
    }


def pretrain_student() -> Options:
    """The shipped student start: contrastive and captioning losses only, and briefly; it has seen no task."""
    return {
        "run": "runs/student",
        "model": _shipped(64, 80, (3, 1, 2)),
        "caption_steps": 600,
        "task_steps": 0,
        "optimiser": {"learning_rate": 1e-3, "warmup": 0.03},
    }


def _shipped(width: int, image_width: int, layers: tuple[int, int, int]) -> Options:
    """Sizes of a model for pictograms; layers of image encoder, text decoder and multimodal decoder."""
    image, text, multimodal = layers
    return {
        "embed_dim": width,
        "image_encoder": {"width": image_width, "layers": image},
        "text_decoder": {"vocab_size": 144, "context_length": 14, "width": width, "layers": text},
        "multimodal_decoder": {"width": width, "layers": multimodal},
    }


RECIPES: dict[str, Recipe] = {
    **{
        f"pictograms_{task}": Recipe("distill", partial(pictograms, task))
        for task in ("captioning", "vqa", "nlvr2", "snli_ve")
    },
    "own_images": Recipe("distill", own_images),
    **{
        f"coca_large_to_{student}_{benchmark}": Recipe("distill", partial(coca_large, student, benchmark))
        for student in EPOCHS
        for benchmark in BENCHMARKS
    },
    "pretrain_teacher": Recipe("pretrain", pretrain_teacher),
    "pretrain_student": Recipe("pretrain", pretrain_student),
}


def recipes_of(command: str) -> dict[str, Recipe]:
    """The recipes of a command, by name."""
    return {name: recipe for name, recipe in RECIPES.items() if recipe.command == command}
