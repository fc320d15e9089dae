"""Writes run directories like those of `distill`, with made-up but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

MODULES = {"image_encoder": 2, "text_decoder": 2, "multimodal_decoder": 2}
STRENGTHS = (1 / 3, 1.0, 3.0)
COLOURS = ("#d1495b", "#edae49", "#00798c", "#66a182", "#30638e")
SHAPES = ("circle", "square", "bar")

Painter = Callable[[random.Random], tuple[Image.Image, str]]


def loss_names() -> list[str]:
    layers = ([f"hidden/{m}/{i}", f"attention/{m}/{i}"] for m, count in MODULES.items() for i in range(count))
    return ["task", "logits", *chain.from_iterable(layers)]


def shapes(rng: random.Random) -> tuple[Image.Image, str]:
    """A 64 x 64 image of two shapes, and a caption of it."""
    image = Image.new("RGB", (64, 64), rng.choice(["#f3ead9", "#dbe7f0", "#23303d"]))
    draw = ImageDraw.Draw(image)
    names = []
    for left in (4, 36):
        name, colour, top = rng.choice(SHAPES), rng.choice(COLOURS), rng.randrange(4, 36)
        box = (left, top, left + 23, top + (23 if name != "bar" else 8))
        (draw.ellipse if name == "circle" else draw.rectangle)(box, fill=colour)
        names.append(name)
    return image, f"a {names[0]} to the left of a {names[1]}"


def write_run(
    path: Path,
    seed: int = 0,
    rounds: int = 60,
    task: str = "captioning",
    arms: list[tuple[str, ...]] | None = None,
    paint: Painter = shapes,
    samples: int = 24,
) -> Path:
    """A finished run directory with every optional file."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    (path / "samples").mkdir()
    rows = _rounds(rng, rounds, arms or [(module,) for module in MODULES])
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text(
        f"task: {task}\nseed: {seed}\nrounds: {rounds}\nsteps_per_round: 20\npolicy:\n  name: discounted_thompson\n"
        "  gamma: 0.9\nlearning_rate: 0.001\nweights:\n  task: 1.0\n  logits: 1.0\n  hidden: 1.0\n  attention: 0.5\n"
    )
    write_json(path / "summary.json", _summary(rng, task, rows, seed))
    write_json(path / "samples.json", _samples(rng, path, task, paint, samples))
    caption = ["a", "circle", "to", "the", "left", "of", "a", "square"]
    centre = {word: (rng.random() * 8, rng.random() * 8) for word in caption}
    maps = [
        [[math.exp(-((y - centre[w][0]) ** 2 + (x - centre[w][1]) ** 2) / 6) / 12 for x in range(8)] for y in range(8)]
        for w in caption
    ]
    write_json(
        path / "cross_attention.json",
        {"image": "samples/000_0.png", "caption": caption, "maps": maps, "grid": [8, 8]},
    )
    return path


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """Reads a JSON file, lets `change` alter the value in place, and writes it back."""
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def _rounds(rng: random.Random, rounds: int, arms: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    losses = {name: rng.uniform(0.5, 3.0) for name in loss_names()}
    count, total = [0.0] * len(arms), [0.0] * len(arms)
    rows = []
    for number in range(rounds):
        untried = [k for k in range(len(arms)) if count[k] == 0]
        means = [t / max(n, 1e-9) for t, n in zip(total, count, strict=True)]
        stds = [0.05 / math.sqrt(max(n, 1e-9)) for n in count]
        arm = untried[0] if untried else max(range(len(arms)), key=lambda k: rng.gauss(means[k], stds[k]))
        reward = rng.gauss(0.02, 0.012)
        for name in losses:
            module = name.split("/")[1] if "/" in name else None
            help_of_round = 0.055 if module is None or module in arms[arm] else 0.008
            fall = help_of_round * rng.uniform(0.3, 1.3) * math.exp(-2.5 * number / rounds)
            reward += fall * (4 if module in arms[arm] else 0.5) / len(losses)
            losses[name] *= 1 - fall + rng.gauss(0, 0.006)
        count = [0.9 * n for n in count]
        total = [0.9 * t for t in total]
        count[arm] += 1
        total[arm] += reward
        posterior: dict[str, Any] = {}
        if all(count):
            names = ["+".join(modules) for modules in arms]
            posterior = {
                "mean": {a: t / n for a, t, n in zip(names, total, count, strict=True)},
                "std": {a: 0.03 / math.sqrt(n) for a, n in zip(names, count, strict=True)},
            }
        computed = [n for n in losses if "/" not in n or n.split("/")[1] in arms[arm]]
        rows.append(
            {
                "round": number,
                "step": 20 * (number + 1),
                "arm": arm,
                "modules": list(arms[arm]),
                "strengths": {module: rng.choice(STRENGTHS) for module in arms[arm]},
                "weights": {
                    f"{kind}/{module}": 50 / (number + 1) for module in arms[arm] for kind in ("hidden", "attention")
                },
                "reward": reward,
                **posterior,
                "losses": {name: losses[name] * rng.uniform(0.93, 1.12) for name in computed},
                "probe": dict(losses),
                "learning_rate": 1e-3 * 0.5 * (1 + math.cos(math.pi * number / rounds)),
                "seconds": 3.9 * (number + 1),
                "steps_per_second": rng.uniform(4.9, 5.3),
            }
        )
    return rows


def _summary(rng: random.Random, task: str, rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    metric = "scene_accuracy" if task == "captioning" else "accuracy"
    after = rng.uniform(62, 80)
    return {
        "task": task,
        "headline_metric": metric,
        "scores": {
            "teacher": {metric: 87.1, "kind_accuracy": 98.0, "loss": 0.213},
            "before": {metric: 12.1, "kind_accuracy": 31.4, "loss": 2.31},
            "after": {metric: after, "kind_accuracy": 91.0, "loss": 0.402},
        },
        "parameters": {"teacher": 3_214_592, "student": 601_344},
        "images_per_second": {"teacher": 412.0, "student": 1311.0},
        "seconds": 243.6,
        "peak_mib": 1388.4,
        "command": f"optima distill --task {task} --seed {seed} --output runs/{task}-{seed}",
        "environment": {"python": "3.11.9", "torch": "2.13.0", "device": "CPU, 2 threads", "commit": "abc1234"},
        "learning_curve": [
            {"step": row["step"], metric: 12 + (after - 12) * (1 - math.exp(-4 * (i + 1) / len(rows)))}
            for i, row in enumerate(rows)
            if i % 5 == 4
        ],
    }


def _samples(rng: random.Random, path: Path, task: str, paint: Painter, count: int) -> list[dict[str, Any]]:
    entries = []
    for number in range(count):
        images, captions = [], []
        for side in range(2 if task == "nlvr2" else 1):
            image, caption = paint(rng)
            name = f"samples/{number:03d}_{side}.png"
            image.save(path / name)
            images.append(name)
            captions.append(caption)
        right = {"teacher": rng.random() < 0.9, "before": rng.random() < 0.15, "after": rng.random() < 0.75}
        wrong = "a circle and three bars"
        said = {model: captions[0] if right[model] else wrong for model in right}
        prompt = None
        if task != "captioning":
            prompt = "is there a circle in the image?"
            said = {model: "yes" if right[model] else "no" for model in right}
        reference = captions[0] if task == "captioning" else "yes"
        entries.append({"images": images, "prompt": prompt, "reference": reference, **said, "correct": right})
    return entries
