"""Distil a model of transformers in a loop of one's own; the bandit chooses the module by the held-out loss."""

import torch
from tiny_clips import load, make_pair

from optima_core import Balancer, Distillation

torch.manual_seed(0)
student, student_forward, teacher_forward, pairs = make_pair()
balancer = Balancer([pair.name for pair in pairs])
distillation = Distillation(student, student_forward, teacher_forward, pairs, balancer=balancer)
optimiser = torch.optim.AdamW(distillation.parameters(), lr=1e-2)


@torch.no_grad()
def held_out() -> float:
    return float(distillation.eval()(load(10**6))["loss"])


balancer.observe(first := held_out())
for number in range(10):
    distillation.train()
    for step in range(4):
        distillation(load(4 * number + step))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    print(number, balancer.chosen(), "reward", round(balancer.observe(held_out()), 2))
print(f"held-out loss {first:.3f} -> {held_out():.3f}")
