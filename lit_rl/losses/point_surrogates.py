"""Losses of the forward process as objects: each returns the loss of every (sample, point) pair, before weights, and its own metrics.

A pair is a clean sample x0 noised to x = (1 - sigma) x0 + sigma noise; new, old: velocities there, of the policy and of the old one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.nft import AdvantageMode, MatchingWeight, matching_logprob, nft_loss, optimality
from lit_rl.losses.policy_gradient import clipped_ratio_loss, policy_metrics
from lit_rl.losses.step_surrogates import Losses, check_range


class PointSurrogate(ABC):
    """A loss whose gradient at new == old rewards samples with A > 0 for being predicted well, and punishes those with A < 0."""

    @abstractmethod
    def __call__(
        self,
        new: Float[Tensor, "N *D"],
        old: Float[Tensor, "N *D"],
        advantages: Float[Tensor, "N"],
        *,
        x: Float[Tensor, "N *D"],
        x0: Float[Tensor, "N *D"],
        noise: Float[Tensor, "N *D"],
        sigma: Float[Tensor, "N"],
        weights: Float[Tensor, "N"],
        adv_clip: float,
    ) -> Losses:
        """Losses, and metrics averaged with `weights`, `ratio_max_dev` being the largest.

        adv_clip: The bound of the advantages, `advantage.clip`.
        """


@dataclass(kw_only=True)
class NFT(PointSurrogate):
    """clip (r l+ + (1 - r) l-) / beta: DiffusionNFT (arXiv 2509.16117), see `lit_rl.losses.nft.nft_loss`.

    Args:
        beta: How far the compared policies are from the old one: 1 (GenEval), 0.1 (OCR, several rewards).
        mode: The part of an advantage that is used, see `lit_rl.losses.nft.optimality`.
    """

    beta: float = 1.0
    mode: AdvantageMode = "normal"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"model.surrogate.beta={self.beta} must be above 0; DiffusionNFT uses 0.1 ... 1")

    def __call__(
        self, new: Tensor, old: Tensor, advantages: Tensor, *,
        x: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor, weights: Tensor, adv_clip: float,
    ) -> Losses:  # fmt: skip
        r = optimality(advantages, clip=adv_clip, mode=self.mode)
        return nft_loss(new, old, x=x, x0=x0, sigma=sigma, r=r, beta=self.beta, scale=adv_clip).policy, {}


@dataclass(kw_only=True)
class Matching(PointSurrogate):
    """max(-A r, -A clamp(r, 1 - low, 1 + high)), log r = how much better `new` matches than `old`: AWM (arXiv 2509.25050).

    Args:
        low: The ratio is clipped from below at 1 - low.
        high: The ratio is clipped from above at 1 + high.
        weight: How the matching error of a time counts in the log-probability, see `lit_rl.losses.nft.matching_logprob`.
        power: Exponent of that weight, likewise.
    """

    low: float = 1e-2
    high: float = 1e-2
    weight: MatchingWeight = "ghuber"
    power: float = 0.25

    def __post_init__(self) -> None:
        check_range(low=self.low, high=self.high)

    def __call__(
        self, new: Tensor, old: Tensor, advantages: Tensor, *,
        x: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor, weights: Tensor, adv_clip: float,
    ) -> Losses:  # fmt: skip
        now, before = (matching_logprob(v, x0, noise, sigma=sigma, weight=self.weight, power=self.power) for v in (new, old))
        losses = clipped_ratio_loss(now - before, advantages, clip_low=self.low, clip_high=self.high)
        return losses, policy_metrics(now, before, clip_low=self.low, clip_high=self.high, weights=weights)
