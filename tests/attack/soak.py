"""Kills commands at random, fills their disks and damages their files, for as long as asked, and prints one line.

    python tests/attack/soak.py --minutes 120
    python tests/attack/soak.py --kills 8        8 kills of each command, and nothing else

Six commands, small enough to take some seconds, are run once undisturbed; that is what every disturbed one must come
to, bit for bit, by the same command, with `--resume` where there is something to resume, and with nothing deleted by
hand. A full disk, and a damaged file, may end a command with status 2 and a line, never with a traceback. Damage to a
file that nothing can replace may also be refused for good, in a line; that is counted.

It knows the product by its command line alone.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

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


@dataclass
class Tally:
    """What is printed at the end; `faults` are lines, each a thing that must not have been."""

    kills: Counter[str] = field(default_factory=Counter)
    full: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    commands: int = 0
    finished: int = 0
    refused: int = 0
    longest: float = 0.0
    peak: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, fault: str) -> None:
        """Says it at once, for whoever watches for two hours."""
        print(fault, flush=True)
        self.faults.append(fault)

    def line(self, minutes: float) -> str:
        def counted(found: Counter[str]) -> str:
            return f"{sum(found.values())} ({', '.join(f'{name} {count}' for name, count in sorted(found.items()))})"

        kinds = Counter(fault.split(":")[0] for fault in self.faults)
        return (
            f"soak: {minutes:.0f} min, {self.commands} commands; kills {counted(self.kills)}; full disks "
            f"{counted(self.full)}; damaged files {counted(self.damaged)}; {self.finished} came to equal bits, "
            f"{self.refused} refused in a line; longest {self.longest:.0f} s, peak {self.peak} MiB; "
            f"faults {len(self.faults)}{f' {dict(kinds)}' if kinds else ''}"
        )


class Soak:
    """The disturbances, one after the other, over one ground of data and models."""

    def __init__(self, ground: Path, command: list[str], seed: int, longest: float) -> None:
        self.ground, self.command, self.longest = ground, command, longest
        self.draws = Random(seed)
        self.tally = Tally()
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.sizes: dict[str, int] = {}
        self.trial = 0

    def start(self, words: list[str], limit: int | None = None) -> subprocess.Popen[str]:
        """A command in a group of its own; `limit`: bytes of the largest file that it may write."""

        def bound() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        self.tally.commands += 1
        return subprocess.Popen(
            [*self.command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True, cwd=self.ground, preexec_fn=bound,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], what: str) -> tuple[int, str]:
        """Waits for the end -> exit status and what was said; a fault is noted for a hang, a traceback, a status."""
        began = time.monotonic()
        try:
            _, error = process.communicate(timeout=self.longest)
        except subprocess.TimeoutExpired:
            self.kill(process)
            error = process.communicate()[1]
            self.tally.note(f"hung: {what}")
        self.tally.longest = max(self.tally.longest, time.monotonic() - began)
        self.tally.peak = max(self.tally.peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
        if "Traceback" in error:
            self.tally.note(f"traceback: {what}: {error.strip().splitlines()[-1]}")
        elif process.returncode not in (0, 2, -signal.SIGKILL):
            self.tally.note(f"status: {what}: {process.returncode}")
        return process.returncode, error

    def kill(self, process: subprocess.Popen[str]) -> None:
        """Ends a command and all that it has started, as the death of a machine does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def run_for(self, process: subprocess.Popen[str], share: float, job: Job) -> bool:
        """Lets it do a share of the undisturbed command's work, however busy the machine -> whether it still runs."""
        began, used = time.monotonic(), 0.0
        while process.poll() is None and used < share * self.seconds[job.name]:
            if time.monotonic() - began > self.longest:
                break  # whoever waits for its end says that it hangs
            time.sleep(0.2)  # looking has a price on a busy machine
            used = spent(process.pid)
        # The same work takes more CPU time where others use the caches.
        self.seconds[job.name] = max(self.seconds[job.name], used)
        return process.poll() is None

    def prepare_ground(self) -> None:
        """Images, models, and each command's results undisturbed."""
        write_images(self.ground / "images")
        for name, more in (("teacher", "--task_steps 1"), ("student", "--task_steps 0 --seed 1")):
            words = f"pretrain --caption_steps 1 --images 2 --threads 1 --run {name} {SIZES} {more}"
            status, error = self.finish(self.start(words.split()), name)
            if status:
                raise SystemExit(f"{name} cannot be made: {error}")
        for job in jobs():
            out, before = self.ground / f"whole-{job.name}", spent_by_children()
            status, error = self.finish(self.start(job.command(self.ground, out, again=False)), job.name)
            if status:
                raise SystemExit(f"{job.name} fails undisturbed: {error}")
            self.seconds[job.name] = spent_by_children() - before
            self.expected[job.name] = results(job, out)
            self.sizes[job.name] = max(path.stat().st_size for path in out.rglob("*") if path.is_file())

    def disturb_by_kills(self, job: Job, most: int) -> int:
        """Starts and kills up to `most` times, then lets it end -> how many kills hit it."""
        out, hit = self.new_place(job), 0
        for _ in range(self.draws.randint(1, most)):
            process = self.start(job.command(self.ground, out, again=out.exists()))
            alive = self.run_for(process, self.draws.uniform(0.02, 1.2), job)
            self.kill(process)
            self.finish(process, f"{job.name} that was killed")
            if not alive:
                break
            hit += 1
        self.tally.kills[job.name] += hit
        self.end_well(job, out, f"{job.name} after {hit} kills")
        return hit

    def disturb_by_full_disk(self, job: Job) -> None:
        """Lets no file grow above some bytes, or fills a small file system if one can be mounted; then makes room."""
        out = self.new_place(job)
        self.tally.full[job.name] += 1
        size = self.draws.randint(512, int(1.2 * self.sizes[job.name]))
        with small_disk(out, 3 * size) as grow:
            limit = size if grow is None else None
            status, error = self.finish(
                self.start(job.command(self.ground, out, again=False), limit), f"{job.name} on a full disk"
            )
            if status == 2 and "optima: " not in error:
                self.tally.note(f"unsaid: {job.name} on a full disk: {error[-200:]}")
            if grow is not None:
                grow()
            self.end_well(job, out, f"{job.name} after a full disk of {size} bytes")

    def disturb_by_damage(self, job: Job) -> None:
        """Kills, damages one of the files, and lets it go on: to equal bits, or to a refusal."""
        out = self.new_place(job)
        process = self.start(job.command(self.ground, out, again=False))
        self.run_for(process, self.draws.uniform(0.5, 1.1), job)
        self.kill(process)
        self.finish(process, f"{job.name} that was killed")
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
        if not files:
            return shutil.rmtree(out, ignore_errors=True)
        self.tally.damaged[job.name] += 1
        path = self.draws.choice(files)
        how = damage(path, self.draws)
        own = any(path in out.glob(pattern) for pattern in job.results)  # a result is nobody's to check
        self.end_well(job, out, f"{job.name} with {path.name} {how}", damaged="trusted" if own else kind_of(path))

    def end_well(self, job: Job, out: Path, what: str, *, damaged: str = "") -> None:
        """Runs the command to its end, to the expected results.

        damaged: of what kind the file is that was damaged, see `kind_of`; "" if none was.
        """
        status, error = self.finish(self.start(job.command(self.ground, out, again=True)), what)
        if status == 0 and results(job, out) == self.expected[job.name]:
            self.tally.finished += 1
        elif damaged == "trusted" or (damaged == "needed" and re.search(r"^optima: (?!warning)", error, re.MULTILINE)):
            self.tally.refused += 1
        else:
            last = (error.strip().splitlines() or [""])[-1]
            self.tally.note(f"{'bits' if status == 0 else 'unfinished'}: {what}: {last[:300]}")
            return  # it is kept for whoever looks into it
        shutil.rmtree(out, ignore_errors=True)

    def new_place(self, job: Job) -> Path:
        self.trial += 1
        return self.ground / f"trial-{self.trial}-{job.name}"


