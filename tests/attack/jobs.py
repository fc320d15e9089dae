"""Six commands that are disturbed, small enough to take some seconds, and what each must come to."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

SIZES = " ".join(
    f"--model.{tower}.{name}={value}"
    for tower in ("image_encoder", "text_decoder", "multimodal_decoder")
    for name, value in (("width", 16), ("layers", 1), ("heads", 2))
)
SCORED = "--evaluate_every 2 --evaluate_items 4 --test_items 8"
SMALL = f"--engine.rounds 6 --engine.steps_per_round 1 --batch_size 4 --probe_size 4 --samples 2 {SCORED}"


@dataclass(frozen=True)
class Job:
    """A command with its options, the one that names where it writes, and which of its files are always the same."""

    name: str
    words: str
    place: str
    results: tuple[str, ...]
    resumes: bool

    def command(self, ground: Path, out: Path, *, again: bool) -> list[str]:
        """The command line; `again` if an earlier one was disturbed."""
        words = [word.format(ground=ground) for word in self.words.split()]
        resume = ["--resume"] if again and self.resumes and (out / "config.yaml").exists() else []
        return [*words, self.place, str(out), *resume]


def jobs() -> list[Job]:
    """The commands; `own images` teaches its teacher first."""
    models = "--teacher {ground}/teacher/model.safetensors --student {ground}/student/model.safetensors --threads 1"
    compared = " ".join(f"--distill.{word[2:]}" if word[:2] == "--" else word for word in f"{models} {SMALL}".split())
    return [
        Job(
            "distill", f"distill {models} {SMALL} --checkpoint_every 1 --quiet", "--run", ("student.safetensors",), True
        ),
        Job(
            "own images",
            f"distill {SMALL} --init scratch --threads 1 --data.name folder --data.root {{ground}}/images "
            "--data.tokenizer texts --data.loader.workers 0 --data.loader.max_rejected 0.1 --teach.steps 2 "
            "--teach.batch_size 4 --checkpoint_every 1 --quiet",
            "--run",
            ("student.safetensors", "teacher/model.safetensors"),
            True,
        ),
        Job(
            "finetune",
            "finetune --model {ground}/student/model.safetensors --task vqa --steps 8 --batch_size 2 --threads 1 "
            f"--checkpoint_every 1 --log_every 1 {SCORED}",
            "--run",
            ("model.safetensors",),
            True,
        ),
        Job(
            "pretrain",
            "pretrain --caption_steps 4 --task_steps 4 --images 2 --threads 1 --checkpoint_every 1 --log_every 1 "
            f"{SIZES}",
            "--run",
            ("model.safetensors",),
            True,
        ),
        Job(
            "compare",
            f"compare {compared} --seeds 1 --task captioning --method optima,uniform",
            "--run",
            ("*/*/seed-0/student.safetensors",),
            False,
        ),
        Job(
            "prepare",
            "prepare --data folder --root {ground}/images --workers 1 --shard_mib 1 --tokenizer words --text_length 9 "
            "--max_rejected 0.1",
            "--out",
            ("*.tar", "*.idx", "*.json"),
            False,
        ),
    ]


def results(job: Job, out: Path) -> dict[str, str]:
    """Digests of the files that must be the same."""
    found = sorted(path for pattern in job.results for path in out.glob(pattern))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def write_images(root: Path, count: int = 300) -> None:
    """A folder of images with captions, one of them broken."""
    import numpy as np
    from PIL import Image

    root.mkdir()
    draws = np.random.default_rng(0)
    rows = []
    for place in range(count):
        name = f"{place}.jpg"
        Image.fromarray(draws.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(root / name, quality=90)
        rows.append({"file_name": name, "text": f"{place % 9} cats"})
    (root / "0.jpg").write_bytes((root / "0.jpg").read_bytes()[:500])
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
