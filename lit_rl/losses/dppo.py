"""DPPO: a trust region of the probability itself takes the place of the clipped ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.masked import masked_mean
from lit_rl.losses.surrogates import Losses, Surrogate


@dataclass(kw_only=True)
class DPPO(Surrogate):
    """-A sg(min(r, cap)) new where the token is inside the region, r = exp(new - sampler's): DPPO (arXiv 2602.04879).

    A token leaves the loss iff its probability p has moved away from mu in the direction of A by more than `high` (A > 0) or `low` (else).
    The ratio is to the sampler: with `answers.old_logprobs: rollout` no other log-probabilities are computed. Defaults are for `tv`.

    Args:
        divergence: `tv`: abs(p - mu); `kl`: of the two-valued distributions (this token, any other), mu log(mu / p) +
            (1 - mu) log((1 - mu) / (1 - p)), for which 0.05 is usual.
        low: Bound for tokens that become less likely.
        high: Bound for tokens that become more likely.
        cap: The ratio is at most this.
        anchor: Whose probability mu is: the sampler's, as in the paper, or the trainer's before its first step (the authors' `recompute`).
    """

    divergence: Literal["tv", "kl"] = "tv"
    low: float = 0.2
    high: float = 0.2
    cap: float = 20.0
    anchor: Literal["sampler", "trainer"] = "sampler"

    def __post_init__(self) -> None:
        if min(self.low, self.high, self.cap) <= 0:
            raise ConfigError(f"model.surrogate.low={self.low}, high={self.high} and cap={self.cap} must be above 0; 0.2 is usual for tv")

    def __call__(self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, behaviour: Tensor | None = None) -> Losses:
        sampler = old if behaviour is None else behaviour
        log_ratio = (new.detach() - sampler).clamp(max=20.0)
        down, up = self.outside(new.detach(), sampler if self.anchor == "sampler" else old)
        held = torch.where(advantages > 0, up, down)
        losses = -advantages * log_ratio.exp().clamp(max=self.cap) * ~held * new
        low, high = (masked_mean((held & side).to(new.dtype), mask) for side in (advantages <= 0, advantages > 0))
        shares = {"clip_fraction": low + high, "clip_fraction_low": low, "clip_fraction_high": high}
        return losses, shares | {"ppo_kl": masked_mean(-log_ratio, mask)}

    def outside(self, new: Float[Tensor, "B S"], anchor: Float[Tensor, "B S"]) -> tuple[Bool[Tensor, "B S"], Bool[Tensor, "B S"]]:
        """Tokens whose probability has fallen, and risen, beyond the region."""
        p, mu = new.exp(), anchor.exp()
        if self.divergence == "tv":
            return p - mu < -self.low, p - mu > self.high
        kl = mu * (anchor - new) + (1 - mu) * ((1 - mu + 1e-8) / (1 - p + 1e-8)).log()
        return (kl > self.low) & (p < mu), (kl > self.high) & (p > mu)
