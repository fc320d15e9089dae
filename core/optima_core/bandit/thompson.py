"""Thompson sampling: pull the arm whose sampled mean is the largest.

That the bandit is a modified Thompson sampling, for rewards whose distribution changes while training goes on, is the
paper's (Liang et al. 2023, arXiv 2310.04550). Its abstract leaves the posterior and the discount open: the formulas
here are from the sources named, their free constants are ours.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optima_core.bandit.catalogue import (
    DRIFT,
    GAMMA_OF_SIGMA,
    NU,
    NU_OF_KALMAN,
    NU_OF_STATIONARY,
    NU_OF_WINDOW,
    PRIOR_VARIANCE,
    WINDOW,
)
from optima_core.bandit.policy import AdaptivePolicy, State, hyper_parameter
from optima_core.bandit.statistics import Belief, DiscountedBelief, relative_to_origin
from optima_core.rng import normal


@dataclass(frozen=True, kw_only=True)
class GaussianThompson(AdaptivePolicy):
    """theta_k = mean_k + nu std_k z_k with z_k ~ N(0, 1), for the mean and std that `posterior` tells."""

    nu: float = hyper_parameter(NU)

    def choose(self, state: State) -> Tensor:
        mean, std = self.posterior(state)
        return torch.argmax(mean + self.nu * std * normal(state["key"], state["round"][:, None]), dim=-1)


@dataclass(frozen=True, kw_only=True)
class DiscountedThompson(DiscountedBelief, GaussianThompson):
    """Discounted Gaussian Thompson sampling, free of the rewards' scale and offset. The default.

        theta_k = (S_k + n_0 m) / (N_k + n_0) + nu sigma z_k / sqrt(N_k + n_0)

    with N, S discounted by gamma every round, m and sigma as `Belief` has them. Where rewards are very noisy,
    gamma = 0.99 and nu = 0.5 do better than the defaults.

    Discounted Thompson sampling: Raj and Kalyani, arXiv 1707.09727; Gaussian, with regret bounds: Qi et al., arXiv
    2305.10718. Ours: sigma is estimated instead of given, because loss decrements are small and shrink as training
    goes on, and the prior is weak and sits at the mean of all arms.
    """


@dataclass(frozen=True, kw_only=True)
class StationaryThompson(DiscountedBelief, GaussianThompson):
    """`DiscountedThompson` that never forgets (gamma = 1): the textbook's, for rewards that do not change."""

    nu: float = hyper_parameter(NU_OF_STATIONARY)
    gamma: float = field(default=1.0, init=False)


@dataclass(frozen=True, kw_only=True)
class SlidingWindowThompson(Belief, GaussianThompson):
    """Gaussian Thompson sampling on the rewards of the last `window` rounds.

    Source: Trovo et al., "Sliding-Window Thompson Sampling for Non-Stationary Settings", JAIR 68 (2020), with the
    corrected analysis of Fiandri et al., arXiv 2409.05181. The scale-free posterior is ours, as in
    `DiscountedThompson`.
    """

    nu: float = hyper_parameter(NU_OF_WINDOW)
    window: int = hyper_parameter(WINDOW)

    def init_belief(self, batch: int, device: torch.device) -> State:
        return super().init_belief(batch, device) | {
            "window_arm": torch.full((batch, self.window), -1, dtype=torch.int64, device=device),
            "window_reward": torch.zeros(batch, self.window, dtype=torch.float64, device=device),
        }

    def learn(self, state: State, pulled: Tensor, reward: Tensor) -> State:
        reward, origin = relative_to_origin(state, reward)
        slot = ((state["round"] - 1) % self.window)[:, None]
        expired_arm, expired_reward = state["window_arm"].gather(1, slot), state["window_reward"].gather(1, slot)
        arms = torch.arange(self.arms, device=pulled.device)
        enters, leaves = pulled.to(torch.float64), (arms == expired_arm).to(torch.float64)
        count = state["count"] + enters - leaves
        # Counts are exact; sums may keep a rounding error of what has left, which an empty arm must not.
        kept = count > 0
        return {
            "origin": origin,
            "count": count,
            "total": torch.where(kept, state["total"] + enters * reward - leaves * expired_reward, 0.0),
            "square": torch.where(kept, state["square"] + enters * reward**2 - leaves * expired_reward**2, 0.0),
            "window_arm": state["window_arm"].scatter(1, slot, (pulled * arms).sum(dim=-1, keepdim=True)),
            "window_reward": state["window_reward"].scatter(1, slot, reward),
        }


@dataclass(frozen=True, kw_only=True)
class KalmanThompson(GaussianThompson):
    """Thompson sampling on a Kalman filter of each arm's mean, which is taken to do a random walk.

    Every round v_k += q for all arms, at most v_0; then for the pulled one, with gain G = v / (v + 1):

        m += G (r - m)        v *= 1 - G        theta_k ~ N(m_k, nu**2 sigma**2 v_k)

    Variances are in units of the reward's noise sigma**2, so q and v_0 have no scale. sigma**2 is the weighted mean
    of the squared normalised innovations, (r - m)**2 / (1 + v), whose expectation it is; the weight 1 / (1 + v) keeps
    an arm's first pulls, which tell of the arms' spread rather than of noise, from counting.

    The filter is Kalman (1960); drawing arms from it for drifting rewards is common practice (for example Gupta,
    Granmo, Agrawala, "Thompson sampling for dynamic multi-armed bandits", ICMLA 2011, for Bernoulli rewards).
    Estimating sigma and the bound on v are ours.
    """

    nu: float = hyper_parameter(NU_OF_KALMAN)
    drift: float = hyper_parameter(DRIFT)
    prior_variance: float = hyper_parameter(PRIOR_VARIANCE)
    gamma: float = hyper_parameter(GAMMA_OF_SIGMA)

    def init_belief(self, batch: int, device: torch.device) -> State:
        zeros = torch.zeros(batch, self.arms, dtype=torch.float64, device=device)
        return {
            "origin": zeros[:, :1].clone(),
            "count": zeros[:, :1].clone(),
            "noise": zeros[:, :1].clone(),
            "mean": zeros,
            "variance": torch.full_like(zeros, self.prior_variance),
        }

    def learn(self, state: State, pulled: Tensor, reward: Tensor) -> State:
        reward, origin = relative_to_origin(state, reward)
        variance = (state["variance"] + self.drift).clamp(max=self.prior_variance)
        gain = variance / (variance + 1.0)
        innovation = reward - state["mean"]
        precision = torch.where(pulled, 1.0 - gain, 0.0)
        return {
            "origin": origin,
            "count": self.gamma * state["count"] + precision.sum(dim=-1, keepdim=True),
            "noise": self.gamma * state["noise"] + ((precision * innovation) ** 2).sum(dim=-1, keepdim=True),
            "mean": torch.where(pulled, state["mean"] + gain * innovation, state["mean"]),
            "variance": torch.where(pulled, variance * (1.0 - gain), variance),
        }

    def posterior(self, state: State) -> tuple[Tensor, Tensor]:
        noise = state["noise"] / state["count"].clamp(min=torch.finfo(torch.float64).tiny)
        return state["origin"] + state["mean"], torch.sqrt(noise * state["variance"])
