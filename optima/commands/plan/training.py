"""What a step of finetuning needs, counted as that of a distillation is: the model alone, on fake tensors."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from optima.coca import CoCa, CoCaConfig, HeadSpec
from optima.commands.plan.memory import Memory
from optima.commands.plan.needs import gpu_arithmetic
from optima.commands.plan.operations import matrix_operations
from optima.task import TASKS, Task
from optima.tasks.batches import TaskBatch
from optima.tasks.forward import TaskForward
from optima_core import recompute_activations
from optima_core.config import OptimiserConfig, Precision
from optima_core.optimiser import clip_gradients, make_optimiser
from optima_core.precision import arithmetic


@dataclass(frozen=True)
class TrainingNeeds:
    """What a step needs. Sizes in bytes; parameters and operations counted.

    activations: what the forward pass leaves for the backward pass, weights in half precision among them. peak: the
    most alive at once.
    """

    parameters: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    peak: int
    operations: float


def measure_training(
    config: CoCaConfig,
    task: Task,
    *,
    batch_size: int,
    text_length: int,
    classes: int,
    precision: Precision | Literal["fp16"],
    recompute: bool = False,
    device: Literal["gpu", "cpu"] = "gpu",
) -> TrainingNeeds:
    """Runs the second step of `finetune` on fake tensors, as it would run on the device; classes: of the head, or 0."""
    images, size = TASKS[task].images, config.image_encoder.image_size
    with FakeTensorMode(), Memory() as memory:
        model = CoCa(config, {task: HeadSpec(classes, images)} if classes else {}).train()
        weights = memory.live
        if recompute:
            recompute_activations(model.transformer_layers())
        optimiser, _ = make_optimiser(model.parameters(), OptimiserConfig(), 2)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = memory.live - weights
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        states = memory.live - weights

        memory.peak = before = memory.live
        with matrix_operations() as counter:
            batch = TaskBatch(
                torch.empty(batch_size, images, 3, size, size),
                torch.ones(batch_size, text_length, dtype=torch.int64),
                torch.zeros(batch_size, dtype=torch.int64),
            )
            half = gpu_arithmetic(precision) if device == "gpu" else arithmetic(precision, torch.device("cpu"))
            with half:
                loss = TaskForward(model, task)(batch, {}).task_loss
            assert loss is not None  # a task of ours has labels
            activations = memory.live - before
            loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(model.parameters(), OptimiserConfig().clip)
        optimiser.step()
    return TrainingNeeds(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=weights,
        gradients=gradients,
        optimiser=states,
        activations=activations,
        peak=memory.peak,
        operations=counter.get_total_flops(),
    )
