"""Whether the Triton kernels compute what they should on this very GPU, asked before a call first uses them.

Kernels are proven in this project by an interpreter and by compilers; the first GPU that runs them may be a user's. So
before a call first takes the triton backend by default, the kernels of its variant (`optima_kernels.shared.variants`)
solve a small random problem, forward and backward, and are compared with the reference in float64 on the CPU.

- A process of its own does it (`selfcheck_process`): an illegal access, after which CUDA refuses every call of a
  process, happens there. It takes some seconds for the first variant and about two for each further one.
- Wrong and right numbers are kept in the user's cache directory, under the GPU's model, the versions of torch, Triton
  and ptxas, a digest of this package's code, and the variant. Nothing else is: what a missing compiler, a full memory
  or somebody else's fault did is forgotten with the process.
- Kernels that are wrong, do not compile or end the process are not used: the loss runs on the blocked backend, and a
  warning says so once. Where nothing could be found out, as with a GPU whose memory is taken, kernels are used, and a
  warning says that, once.
- Ranks of torch.distributed agree (`agreement`): where one finds its kernels unusable, all fall back, and one says so.
  A rank that finds that when the others, which waited for it for a minute, already use theirs cannot join them, and
  says so in an error.
- While a CUDA graph is being captured nothing can be checked, and what was not checked before is trusted: run the step
  once before capturing it, as torch asks for anyway.

OPTIMA_SELFCHECK=skip uses the kernels unchecked, OPTIMA_SELFCHECK=force checks anew whatever is kept.
"""

import functools
import hashlib
import json
import os
import threading
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from optima_kernels.shared import selfcheck_process
from optima_kernels.shared.agreement import agreed
from optima_kernels.shared.selfcheck_process import Answer, check, ptxas_version
from optima_kernels.shared.variants import DEFAULTS, usual

LOSSES = tuple(DEFAULTS)
VARIABLE = "OPTIMA_SELFCHECK"

_lock = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """What checking a variant of a loss found.

    `verdict`: "right"; "wrong" numbers; "unusable" kernels that do not compile or end their process; "unknown" where
    nothing was found out. `error` is the largest relative RMS error of the loss and its gradients, None if the kernels
    did not run; `detail` says what is wrong, and is empty if nothing is.
    """

    loss: str
    variant: str
    device: str
    torch: str
    triton: str
    ptxas: str
    verdict: Literal["right", "wrong", "unusable", "unknown"]
    error: float | None
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the kernels may be used."""
        return self.verdict in ("right", "unknown")


def is_trusted(loss: str, variant: str, device: torch.device) -> bool:
    """Whether the Triton kernels of a variant of `loss` may be used on `device`; warns once if not.

    Raises:
        RuntimeError: they are unusable here, and right for another rank of the job.
    """
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in ("auto", "skip", "force"):
        raise ValueError(f"{VARIABLE} must be auto, skip or force, not {mode!r}")
    if mode == "skip" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return True
    with _lock:
        return _is_trusted(loss, variant, device, mode == "force")


@functools.cache
def _is_trusted(loss: str, variant: str, device: torch.device, force: bool) -> bool:
    kept = None if force else _read(_cache_file(loss, variant, device))
    outcome = kept or check_anew(loss, variant, device)
    return _agreed(outcome)


def check_anew(loss: str, variant: str, device: torch.device) -> Outcome:
    """Checks in a process of its own, and keeps a verdict about numbers for `is_trusted` in processes to come."""
    outcome = _outcome(loss, variant, device, selfcheck_process.ask(loss, variant, device))
    if outcome.verdict in ("right", "wrong"):
        _write(_cache_file(loss, variant, device), outcome)
    return outcome


def check_here(loss: str, variant: str, device: torch.device) -> Outcome:
    """Checks in this process, which a fault may end; keeps nothing."""
    return _outcome(loss, variant, device, check(loss, variant, device))


def _outcome(loss: str, variant: str, device: torch.device, answer: Answer) -> Outcome:
    versions = (torch.__version__, _triton_version(), ptxas_version())
    return Outcome(loss, variant, _name(device), *versions, answer.verdict, answer.error, answer.detail)


def _agreed(outcome: Outcome) -> bool:
    """Whether the kernels may be used by the verdict that holds for all ranks, one of which warns of what is amiss."""
    agreement = agreed(f"selfcheck/{outcome.loss}/{outcome.variant}", json.dumps(asdict(outcome)), _severity)
    held = Outcome(**json.loads(agreement.finding))
    if held.passed and not outcome.passed:
        raise RuntimeError(
            f"{outcome.loss} runs on Triton kernels on other ranks, but here, on {outcome.device}, they are "
            f'{outcome.verdict}: {outcome.detail}. Mend this machine, or give backend="blocked" on all ranks '
            f"({outcome.variant})"
        )
    if agreement.says and held.verdict != "right":
        warnings.warn(_warning(held, agreement.rank), RuntimeWarning, stacklevel=2)
    return held.passed


def _severity(finding: str) -> int:
    return ("right", "unknown", "unusable", "wrong").index(json.loads(finding)["verdict"])


def _warning(outcome: Outcome, rank: int | None) -> str:
    where = outcome.device if rank is None else f"{outcome.device} of rank {rank}"
    if outcome.passed:
        return (
            f"the Triton kernels of {outcome.loss} for {outcome.variant} are used unchecked on {where}: "
            f"{outcome.detail}. `optima doctor --check` checks them; {VARIABLE}=skip says that it need not be"
        )
    return (
        f"{outcome.loss} falls back to the slower blocked backend{'' if rank is None else ' on all ranks'}: its Triton "
        f"kernels for {outcome.variant} are {outcome.verdict} on {where} with torch {outcome.torch}, triton "
        f"{outcome.triton} and ptxas {outcome.ptxas}: {outcome.detail}. {_advice(outcome)}"
    )


def _advice(outcome: Outcome) -> str:
    if outcome.verdict == "wrong":
        return f"Another version of Triton may be right; {VARIABLE}=force checks again"
    return "`optima doctor --check` tries again and tells more; a missing C compiler or a full disk can be the cause"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


@functools.cache
def _digest() -> str:
    """Of this package's code."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    return code.hexdigest()


def _cache_file(loss: str, variant: str, device: torch.device) -> Path:
    """One file a variant, so that processes that check different ones do not meet."""
    key = "\n".join((_name(device), torch.__version__, _triton_version(), ptxas_version(), _digest(), variant))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "optima_kernels" / "selfcheck" / f"{loss}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> Outcome | None:
    try:
        return Outcome(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, outcome: Outcome) -> None:
    """At once or not at all; where the directory cannot be written, the next process checks again."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
        scratch.replace(file)


def everything_usual() -> list[tuple[str, str]]:
    """The losses and variants that the engine's defaults take."""
    return [(loss, variant) for loss in LOSSES for variant in usual(loss)]
