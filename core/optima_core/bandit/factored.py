"""Thompson sampling over strengths of all modules at once, with a belief a module instead of one an arm.

An arm of kind "strengths" gives every module one of L levels (`optima_core.bandit.arms`): L ** K arms, of which a run
could never try all. What is learnt here grows with the number K of modules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optima_core.bandit.arms import LEVELS, arm_of_levels, levels_of_arm
from optima_core.bandit.catalogue import GAMMA, NU, PRIOR_PRECISION
from optima_core.bandit.policy import Policy, State, hyper_parameter
from optima_core.bandit.statistics import FORGOTTEN
from optima_core.rng import normal, uniform

_FULL = LEVELS.index(1.0)


@dataclass(frozen=True, kw_only=True)
class FactoredPolicy(Policy):
    """A policy over the arms of kind "strengths". `arms` is len(LEVELS) to the power of the number of modules."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(LEVELS) ** self.modules != self.arms:
            raise ValueError(f"arms must be a power of the {len(LEVELS)} strengths (arms='strengths'), got {self.arms}")

    @property
    def modules(self) -> int:
        """Number of modules."""
        count, arms = 0, self.arms
        while arms >= len(LEVELS):
            count, arms = count + 1, arms // len(LEVELS)
        return count

    @property
    def beliefs(self) -> int:
        """One a module."""
        return self.modules


@dataclass(frozen=True, kw_only=True)
class LinearThompson(FactoredPolicy):
    """Discounted Bayesian linear regression of the reward on the level of every module; each takes its best level.

        reward = beta_0 + sum over modules k of beta[k, level of k] + noise,  beta[k, level 0] = 0

    With x the indicator of the levels played, A = gamma A + x x^T + (1 - gamma) lambda I from A = lambda I, and
    b = gamma b + x r, the posterior is N(A^-1 b, sigma**2 A^-1); sigma**2 is the discounted mean squared residual.
    A draw beta = A^-1 b + nu sigma A^-1/2 z is taken every round; but the first round takes every module at strength 1,
    and the next two times L rounds every level of every module in turn, from a random one.

    Thompson sampling of a linear model: Agrawal and Goyal, arXiv 1209.3352; discounted: Russac et al., "Weighted linear
    bandits for non-stationary environments", arXiv 1909.09146. Ours: the additive model over modules, whose effects are
    marginal in the neighbourhood of what is being played because what is long past is forgotten.
    """

    gamma: float = hyper_parameter(GAMMA)
    nu: float = hyper_parameter(NU)
    prior_precision: float = hyper_parameter(PRIOR_PRECISION)

    @property
    def _width(self) -> int:
        return 1 + self.modules * (len(LEVELS) - 1)

    @property
    def beliefs(self) -> int:
        """One a coefficient, of which random numbers are drawn."""
        return self._width

    def init_belief(self, batch: int, device: torch.device) -> State:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=torch.float64, device=device)

        width = self._width
        return {
            "gram": self.prior_precision * torch.eye(width, dtype=torch.float64, device=device).expand(batch, -1, -1),
            "moment": zeros(width),
            "origin": zeros(1),
            "count": zeros(1),
            "square": zeros(1),
        }

    def update(self, state: State, arm: Tensor, reward: Tensor) -> State:
        """See `Policy.update`."""
        reward = reward.to(torch.float64)[:, None]
        origin = torch.where(state["count"] == 0, reward, state["origin"])
        centred = reward - origin
        x = self._features(arm)
        prior = self.prior_precision * torch.eye(self._width, dtype=torch.float64, device=arm.device)
        return state | {
            "gram": self.gamma * state["gram"] + x[:, :, None] * x[:, None, :] + (1 - self.gamma) * prior,
            "moment": self.gamma * state["moment"] + x * centred,
            "origin": origin,
            "count": self.gamma * state["count"] + 1.0,
            "square": self.gamma * state["square"] + centred**2,
        }

    def choose(self, state: State) -> Tensor:
        mean, factor = self._coefficients(state)
        noise = normal(state["key"], state["round"][:, None])[:, :, None]
        sigma = self._sigma(state, mean)
        draw = mean + self.nu * sigma * torch.linalg.solve_triangular(factor.mT, noise, upper=True)[:, :, 0]
        effects = draw[:, 1:].unflatten(1, (self.modules, len(LEVELS) - 1))
        learnt = torch.cat([torch.zeros_like(effects[..., :1]), effects], dim=-1).argmax(dim=-1)
        number = state["round"][:, None]
        turn = number // len(LEVELS)
        offset = (uniform(state["key"][:, : self.modules], turn, stream=1) * len(LEVELS)).long()
        in_turn = (number + offset) % len(LEVELS)
        levels = torch.where(number > 2 * len(LEVELS), learnt, torch.where(number == 0, _FULL, in_turn))
        return arm_of_levels(levels)

    def posterior(self, state: State) -> tuple[Tensor, Tensor]:
        """Effect of each module at strength 1 against leaving it out, and its spread, float64 [batch, modules]."""
        mean, factor = self._coefficients(state)
        covariance = torch.cholesky_inverse(factor)
        place = 1 + torch.arange(self.modules, device=mean.device) * (len(LEVELS) - 1) + _FULL - 1
        spread = torch.sqrt(torch.diagonal(covariance, dim1=-2, dim2=-1)) * self._sigma(state, mean)
        return mean[:, place], spread[:, place]

    def _features(self, arm: Tensor) -> Tensor:
        """x, float64 [batch, width]."""
        levels = levels_of_arm(arm, self.modules)[:, :, None]
        played = levels == torch.arange(1, len(LEVELS), device=arm.device)
        return torch.cat([torch.ones_like(arm)[:, None], played.flatten(1)], dim=-1).to(torch.float64)

    def _coefficients(self, state: State) -> tuple[Tensor, Tensor]:
        """The posterior's mean [batch, width], and the lower Cholesky factor of its precision."""
        factor, _ = torch.linalg.cholesky_ex(state["gram"])
        return torch.cholesky_solve(state["moment"][:, :, None], factor)[:, :, 0], factor

    def _sigma(self, state: State, mean: Tensor) -> Tensor:
        """[batch, 1]"""
        residual = (state["square"][:, 0] - (state["moment"] * mean).sum(dim=-1)).clamp(min=0.0)
        return torch.sqrt(residual / state["count"][:, 0].clamp(min=FORGOTTEN))[:, None]
