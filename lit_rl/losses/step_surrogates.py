"""Policy-gradient losses of denoising steps as objects: each returns the loss of every (sample, step) pair, before weights, and metrics.

new, old: log-probabilities of the stored step under the present policy and the one that acted, means over latent elements.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.policy_gradient import LOG_RATIO_LIMIT, clipped_ratio_loss, guard_logratio, policy_metrics, ratio_metrics

Losses = tuple[Float[Tensor, "N"], dict[str, Float[Tensor, ""]]]


class StepSurrogate(ABC):
    """A loss whose gradient at new == old is that of -A new."""

    needs_means: ClassVar[bool] = False
    """The rollout keeps the mean of each step under the policy that acted."""

    @abstractmethod
    def __call__(
        self,
        new: Float[Tensor, "N"],
        old: Float[Tensor, "N"],
        advantages: Float[Tensor, "N"],
        *,
        weights: Float[Tensor, "N"],
        mean: Float[Tensor, "N *D"],
        old_mean: Float[Tensor, "N *D"] | None,
        noise_std: Float[Tensor, "N"],
    ) -> Losses:
        """Losses, and metrics averaged with `weights`, `ratio_max_dev` being the largest.

        mean, old_mean: of the step under the present policy and the one that acted. noise_std: Standard deviation of the step's noise.
        """


@dataclass(kw_only=True)
class Clip(StepSurrogate):
    """max(-A r, -A clamp(r, 1 - low, 1 + high)), r = exp(new - old): Flow-GRPO (arXiv 2505.05470).

    Args:
        low: The ratio is clipped from below at 1 - low. Log-probabilities are means over latent elements, so 1e-4 is like 0.2 for tokens.
        high: The ratio is clipped from above at 1 + high.
    """

    low: float = 1e-4
    high: float = 1e-4

    def __post_init__(self) -> None:
        check_range(low=self.low, high=self.high)

    def __call__(
        self, new: Tensor, old: Tensor, advantages: Tensor, *, weights: Tensor, mean: Tensor, old_mean: Tensor | None, noise_std: Tensor
    ) -> Losses:
        clip = {"clip_low": self.low, "clip_high": self.high}
        log_ratio = self.log_ratio(new, old, mean, old_mean, noise_std)
        return clipped_ratio_loss(log_ratio, advantages, **clip), policy_metrics(new, old, **clip, weights=weights)

    def log_ratio(self, new: Tensor, old: Tensor, mean: Tensor, old_mean: Tensor | None, noise_std: Tensor) -> Float[Tensor, "N"]:
        """The log-ratio that is clipped."""
        return new - old


@dataclass(kw_only=True)
class Guard(Clip):
    """`Clip` of a ratio that is centred and scaled by the step's noise, so that one range fits all steps: GRPO-Guard (arXiv 2510.22319).

    Args:
        low: The ratio is clipped from below at 1 - low; published with 2e-6 (OCR, GenEval) and 4e-6 (PickScore).
        high: The ratio is clipped from above at 1 + high.
    """

    needs_means: ClassVar[bool] = True
    low: float = 2e-6
    high: float = 2e-6

    def log_ratio(self, new: Tensor, old: Tensor, mean: Tensor, old_mean: Tensor | None, noise_std: Tensor) -> Float[Tensor, "N"]:
        assert old_mean is not None
        return guard_logratio(new, old, mean, old_mean, noise_std=noise_std)


@dataclass(kw_only=True)
class DPPO(StepSurrogate):
    """-A r, but 0 where the step's divergence is at least `threshold` and r moves away from 1: Flow-DPPO (arXiv 2606.11025).

    The divergence is k = mean_D (mu - mu_old)^2 / (2 s^2), s = noise_std: the exact one of the two Gaussians, per latent element (the
    paper sums over elements). A pair moves away where r > 1 and A > 0, or r < 1 and A < 0.

    Args:
        threshold: tau, per latent element.
        scaled: Divide by the step's own variance; False takes s = 1, as UniRL and verl-omni do without `add_kl_coefficient`.
    """

    needs_means: ClassVar[bool] = True
    threshold: float = 1e-6
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ConfigError(f"model.surrogate.threshold={self.threshold} must be above 0, or no step that moves away is ever trained")

    def __call__(
        self, new: Tensor, old: Tensor, advantages: Tensor, *, weights: Tensor, mean: Tensor, old_mean: Tensor | None, noise_std: Tensor
    ) -> Losses:
        assert old_mean is not None
        ratio = (new - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        moved = self.divergence(mean, old_mean, noise_std)
        away = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
        left_out = (moved >= self.threshold) & away
        return torch.where(left_out, 0.0, -advantages * ratio), _shares(moved, left_out, weights) | ratio_metrics(new, old, weights=weights)

    def divergence(self, mean: Tensor, old_mean: Tensor, noise_std: Tensor) -> Float[Tensor, "N"]:
        """k of each pair, without a gradient; 0 in steps without noise."""
        square = (mean.detach() - old_mean).pow(2).flatten(1).mean(1)
        std = noise_std if self.scaled else torch.ones_like(noise_std)
        return torch.where(noise_std > 0, square / (2 * torch.where(std > 0, std, 1.0) ** 2), 0.0)


def check_range(**bounds: float) -> None:
    """Raise ConfigError for a bound of a clip range that is not in (0, 1)."""
    for name, value in bounds.items():
        if not 0 < value < 1:
            raise ConfigError(
                f"model.surrogate.{name}={value} must be in (0, 1); log-probabilities are means over latent elements, so use 1e-5 ... 1e-3"
            )


def _shares(moved: Float[Tensor, "N"], left_out: Bool[Tensor, "N"], weights: Float[Tensor, "N"]) -> dict[str, Float[Tensor, ""]]:
    total = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return {"masked_fraction": (left_out * weights).sum() / total, "kl_new_old": (moved * weights).sum() / total}
