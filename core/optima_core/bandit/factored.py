"""Thompson sampling over strengths of all modules at once, with a belief a module instead of one an arm.

An arm of kind "strengths" gives every module one of L levels (`optima_core.bandit.arms`): L ** K arms, of which a run
could never try all. What is learnt here grows with the number K of modules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optima_core.bandit.arms import LEVELS, arm_of_levels, levels_of_arm
from optima_core.bandit.catalogue import GAMMA, NU, PRIOR_PRECISION, TRUST
from optima_core.bandit.policy import Policy, State, hyper_parameter
from optima_core.bandit.statistics import FORGOTTEN
from optima_core.rng import normal

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
    A draw beta = A^-1 b + nu sigma A^-1/2 z is taken every round. The prior is the belief that every module is worth
    its strength of 1: its mean is `trust` sigma for the coefficients of that level, and 0 for the others. It takes
    evidence to leave a module out; as A holds lambda I, what is forgotten returns to that belief.

    Thompson sampling of a linear model: Agrawal and Goyal, arXiv 1209.3352; discounted: Russac et al., "Weighted linear
    bandits for non-stationary environments", arXiv 1909.09146. Ours: the additive model over modules, whose effects are
    marginal in the neighbourhood of what is being played because what is long past is forgotten.
    """

    gamma: float = hyper_parameter(GAMMA)
    nu: float = hyper_parameter(NU)
    prior_precision: float = hyper_parameter(PRIOR_PRECISION)
    trust: float = hyper_parameter(TRUST)

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
        mean, factor, sigma = self._coefficients(state)
        noise = normal(state["key"], state["round"][:, None])[:, :, None]
        draw = mean + self.nu * sigma * torch.linalg.solve_triangular(factor.mT, noise, upper=True)[:, :, 0]
        effects = draw[:, 1:].unflatten(1, (self.modules, len(LEVELS) - 1))
        learnt = torch.cat([torch.zeros_like(effects[..., :1]), effects], dim=-1).argmax(dim=-1)
        # Before rewards differ there is no scale to draw on.
        return arm_of_levels(torch.where(sigma > 0, learnt, _FULL))

    def posterior(self, state: State) -> tuple[Tensor, Tensor]:
        """Effect of each module at strength 1 against leaving it out, and its spread, float64 [batch, modules]."""
        mean, factor, sigma = self._coefficients(state)
        spread = sigma * torch.sqrt(torch.diagonal(torch.cholesky_inverse(factor), dim1=-2, dim2=-1))
        place = self._places_of_full(mean.device)
        return mean[:, place], spread[:, place]

    def _features(self, arm: Tensor) -> Tensor:
        """x, float64 [batch, width]."""
        levels = levels_of_arm(arm, self.modules)[:, :, None]
        played = levels == torch.arange(1, len(LEVELS), device=arm.device)
        return torch.cat([torch.ones_like(arm)[:, None], played.flatten(1)], dim=-1).to(torch.float64)

    def _places_of_full(self, device: torch.device) -> Tensor:
        """Of the coefficients of strength 1, int64 [modules]."""
        return 1 + torch.arange(self.modules, device=device) * (len(LEVELS) - 1) + _FULL - 1

    def _coefficients(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """The posterior's mean [batch, width], the lower Cholesky factor of its precision, and sigma [batch, 1]."""
        factor, _ = torch.linalg.cholesky_ex(state["gram"])
        fit = torch.cholesky_solve(state["moment"][:, :, None], factor)[:, :, 0]
        residual = (state["square"] - (state["moment"] * fit).sum(dim=-1, keepdim=True)).clamp(min=0.0)
        sigma = torch.sqrt(residual / state["count"].clamp(min=FORGOTTEN))
        prior = torch.zeros_like(fit).index_fill(1, self._places_of_full(fit.device), self.prior_precision * self.trust)
        return fit + sigma * torch.cholesky_solve(prior[:, :, None], factor)[:, :, 0], factor, sigma
