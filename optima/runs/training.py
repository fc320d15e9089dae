"""The loop of ordinary training, without a teacher: losses, optimiser, progress lines, checkpoints, and going on."""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from optima.coca import CoCa
from optima.runs.directory import RunDirectory, fingerprint
from optima.runs.interruption import StopRequest
from optima_core.config import OptimiserConfig, Precision
from optima_core.errors import OptimaError
from optima_core.optimiser import clip_gradients, make_optimiser
from optima_core.precision import arithmetic
from optima_core.state import load_optimiser, optimiser_state


class TrainingConfig(Protocol):
    """What the loop takes from a command's configuration, all of which a resumed run must share but the last two."""

    @property
    def optimiser(self) -> OptimiserConfig: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def compile(self) -> bool: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def log_every(self) -> int: ...


STATE = {"config": str, "model": dict, "optimiser": dict, "schedule": dict, "step": int}
"""What a checkpoint holds: key -> type."""


def train(
    model: CoCa,
    steps: int,
    losses: Callable[[int], dict[str, Tensor]],
    config: TrainingConfig,
    directory: RunDirectory,
    say: Callable[[str], None],
    after_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Trains the model for `steps` steps, or those of them that earlier parts of the run have left.

    Args:
        model: trained in place, on its device.
        steps: optimiser steps of the whole run.
        losses: gives the losses of a step, 0 to steps - 1, by name; their sum is minimised.
        config: the command's dataclass, written to config.yaml.
        directory: holds the checkpoints.
        say: shows a progress line.
        after_step: called with the number of steps made, after each.

    Raises:
        OptimaError: if a loss is not finite, or the run in the directory was configured otherwise.
        KeyboardInterrupt: after a checkpoint, if the user asked to stop.
    """
    device = model.logit_scale.device
    optimiser, schedule = make_optimiser(model.parameters(), config.optimiser, steps)
    step = 0
    state = directory.checkpoints.load(STATE)
    if state is not None:
        directory.refuse_other_run(config, state["config"])
        model.load_state_dict(state["model"])
        load_optimiser(model, optimiser, state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
    if config.compile:
        for module in (model.image_encoder, model.text_decoder, model.multimodal_decoder):
            module.compile(dynamic=False)
    directory.write_config(config)
    model.train()
    started, first = time.monotonic(), step
    with StopRequest() as stop:
        while step < steps:
            with arithmetic(config.precision, device):
                found = losses(step)
            total = torch.stack(list(found.values())).sum()
            if not torch.isfinite(total):
                bad = [name for name, loss in found.items() if not torch.isfinite(loss)]
                raise OptimaError(f"loss {', '.join(bad)} is not finite at step {step}; the last checkpoint is intact")
            total.backward()  # type: ignore[no-untyped-call]
            clip_gradients(model.parameters(), config.optimiser.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            if step % config.log_every == 0 or step == steps:
                rate = (step - first) / (time.monotonic() - started)
                shown = "  ".join(f"{name} {loss.item():.3f}" for name, loss in found.items())
                say(f"step {step}/{steps}  {shown}  {rate:.2f} steps/s  {(steps - step) / rate / 60:.0f} min left")
            if step % config.checkpoint_every == 0 or step == steps or stop.made:
                directory.checkpoints.save(
                    step,
                    {
                        "config": fingerprint(config),
                        "model": model.state_dict(),
                        "optimiser": optimiser_state(model, optimiser),
                        "schedule": schedule.state_dict(),
                        "step": step,
                    },
                )
            if stop.made:
                raise KeyboardInterrupt
            after_step(step)
    directory.checkpoints.tidy()
