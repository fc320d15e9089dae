"""Thompson sampling: pull the arm whose sampled mean is the largest.

The abstract of OPTIMA (Liang et al. 2023, arXiv 2310.04550) fixes that the bandit is a modified Thompson sampling for rewards
whose distribution changes over time. The posterior, the discount and every number below are our choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optima_core.bandit.policy import AdaptivePolicy, State, hyper_parameter
from optima_core.bandit.statistics import init_statistics, observe, pooled_sigma, shrunk_mean
from optima_core.rng import normal


@dataclass(frozen=True, kw_only=True)
class GaussianThompson(AdaptivePolicy):
    """Common part of the samplers that draw from a Gaussian posterior."""

    def choose(self, state: State) -> Tensor:
        mean, std = self.posterior(state)
        return torch.argmax(mean + std * normal(state["key"], state["round"][:, None]), dim=-1)


@dataclass(frozen=True, kw_only=True)
class DiscountedThompson(GaussianThompson):
    """Discounted Gaussian Thompson sampling, free of the rewards' scale and offset. The default.

    With N, S, Q the discounted count, sum and sum of squares of each arm, m the mean of all rewards and sigma the spread
    within arms, both pooled:

        theta_k = (S_k + n_0 m) / (N_k + n_0) + nu sigma z_k / sqrt(N_k + n_0),    z_k ~ N(0, 1)

    Discounting in Thompson sampling: Raj and Kalyani, arXiv 1707.09727; Gaussian with regret bounds: Qi et al., arXiv
    2305.10718. Ours: sigma is estimated, not given, because loss decrements are small and shrink as training goes on, and the
    prior is worth 0.01 rewards at the pooled mean.
    """

    gamma: float = hyper_parameter(0.98, 0.5, 1.0, "discount per round; the memory is about 1 / (1 - gamma) rounds")
    nu: float = hyper_parameter(
        0.35, 0.0, 100.0, "width of the sampled posterior; 1 is the textbook's, less is greedier"
    )
    prior_count: float = hyper_parameter(0.01, 1e-6, 100.0, "rewards' worth of the prior at the mean of all arms")

    def init_belief(self, batch: int, device: torch.device) -> State:
        return init_statistics(batch, self.arms, device)

    def learn(self, state: State, pulled: Tensor, reward: Tensor) -> State:
        return observe(state, pulled, reward, self.gamma)

    def posterior(self, state: State) -> tuple[Tensor, Tensor]:
        mean = state["origin"] + shrunk_mean(state, self.prior_count)
        return mean, self.nu * pooled_sigma(state) / torch.sqrt(state["count"] + self.prior_count)
