"""Preference losses: DPO and its relatives, one number per pair (chosen, rejected), from sums over completion tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.masked import masked

PreferenceLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "ipo_sum",
    "sigmoid_norm",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
]
"""See `preference_loss`."""

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
"""f of the log-ratios in chosen minus rejected: x; 1 - exp(-x); log 2 + log sigmoid(x); (exp((a - 1) x) - 1) / (a - 1)."""

DISCOPOP_TAU = 0.05


@dataclass(frozen=True, kw_only=True)
class Preference:
    """DPO's loss of pairs that stand beside rows of another kind.

    Args:
        coef: Weight of a pair beside another row.
        kind: Form of the loss, see `preference_loss`.
        beta: How far pairs may take the policy from the reference.
        label_smoothing: Share of the pairs that are taken to be labelled the wrong way round, in [0, 0.5); for `sigmoid`.
    """

    coef: float = 1.0
    kind: Literal["sigmoid", "hinge"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(
        self,
        chosen: Float[Tensor, "P"],
        rejected: Float[Tensor, "P"],
        ref_chosen: Float[Tensor, "P"],
        ref_rejected: Float[Tensor, "P"],
    ) -> tuple[Float[Tensor, "P"], dict[str, Float[Tensor, "P"]]]:
        """Losses of pairs, and of each its loss, margin and 1 where the chosen answer gained more, from `sequence_logprobs`."""
        four = chosen, rejected, ref_chosen, ref_rejected
        losses = preference_loss(*four, kind=self.kind, beta=self.beta, label_smoothing=self.label_smoothing).float()
        better, worse = (self.beta * (logprobs - reference).detach() for logprobs, reference in (four[::2], four[1::2]))
        margin = better - worse
        return losses, {"loss": losses.detach(), "margin": margin.float(), "accuracy": (margin > 0).float()}

    def __post_init__(self) -> None:
        if self.coef < 0 or self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"model.preference.coef={self.coef} must not be negative, beta={self.beta} must be above 0 (0.1 is usual) and "
                f"label_smoothing={self.label_smoothing} in [0, 0.5)"
            )


def sequence_logprobs(logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B"]:
    """Sum of each row's masked log-probabilities, in float64: float32 flips signs of differences at about 2000 tokens."""
    return masked(logprobs.double(), mask).sum(1)


def ld_sequence_logprobs(
    logprobs: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], shared: Int[Tensor, "B"], *, alpha: float
) -> Float[Tensor, "B"]:
    """`sequence_logprobs` in which tokens beyond the first `shared` ones count alpha: LD-DPO (arXiv 2409.06411).

    shared: the shorter completion's length of each row's pair. alpha 1 is DPO.
    """
    beyond = mask.cumsum(1) > shared[:, None]
    return masked(logprobs.double() * torch.where(beyond, alpha, 1.0), mask).sum(1)


