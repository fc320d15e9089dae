"""One whole distillation step as a function of tensors, put together from the engine's public pieces.

What the engine does on a GPU, where the chosen arm stays a tensor: select an arm, tap all modules under its gates, run
the teacher and the student, all losses, the optimiser, then the reward and the bandit's update.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optima.coca import CoCa, CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.pairs import module_pairs
from optima.tasks.batches import TaskBatch
from optima.tasks.forward import TaskForward
from optima_core.bandit import arm_gates, make_policy
from optima_core.modules import ModulePair
from optima_core.objective import Objective, ObjectiveConfig
from optima_core.optimiser import OptimiserConfig, clip_gradients, make_optimiser
from optima_core.reward import RewardMeter

State = dict[str, Tensor]


def make_coca(width: int, layers: int, heads: int) -> CoCa:
    return CoCa(
        CoCaConfig(
            embed_dim=width,
            image_encoder=ImageEncoderConfig(32, 16, width, layers, heads, 2.0),
            text_decoder=TextDecoderConfig(40, 7, width, layers, heads, 2.0),
            multimodal_decoder=MultimodalDecoderConfig(width, layers, heads, 2.0),
        )
    )


class WholeStep(NamedTuple):
    """`forward`, `learn` and `reward` are what a step computes on the device; `run` is all three in order."""

    objective: Objective
    teacher: CoCa
    student: CoCa
    bandit: State
    meter: State
    forward: Callable[[TaskBatch, State], tuple[Tensor, Tensor, Tensor, State]]
    learn: Callable[[], None]
    reward: Callable[[Tensor, Tensor, State, State], tuple[State, State]]

    def run(self, batch: TaskBatch, bandit: State, meter: State) -> tuple[Tensor, State, State]:
        """The loss, and the bandit's and the reward's state after a step that is a round of its own."""
        total, tracked, arm, bandit = self.forward(batch, bandit)
        total.backward()  # type: ignore[no-untyped-call]
        self.learn()
        bandit, meter = self.reward(arm, tracked, bandit, meter)
        return total.detach(), bandit, meter


def make_whole_step(
    config: ObjectiveConfig, device: torch.device | str = "cpu", policy: str = "discounted_thompson"
) -> WholeStep:
    """Tiny random models that caption; with fake tensors if made under FakeTensorMode."""
    with torch.device(device):
        student, teacher = make_coca(16, 1, 2), make_coca(32, 2, 2).eval()
        pairs: Sequence[ModulePair] = module_pairs(student, teacher)
        objective = Objective(pairs, config)
    names = [pair.name for pair in pairs]
    trained = [*student.parameters(), *objective.parameters()]
    options = OptimiserConfig()
    optimiser, schedule = make_optimiser(trained, options, 100)
    chooser = make_policy(policy, arms=len(names))
    table = arm_gates(len(names), device=device)
    meter = RewardMeter(kind="absolute", normaliser="ratio")
    student_forward, teacher_forward = TaskForward(student, "captioning"), TaskForward(teacher, "captioning")
    student_taps, teacher_taps = objective.wanted(names)

    def forward(batch: TaskBatch, bandit: State) -> tuple[Tensor, Tensor, Tensor, State]:
        arm, bandit = chooser.select(bandit)
        gates = dict(zip(names, table[arm][0].unbind(), strict=True))
        with torch.no_grad():
            taught = teacher_forward(batch, teacher_taps)
        terms = objective(student_forward(batch, student_taps), taught, gates)
        return objective.total(terms), torch.stack(list(terms.values())).float().detach(), arm, bandit

    def learn() -> None:
        clip_gradients(trained, options.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()

    def reward(arm: Tensor, tracked: Tensor, bandit: State, state: State) -> tuple[State, State]:
        earned, state = meter.measure(state, tracked[None])
        return chooser.update(bandit, arm, earned), state

    losses = 2 + len(names) * (bool(config.hidden) + bool(config.attention))
    return WholeStep(
        objective,
        teacher,
        student,
        chooser.init(1, 0, device),
        meter.init_unmeasured(1, losses, device),
        forward,
        learn,
        reward,
    )


def random_batch(device: torch.device | str = "cpu", size: int = 3) -> TaskBatch:
    """Pictures and texts; the last text is half padding."""
    tokens = torch.randint(1, 40, (size, 7), device=device)
    tokens[-1, 4:] = 0
    return TaskBatch(torch.rand(size, 1, 3, 32, 32, device=device), tokens, torch.full((size,), -1, device=device))
