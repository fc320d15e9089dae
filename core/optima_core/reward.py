"""The reward of a round: how far the tracked losses fell.

A loss decrement as the reward of a bandit over modules is the paper's idea (Liang et al. 2023, arXiv 2310.04550);
learning progress as a bandit's reward goes back to Graves et al., arXiv 1704.03003. The exact form is ours. Absolute
decrements follow the largest losses; relative ones, taken from where each loss stood, count the fall of a small loss
like that of a large one. bench/COMPARE.md says which served better.

The losses come from a held probe batch, measured at the end of every round (`RewardMeter.measure`: costs a forward
pass, little noise), or from training itself (`observe` every step, `finish` at the round's end: free, noisier, and a
module that is not distilled has no loss to tell).

Everything works on device tensors with a leading batch dimension, without host synchronisation, in float64.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optima_core.config import RewardConfig

State = dict[str, Tensor]


def relative_decrement(
    before: Tensor, after: Tensor, initial: Tensor, *, floor: float = 0.3, clip: float = 1.0
) -> Tensor:
    """Mean over losses of (before - after) / (before + floor * initial), clipped to [-clip, clip].

    The floor, a share of each loss's first value, keeps a loss that is nearly gone from ruling the reward with its
    noise. A loss that was not measured this round counts as unchanged: hand in the same value before and after.

    Args:
        before, after, initial: non-negative losses [batch, losses] at the round's start, its end, and the run's start.

    Returns:
        The reward, float64 [batch].
    """
    before, after, initial = (loss.to(torch.float64) for loss in (before, after, initial))
    # Without the lower bound a loss that is exactly zero from the start would give 0 / 0.
    scale = (before + floor * initial).clamp(min=torch.finfo(torch.float32).tiny)
    return ((before - after) / scale).mean(dim=-1).clamp(-clip, clip)


def absolute_decrement(before: Tensor, after: Tensor, initial: Tensor, *, clip: float = 1.0) -> Tensor:
    """How far all losses fell together, as a share of their first sum, clipped to [-clip, clip]: float64 [batch].

    sum(before - after) / sum(initial) over losses [batch, losses]; the unit of the losses cancels, their sizes do not.
    """
    before, after, initial = (loss.to(torch.float64) for loss in (before, after, initial))
    scale = initial.sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((before - after).sum(dim=-1) / scale).clamp(-clip, clip)


@dataclass(frozen=True)
class RewardMeter:
    """Turns the losses of successive rounds into rewards.

    Like a policy it holds settings only; its memory is a dictionary of tensors [batch, ...] that can be saved as it is.

    Attributes:
        config: How; its `source` is for the caller to follow.
    """

    config: RewardConfig = field(default_factory=RewardConfig)

    def init(self, losses: Tensor) -> State:
        """The state at a run's start, given `losses` [batch, losses] of the probe batch."""
        measured = torch.ones_like(losses, dtype=torch.bool)
        batch, count = losses.shape
        return self.observe(self.init_unmeasured(batch, count, losses.device), losses, measured)

    def init_unmeasured(self, batch: int, losses: int, device: torch.device | str = "cpu") -> State:
        """The state at a run's start when no loss is known yet, for rewards from training."""
        zeros = torch.zeros(batch, losses, dtype=torch.float64, device=device)
        scalar = torch.zeros(batch, dtype=torch.float64, device=device)
        state = {
            "initial": zeros,
            "before": zeros.clone(),
            "level": zeros.clone(),
            "seen": torch.zeros(batch, losses, dtype=torch.bool, device=device),
            "count": scalar,
            "raw_total": scalar.clone(),
            "size": scalar.clone(),
            "total": scalar.clone(),
            "square": scalar.clone(),
        }
        if self.config.normaliser == "quantile":
            # Unused places are infinite, so they sort behind the rewards.
            state["history"] = torch.full((batch, self.config.window), math.inf, dtype=torch.float64, device=device)
            state["rounds"] = torch.zeros(batch, dtype=torch.int64, device=device)
        return state

    def observe(self, state: State, losses: Tensor, measured: Tensor) -> State:
        """Take in one training step's `losses` [batch, losses], of which those `measured` (bool, same shape) count.

        What the others hold is ignored, be it NaN.
        """
        losses = losses.to(torch.float64)
        smoothed = self.config.smoothing * state["level"] + (1.0 - self.config.smoothing) * losses
        first = measured & ~state["seen"]
        return state | {
            "initial": torch.where(first, losses, state["initial"]),
            "before": torch.where(first, losses, state["before"]),
            "level": torch.where(first, losses, torch.where(measured, smoothed, state["level"])),
            "seen": state["seen"] | measured,
        }

    def measure(self, state: State, losses: Tensor) -> tuple[Tensor, State]:
        """The reward, float64 [batch], of the round that ended with the probe `losses` [batch, losses]."""
        return self.finish(state | {"level": losses.to(torch.float64)})

    def finish(self, state: State) -> tuple[Tensor, State]:
        """The reward, float64 [batch], of the round that ends here, from what was observed."""
        if self.config.kind == "relative":
            reward = relative_decrement(
                state["before"], state["level"], state["initial"], floor=self.config.floor, clip=self.config.clip
            )
        else:
            reward = absolute_decrement(state["before"], state["level"], state["initial"], clip=self.config.clip)
        state = state | {"before": state["level"], "count": self.config.gamma * state["count"] + 1.0}
        if self.config.baseline:
            raw_total = self.config.gamma * state["raw_total"] + reward
            state, reward = state | {"raw_total": raw_total}, reward - raw_total / state["count"]
        match self.config.normaliser:
            case "ratio":
                return self._ratio(state, reward)
            case "zscore":
                return self._zscore(state, reward)
            case "quantile":
                return self._quantile(state, reward)
        return reward, state

    def _ratio(self, state: State, reward: Tensor) -> tuple[Tensor, State]:
        size = self.config.gamma * state["size"] + reward.abs()
        mean = size / state["count"]
        return torch.where(mean > 0, reward / torch.where(mean > 0, mean, 1.0), 0.0), state | {"size": size}

    def _zscore(self, state: State, reward: Tensor) -> tuple[Tensor, State]:
        total = self.config.gamma * state["total"] + reward
        square = self.config.gamma * state["square"] + reward**2
        deviation = reward - total / state["count"]
        variance = square / state["count"] - (total / state["count"]) ** 2
        # A spread below rounding is none: the first reward, or rewards that are all alike.
        exists = variance > 1e-12 * square / state["count"]
        score = torch.where(exists, deviation / torch.sqrt(torch.where(exists, variance, 1.0)), 0.0)
        return score, state | {"total": total, "square": square}

    def _quantile(self, state: State, reward: Tensor) -> tuple[Tensor, State]:
        slot = (state["rounds"] % self.config.window)[:, None]
        history = state["history"].scatter(1, slot, reward[:, None])
        rounds = state["rounds"] + 1
        ascending = torch.sort(history, dim=-1).values
        last = (rounds.clamp(max=self.config.window) - 1)[:, None]
        low = ascending.gather(1, last // 5)[:, 0]
        high = ascending.gather(1, last - last // 5)[:, 0]
        spread = high - low
        scaled = torch.where(spread > 0, 2.0 * (reward - low) / torch.where(spread > 0, spread, 1.0) - 1.0, 0.0)
        return scaled.clamp(-1.0, 1.0), state | {"history": history, "rounds": rounds}
