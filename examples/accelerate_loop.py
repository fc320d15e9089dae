"""Distil a model of transformers with Accelerate; `accelerate launch` runs it on several GPUs."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from tiny_clips import load, make_pair

from optima_core import Balancer, Distillation

torch.manual_seed(0)
student, student_forward, teacher_forward, pairs = make_pair()
balancer = Balancer([pair.name for pair in pairs])
module = Distillation(student, student_forward, teacher_forward, pairs, balancer=balancer)
accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
module, optimiser = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=1e-2))


@torch.no_grad()
def held_out() -> float:
    return accelerator.reduce(module.eval()(load(10**6))["loss"], "mean").item()


balancer.observe(first := held_out())
for number in range(10):
    module.train()
    for step in range(4):
        accelerator.backward(module(load(4 * number + step))["loss"])
        optimiser.step()
        optimiser.zero_grad()
    balancer.observe(held_out())
accelerator.print(f"held-out loss {first:.3f} -> {held_out():.3f}")
