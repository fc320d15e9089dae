"""The choosing alone, for losses that anyone computes in any loop.

    balancer = Balancer(["vision", "language"])
    balancer.observe(evaluate())                                   # where it starts
    for _ in range(rounds):
        for batch in some_batches:
            losses = my_losses(batch)                              # by name
            sum(weight * losses[name] for name, weight in balancer.weights().items()).backward()
            ...
        balancer.observe(evaluate())                               # how far it came; ends the round

The bandit is the engine's (`optima_core.bandit`), and so is the reward: how far the held-out losses fell.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optima_core.bandit.arms import arm_strengths, belief_names, count_arms
from optima_core.bandit.config import BanditConfig
from optima_core.config import RewardConfig
from optima_core.reward import RewardMeter


class Balancer:
    """Which of some named losses are learnt this round, learnt from what the rounds brought.

    Args:
        names: The losses' names, at least one.
        bandit: The policy, and whether one loss or any set of them is learnt at a time.
        reward: How the fall of the held-out losses becomes a reward; its `source` does not matter.
        seed: Of the policy's random numbers. Processes of one run take the same, and observe the same losses, and then
            choose alike.

    Raises ValueError if names are missing or equal, or an option does not fit their number.
    """

    def __init__(
        self,
        names: Sequence[str],
        bandit: BanditConfig | None = None,
        reward: RewardConfig | None = None,
        seed: int = 0,
    ) -> None:
        bandit = bandit or BanditConfig()
        self.names = tuple(names)
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be different names of losses, at least one, got {list(names)}")
        self._arms = bandit.arm_kind
        self.policy = bandit.make(count_arms(len(self.names), self._arms))
        self._meter = RewardMeter(reward or RewardConfig())
        self._bandit = self.policy.init(batch=1, seed=seed)
        self._losses: dict[str, torch.Tensor] = {}
        self._arm: int | None = None
        self.rounds = 0
        """Rounds that were rewarded."""

    def weights(self) -> dict[str, float]:
        """The strength of each loss this round, 0 for those that are not learnt; the same until `observe`.

        With one of n losses learnt at a time, n times its weight teaches as much over a run as all of them at once.
        """
        if self._arm is None:
            arm, self._bandit = self.policy.select(self._bandit)
            self._arm = int(arm)
        strengths = arm_strengths(torch.tensor([self._arm]), len(self.names), self._arms)[0]
        return dict(zip(self.names, strengths.tolist(), strict=True))

    def chosen(self) -> tuple[str, ...]:
        """The losses of weight 1."""
        return tuple(name for name, weight in self.weights().items() if weight)

    def observe(self, held_out: float | Mapping[str, float]) -> float:
        """Ends the round with the held-out loss, or several by name, and returns the round's reward.

        The first one tells where things start and rewards nothing (0).

        Raises ValueError if a loss is not finite, or there are others than before.
        """
        named = held_out if isinstance(held_out, Mapping) else {"": held_out}
        losses = torch.tensor([[float(named[name]) for name in sorted(named)]], dtype=torch.float64)
        if not losses.isfinite().all():
            raise ValueError(f"held-out losses must be finite, got {held_out}")
        if not self._losses:
            self._losses = self._meter.init(losses)
            self._arm = None
            return 0.0
        if losses.shape != self._losses["before"].shape:
            raise ValueError(f"as many losses must be observed as at first, got {list(named)}")
        reward, self._losses = self._meter.measure(self._losses, losses)
        if self._arm is not None:
            self._bandit = self.policy.update(self._bandit, torch.tensor([self._arm]), reward)
            self.rounds += 1
        self._arm = None
        return float(reward)

    def posterior(self) -> dict[str, tuple[float, float]]:
        """By loss, or by set of losses where arms are sets: the estimated reward and its spread."""
        mean, spread = self.policy.posterior(self._bandit)
        names = belief_names(self.names, self._arms)
        return dict(zip(names, zip(mean[0].tolist(), spread[0].tolist(), strict=True), strict=False))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to choose as an uninterrupted one."""
        return {"bandit": self._bandit, "losses": self._losses, "arm": self._arm, "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for a balancer made alike."""
        self._bandit, self._losses = dict(state["bandit"]), dict(state["losses"])
        self._arm, self.rounds = state["arm"], state["rounds"]
