"""Everything worth running on a rented GPU, from a plain checkout, without network or installation.

    python bench/run_on_gpu.py [--part correctness kernels step data] [--minutes 9] [--out DIR]

Every item's result is a line of DIR/gpu.jsonl as soon as it is there. Items are grouped, and a group runs in a
process of its own: an illegal access ends that process and no other, and the group goes on without the item. A call
repeated with the same DIR and the same code does what is still missing. The last thing printed is a short table.

Exit status: 1 if anything was wrong, with names; 3 if nothing was, but something is still missing; 2 without a GPU.

`--rehearse` runs the same on a CPU, with tiny shapes in Triton's interpreter: a proof of the script, not of speed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "core"), str(ROOT / "kernels")]

from bench.gpu import lines  # noqa: E402
from bench.gpu.plan import PARTS, Group, groups_of  # noqa: E402
from bench.gpu.summary import summary  # noqa: E402

RESTARTS = 4
WARM_SHARE = 0.4  # of the time that is left may go into compiling what is timed afterwards
DEAD = 9
SANITIZED = 99
GROUP = lines.GROUP


@dataclass(frozen=True)
class Runner:
    """Starts groups and keeps what became of them."""

    out: Path
    code: str
    seed: int
    rehearse: bool
    deadline: float

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, group: Group, warm: bool = False) -> None:
        """The group to its end, as often as it dies and time allows."""
        tool = group.tool
        if tool and shutil.which(tool[0]) is None:
            if not warm:
                self._keep(group, "(tool)", ok=True, note=f"{tool[0]} is not installed")
            return
        for _ in range(RESTARTS):
            seconds = min(group.seconds, self.left() * (WARM_SHARE if warm else 1) - 5)
            if seconds < 5:
                if not warm:
                    self._keep(group, GROUP, ok=True, left="items for which no time was left")
                return
            if not self._once(group, seconds, warm):
                return

    def _once(self, group: Group, seconds: float, warm: bool) -> bool:
        """One process; whether another is needed."""
        log = self.out / f"{group.part}-{group.name}.log"
        command = [*group.tool, sys.executable, "-m", "bench.gpu.child", group.part, group.name]
        command += ["--package", group.package]
        command += [
            "--out",
            str(self.out),
            "--code",
            self.code,
            "--seconds",
            f"{seconds:.0f}",
            "--seed",
            str(self.seed),
        ]
        command += ["--rehearse"] * self.rehearse + ["--warm"] * warm
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=self._environment(group), stdout=file, stderr=file)
            try:
                status = process.wait(timeout=max(1.0, min(seconds if warm else 1.5 * seconds, self.left())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = None
        if warm or status in (0, 1):
            return False
        if status is None and self.left() < 1:
            self._keep(group, GROUP, ok=True, left=f"items from {_begun(log)} on")
        elif status is None:
            self._keep(group, _begun(log), ok=False, error=f"ended after {1.5 * seconds:.0f} s")
        elif status == SANITIZED:
            self._keep(group, "(tool)", ok=False, error=_sanitizer_says(log))
            return False
        elif status != DEAD:  # which has left a line itself
            self._keep(group, _begun(log), ok=False, error=f"the process died with status {status}: {_last(log)}")
        return True

    def _environment(self, group: Group) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "core"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            environment["TRITON_INTERPRET"] = "1"
        if group.tool:
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that an access beside a tensor is one outside
        return environment

    def _keep(self, group: Group, item: str, **found: object) -> None:
        place = {"part": group.part, "group": group.name, "code": self.code, "item": item}
        lines.append(self.out, place | found)


def _begun(log: Path) -> str:
    """The item that a process was at when it ended, or the group where it had come to none."""
    begun = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("begins: ")]
    return begun[-1].removeprefix("begins: ") if begun else GROUP


def _last(log: Path) -> str:
    found = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " ".join(found[-3:])[-300:]


def _sanitizer_says(log: Path) -> str:
    found = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("=========")]
    said = [line.removeprefix("=========").strip() for line in found]
    return " ".join([*said[:6], *said[-1:]])[:500]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="in this order; all if not given")
    parser.add_argument("--group", nargs="+", help="only groups of these names")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing runs any more")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", help="where results go")
    parser.add_argument("--jobs", type=int, help="processes at once where nothing is timed; one a core, 14 at most")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    options = parser.parse_args()
    if not options.rehearse and shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        print("no NVIDIA GPU is found, so there is nothing to measure; --rehearse tries the script", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(
        options.out.resolve(), lines.digest(), options.seed, options.rehearse, time.monotonic() + 60 * options.minutes
    )
    offered = [group for part in options.part for group in groups_of(part)]
    chosen = [group for group in offered if not options.group or group.name in options.group]
    jobs = options.jobs or min(14, len(os.sched_getaffinity(0)))
    print(f"results go to {runner.out / lines.FILE}, code {runner.code}, {jobs} processes at once", flush=True)
    for part in options.part:
        _run_part(runner, [group for group in chosen if group.part == part], jobs)
    text, status = summary(runner.out, runner.code, chosen)
    print(text)
    return status


def _run_part(runner: Runner, groups: Sequence[Group], jobs: int) -> None:
    """What may run together, then what is timed, one after the other."""
    alone = [group for group in groups if not group.together]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda group: _told(runner, group), [group for group in groups if group.together]))
        if not runner.rehearse:  # compilers have all cores now, so that they take none while times are taken
            list(pool.map(lambda group: runner.run(group, warm=True), alone))
    for group in alone:
        _told(runner, group)


def _told(runner: Runner, group: Group) -> None:
    started = time.monotonic()
    runner.run(group)
    place = (group.part, group.name)
    found = [line for key, line in lines.of_code(runner.out, runner.code).items() if key[:2] == place]
    wrong = sum(not line["ok"] for line in found)
    print(
        f"{group.part} {group.name}: {len(found)} items, {wrong} wrong, {time.monotonic() - started:.0f} s", flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
