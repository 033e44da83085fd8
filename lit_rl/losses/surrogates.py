"""Policy-gradient losses of language models as objects: each returns the loss of every token, before weights, and its own metrics.

new: log-probabilities as the policy has them now; old: as they were before the first step on a rollout. Advantages are detached data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.masked import masked, masked_mean, row_mean
from lit_rl.losses.policy_gradient import LOG_RATIO_LIMIT, clipped_ratio_loss, is_clipped
from lit_rl.losses.sequence_ratio import sequence_log_ratio

Metrics = dict[str, Float[Tensor, ""]]
Losses = tuple[Float[Tensor, "B S"], Metrics]


class Surrogate(ABC):
    """A loss whose gradient at new == old is that of -A new."""

    @abstractmethod
    def __call__(
        self,
        new: Float[Tensor, "B S"],
        old: Float[Tensor, "B S"],
        advantages: Float[Tensor, "B S"],
        mask: Bool[Tensor, "B S"],
        *,
        behaviour: Float[Tensor, "B S"] | None = None,
    ) -> Losses:
        """Losses, whose gradient flows to `new`, and metrics: means over the masked tokens.

        behaviour: log-probabilities as the sampler reported them, where they are not `old`.
        """


@dataclass(kw_only=True)
class Clip(Surrogate):
    """max(-A r, -A clamp(r, 1 - low, 1 + high)), r = exp(new - old): PPO (arXiv 1707.06347, eq. 7), GRPO.

    Args:
        low: The ratio is clipped from below at 1 - low.
        high: The ratio is clipped from above at 1 + high; DAPO has 0.28.
        dual: Bound of the ratio for negative advantages (arXiv 1912.09729), e.g. 3; None = none.
        cap: Bound of the ratio in the branch that is not clipped (INTELLECT-2, TRL's delta), above 1 + high; None = none.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if self.dual is not None and self.dual <= 1:
            raise ConfigError(f"model.surrogate.dual={self.dual} must be above 1 (3 is usual), or null for none")

    def log_ratio(self, new: Tensor, old: Tensor, mask: Tensor) -> Float[Tensor, "B S"]:
        """The log-ratio that is clipped."""
        return new - old

    def __call__(self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, behaviour: Tensor | None = None) -> Losses:
        log_ratio, clip = self.log_ratio(new, old, mask), {"clip_low": self.low, "clip_high": self.high}
        losses = clipped_ratio_loss(log_ratio, advantages, **clip, dual_clip=self.dual, ratio_cap=self.cap)
        return losses, surrogate_metrics(log_ratio, advantages, mask, **clip, dual_clip=self.dual)


@dataclass(kw_only=True)
class SequenceClip(Clip):
    """`Clip` of the whole answer's ratio, the geometric mean of its tokens': GSPO (arXiv 2507.18071). Its range is 1,000 times narrower.

    Args:
        low: The ratio is clipped from below at 1 - low.
        high: The ratio is clipped from above at 1 + high.
        dual: Bound of the ratio for negative advantages (arXiv 1912.09729); None = none.
        cap: Bound of the ratio in the branch that is not clipped, above 1 + high; None = none.
    """

    low: float = 3e-4
    high: float = 4e-4

    def log_ratio(self, new: Tensor, old: Tensor, mask: Tensor) -> Float[Tensor, "B S"]:
        return sequence_log_ratio(new, old, mask)


@dataclass(kw_only=True)
class Cispo(Surrogate):
    """-sg(clamp(r, 1 - low, 1 + high)) A new: CISPO (arXiv 2506.13585, eq. 4), where clipped tokens keep a gradient.

    Args:
        low: The weight is at least 1 - low; None = no lower bound, as in the paper.
        high: The weight is at most 1 + high. TRL's epsilon_high is the bound itself: high is that minus 1.
    """

    low: float | None = None
    high: float = 4.0

    def __post_init__(self) -> None:
        _check_range(self.low or 0.0, self.high)

    def __call__(self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, behaviour: Tensor | None = None) -> Losses:
        ratio = _ratio(new.detach() - old)
        least = 0.0 if self.low is None else 1 - self.low
        losses = -ratio.clamp(least, 1 + self.high) * advantages * new
        return losses, _clip_shares(ratio < least, ratio > 1 + self.high, mask) | _moved(new - old, mask)


@dataclass(kw_only=True)
class Sapo(Surrogate):
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A: SAPO's soft clipping (arXiv 2511.20347).

    Args:
        tau_pos: Sharpness where A > 0.
        tau_neg: Sharpness elsewhere; the larger it is, the sooner a ratio far from 1 loses its gradient.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        if self.tau_pos <= 0 or self.tau_neg <= 0:
            raise ConfigError(f"model.surrogate.tau_pos={self.tau_pos} and tau_neg={self.tau_neg} must be above 0; 1 is usual")

    def __call__(self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, behaviour: Tensor | None = None) -> Losses:
        tau = torch.where(advantages > 0, self.tau_pos, self.tau_neg).to(new.dtype)
        return -4 / tau * torch.sigmoid(tau * (_ratio(new - old) - 1)) * advantages, _moved(new - old, mask)


@dataclass(kw_only=True)
class GeoMean(Surrogate):
    """-mean_t(A) exp(mean_t d'), d' = new - old clipped on the side of A's sign: GMPO (arXiv 2507.20673).

    Every token of an answer has the answer's loss: with aggregation seq-mean-token-mean the step's loss is the mean over answers.

    Args:
        low: The log-ratio of a token with A < 0 is at least -low.
        high: The log-ratio of a token with A > 0 is at most high.
    """

    low: float = 0.4
    high: float = 0.4

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def __call__(self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, behaviour: Tensor | None = None) -> Losses:
        log_ratio, sign = new - old, advantages.sign()
        limited = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-self.low, self.high))
        losses = (-row_mean(advantages, mask) * row_mean(limited, mask).exp())[:, None].expand_as(new)
        below, above = (log_ratio < -self.low) & (advantages < 0), (log_ratio > self.high) & (advantages > 0)
        return losses, _clip_shares(below, above, mask) | _moved(log_ratio, mask)


