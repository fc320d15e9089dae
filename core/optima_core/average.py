"""A running average of a model's weights, of which the host asks the device nothing."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class RunningAverage:
    """average = decay * average + (1 - decay) * weights after a step; after the first, the weights themselves.

    `torch.optim.swa_utils.AveragedModel` computes the same and counts its steps in a tensor that it moves to the device
    each time, which waits for the device.

    Args:
        model: The model that learns; a copy of it, `module`, holds the average. Buffers and whole numbers are copied
            as they are. Where the model's parameters are sharded afterwards, the copy's have to be, in the same way.
        decay: Of the average, per step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # Handed to deepcopy ready-made, which could not copy fake tensors itself.
        copies: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in model.parameters()
        }
        self.module = deepcopy(model, copies | {id(buffer): buffer.clone() for buffer in model.buffers()})
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights after a step."""
        # Of sharded parameters every rank averages its shards.
        pairs = [
            (_local(ours), _local(theirs))
            for ours, theirs in zip(self.module.parameters(), model.parameters(), strict=True)
        ]
        averaged = [(ours, theirs) for ours, theirs in pairs if self.steps and ours.is_floating_point()]
        if averaged:
            torch._foreach_lerp_([ours for ours, _ in averaged], [theirs for _, theirs in averaged], 1 - self.decay)
        copied = [(ours, theirs) for ours, theirs in pairs if not self.steps or not ours.is_floating_point()]
        for ours, theirs in (*copied, *zip(self.module.buffers(), model.buffers(), strict=True)):
            ours.copy_(theirs)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: tensors by name, behind "module.", and the number of steps."""
        return {"steps": self.steps} | {f"module.{name}": x for name, x in self.module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.steps = state["steps"]
        self.module.load_state_dict({name.removeprefix("module."): x for name, x in state.items() if name != "steps"})


def _local(parameter: Tensor) -> Tensor:
    """This rank's shard; of a whole parameter, itself."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
