"""Where the numbers of a run go beside its directory: TensorBoard, Weights & Biases, MLflow, by one interface."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from optima.runs.config import TrackerName
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError
from optima_core.records import RoundRecord


class Tracker(Protocol):
    """Takes numbers by name."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The values after an optimiser step."""

    def close(self) -> None:
        """Nothing more will come."""


def scalars_of(record: RoundRecord) -> dict[str, float]:
    """What trackers are told of a round."""
    scalars = {"reward": record.reward, "learning_rate": record.learning_rate, "step_seconds": record.step_seconds}
    scalars |= {f"train/{name}": value for name, value in record.losses.items()}
    scalars |= {f"probe/{name}": value for name, value in record.probe.items()}
    scalars |= {f"rounds/{arm}": pulls for arm, pulls in record.pulls.items()}
    return scalars | {f"expected_reward/{arm}": mean for arm, mean in record.mean.items()}


def make_trackers(names: Sequence[TrackerName], run: Path, step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of those names. `step`: where a resumed run goes on. `config`: the run's options.

    Raises OptimaError if a package is missing.
    """
    known: dict[TrackerName, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WeightsAndBiases,
        "mlflow": _MLflow,
    }
    return [known[name](run, step, config) for name in dict.fromkeys(names)]


def _missing(name: str, package: str) -> OptimaError:
    return OptimaError(
        f"{name} is on and the package {package} is not installed; `pip install {package}`, or leave the option out"
    )


class _TensorBoard:
    """Event files in the run directory; those of steps that a resumed run repeats are purged."""

    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard", "tensorboard") from None
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class _WeightsAndBiases:
    """A run of W&B; a resumed run goes on in it, by the id that its first part left in the run directory."""

    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "wandb") from None
        kept = run / "wandb_run"
        known = kept.read_text(encoding="utf-8") if step and kept.exists() else None
        self._run = wandb.init(
            project="optima", name=run.name, dir=str(run), config=dict(config), id=known, resume="allow"
        )
        write_atomically(kept, self._run.id.encode())

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow, likewise."""

    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError:
            raise _missing("mlflow", "mlflow") from None
        kept = run / "mlflow_run"
        known = kept.read_text(encoding="utf-8") if step and kept.exists() else None
        self._mlflow = mlflow
        started = mlflow.start_run(run_id=known, run_name=None if known else run.name)
        write_atomically(kept, started.info.run_id.encode())
        if known is None:
            mlflow.log_params(dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        # MLflow allows letters, digits and _-. /: only.
        self._mlflow.log_metrics({name.replace("+", "_and_"): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()
