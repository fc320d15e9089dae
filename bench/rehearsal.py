"""A whole job at real size, on a CPU: from open_clip's checkpoint to captions of what was exported to open_clip again.

    python bench/rehearsal.py [--preset coca_ViT-L-14] [--out runs/rehearsal] [--limit 12] [--write bench/REHEARSAL.md]

Makes images of 480 x 640 pixels in COCO's form and a CoCa of random weights, then runs the commands that a person
would: import, finetune (two steps), distil into tiny12 (one round of two steps; all else as the recipe has it, but for
batch, probe, and the items that the student's start is made of), evaluate, export, import of the export, captions.
Before that `plan` is asked. What it says stands beside what each command took: seconds, CPU seconds, and memory. Random
weights say nothing of worth: this proves that the commands go through at this size, and what they cost.

With open_clip installed (`pip install --no-deps open-clip-torch ftfy regex`) the weights are those that it gives a new
model, and its model captions the images, too; else our export writes the weights, and our model alone captions.

A stage whose memory exceeds --limit (GiB, mapped files aside) is ended, and so is the rehearsal. Called again with the
same --out it goes on with the stages that are missing.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "core"), str(ROOT / "kernels"), str(ROOT / "tests" / "optima")]

GIB = 2**30
RECIPE = "coca_large_to_tiny12_coco"
DATA = Path("data/coco_karpathy")
TEACHER = Path("runs/coca_large_coco")
STUDENT = Path(f"runs/{RECIPE}")
STEPS, BATCH, PROBE, START, TEXT_LENGTH = 2, 1, 2, 16, 32
IMAGES = {"train": 6, "val": 2, "test": 2}
CAPTIONS = 5
SIDES = (480, 640)
POLL = 0.5


@dataclass
class Stage:
    """What a command took. resident: MiB at the most, mapped files included; anonymous: without them, workers included.

    lines: what it printed, with the CPU seconds that it had taken by then.
    """

    name: str
    seconds: float = 0.0
    cpu: float = 0.0
    resident: float = 0.0
    anonymous: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def cpu_between(self, before: str, after: str) -> float:
        """CPU seconds from the first line that begins with `before` to the first later one that begins with `after`."""
        start = next(i for i, (_, line) in enumerate(self.lines) if line.startswith(before))
        end = next(i for i, (_, line) in enumerate(self.lines) if i > start and line.startswith(after))
        return self.lines[end][0] - self.lines[start][0]


class Rehearsal:
    """Runs commands in a folder, one after the other, and keeps what they took."""

    def __init__(self, out: Path, limit: float, threads: int) -> None:
        self.out, self.limit, self.threads = out, limit, threads
        self.stages: dict[str, Stage] = {}
        self.kept = out / "stages.json"
        self.done = (
            {row["name"]: Stage(**row) for row in json.loads(self.kept.read_text())} if self.kept.exists() else {}
        )

    def optima(self, name: str, *words: object) -> Stage:
        """A command of ours."""
        return self._run(name, [sys.executable, "-u", "-m", "optima", *map(str, words)])

    def clear(self, name: str, folder: Path) -> None:
        """Takes away what a stage left in a folder of the rehearsal's when it was interrupted."""
        if name not in self.done:
            shutil.rmtree(self.out / folder, ignore_errors=True)

    def part(self, name: str, *words: object) -> Stage:
        """A part of this script, in a process of its own."""
        return self._run(name, [sys.executable, "-u", __file__, "--part", name, *map(str, words)])

    def _run(self, name: str, command: Sequence[str]) -> Stage:
        if name in self.done:
            self.stages[name] = self.done[name]
            return self.done[name]
        stage = self.stages[name] = Stage(name)
        print(f"== {name}: {' '.join(command[3:])}", flush=True)
        paths = [*(str(ROOT / part) for part in ("", "core", "kernels")), *os.environ.get("PYTHONPATH", "").split(":")]
        environment = os.environ | {"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": str(self.threads)}
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.out, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=_read, args=(process, stage))
        reader.start()
        pause = POLL / 32  # A command that ends soon is looked at, too.
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            stage.anonymous = max(stage.anonymous, _anonymous(process.pid))
            # Not of wait4: what is started has its starter's peak for its own, until the program is there.
            stage.resident = max(stage.resident, _resident_peak(process.pid))
            if stage.anonymous > self.limit * 1024:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(pause)
            pause = min(POLL, 2 * pause)
        process.returncode = os.waitstatus_to_exitcode(status)
        reader.join()
        stage.seconds = time.monotonic() - started
        stage.cpu = usage.ru_utime + usage.ru_stime
        print(
            f"   {stage.seconds:.0f} s, {stage.cpu:.0f} CPU s, {stage.resident:.0f} MiB resident, "
            f"{stage.anonymous:.0f} MiB anonymous",
            flush=True,
        )
        if stage.anonymous > self.limit * 1024:
            raise SystemExit(f"{name} took more than {self.limit:g} GiB and was ended")
        if process.returncode:
            raise SystemExit(f"{name} ended with status {process.returncode}")
        self.kept.write_text(json.dumps([asdict(stage) for stage in self.stages.values()]))
        return stage