def preference_loss(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    ref_chosen: Float[Tensor, "B"],
    ref_rejected: Float[Tensor, "B"],
    *,
    kind: PreferenceLoss = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    lengths: tuple[Int[Tensor, "B"], Int[Tensor, "B"]] | None = None,
    f_divergence: FDivergence = "reverse_kl",
    alpha: float = 0.5,
) -> Float[Tensor, "B"]:
    """One loss per pair from `sequence_logprobs` of the policy and the reference: DPO (arXiv 2305.18290, eq. 7) and its relatives.

    h = chosen - ref_chosen, k = rejected - ref_rejected, z = f(h) - f(k), n the lengths, e = label_smoothing, s = log sigmoid.

    | sigmoid      | -(1 - e) s(beta z) - e s(-beta z)  (e > 0: cDPO; TRL's sigmoid ignores e)                                     |
    | hinge        | max(0, 1 - beta z)                                               (SLiC)                                       |
    | ipo          | (h / n_c - k / n_r - 1 / (2 beta))^2                             (TRL, AReaL)                                 |
    | ipo_sum      | (z - 1 / (2 beta))^2                                             (arXiv 2310.12036 as written; OpenRLHF)      |
    | sigmoid_norm | -s(beta (h / n_c - k / n_r))                                     (length-normalised)                          |
    | robust       | (-(1 - e) s(beta z) + e s(-beta z)) / (1 - 2 e)                  (arXiv 2403.00409)                           |
    | exo_pair     | q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e)            q = sigmoid(beta z), e > 0                   |
    | nca_pair     | -s(beta h) - s(-beta h) / 2 - s(-beta k) / 2                                                                  |
    | bco_pair     | -s(beta h) - s(-beta k)                                                                                       |
    | sppo_hard    | (h - 1 / (2 beta))^2 + (k + 1 / (2 beta))^2                                                                   |
    | aot          | sigmoid with z = sorted(chosen - rejected) - sorted(ref_chosen - ref_rejected): over the pairs of this call   |
    | aot_unpaired | sigmoid with z = sorted(h) - sorted(k)                                                                        |
    | apo_zero     | 1 - sigmoid(beta h) + sigmoid(beta k)                            (arXiv 2408.06266)                           |
    | apo_down     | sigmoid(beta h) + 1 - sigmoid(beta (h - k))                                                                   |
    | discopop     | -s(beta z) (1 - q) + exp(-beta z) q,  q = sigmoid(beta z / 0.05)                                              |

    Mix kinds by summing weighted losses (MPO: 0.8 sigmoid + 0.2 bco_pair + `nll_loss` of the chosen tokens). The aot kinds change with
    the micro-batch.
    """
    h, k = chosen - ref_chosen, rejected - ref_rejected
    z = beta * (_divergence(h, f_divergence, alpha) - _divergence(k, f_divergence, alpha))
    if kind in ("ipo", "sigmoid_norm"):
        if lengths is None:
            raise ValueError(f"preference loss {kind!r} divides by the completions' lengths: pass lengths=(chosen, rejected)")
        of_chosen, of_rejected = (n.clamp(min=1).to(chosen.dtype) for n in lengths)
        gap = h / of_chosen - k / of_rejected
        return (gap - 0.5 / beta) ** 2 if kind == "ipo" else -F.logsigmoid(beta * gap)
    if kind == "exo_pair" and label_smoothing <= 0:
        raise ValueError("preference loss exo_pair needs label_smoothing above 0; 1e-3 is usual")
    if kind == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"preference loss robust needs label_smoothing in [0, 0.5), not {label_smoothing}")
    if kind == "aot":
        z = beta * ((chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values)
    elif kind == "aot_unpaired":
        z = beta * (h.sort().values - k.sort().values)
    return _OF_PAIRS[kind](z, beta * h, beta * k, beta, label_smoothing)


def preference_metrics(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    ref_chosen: Float[Tensor, "B"],
    ref_rejected: Float[Tensor, "B"],
    *,
    beta: float,
) -> dict[str, Float[Tensor, ""]]:
    """Means over the pairs: implicit rewards beta (log p - log p_ref) of both, their margin, how often chosen wins, log-probabilities."""
    better, worse = beta * (chosen - ref_chosen).detach(), beta * (rejected - ref_rejected).detach()
    return {
        "rewards_chosen": better.mean(),
        "rewards_rejected": worse.mean(),
        "margin": (better - worse).mean(),
        "accuracy": (better > worse).to(better.dtype).mean(),
        "logprobs_chosen": chosen.detach().mean(),
        "logprobs_rejected": rejected.detach().mean(),
    }


def _divergence(x: Tensor, kind: FDivergence, alpha: float) -> Tensor:
    if kind == "forward_kl":
        return 1 - (-x).exp()
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(x)
    if kind == "alpha_divergence" and alpha != 1:
        return (((alpha - 1) * x).exp() - 1) / (alpha - 1)
    return x  # reverse KL, and the limit of the alpha divergence at 1


def _smoothed(z: Tensor, h: Tensor, k: Tensor, beta: float, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


def _robust(z: Tensor, h: Tensor, k: Tensor, beta: float, e: float) -> Tensor:
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def _exo(z: Tensor, h: Tensor, k: Tensor, beta: float, e: float) -> Tensor:
    return z.sigmoid() * (F.logsigmoid(z) - math.log(1 - e)) + (-z).sigmoid() * (F.logsigmoid(-z) - math.log(e))


def _discopop(z: Tensor, h: Tensor, k: Tensor, beta: float, e: float) -> Tensor:
    blend = (z / DISCOPOP_TAU).sigmoid()
    return -F.logsigmoid(z) * (1 - blend) + (-z).exp() * blend


_OF_PAIRS: Mapping[str, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": _smoothed,
    "aot": _smoothed,
    "aot_unpaired": _smoothed,
    "robust": _robust,
    "exo_pair": _exo,
    "discopop": _discopop,
    "hinge": lambda z, h, k, beta, e: (1 - z).relu(),
    "ipo_sum": lambda z, h, k, beta, e: (z / beta - 0.5 / beta) ** 2,
    "nca_pair": lambda z, h, k, beta, e: -F.logsigmoid(h) - 0.5 * F.logsigmoid(-h) - 0.5 * F.logsigmoid(-k),
    "bco_pair": lambda z, h, k, beta, e: -F.logsigmoid(h) - F.logsigmoid(-k),
    "sppo_hard": lambda z, h, k, beta, e: (h / beta - 0.5 / beta) ** 2 + (k / beta + 0.5 / beta) ** 2,
    "apo_zero": lambda z, h, k, beta, e: 1 - h.sigmoid() + k.sigmoid(),
    "apo_down": lambda z, h, k, beta, e: h.sigmoid() + 1 - (h - k).sigmoid(),
}
"""Losses of (z, h, k), all three already times beta."""
