"""Held-out pairs of a method that learns from answers, too: how often the chosen answer gained more on the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rl.losses.preference import sequence_logprobs
from lit_rl.modules.media import with_media
from lit_rl.modules.tokens import LitTokens
from lit_rl.replay.preferences import pair_rows
from lit_rl.types import TokenRollout


class PairMargins:
    """Margins of the pairs of an evaluation on this process, Float64 "P" of each batch."""

    def __init__(self) -> None:
        self._margins: list[Tensor] = []

    def add(self, method: LitTokens, pairs: TokenRollout, real: Tensor, *, beta: float, temperature: float) -> None:
        """beta ((log p - log p_ref) of the chosen answer - that of the rejected one). real: Bool "P", the others fill up a batch."""
        pairs = with_media(pairs, method.policy, method.data)
        chosen, rejected = pair_rows(pairs.group, pairs.columns["preference"])
        new = method.all_logprobs(pairs, temperature=temperature)
        with method.policy.reference():
            theirs = method.all_logprobs(pairs, temperature=temperature)
        gain = beta * sequence_logprobs(new - theirs, pairs.mask)
        self._margins.append((gain[chosen] - gain[rejected])[real])

    def report(self, method: LitTokens) -> None:
        """Log `val/dpo_margin` and `val/dpo_accuracy` over all processes, of which all have pairs or none has. Collective."""
        margins, self._margins = self._margins, []
        if margins:
            margin = method.all_ranks(torch.cat(margins)).double()
            method.report({"val/dpo_margin": float(margin.mean()), "val/dpo_accuracy": float((margin > 0).double().mean())})