def _read(process: "subprocess.Popen[str]", stage: Stage) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        stage.lines.append((_cpu_seconds(process.pid), line.rstrip("\n")))
        print(f"   {line}", end="", flush=True)


def _cpu_seconds(pid: int) -> float:
    """Of a process so far, its threads included; what its children took comes with their end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_peak(pid: int) -> float:
    """MiB that a process has held at the most; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _anonymous(root: int) -> float:
    """MiB of a process and its children that no file stands behind; what a fork shares counts twice.

    smaps_rollup would count it once, but holds up the process while it walks its pages.
    """
    total, found = 0.0, [root]
    while found:
        pid = found.pop()
        try:
            sizes = Path(f"/proc/{pid}/status").read_text().splitlines()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in sizes if line.startswith(("RssAnon:", "RssShmem:"))) / 1024
        found += map(int, children)
    return total


def make_data(root: Path) -> None:
    """Images of gradients and noise, COCO's captions of them, and Karpathy's split of the same."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    site: dict[str, dict[str, list[Any]]] = {name: {"images": [], "annotations": []} for name in ("train", "val")}
    karpathy = []
    for number, split in enumerate([name for name, count in IMAGES.items() for _ in range(count)], 1):
        part = "train" if split == "train" else "val"
        name = f"COCO_{part}2014_{number:012d}.jpg"
        (root / f"{part}2014").mkdir(exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(SIDES[::-1], Image.BICUBIC)
        pixels = np.asarray(coarse, np.float32) + draw.normal(0, 8, (*SIDES, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{part}2014" / name, quality=90)
        texts = [" ".join(("a", *draw.choice(WORDS, 8))) + "." for _ in range(CAPTIONS)]
        site[part]["images"].append({"id": number, "file_name": name, "height": SIDES[0], "width": SIDES[1]})
        for i, text in enumerate(texts):
            site[part]["annotations"].append({"id": number * CAPTIONS + i, "image_id": number, "caption": text})
        sentences = [{"raw": text} for text in texts]
        karpathy.append(
            {"filepath": f"{part}2014", "filename": name, "cocoid": number, "split": split, "sentences": sentences}
        )
    for part, content in site.items():
        (root / "annotations" / f"captions_{part}2014.json").write_text(json.dumps(content))
    (root / "dataset_coco.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))


WORDS = ("red", "green", "blue", "bright", "dark", "soft", "wide", "hill", "cloud", "field", "sky", "sea", "wall")


def write_weights(preset: str, path: Path) -> None:
    """A checkpoint of random weights in open_clip's layout, as its training loop would write it."""
    import torch

    from optima.coca import CoCa
    from optima.coca.open_clip import to_open_clip
    from optima.coca.presets import TEACHERS

    torch.manual_seed(0)
    open_clip = _open_clip()
    if open_clip is None:
        weights = to_open_clip(CoCa(TEACHERS[preset]))
        print("open_clip is not installed: our export wrote the weights")
    else:
        model = open_clip.create_model(preset)
        with torch.no_grad():
            model.text_decoder.text_projection.normal_(std=0.02)  # open_clip leaves it as the memory was
        weights = model.state_dict()
        print(f"open_clip {open_clip.__version__} initialised the weights")
    torch.save({"epoch": 0, "state_dict": weights}, path)
    print(f"{len(weights)} tensors, {sum(tensor.numel() for tensor in weights.values()) / 1e6:.1f} M weights")


