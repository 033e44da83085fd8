"""Divergences of a policy from its reference, per token, and rules for their weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lit_rl.errors import ConfigError

KLEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"]
"""See `kl_estimate`. verl's names: kl = k1, mse = k2, low_var_kl = k3."""


def kl_estimate(new: Float[Tensor, "*S"], ref: Float[Tensor, "*S"], *, kind: KLEstimator) -> Float[Tensor, "*S"]:
    """One-sample estimates of KL(new || ref), with x = new - ref (Schulman, "Approximating KL divergence").

    | kind | value                  | as a loss                                                              |
    | k1   | x                      | its expected gradient is 0: of no use as a loss, right in a reward     |
    | abs  | abs(x)                 |                                                                        |
    | k2   | x^2 / 2                | its gradient is the one of the KL                                      |
    | k3   | exp(-x) - 1 + x        | that of the *forward* KL; x in [-20, 20], value in [-10, 10], as verl  |
    | "+"  | of the kind before it  | and the gradient of k2 (straight through); verl documents but refuses it |

    The gradient flows to `new`; compute `ref` without one.
    """
    x = new - ref
    if kind.endswith("+"):
        square = 0.5 * x**2
        return square - square.detach() + _value(x.detach(), kind[:-1])
    return _value(x, kind)


def _value(x: Tensor, kind: str) -> Tensor:
    if kind == "k1":
        return x
    if kind == "abs":
        return x.abs()
    if kind == "k2":
        return 0.5 * x**2
    limited = x.clamp(-20, 20)
    return ((-limited).exp() + limited - 1).clamp(-10, 10)


@dataclass(frozen=True, kw_only=True)
class KL:
    """Divergence from the reference as a term of the loss.

    Args:
        coef: Its weight; 0 spends no forward on the reference.
        kind: Its estimate, see `kl_estimate`; verl's low_var_kl is k3.
    """

    coef: float = 0.0
    kind: KLEstimator = "k3"

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ConfigError(f"model.kl.coef={self.coef} must not be negative; 0 spends no forward on the reference")

    def __call__(self, new: Float[Tensor, "*S"], ref: Float[Tensor, "*S"] | None) -> Float[Tensor, "*S"]:
        """The estimate at each token, with a gradient to `new`."""
        assert ref is not None, "a divergence needs the reference's log-probabilities"
        return kl_estimate(new, ref, kind=self.kind)


@dataclass(frozen=True, kw_only=True)
class RewardKL:
    """Divergence from the reference that is taken off the reward at every token.

    Args:
        coef: Its weight; the first one, where it adapts.
        kind: Its estimate; k1 = log p - log p_ref.
        target: The weight adapts so that the mean divergence stays here (arXiv 1909.08593); None = it is constant.
        horizon: Answers in which it may change by a factor of about e^0.2.
    """

    coef: float = 0.0
    kind: Literal["k1", "k2", "k3", "abs"] = "k1"
    target: float | None = None
    horizon: int = 10000

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ConfigError(f"model.kl_in_reward.coef={self.coef} must not be negative; 0 spends no forward on the reference")
        if self.target is not None and not (self.coef and self.target > 0 and self.horizon > 0):
            raise ConfigError(
                f"model.kl_in_reward.target={self.target} and horizon={self.horizon} must be above 0 (0.1 and 10000 are usual), and so "
                f"must coef={self.coef}, which they adapt; for a constant weight leave target out"
            )

    def controller(self) -> FixedKL:
        """A rule for the weight from iteration to iteration; its state belongs into the checkpoint."""
        return FixedKL(self.coef) if self.target is None else AdaptiveKL(self.coef, target=self.target, horizon=self.horizon)


class FixedKL:
    """The coefficient stays what it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, *, sequences: int) -> None:
        """Takes note of an iteration's mean KL."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.coef = state["coef"]


class AdaptiveKL(FixedKL):
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * sequences / horizon, per iteration (arXiv 1909.08593, section 2.2).

    kl: mean over sequences of the mean over their tokens. sequences: how many the iteration had, over all ranks.
    """

    def __init__(self, coef: float, *, target: float, horizon: int | float) -> None:
        super().__init__(coef)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, *, sequences: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * sequences / self.horizon