def spent(session: int) -> float:
    """CPU seconds of a session's processes and of the children that they have waited for."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def spent_by_children() -> float:
    """CPU seconds of all that this process has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def kind_of(path: Path) -> str:
    """What may come of damage to a file.

    "trusted": its content is taken at its word, so a run may end otherwise, or be refused. "needed": damage is noticed,
    and refused if no spare is left. "written anew": damage is of no consequence.
    """
    if path.name in ("config.yaml", "settings.yaml"):
        return "trusted"
    if path.name in ("metrics.jsonl", "report.html", "samples.json", "words.json", "rejected.jsonl"):
        return "written anew"
    return "needed"


def results(job: Job, out: Path) -> dict[str, str]:
    """Digests of the files that must be the same."""
    found = sorted(path for pattern in job.results for path in out.glob(pattern))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def damage(path: Path, draws: Random) -> str:
    """Damages a file -> how."""
    data = bytearray(path.read_bytes())
    how = draws.choice(["cut", "emptied", "flipped", "lost", "garbled"])
    if how == "lost":
        path.unlink()
        return how
    if how == "flipped" and data:
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    else:
        data = {"cut": data[: len(data) // 2], "garbled": bytearray(draws.randbytes(200))}.get(how, bytearray())
    path.write_bytes(data)
    return how


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> "contextlib.AbstractContextManager[Callable[[], None] | None]":  # type: ignore[misc]
    """A file system of `size` bytes at the path, and what makes it large; None where mounting is not allowed."""
    path.mkdir()
    size = max(size, 2**16)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(path)], check=True, capture_output=True)
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0, help="how long, after the undisturbed runs")
    parser.add_argument("--kills", type=int, default=0, help="that many kills of each command, and nothing else")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--longest", type=float, default=180, help="seconds after which a command counts as hung")
    parser.add_argument("--ground", type=Path, help="an empty folder to work in; by default a temporary one")
    parser.add_argument("--command", default=f"{sys.executable} -P -m optima.run", help="what starts the product")
    words = parser.parse_args()
    ground = (words.ground or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    ground.mkdir(parents=True, exist_ok=True)
    soak = Soak(ground, words.command.split(), words.seed, words.longest)
    soak.prepare_ground()
    began = time.monotonic()
    if words.kills:
        for job in jobs():
            while soak.tally.kills[job.name] < words.kills and not soak.tally.faults:
                soak.disturb_by_kills(job, min(3, words.kills - soak.tally.kills[job.name]))
    while time.monotonic() - began < 60 * words.minutes:
        job = soak.draws.choice(jobs())
        soak.draws.choice(
            [lambda job: soak.disturb_by_kills(job, 3), soak.disturb_by_full_disk, soak.disturb_by_damage]
        )(job)
    print(soak.tally.line((time.monotonic() - began) / 60))
    if not soak.tally.faults and words.ground is None:
        shutil.rmtree(ground, ignore_errors=True)
    return 1 if soak.tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
