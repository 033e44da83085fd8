"""How far a policy is from its reference, per token, and who decides what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor

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
        if target <= 0 or horizon <= 0:
            raise ValueError(f"an adaptive KL coefficient needs target {target} and horizon {horizon} above 0; 0.1 and 10000 are usual")
        super().__init__(coef)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, *, sequences: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * sequences / self.horizon
