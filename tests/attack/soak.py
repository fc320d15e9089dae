"""Kills commands at random, fills their disks and damages their files, for as long as asked, and prints one line.

    python tests/attack/soak.py --minutes 120
    python tests/attack/soak.py --kills 8                  8 kills of each command, and nothing else
    python tests/attack/soak.py --kills 8 --job prepare    of one command

Six commands, small enough to take some seconds, are run once undisturbed; that is what every disturbed one must come
to, bit for bit, by the same command, with `--resume` where there is something to resume, and with nothing deleted by
hand. A full disk, and a damaged file, may end a command with status 2 and a line, never with a traceback. Damage to a
file that nothing can replace may also be refused for good, in a line; that is counted.

The line is printed when the time is up, whatever is under way then, and after SIGTERM or Ctrl-C; what is under way does
not count. Every ten minutes it is printed as it stands.

It knows the product by its command line alone.
"""

import argparse
import contextlib
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from jobs import SIZES, Job, jobs, results, write_images

SAID_EVERY = 600.0
"""Seconds between two lines of figures as they stand."""


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

    def __init__(self, ground: Path, command: list[str], chosen: list[Job], seed: int, longest: float) -> None:
        self.ground, self.command, self.jobs, self.longest = ground, command, chosen, longest
        self.began = time.monotonic()
        self.draws = Random(seed)
        self.tally = Tally()
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.sizes: dict[str, int] = {}
        self.trial = 0
        self.enough = False

    def start(self, words: list[str], limit: int | None = None) -> subprocess.Popen[str]:
        """A command in a group of its own; `limit`: bytes of the largest file that it may write."""

        def bound() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        self.tally.commands += 1
        return subprocess.Popen(
            [*self.command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            process_group=0, cwd=self.ground, preexec_fn=bound,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], what: str) -> tuple[int, str]:
        """Waits for the end -> exit status and what was said; a fault is noted for a hang, a traceback, a status."""
        began, patience, error = time.monotonic(), Patience(self.longest), None
        while error is None:
            try:
                error = process.communicate(timeout=1)[1]
            except subprocess.TimeoutExpired:
                self.end_if_enough(process)
                if patience.is_over(spent(process.pid)):
                    self.tally.note(f"hung: {what}")
                    self.kill(process)
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
        patience, used = Patience(self.longest), 0.0
        while process.poll() is None and used < share * self.seconds[job.name]:
            time.sleep(0.2)  # looking has a price on a busy machine
            used = spent(process.pid)
            self.end_if_enough(process)
            if patience.is_over(used):
                self.tally.note(f"hung: {job.name}")
                break
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
        for job in self.jobs:
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

    def kill_each(self, most: int) -> None:
        """Kills every command that many times, or until there is a fault."""
        for job in self.jobs:
            while self.tally.kills[job.name] < most and not self.tally.faults and not self.enough:
                self.disturb_by_kills(job, min(3, most - self.tally.kills[job.name]))

    def disturb_until_enough(self) -> None:
        """One disturbance at random after the other."""
        said = time.monotonic()
        while not self.enough:
            job = self.draws.choice(self.jobs)
            self.draws.choice(
                [lambda job: self.disturb_by_kills(job, 3), self.disturb_by_full_disk, self.disturb_by_damage]
            )(job)
            if time.monotonic() - said > SAID_EVERY:
                said = time.monotonic()
                print(f"so far, {self.figures()}", flush=True)

    def figures(self) -> str:
        return self.tally.line((time.monotonic() - self.began) / 60)

    def end_after(self, seconds: float) -> None:
        """Raises Enough within what is under way after these seconds, if any, or at SIGTERM or Ctrl-C."""

        def end(*_: object) -> None:
            self.enough = True  # an exception raised here would be lost where Python calls whom nobody hears

        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def end_if_enough(self, process: subprocess.Popen[str]) -> None:
        """Raises Enough, and ends the process, if it is time."""
        if self.enough:
            self.kill(process)
            process.wait()
            raise Enough


class Enough(Exception):
    """The time is up, or the soak was told to stop."""


class Patience:
    """With a command, which hangs if it computes for too long, or in as long a time not even for a second.

    Time alone says nothing: on a busy machine the same command takes many times as long.
    """

    def __init__(self, longest: float) -> None:
        """longest: seconds."""
        self.longest = longest
        self.looked, self.used = time.monotonic(), 0.0

    def is_over(self, used: float) -> bool:
        """used: CPU seconds so far."""
        idle = False
        if time.monotonic() - self.looked > self.longest:
            idle = used - self.used < 1
            self.looked, self.used = time.monotonic(), used
        return idle or used > self.longest


def spent(group: int) -> float:
    """CPU seconds of a process group, and of the children that it has waited for."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
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
def small_disk(path: Path, size: int) -> Iterator[Callable[[], object] | None]:
    """A file system of `size` bytes at the path, and what makes it large; None where mounting is not allowed."""
    path.mkdir()
    size = max(size, 2**16)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    larger = ["mount", "-o", "remount,size=1g", str(path)]
    mounts = False
    try:
        mounts = shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
        yield (lambda: subprocess.run(larger, check=True, capture_output=True)) if mounts else None
    finally:
        if mounts:
            subprocess.run(["umount", "-l", str(path)], capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0, help="how long in all, with the undisturbed runs")
    parser.add_argument("--kills", type=int, default=0, help="that many kills of each command, and nothing else")
    parser.add_argument("--job", choices=[job.name for job in jobs()], action="append", help="by default all of them")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--longest", type=float, default=180, help="CPU seconds after which a command counts as hung")
    parser.add_argument("--ground", type=Path, help="an empty folder to work in; by default a temporary one")
    parser.add_argument("--command", default=f"{sys.executable} -P -m optima.run", help="what starts the product")
    words = parser.parse_args()
    ground = (words.ground or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    ground.mkdir(parents=True, exist_ok=True)
    chosen = [job for job in jobs() if not words.job or job.name in words.job]
    soak = Soak(ground, shlex.split(words.command), chosen, words.seed, words.longest)
    soak.end_after(60 * words.minutes)
    with contextlib.suppress(Enough):
        soak.prepare_ground()
        if words.kills:
            soak.kill_each(words.kills)
        elif words.minutes:
            soak.disturb_until_enough()
    print(soak.figures(), flush=True)
    if not soak.tally.faults and words.ground is None:
        shutil.rmtree(ground, ignore_errors=True)
    return 1 if soak.tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
