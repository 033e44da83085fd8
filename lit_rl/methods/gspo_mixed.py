"""Preferences and self-play in one run: DPO on the rows that have a pair of answers, GSPO on the answers to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.credit.rules import Credit, Group
from lit_rl.credit.tokens import win_rates
from lit_rl.credit.weights import mixed_weights
from lit_rl.errors import ConfigError
from lit_rl.losses.off_policy import sampler_kl
from lit_rl.losses.preference import Preference, sequence_logprobs
from lit_rl.losses.sequence_ratio import answer_ratios
from lit_rl.losses.surrogates import SequenceClip
from lit_rl.losses.terms import Term, Terms, token_means
from lit_rl.modules.gradient import LitPolicyGradient
from lit_rl.modules.pair_margins import PairMargins
from lit_rl.policies.base import TokenPolicy
from lit_rl.replay.batches import TokenBatch
from lit_rl.replay.mixed_rows import count_rows, is_given, is_pair, part_of, rows_where, share_of_rows, with_both_answers
from lit_rl.replay.preferences import of_both, pair_rows, pair_units
from lit_rl.replay.rows import concatenated, select
from lit_rl.replay.sequences import assemble, pair_sequences
from lit_rl.replay.sources import PairSource, TextSource
from lit_rl.types import Info, Minibatch, Prompts, TokenRollout


class MixedGSPO(LitPolicyGradient):
    """(1 / N) (sum over self-play rows of the mean loss of their answers + preference.coef * sum over pairs of DPO's), N rows in a step.

    Rows whose `info["kind"]` is "pair" (see `datamodules.mixed.PromptsAndPairs`) are learned from as they are, relative to the reference;
    to the others the policy gives `group_size` answers, whose loss is that of GSPO (arXiv 2507.18071) for each answer's mean token. Both
    terms see the policy at `sampling.temperature`. An iteration is `prompts_per_iteration` rows of either kind.

    Args:
        policy: The language model that is trained. Of the datamodule see `LitPolicyGradient` and, for pairs, `DPO`.
        self_play: What an answer earns: its `score`, or its `winrate`, the mean chance sigmoid(own score - other's) to beat another answer
            to the same prompt, for scores that are a reward model's.
        credit: How an answer's rewards become its advantages, see `lit_rl.credit.rules`; default: `Group`.
        surrogate: The ratio of whole answers, clipped; default: `SequenceClip`.
        preference: DPO's loss of the pairs.
        kwargs: See `LitPolicyGradient`.
    """

    stored_with: Sequence[str] = ("self_play",)
    surrogate: SequenceClip

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        self_play: Literal["score", "winrate"] = "score",
        credit: Credit | None = None,
        preference: Preference | None = None,
        surrogate: SequenceClip | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, surrogate=surrogate or SequenceClip(), aggregation="seq-mean-token-mean", **kwargs)
        self.refuse_ahead()
        if self.group_size == 1:
            raise ConfigError("model.group_size=1 gives every answer advantage 0, as there is no sibling to compare it with: use 4 to 16")
        self.self_play, self.rule = self_play, credit or Group()
        self.preference, self.margins = preference or Preference(), PairMargins()

    # ------------------------------------------------------------------ sizes
    sources = (TextSource, PairSource)
    datamodules = "datamodules.mixed.PromptsAndPairs"

    def check_parts(self, stage: str) -> None:
        super().check_parts(stage)
        rows = chain(self.held_out_pairs, self.source(PairSource).train_prompts if stage == "fit" else ())
        if stage != "predict" and any(is_pair(row) for row in rows):
            self.policy.check_reference(after_warmup=False)

    def plan(self) -> str:
        return (
            f"An iteration: {self.prompts_per_iteration} rows: pairs, or {self.group_size} answers; {self.inner_epochs * self.updates} "
            f"optimizer steps of {self.prompts_per_update} rows, each in {self.micro_batches_per_update} micro-batches on each process"
        )

    @property
    def held_out_pairs(self) -> Sequence[Info]:
        return getattr(self.data, "held_out_pairs", ())

    units_per_prompt = 1  # a pair stays together

    def units(self, rollout: TokenRollout, rows: Tensor) -> list[Tensor]:
        return pair_units(rows, rollout.group.cpu(), rollout.columns["preference"].cpu())

    # ------------------------------------------------------------------ rows for a rollout
    def micro_batches_within(self, tokens: int) -> int:
        raise ConfigError(
            "MixedGSPO's micro-batches hold pairs and answers: set trainer.accumulate_grad_batches, not model.micro_batch_tokens"
        )

    def ask(self, iteration: int) -> Prompts:
        info = self.data.prompts(iteration, self.prompts_per_iteration)
        mine = share_of_rows(info, updates=self.updates, rank=self.global_rank, world_size=self.trainer.world_size)
        group = torch.tensor([row for row in mine for _ in range(2 if is_pair(info[row]) else self.group_size)])
        return Prompts(group=group, info=[info[row] for row in group.tolist()])

    def sample(self, prompts: Prompts) -> TokenRollout:
        """The engine's answers, submitted for scoring, and then the pairs."""
        pair = torch.tensor([is_pair(row) for row in prompts.info])
        answered, given = (part_of(prompts, where) for where in (~pair, pair))
        asked, answers = self.answers.generate(self, answered, self.keys(answered), self.answers.sampling)
        parts = [assemble(answered, asked, answers).with_columns(preference=torch.zeros(len(answers)).long())] if answers else []
        return concatenated(parts + ([self.pairs(given)] if len(given) else [])).to(self.device)

    def pairs(self, prompts: Prompts) -> TokenRollout:
        """Chosen, rejected, chosen, rejected, ...: each row of the data stands twice in `prompts`."""
        return pair_sequences(prompts, self.source(PairSource).pair_ids)

    def annotate(self, rollout: TokenRollout) -> TokenRollout:
        """Log-probabilities where they are needed: the trainer's of answers, the reference's of pairs."""
        temperature, pairs = self.answers.sampling.temperature, rows_where(is_given(rollout))
        if self.needs_logprobs():
            mine = self.all_logprobs(rollout, temperature=temperature, rows=rows_where(~is_given(rollout)))
            rollout = replace(rollout.with_streams(behaviour=rollout.logprobs), logprobs=mine)
        if self.needs_reference() or self.all_ranks(pairs).numel():
            with self.policy.reference():
                theirs = self.all_logprobs(rollout, temperature=temperature, rows=None if self.needs_reference() else pairs)
            rollout = rollout.with_streams(reference=theirs)
        return rollout

    # ------------------------------------------------------------------ credit
    def score(self, rollout: TokenRollout) -> TokenRollout:
        """Pairs have no score: NaN."""
        answers = rows_where(~is_given(rollout))
        if not self.all_ranks(answers).numel():
            return rollout
        with self.phase("score"):
            found = self.queue().gather()
        nothing = torch.full((len(rollout),), torch.nan, dtype=torch.float64)
        return replace(rollout, rewards={name: nothing.index_put((answers.cpu(),), values) for name, values in found.items()})

    def credit(self, rollout: TokenRollout) -> TokenRollout:
        rollout = self.without_broken(rollout)
        given, answers = is_given(rollout), rows_where(~is_given(rollout))
        total = torch.full((len(rollout),), torch.nan, dtype=torch.float64, device=self.device)
        self.rollout_metrics = {}
        if rollout.rewards:
            total = self.total(rollout)
            own = select(rollout, answers)
            seen = own.streams if self.needs_reference() else {name: x for name, x in own.streams.items() if name != "reference"}
            self.rollout_metrics = self.describe(replace(own, streams=seen), total[answers])
        rollout = self.with_advantages(replace(rollout, mask=rollout.mask & (given | total.isfinite())[:, None]), total)
        rollout = replace(rollout, weights=self.token_weights(rollout))
        counts = {"non_finite": self.non_finite, "gspo/answers_that_teach": self.all_ranks(rows_where(self.teaches(rollout))).numel()}
        counts |= zip(("gspo/self_play_rows", "gspo/pref_rows"), self.sum_of_ranks(count_rows(rollout.group, given)).tolist())
        self.rollout_metrics |= {name: float(count) for name, count in counts.items()}
        return rollout

    def with_advantages(self, rollout: TokenRollout, total: Tensor) -> TokenRollout:
        answers = replace(rollout, mask=rollout.mask & ~is_given(rollout)[:, None])
        earned = self.everywhere(win_rates, total, rollout.group) if self.self_play == "winrate" else total
        rewards, group, known = self.token_rewards(answers, earned), rollout.group, total.isfinite()
        advantages = self.rule(rewards, group, answers.mask, has_reward=known, total=self.sum_of_ranks, everywhere=self.everywhere)
        return replace(rollout, advantages=advantages.float().where(rollout.mask, 0.0))

    def token_weights(self, rollout: TokenRollout) -> Tensor:
        """1 / (N n L) for each of the L tokens of an answer that is one of n to its row, preference.coef / N for a pair."""
        given, mask = is_given(rollout), rollout.mask
        counts = torch.zeros(self.prompts_per_iteration, device=mask.device)
        siblings = self.sum_of_ranks(counts.index_add(0, rollout.group, (mask.any(1) & ~given).float()))[rollout.group]
        return mixed_weights(mask, given, siblings, rows=self.prompts_per_update, pair=self.preference.coef)

    def teaches(self, rollout: TokenRollout) -> Tensor:
        """Bool "B": answers with an advantage."""
        assert rollout.advantages is not None
        return (rollout.advantages != 0).any(1)

    def finite(self, rollout: TokenRollout) -> Tensor:
        """Both answers of a pair are finite, or neither counts."""
        finite, pairs = super().finite(rollout), pair_rows(rollout.group, rollout.columns["preference"])
        return of_both(pairs, finite[pairs[0]] & finite[pairs[1]], finite)

    def useful(self, rollout: TokenRollout) -> Tensor:
        some = super().useful(rollout)
        return some if self.kl.coef or self.entropy_coef else some & (is_given(rollout) | self.teaches(rollout))

    # ------------------------------------------------------------------ loss
    def loss(self, batch: Minibatch) -> Terms:
        """One forward for both kinds, so that sharded processes keep step whatever they hold."""
        tokens, draw = (batch.tokens, batch.lengths, batch.mask), self.answers.sampling
        new, entropy = self.policy.logprobs(*tokens, media=batch.media, temperature=draw.temperature, entropy=self.entropy_coef != 0)
        given = is_given(batch)
        own = TokenBatch(**vars(batch) | {"mask": batch.mask & ~given[:, None], "weights": batch.weights.where(~given[:, None], 0.0)})
        behaviour = own.streams.get("behaviour")
        stored = behaviour is not None or self.answers.old_logprobs == "rollout"
        old = own.logprobs if stored else new.detach()  # one optimizer step per rollout: the ratio is 1
        losses, metrics = self.surrogate(new, old, own.advantages, own.mask, behaviour=behaviour)
        if self.correction is not None:
            losses = losses * self.correction(own.logprobs, behaviour, own.mask)
        preference, of_pairs = self.preference_term(new, batch)
        terms = {"policy": Term(losses, own.weights), "preference": preference}
        if self.kl.coef:
            terms["kl"] = Term(self.kl(new, own.streams["reference"]), own.weights, self.kl.coef)
        if entropy is not None:
            terms["entropy"] = Term(-entropy, own.weights, self.entropy_coef)
        if behaviour is not None:
            metrics["rollout_kl"] = sampler_kl(own.logprobs, behaviour, own.mask)
        counted = own.mask & (own.weights != 0)  # a minibatch without weight only fills up
        self.meters.mean(metrics | token_means(terms, own.mask), weight=counted.sum())
        self.meters.mean(of_pairs | self.ratios(new, old, own))
        return terms

    def preference_term(self, new: Tensor, batch: Minibatch) -> tuple[Term, dict[str, Tensor]]:
        """DPO's losses of the pairs, of which there may be none, and this micro-batch's part of their means."""
        chosen, rejected = pair_rows(batch.group, batch.columns["preference"])
        reference = batch.streams.get("reference", torch.zeros_like(new))
        mine, theirs = sequence_logprobs(new, batch.mask), sequence_logprobs(reference, batch.mask)
        losses, seen = self.preference(mine[chosen], mine[rejected], theirs[chosen], theirs[rejected])
        shares = {f"dpo/{name}": self.share(values.sum(), "gspo/pref_rows") for name, values in seen.items()}
        return Term(losses, batch.weights[chosen].amax(1)), shares

    def ratios(self, new: Tensor, old: Tensor, batch: Minibatch) -> dict[str, Tensor]:
        """How far answers that teach have moved since they were sampled: this micro-batch's part of their means."""
        counted, clip = (batch.weights != 0).any(1), {"clip_low": self.surrogate.low, "clip_high": self.surrogate.high}
        sums, largest = answer_ratios(new, old, batch.advantages, batch.mask, counted=counted, **clip)
        self.meters.largest({"gspo/seq_ratio_max": largest})
        return {f"gspo/{name}": self.share(value, "gspo/answers_that_teach") for name, value in sums.items()}

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, object]:
        """Answers to self-play rows, or margins of pairs: a batch is of one kind."""
        if not is_pair(batch.info[0]):
            return super().validation_step(batch, batch_idx)
        pairs, real = self.pairs(with_both_answers(batch)).to(self.device), batch.group.to(self.device) >= 0
        self.margins.add(self, pairs, real, beta=self.preference.beta, temperature=self.answers.sampling.temperature)
        return {"prompts": batch}

    def on_validation_epoch_end(self) -> None:
        if self.evaluated:
            super().on_validation_epoch_end()
        self.margins.report(self)

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def share(self, part: Tensor, of: str) -> Tensor:
        """A micro-batch's part of an iteration's mean over `rollout_metrics[of]` things."""
        return self.of_step(part) * self.updates / max(self.rollout_metrics[of], 1)
