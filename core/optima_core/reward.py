"""The reward of a round: how far the tracked losses fell.

A loss decrement as the reward of a bandit over modules is the paper's idea (Liang et al. 2023, arXiv 2310.04550);
learning progress as a bandit's reward goes back to Graves et al., arXiv 1704.03003. The exact form is ours. Absolute
decrements follow whichever module has the largest loss scale, so by default a decrement is taken relative to where
the loss stood.

All functions work on device tensors with a leading batch dimension, without host synchronisation.
"""

import torch
from torch import Tensor


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


def absolute_decrement(before: Tensor, after: Tensor, *, clip: float = 1.0) -> Tensor:
    """Mean over losses of before - after, clipped to [-clip, clip]: float64 [batch], from losses [batch, losses]."""
    return (before.to(torch.float64) - after.to(torch.float64)).mean(dim=-1).clamp(-clip, clip)
