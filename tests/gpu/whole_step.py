"""One whole distillation step as a function of tensors: the engine's own step, and the bandit around it.

What happens on a GPU when the chosen arm stays a tensor: select an arm, tap all modules under its gates, run the
teacher and the student, all losses, the optimiser, then the reward and the bandit's update.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optima.coca import CoCa, CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.pairs import module_pairs
from optima.tasks.batches import TaskBatch
from optima.tasks.forward import TaskForward
from optima_core import Distiller, DistillerConfig, Step
from optima_core.bandit import Policy, arm_strengths, count_arms
from optima_core.objective import Gates, Losses, as_vector
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


@dataclass(frozen=True)
class WholeStep:
    """`forward`, `update` and `reward` are what a step computes on the device; `run` is all three in order.

    step: of tiny random models that caption. bandit, meter: the state of policy and rewards at the start.
    """

    step: Step[TaskBatch]
    policy: Policy
    rewards: RewardMeter
    bandit: State
    meter: State

    def forward(self, batch: TaskBatch, bandit: State) -> tuple[Losses, Gates, Tensor, State]:
        arm, bandit = self.policy.select(bandit)
        gates = (arm_strengths(arm, len(self.step.names), self.step.config.bandit.arm_kind)[0] > 0).float()
        of_modules = dict(zip(self.step.names, gates.unbind(), strict=True))
        return self.step.compute(batch, of_modules), of_modules, arm, bandit

    def reward(self, arm: Tensor, tracked: Tensor, bandit: State, meter: State) -> tuple[State, State]:
        earned, meter = self.rewards.measure(meter, tracked[None])
        return self.policy.update(bandit, arm, earned), meter

    def run(self, batch: TaskBatch, bandit: State, meter: State) -> tuple[Tensor, State, State]:
        """The loss, and the bandit's and the reward's state after a step that is a round of its own."""
        with self.step.arithmetic():
            losses, gates, arm, bandit = self.forward(batch, bandit)
        total = self.step.backward(losses)
        self.step.update(gates)
        self.step.advance()
        bandit, meter = self.reward(arm, as_vector(losses).values, bandit, meter)
        return total, bandit, meter


def make_whole_step(config: DistillerConfig, device: torch.device | str = "cpu") -> WholeStep:
    """With fake tensors if made under FakeTensorMode."""
    with torch.device(device):
        student, teacher = make_coca(16, 1, 2), make_coca(32, 2, 2).eval()
    forwards = (TaskForward(model, "captioning") for model in (student, teacher))
    step = Step(student, *forwards, module_pairs(student, teacher, single_layer_maps=True), config)
    policy = config.bandit.make(count_arms(len(step.names), config.bandit.arm_kind))
    rewards = RewardMeter(config.reward)
    losses = 2 + len(step.names) * (bool(config.objective.hidden) + bool(config.objective.attention))
    return WholeStep(step, policy, rewards, policy.init(1, 0, device), rewards.init_unmeasured(1, losses, device))


def make_distiller(
    device: torch.device | str, config: DistillerConfig, load: Callable[[int], TaskBatch] | None = None
) -> Distiller[TaskBatch]:
    """Of equal tiny models that caption, each time; by default every batch is the same."""
    torch.manual_seed(0)
    student, teacher = make_coca(16, 1, 2).to(device), make_coca(32, 2, 2).to(device).eval()
    forwards = (TaskForward(model, "captioning") for model in (student, teacher))
    batch = random_batch(device)
    return Distiller(
        student,
        *forwards,
        module_pairs(student, teacher, single_layer_maps=True),
        load or (lambda _: batch),
        batch,
        config,
    )


def random_batch(device: torch.device | str = "cpu", size: int = 3) -> TaskBatch:
    """Images and texts; the last text is half padding. Drawn on the CPU, so that any device sees the same, and what
    is drawn after it, such as the projections of the hidden loss, is the same beside every device."""
    tokens = torch.randint(1, 40, (size, 7))
    tokens[-1, 4:] = 0
    batch = torch.rand(size, 1, 3, 32, 32), tokens, torch.full((size,), -1)
    return TaskBatch(*(x.to(device) for x in batch))
