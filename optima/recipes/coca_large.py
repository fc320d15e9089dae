"""coca_ViT-L-14 into its students on the four benchmarks.

The numbers are our choice, from what is usual for these benchmarks and sizes: no run of them has been measured, and
they need a GPU. Their teachers are to be finetuned first; for VQAv2, say,

    optima finetune --model coca_ViT-L-14.safetensors --task vqa --data.name vqav2 --data.root data/vqav2
        --data.tokenizer clip --data.text_length 24 --run runs/coca_large_vqa
"""

from dataclasses import dataclass
from typing import Any

TEACHER = "coca_ViT-L-14"
"""The preset that every teacher of these recipes is finetuned from."""


@dataclass(frozen=True)
class Benchmark:
    """A data set: its task, training items, tokens of a text, and the least area of a training crop."""

    task: str
    data: str
    items: int
    text_length: int
    least_area: float


BENCHMARKS = {
    "coco": Benchmark("captioning", "coco_karpathy", 113_287, 32, 0.5),
    "vqa": Benchmark("vqa", "vqav2", 440_000, 24, 0.8),
    "nlvr2": Benchmark("nlvr2", "nlvr2", 86_373, 48, 0.8),
    "snli_ve": Benchmark("snli_ve", "snli_ve", 529_527, 32, 0.5),
}
TEACHER_FILES = {benchmark: f"runs/coca_large_{benchmark}/model.safetensors" for benchmark in BENCHMARKS}
"""Where the recipes look for their teachers."""

EPOCHS = {
    "base": {"coco": 10, "vqa": 10, "nlvr2": 20, "snli_ve": 5},
    "tiny12": {"coco": 20, "vqa": 15, "nlvr2": 30, "snli_ve": 8},
    "tiny6": {"coco": 20, "vqa": 15, "nlvr2": 30, "snli_ve": 8},
}
LEARNING_RATE = {"base": 1e-4, "tiny12": 3e-4, "tiny6": 3e-4}
STEP = 256
"""Items a step, over all ranks."""

STEPS_A_ROUND = 50


def coca_large(student: str, benchmark: str) -> dict[str, Any]:
    """Where the options of `distill` differ from its defaults."""
    chosen = BENCHMARKS[benchmark]
    steps = EPOCHS[student][benchmark] * chosen.items // STEP
    parts = 8 if benchmark == "nlvr2" else 4  # two images an item
    transform = {"fit": "squash", "least_area": chosen.least_area, "mirror": benchmark in ("coco", "snli_ve")}
    return {
        "task": chosen.task,
        "data": {
            "name": chosen.data,
            "root": f"data/{chosen.data}",
            "tokenizer": "clip",
            "text_length": chosen.text_length,
            "loader": {"transform": transform},
        },
        "run": f"runs/coca_large_to_{student}_{benchmark}",
        "teacher": TEACHER_FILES[benchmark],
        "student": student,
        "init": "teacher_pca",
        "batch_size": STEP // parts,
        "engine": {
            "rounds": -(-steps // STEPS_A_ROUND),
            "steps_per_round": STEPS_A_ROUND,
            "accumulate": parts,
            "objective": {"attention_heads": "relation", "relation_heads": 16},
            "optimiser": {"learning_rate": LEARNING_RATE[student]},
            "precision": "bf16",
            "ema": 0.999,
        },
        "evaluate_every": 20,
        "evaluate_items": 1000,
        "evaluate_batch": 64,
    }