def caption_by_open_clip(exported: Path, root: Path) -> None:
    """Prints, as JSON, the captions that open_clip's model gives the validation images: greedy, from its own logits."""
    import torch

    from optima.coca.checkpoint import read_config
    from optima.data.config import DataConfig, LoaderConfig, TransformConfig
    from optima.tasks.choose import open_data

    open_clip = _open_clip()
    if open_clip is None:
        print("open_clip is not installed")
        return
    model = open_clip.create_model(f"local-dir:{exported}").eval()
    config = read_config(Path("again.safetensors"))
    loader = LoaderConfig(workers=0, transform=TransformConfig(fit="squash"))
    options = DataConfig(name="coco", root=root, tokenizer="clip", text_length=TEXT_LENGTH, loader=loader)
    data = open_data(options, "captioning", config, device=torch.device("cpu"))
    mean_C11, std_C11 = (
        torch.tensor(values).view(3, 1, 1) for values in (config.image_encoder.mean, config.image_encoder.std)
    )
    captions = []
    for _, batch in data.held_batches("validation", 4, 0):
        pixels = ((batch.images[:, 0] + 1) / 2 - mean_C11) / std_C11
        tokens = torch.full((len(pixels), 1), data.tokenizer.start_id)
        with torch.no_grad():
            while tokens.shape[1] < TEXT_LENGTH:
                logits = model(pixels, tokens, output_labels=False)["logits"][:, -1]
                tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
        captions += data.tokenizer.decode(tokens)
    print(json.dumps(captions))


def _open_clip() -> Any:
    """The module, or None; the tests' oracle knows how to import it without torchvision."""
    from importlib.util import find_spec

    if find_spec("open_clip") is None:
        return None
    from open_clip_oracle import load_open_clip

    return load_open_clip()


