"""What a round leaves for the host, and how it gets there without the device waiting.

All numbers of a round travel as one vector: on CUDA into pinned memory behind the round's own work, with an event that
says when they have arrived. So the next round may be queued before the last one's losses are read.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round, on the host.

    round: from 1. step: optimiser steps taken in all. arm: index, -1 for all modules. modules: those distilled.
    strengths: of each module distilled. weights: by "hidden/<module>" and "attention/<module>", the factor of
        those losses: strength, unit, and the objective's weight.
    agreement: by the same names, the cosine of their gradient and the predictions' in the round's first step.
    reward: what the round earned. pulls: rounds by arm name so far, for the arms tried; mean, std: their posterior.
    losses: mean of each loss term over the round's steps. probe: each loss term on the probe batch after the round.
    tapped: share of the student's layers that were tapped, with the teacher's, and went into layer losses; the work of
        the others was saved. step_seconds: mean time of an optimiser step, probe not included.
    """

    round: int
    step: int
    arm: int
    modules: tuple[str, ...]
    strengths: dict[str, float]
    weights: dict[str, float]
    agreement: dict[str, float]
    reward: float
    pulls: dict[str, int]
    mean: dict[str, float]
    std: dict[str, float]
    losses: dict[str, float]
    probe: dict[str, float]
    learning_rate: float
    tapped: float
    step_seconds: float = field(compare=False)


class Sent:
    """A tensor on its way to the host: on CUDA into pinned memory, behind the work that has been queued so far."""

    def __init__(self, tensor: Tensor) -> None:
        self._value = tensor.detach()
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def ready(self) -> bool:
        """Whether `value` would not wait; always so on a CPU."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def value(self) -> Tensor:
        """The tensor, on the CPU; waits for the device to come that far."""
        if self._event is not None:
            self._event.synchronize()
        return self._value


class PendingRecord:
    """A round's record on its way to the host.

    Args:
        tensors: What it is made of, on one device.
        describe: Makes the record of the same names' values, float64 on the CPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor], describe: Callable[[dict[str, Tensor]], RoundRecord]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._describe = describe
        self._sent = Sent(torch.cat([tensor.detach().to(torch.float64).flatten() for tensor in tensors.values()]))

    def ready(self) -> bool:
        """Whether `result` would not wait; always so on a CPU."""
        return self._sent.ready()

    def result(self) -> RoundRecord:
        """The record; waits for the device to finish the round.

        Raises OptimaError, naming the loss term, if a loss became NaN or infinite; the state is then not worth saving.
        """
        parts = torch.split(self._sent.value(), [math.prod(shape) for shape in self._shapes.values()])
        named = zip(self._shapes.items(), parts, strict=True)
        return self._describe({name: part.view(shape) for (name, shape), part in named})


class Stopwatch:
    """Measures seconds of work on a device without waiting for it; runs from the start."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            self._events[0].record()
        self._started = time.perf_counter()
        self._stopped = self._started

    def stop(self) -> None:
        """Ends the measurement behind what has been queued so far."""
        if self._events:
            self._events[1].record()
        self._stopped = time.perf_counter()

    def seconds(self) -> float:
        """To be read once the device has come past `stop`."""
        if not self._events:
            return self._stopped - self._started
        return float(self._events[0].elapsed_time(self._events[1])) / 1000
