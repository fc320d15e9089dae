"""OPTIMA's bandit as the loss balancer of NVIDIA Model-Optimizer, on two linear models of three layers."""

import modelopt.torch.distill as mtd
import torch
from torch import nn

from optima_core import Balancer


class BanditBalancer(mtd.DistillationLossBalancer):
    """The student's own loss, and of the distillation losses the one that is learnt this round."""

    def __init__(self, balancer: Balancer):
        super().__init__()
        self.balancer = balancer

    def forward(self, loss: dict) -> torch.Tensor:
        own = loss.get("student_loss", 0.0)
        return own + sum(weight * loss[name] for name, weight in self.balancer.weights().items())


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x)))


torch.manual_seed(0)
teacher, student = Layers(), Layers()
balancer = Balancer(["MSELoss_0", "MSELoss_1"])
criterion = {("first", "first"): nn.MSELoss(), ("second", "second"): nn.MSELoss()}
how = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": BanditBalancer(balancer)}
model = mtd.convert(student, mode=[("kd_loss", how)])
optimiser, x = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.randn(64, 8)
for step in range(41):
    error = (model(x) - teacher(x)).square().mean()
    if step % 4 == 0:
        print(step, f"held-out loss {float(error):.3f}", balancer.observe(float(error)), balancer.chosen())
    model.compute_kd_loss(student_loss=error).backward()
    optimiser.step()
    optimiser.zero_grad()