def measure_rates() -> None:
    """Prints, as JSON, what a thread does at best: 10^12 operations a second in bf16, 10^12 bytes a second copied."""
    import torch

    def best(work: Any) -> float:
        times = []
        for _ in range(5):
            begun = time.process_time()
            work()
            times.append(time.process_time() - begun)
        return min(times)

    left, right = torch.randn(1024, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    rate = 2 * 1024 * 2048 * 2048 / best(lambda: left @ right) / 1e12
    copied = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e12
    print(json.dumps({"peak": round(rate, 4), "bandwidth": round(copied, 4)}))


def rehearse(run: Rehearsal, preset: str) -> None:
    """All stages."""
    run.clear("data", DATA)
    run.part("data")
    rates = json.loads(run.part("rates").lines[-1][1])
    run.part("weights", "--preset", preset)
    run.optima("import", "import", "--checkpoint", "open_clip.pt", "--preset", preset, "--output", "coca.safetensors")

    here = ("--data.loader.workers", 0)  # a worker, forked, would keep a copy of the weights that training changes
    data = ("--data.root", DATA, "--data.tokenizer", "clip", "--data.text_length", TEXT_LENGTH,
            "--data.loader.transform.fit", "squash", *here)  # fmt: skip
    chip = ("--chip", "cpu", "--peak", rates["peak"], "--bandwidth", rates["bandwidth"], "--json")
    own = ("--config", RECIPE, "--teacher", TEACHER / "model.safetensors", "--batch_size", BATCH,
           "--probe_size", PROBE, "--init_items", START, "--engine.rounds", 1, "--engine.steps_per_round", STEPS,
           "--threads", run.threads, *here)  # fmt: skip
    lesson = ("--task", "captioning", "--data.name", "coco", *data, "--batch_size", BATCH, "--threads", run.threads)
    run.optima(
        "plan of finetuning", "plan", "--stage", "finetune", "--teacher", "coca.safetensors", *lesson,
        "--engine.precision", "bf16", *chip,
    )  # fmt: skip
    run.optima("plan of distillation", "plan", *own[:2], "--teacher", "coca.safetensors", *own[4:], *chip)

    run.clear("finetune", TEACHER)
    run.optima(
        "finetune", "finetune", "--model", "coca.safetensors", *lesson, "--run", TEACHER, "--steps", STEPS,
        "--log_every", 1, "--evaluate_every", 0, "--evaluate_batch", 2, "--test_items", 2,
        "--optimiser.learning_rate", 1e-6,
    )  # fmt: skip
    run.clear("distil", STUDENT)
    run.optima("distil", "distill", *own)
    student = STUDENT / "student.safetensors"
    scored = ("--data.name", "coco", *data, "--split", "validation", "--batch_size", 4)
    run.optima("evaluate", "evaluate", "--model", student, *scored, "--predictions", "said")
    run.optima("export", "export", "--model", student, "--format", "open_clip", "--output", "exported")
    again = ("--checkpoint", "exported/open_clip_model.safetensors", "--output", "again.safetensors")
    run.optima("import of the export", "import", *again)
    run.optima("captions", "evaluate", "--model", "again.safetensors", *scored, "--predictions", "said_again")
    run.part("captions by open_clip")


def refuse_other_captions(run: Rehearsal) -> str:
    """Ends the rehearsal if the export says other things than the student -> what was found, as a sentence."""
    files = [next((run.out / folder).glob("captions*.json")) for folder in ("said", "said_again")]
    ours, again = ([row["caption"] for row in json.loads(path.read_text())] for path in files)
    if ours != again:
        raise SystemExit(f"captions of the export differ: {again} for {ours}")
    told = run.stages["captions by open_clip"].lines[-1][1]
    if not told.startswith("["):
        return f"The {len(ours)} captions of the export are the student's; {told}."
    if json.loads(told) != ours:
        raise SystemExit(f"open_clip's captions differ: {told} for {ours}")
    return f"The {len(ours)} captions of the export, by our model and by open_clip's own, are the student's."


def page(run: Rehearsal, preset: str, captions: str) -> str:
    """The table and what it was made with; a stage that was not run is called not measured."""
    planned = {
        name: json.loads(run.stages[plan].text)
        for name, plan in (("finetune", "plan of finetuning"), ("distil", "plan of distillation"))
        if plan in run.stages
    }
    lines = ["| stage | seconds | CPU seconds | planned | GiB, mapped files aside | planned | GiB resident |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name in STAGES:
        memory = f"{planned[name]['needs']['peak'] / GIB:.2f}" if name in planned else ""
        stage = run.stages.get(name)
        if stage is None:
            lines.append(f"| {name} | not measured | | | | {memory} | |")
            continue
        lines.append(
            f"| {name} | {stage.seconds:.0f} | {stage.cpu:.0f} | | {stage.anonymous / 1024:.2f} | {memory} | "
            f"{stage.resident / 1024:.2f} |"
        )
        if name == "finetune":
            seconds = stage.cpu_between("step 1/", "step 2/")
            lines.append(f"| – its second step | | {seconds:.1f} | {planned[name]['seconds']:.1f} | | | |")
        if name == "distil":
            seconds = stage.cpu_between("step 0:", "round ")
            lines.append(f"| – its round and probe | | {seconds:.1f} | {3600 * planned[name]['hours']:.1f} | | | |")
    return "\n\n".join(
        [TITLE, _head(run, preset), NOTES.format(preset=preset, **_counts()), "\n".join(lines), captions]
    )


def _head(run: Rehearsal, preset: str) -> str:
    """Command, commit, date, machine, versions."""
    commit = _output("git", "rev-parse", "--short", "HEAD") + ("+" if _output("git", "status", "--porcelain") else "")
    processor = next(x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "name" in x)
    return (
        f"`python bench/rehearsal.py --preset {preset}`, commit {commit}, {datetime.date.today()}, {processor} "
        f"({os.cpu_count()} cores, {run.threads} used, shared with other work), torch "
        f"{importlib.metadata.version('torch')}, Python {platform.python_version()}."
    )


STAGES = (
    "data", "rates", "weights", "import", "plan of finetuning", "plan of distillation", "finetune", "distil",
    "evaluate", "export", "import of the export", "captions", "captions by open_clip",
)  # fmt: skip
TITLE = "# A whole job at real size, on a CPU"
NOTES = """{preset} with random weights is imported, finetuned for {steps} steps, distilled into tiny12 for a round of
{steps} steps, evaluated, exported to open_clip, read again, and captions are generated from the export. The settings
are the recipe's, but for batch ({batch} x 4), probe ({probe} items) and what the student's start is made of ({start}
items). {images} images of 480 x 640, captions and Karpathy's split in COCO's form. They are loaded within the training
process (`--data.loader.workers 0`): a worker, forked, would keep a copy of the weights that training on a CPU changes.

Seconds are of the whole command, on a machine that other work shares: CPU seconds say more. What `plan` said beforehand
(`--chip cpu`, with the rates that one thread reaches in products and copies) is of the steps alone: no loading, start,
evaluation or checkpoint. Its memory counts tensors; a process with torch loaded takes about 0.4 GiB besides."""


def _counts() -> dict[str, int]:
    return {"steps": STEPS, "batch": BATCH, "probe": PROBE, "start": START, "images": sum(IMAGES.values())}


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="coca_ViT-L-14", choices=("coca_ViT-L-14", "coca_ViT-B-32"))
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"), help="a folder; it takes about 25 GB")
    parser.add_argument("--limit", type=float, default=12.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, default=ROOT / "bench/REHEARSAL.md")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page of what was run")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "data":
        make_data(DATA)
    elif options.part == "rates":
        measure_rates()
    elif options.part == "weights":
        write_weights(options.preset, Path("open_clip.pt"))
    elif options.part == "captions by open_clip":
        caption_by_open_clip(Path("exported"), DATA)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        run = Rehearsal(options.out.resolve(), options.limit, options.threads)
        if options.page:
            run.stages = run.done
        else:
            rehearse(run, options.preset)
        captions = refuse_other_captions(run) if len(run.stages) == len(STAGES) else "What is not measured was not run."
        text = page(run, options.preset, captions) + "\n"
        options.write.write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
