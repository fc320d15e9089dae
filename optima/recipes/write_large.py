"""Writes the recipes of coca_ViT-L-14 and its students on the four benchmarks: `python -m optima.recipes.write_large`.

Each file names every hyper-parameter; here they are said once. They are our choice, from what is usual for these
benchmarks and sizes: no run of them has been measured.
"""

from pathlib import Path
from typing import Any

import yaml

BATCH = 256
"""Items a step, over all ranks."""

TEACHER = "coca_ViT-L-14"
"""The preset that every teacher of these recipes is finetuned from."""

TASKS: dict[str, dict[str, Any]] = {
    "coco": {"task": "captioning", "data": "coco_karpathy", "items": 113_287, "text_length": 32, "least_area": 0.5},
    "vqa": {"task": "vqa", "data": "vqav2", "items": 440_000, "text_length": 24, "least_area": 0.8},
    "nlvr2": {"task": "nlvr2", "data": "nlvr2", "items": 86_373, "text_length": 48, "least_area": 0.8},
    "snli_ve": {"task": "snli_ve", "data": "snli_ve", "items": 529_527, "text_length": 32, "least_area": 0.5},
}
TEACHER_FILES = {benchmark: f"runs/coca_large_{benchmark}/model.safetensors" for benchmark in TASKS}
"""Where the recipes look for their teachers, which are to be finetuned first."""

EPOCHS = {
    "base": {"coco": 10, "vqa": 10, "nlvr2": 20, "snli_ve": 5},
    "tiny12": {"coco": 20, "vqa": 15, "nlvr2": 30, "snli_ve": 8},
    "tiny6": {"coco": 20, "vqa": 15, "nlvr2": 30, "snli_ve": 8},
}
LEARNING_RATE = {"base": 1e-4, "tiny12": 3e-4, "tiny6": 3e-4}
STEPS_A_ROUND = 50


def recipe(student: str, benchmark: str) -> dict[str, Any]:
    """The configuration of `distill`."""
    chosen = TASKS[benchmark]
    steps = EPOCHS[student][benchmark] * chosen["items"] // BATCH
    pairs = benchmark == "nlvr2"
    return {
        "task": chosen["task"],
        "data": {
            "name": chosen["data"],
            "root": f"data/{chosen['data']}",
            "tokenizer": "clip",
            "text_length": chosen["text_length"],
            "answers": 3129,
            "loader": {
                "engine": "auto",
                "max_rejected": 0.01,
                "transform": {
                    "fit": "squash",
                    "interpolation": "bicubic",
                    "least_area": chosen["least_area"],
                    "most_stretch": 4 / 3,
                    "mirror": benchmark in ("coco", "snli_ve"),
                },
            },
        },
        "run": f"runs/coca_large_to_{student}_{benchmark}",
        "teacher": TEACHER_FILES[benchmark],
        "student": student,
        "init": "teacher_pca",
        "batch_size": BATCH // (8 if pairs else 4),
        "probe_size": 128,
        "layer_map": "uniform",
        "engine": {
            "rounds": -(-steps // STEPS_A_ROUND),
            "steps_per_round": STEPS_A_ROUND,
            "accumulate": 8 if pairs else 4,
            "objective": {
                "task": 1.0,
                "logits": 1.0,
                "hidden": 3.0,
                "attention": 3.0,
                "temperature": 2.0,
                "divergence": "forward",
                "attention_kind": "kl",
                "attention_heads": "relation",
                "relation_heads": 16,
                "normalize": "layernorm",
            },
            "optimiser": {
                "learning_rate": LEARNING_RATE[student],
                "schedule": "cosine",
                "warmup": 0.05,
                "final": 0.0,
                "weight_decay": 0.05,
                "beta1": 0.9,
                "beta2": 0.98,
                "clip": 1.0,
            },
            "bandit": {"policy": "discounted_thompson", "arms": "modules", "min_share": 0.1, "gamma": 0.8},
            "reward": {
                "source": "probe",
                "kind": "absolute",
                "floor": 0.3,
                "clip": 1.0,
                "baseline": False,
                "normaliser": "ratio",
                "gamma": 0.8,
            },
            "precision": "bf16",
            "ema": 0.999,
        },
        "evaluate_every": 20,
        "evaluate_items": 1000,
        "evaluate_batch": 64,
        "test_items": 0,
        "checkpoint_every": 5,
        "keep": 2,
        "seed": 0,
    }


def write(folder: Path = Path(__file__).parent) -> None:
    """Writes the twelve files."""
    for student in EPOCHS:
        for benchmark, chosen in TASKS.items():
            heading = (
                f"# {TEACHER} into {student} on {chosen['data']}; needs a GPU. Not measured: see write_large.py.\n"
                f"# The teacher: finetune --model {TEACHER}.safetensors --task {chosen['task']} "
                f"--data.name {chosen['data']} --data.root data/{chosen['data']}\n"
                f"#   --data.tokenizer clip --data.text_length {chosen['text_length']} "
                f"--run runs/coca_large_{benchmark}\n"
            )
            text = yaml.safe_dump(recipe(student, benchmark), sort_keys=False)
            (folder / f"coca_large_to_{student}_{benchmark}.yaml").write_text(heading + text, encoding="utf-8")


if __name__ == "__main__":
    write()
