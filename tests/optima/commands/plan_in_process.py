"""Distils for two steps, all modules at once, and prints by how many bytes the process grew at its peak."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from optima.coca import CoCa, HeadSpec
from optima.coca.checkpoint import config_from_dict
from optima.coca.pairs import module_pairs
from optima.tasks.batches import TaskBatch
from optima.tasks.forward import TaskForward
from optima_core import BanditConfig, Distiller, DistillerConfig, ObjectiveConfig
from optima_core.recompute import recompute_activations


def resident(field: str) -> int:
    """Bytes in memory: "VmRSS" now, "VmHWM" at the most; getrusage's most is inherited from the process that forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def run(sizes: dict[str, Any]) -> None:
    """Builds, distils."""
    spec = {sizes["task"]: HeadSpec(sizes["classes"])} if sizes["classes"] else {}
    teacher, student = (CoCa(config_from_dict(sizes[name]), spec) for name in ("teacher", "student"))

    if sizes["recompute"]:
        recompute_activations(student.transformer_layers())

    def load(_: int, items: int = sizes["batch_size"]) -> TaskBatch:
        side, length = student.config.image_encoder.image_size, sizes["text_length"]
        tokens = torch.randint(1, student.config.text_decoder.vocab_size, (items, length))
        return TaskBatch(torch.rand(items, 1, 3, side, side), tokens, torch.zeros(items, dtype=torch.int64))

    distiller = Distiller(
        student.train(),
        TaskForward(student, sizes["task"]),
        TaskForward(teacher.eval().requires_grad_(False), sizes["task"]),
        module_pairs(student, teacher),
        load,
        load(0, sizes["probe_size"]),
        DistillerConfig(
            rounds=1,
            steps_per_round=2,
            precision=sizes["precision"],
            accumulate=sizes["accumulate"],
            objective=ObjectiveConfig(attention_heads="mean"),
            bandit=BanditConfig(policy="all_modules"),
        ),
    )
    distiller.run_round()


def main() -> None:
    torch.set_num_threads(1)
    sizes = json.loads(sys.argv[1])
    run(json.loads(sys.argv[2]))  # what is loaded and kept at the first use is not the step's
    before = resident("VmRSS")
    run(sizes)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
