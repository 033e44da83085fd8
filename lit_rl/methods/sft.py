"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from lit_rl.losses.supervised import dft_loss, nll_loss
from lit_rl.losses.terms import Term, Terms
from lit_rl.modules.media import with_media
from lit_rl.modules.tokens import LitTokens
from lit_rl.policies.base import TokenPolicy
from lit_rl.replay.sequences import sequences
from lit_rl.replay.sources import SupervisedSource
from lit_rl.rollouts.answers import Answers
from lit_rl.types import Minibatch, Prompts, TokenRollout


class SFT(LitTokens):
    """Maximum likelihood of the demonstrated answers; no token of a prompt is learned.

    An iteration is `prompts_per_iteration` rows of the data, `prompts_per_update` of them in one optimizer step. Validation logs the
    loss on the held-out rows and, where the run has rewards, has the policy answer their prompts and scores that. Dropout is active while
    it trains, that of the model's config.json and `lora.dropout`; other methods train without any.

    Args:
        policy: The language model that is trained. The datamodule has `supervised_ids(info) -> (ids, which of them are learned)`.
        loss_kind: `nll`, or `dft`, which weighs each token with its own probability (arXiv 2508.05629).
        answers: How held-out prompts are answered, in evaluation and prediction.
        kwargs: See `LitTokens`.
    """

    drops = True
    sources = (SupervisedSource,)
    datamodules = "datamodules.supervised.SupervisedText"

    def __init__(
        self, policy: TokenPolicy, *, loss_kind: Literal["nll", "dft"] = "nll", answers: Answers | None = None, **kwargs: Any
    ) -> None:
        super().__init__(policy, group_size=1, answers=answers or Answers(), **kwargs)
        self.loss_kind = loss_kind
        self.token_loss = {"nll": nll_loss, "dft": dft_loss}[loss_kind]
        self._held_out = torch.zeros(2, dtype=torch.float64)  # summed loss and number of tokens of the evaluation under way

    def needs_rewards(self) -> bool:
        return False

    # ------------------------------------------------------------------ demonstrations for a rollout
    def generates(self) -> bool:
        return self.reward_queue is not None or self.trainer.predicting

    def longest_sequence(self) -> int:
        return self.source(SupervisedSource).max_length

    def collect(self, prompts: Prompts) -> TokenRollout:
        return self.demonstrations(prompts)

    def demonstrations(self, prompts: Prompts) -> TokenRollout:
        """The rows' conversations, the assistant's tokens being the actions."""
        rows = [self.source(SupervisedSource).supervised_ids(row) for row in prompts.info]
        found = sequences(prompts, [ids for ids, _ in rows], [chosen for _, chosen in rows])
        return with_media(found, self.policy, self.data).to(self.device)

    def score(self, rollout: TokenRollout) -> TokenRollout:
        return rollout

    def credit(self, rollout: TokenRollout) -> TokenRollout:
        tokens = self.sum_of_ranks(rollout.mask.sum())
        self.rollout_metrics = {"tokens": float(tokens)}
        return replace(rollout, weights=self.token_weights(rollout))

    # ------------------------------------------------------------------ loss
    def loss(self, batch: Minibatch) -> Terms:
        linear = -batch.weights if self.loss_kind == "nll" else None
        new, _ = self.policy.logprobs(batch.tokens, batch.lengths, batch.mask, media=batch.media, arriving=linear)
        return {"sft": Term(self.token_loss(new), batch.weights)}

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, object]:
        here = Prompts(group=batch.group, info=batch.info)
        held_out = self.demonstrations(here)
        real = (held_out.group >= 0)[:, None]  # the rest fills up the last batch
        new, _ = self.policy.logprobs(held_out.tokens, held_out.lengths, held_out.mask, media=held_out.media)
        mask = held_out.mask & real
        self._held_out += torch.stack([-(new * mask).sum().double(), mask.sum().double()]).cpu()
        return super().validation_step(batch, batch_idx) if self.reward_queue is not None else {"prompts": batch}

    def on_validation_epoch_end(self) -> None:
        total, tokens = self.sum_of_ranks(self._held_out.to(self.device)).tolist()
        self._held_out = torch.zeros_like(self._held_out)
        self.report({"val/loss": total / max(tokens, 1)}, bar=("val/loss",))
        if self.reward_queue is not None:
            super().on_validation_epoch_end()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