@dataclass(kw_only=True)
class Reinforce(Surrogate):
    """-A new: REINFORCE, GPG (arXiv 2504.02546)."""

    def __call__(self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, behaviour: Tensor | None = None) -> Losses:
        return -advantages * new, _moved(new - old, mask)


@dataclass(kw_only=True)
class Vespo(Surrogate):
    """-sg(phi) A new, phi = exp(l + k w - l exp(w)), w = the answer's summed log-ratio in [log 1e-8, 20]: VESPO, as TRL has it.

    Args:
        k_pos: k where A >= 0.
        lambda_pos: l where A >= 0.
        k_neg: k where A < 0.
        lambda_neg: l where A < 0.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __call__(self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, behaviour: Tensor | None = None) -> Losses:
        log_ratio = (new.detach() - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        total = masked(log_ratio, mask).sum(1, keepdim=True).clamp(-18.420680743952367, LOG_RATIO_LIMIT)
        good = advantages >= 0
        k, scale = torch.where(good, self.k_pos, self.k_neg), torch.where(good, self.lambda_pos, self.lambda_neg)
        phi = (scale.to(new.dtype) + k.to(new.dtype) * total - scale.to(new.dtype) * total.exp()).exp()
        return -phi * advantages * new, _moved(new - old, mask)


# ---------------------------------------------------------------------- formulas that several share
def surrogate_metrics(
    log_ratio: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Metrics:
    """clip_fraction = _low (r < 1, A < 0) + _high (r > 1, A > 0): shares of the tokens whose gradient the clip takes.

    clip_fraction_dual: share of those at the dual clip, which are none of the above. ppo_kl = mean(-log_ratio).
    """
    log_ratio = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    clipped = is_clipped(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    metrics = _clip_shares(clipped & (log_ratio < 0), clipped & (log_ratio > 0), mask, dtype=log_ratio.dtype) | _moved(log_ratio, mask)
    if dual_clip is not None:
        loss = torch.maximum(-advantages * log_ratio.exp(), -advantages * log_ratio.exp().clamp(1 - clip_low, 1 + clip_high))
        at_bound = (advantages < 0) & (loss > -advantages * dual_clip)
        metrics["clip_fraction_dual"] = masked_mean(at_bound.to(log_ratio.dtype), mask)
    return metrics


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _moved(log_ratio: Tensor, mask: Tensor) -> Metrics:
    """ppo_kl = mean(-log_ratio), an estimate of KL(old || new)."""
    return {"ppo_kl": masked_mean(-log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), mask)}


def _clip_shares(low: Tensor, high: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> Metrics:
    below, above = masked_mean(low.to(dtype), mask), masked_mean(high.to(dtype), mask)
    return {"clip_fraction": below + above, "clip_fraction_low": below, "clip_fraction_high": above}


def _check_range(low: float, high: float) -> None:
    if low < 0 or high < 0:
        raise ConfigError(f"model.surrogate.low={low} and high={high} must not be negative; 0.2 is usual for the ratio of a token")
