"""Direct preference optimization (arXiv 2305.18290) and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.preference import FDivergence, PreferenceLoss, ld_sequence_logprobs, preference_loss, preference_metrics
from lit_rl.losses.terms import Term, Terms
from lit_rl.modules.media import with_media
from lit_rl.modules.tokens import LitTokens
from lit_rl.policies.base import TokenPolicy
from lit_rl.ranks import gather_objects
from lit_rl.replay.preferences import of_both, pair_rows, pair_units, preferences
from lit_rl.replay.sequences import pair_sequences
from lit_rl.replay.sources import PairSource
from lit_rl.seeding import seed_of
from lit_rl.types import Minibatch, Prompts, TokenRollout


class DPO(LitTokens):
    """Learns from pairs of a chosen and a rejected answer to the same prompt, relative to the reference.

    An iteration is `prompts_per_iteration` pairs, `prompts_per_update` of them in one optimizer step.

    Args:
        policy: The language model that is trained. The datamodule has `pair_ids(info) -> (prompt, chosen, rejected)`, token ids of each.
        loss_kind: Form of the loss, see `lit_rl.losses.preference.preference_loss`.
        beta: How far the policy may leave the reference, 0.01 ... 0.5: the smaller, the farther.
        label_smoothing: Share of the pairs that are taken to be labelled the wrong way round, in [0, 0.5).
        sft_coef: Weight of the chosen answer's mean negative log-likelihood beside it (RPO, MPO).
        ld_alpha: Weight of tokens beyond the shorter answer of a pair (LD-DPO); 1 is DPO.
        f_divergence: The divergence that keeps the policy near the reference, see `lit_rl.losses.preference` (arXiv 2309.16240).
        divergence_alpha: Of `alpha_divergence`, in (0, 1).
        reference: Its log-probabilities are computed for the pairs of an iteration before its first step (`live`), or once for all pairs
            of the data before the first iteration (`precomputed`), from the weights that the run starts with: no copy of them is kept.
        kwargs: See `LitTokens`.
    """

    unit_size = 2
    sources = (PairSource,)
    datamodules = "datamodules.pairs.PreferencePairs"

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        loss_kind: PreferenceLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        sft_coef: float = 0.0,
        ld_alpha: float = 1.0,
        f_divergence: FDivergence = "reverse_kl",
        divergence_alpha: float = 0.5,
        reference: Literal["live", "precomputed"] = "live",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, group_size=2, answers=None, aggregation="seq-mean-token-sum", **kwargs)
        if beta <= 0:
            raise ConfigError(f"model.beta={beta} must be above 0; 0.1 is usual")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(f"model.label_smoothing={label_smoothing} must be in [0, 0.5)")
        if not 0 <= ld_alpha <= 1:
            raise ConfigError(f"model.ld_alpha={ld_alpha} must be in [0, 1]; 1 is DPO")
        if reference == "live":
            policy.check_reference(after_warmup=False)
        self.precomputes = reference == "precomputed"
        self.known: dict[int, tuple[float, float]] | None = None  # the reference's sums by pair, of chosen and rejected answer
        self.loss_kind: PreferenceLoss = loss_kind
        self.f_divergence: FDivergence = f_divergence
        self.divergence_alpha = divergence_alpha
        self.beta, self.label_smoothing = beta, label_smoothing
        self.sft_coef, self.ld_alpha = sft_coef, ld_alpha
        self._held_out: list[dict[str, Tensor]] = []

    def needs_rewards(self) -> bool:
        return False

    def longest_sequence(self) -> int:
        return self.source(PairSource).max_length

    # ------------------------------------------------------------------ pairs for a rollout
    def collect(self, prompts: Prompts) -> TokenRollout:
        return self.pairs(prompts)

    def pairs(self, prompts: Prompts) -> TokenRollout:
        """Chosen, rejected, chosen, rejected, ...: each row of the data stands twice in `prompts`."""
        rollout = self.sequences(prompts)
        if self.precomputes:
            return rollout.with_streams(reference=self.remembered(rollout))
        with self.policy.reference():
            return rollout.with_streams(reference=self.all_logprobs(rollout))

    def sequences(self, prompts: Prompts) -> TokenRollout:
        return with_media(pair_sequences(prompts, self.source(PairSource).pair_ids), self.policy, self.data).to(self.device)

    # ------------------------------------------------------------------ the reference of all pairs at once
    def remembered(self, rollout: TokenRollout) -> Tensor:
        """Float64 "B S": the reference's sum over each answer, at its first token. Collective in the first call of a run."""
        if self.known is None:
            self.known = self.precompute()
        try:
            sums = torch.tensor([self.known[key] for key in pair_keys(rollout)], dtype=torch.float64, device=self.device)
        except KeyError as error:
            raise ConfigError(
                "the data hold a pair that they did not when the reference was computed, before the first iteration: go on with the files "
                "and lengths of that time, or set model.reference to live"
            ) from error
        chosen, rejected = pairs_of(rollout)
        of_row = sums.new_zeros(len(rollout)).index_put((chosen,), sums[:, 0]).index_put((rejected,), sums[:, 1])
        first = rollout.mask & (rollout.mask.cumsum(1) == 1)
        return torch.where(first, of_row[:, None], 0.0)

    @torch.no_grad()
    def precompute(self) -> dict[int, tuple[float, float]]:
        """The sums of all training and held-out pairs. Every process does a share; collective."""
        if self.trainer.global_step:
            raise ConfigError("model.reference=precomputed needs a checkpoint that was written with it, or a run from its beginning")
        data = self.source(PairSource)
        rows = [*data.train_prompts, *data.held_out]
        size, world = max(1, self.prompts_per_update // self.trainer.world_size), self.trainer.world_size
        share = -(-len(rows) // (size * world)) * size
        known: dict[int, tuple[float, float]] = {}
        for first in range(self.global_rank * share, (self.global_rank + 1) * share, size):
            chunk = [rows[min(i, len(rows) - 1)] for i in range(first, first + size) for _ in range(2)]
            rollout = self.sequences(Prompts(group=torch.arange(size).repeat_interleave(2), info=chunk))
            with self.policy.reference() if self.policy.has_reference else nullcontext():
                values = self.all_logprobs(rollout)
            sums = ld_sequence_logprobs(values, rollout.mask, shorter(rollout), alpha=self.ld_alpha)
            chosen, rejected = (sums[rows].tolist() for rows in pairs_of(rollout))
            known |= dict(zip(pair_keys(rollout), zip(chosen, rejected)))
        return {key: pair for rank in gather_objects(known) for key, pair in rank.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.known is not None:
            values = torch.tensor(list(self.known.values()), dtype=torch.float64)
            checkpoint["reference_sums"] = {"pairs": torch.tensor(list(self.known)), "values": values}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.precomputes and (saved := checkpoint.get("reference_sums")) is not None:
            self.known = dict(zip(saved["pairs"].tolist(), map(tuple, saved["values"].tolist())))

    def score(self, rollout: TokenRollout) -> TokenRollout:
        return rollout

    def credit(self, rollout: TokenRollout) -> TokenRollout:
        """Every pair weighs alike in its optimizer step; one of which the reference says something that is not finite has no weight."""
        usable = self.finite(rollout)
        rollout = self.without_broken(rollout)
        step, weights = self.step_of(rollout), torch.zeros(rollout.mask.shape, device=self.device)
        for update in range(self.updates):
            rows = usable & (step == update)
            weights[rows] = 1 / max(int(self.sum_of_ranks(rows.sum())) // 2, 1)
        self.rollout_metrics = {"pairs": float(self.prompts_per_iteration), "non_finite": float(self.non_finite)}
        return replace(rollout, weights=weights)

    def finite(self, rollout: TokenRollout) -> Tensor:
        """Both answers of a pair are finite, or neither counts."""
        finite, pairs = super().finite(rollout), pairs_of(rollout)
        return of_both(pairs, finite[pairs[0]] & finite[pairs[1]], finite)

    def units(self, rollout: TokenRollout, rows: Tensor) -> list[Tensor]:
        return pair_units(rows, rollout.group.cpu(), rollout.columns["preference"].cpu())

    def restore_rollout(self, fields: dict[str, Any]) -> TokenRollout:
        """Earlier checkpoints do not say which answer was chosen: the first of each pair."""
        rollout = super().restore_rollout(fields)
        return rollout if "preference" in rollout.columns else rollout.with_columns(preference=preferences(rollout.group))

    # ------------------------------------------------------------------ loss
    def loss(self, batch: Minibatch) -> Terms:
        weights = batch.weights[pairs_of(batch)[0], 0]
        terms, metrics = self.of_pairs(batch, weights)
        self.meters.mean(metrics, weight=(weights != 0).sum())
        return terms

    def of_pairs(self, batch: Minibatch, weights: Tensor) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Terms with these weights Float "N/2", and metrics of the pairs of a batch."""
        new, _ = self.policy.logprobs(batch.tokens, batch.lengths, batch.mask, media=batch.media)
        (chosen, rejected), count, shared = pairs_of(batch), batch.mask.sum(1), shorter(batch)
        mine, theirs = (ld_sequence_logprobs(x, batch.mask, shared, alpha=self.ld_alpha) for x in (new, batch.streams["reference"]))
        four = mine[chosen], mine[rejected], theirs[chosen], theirs[rejected]
        losses = preference_loss(
            *four,
            kind=self.loss_kind,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            lengths=(count[chosen], count[rejected]),
            f_divergence=self.f_divergence,
            alpha=self.divergence_alpha,
        )
        terms = {"preference": Term(losses.float(), weights)}
        if self.sft_coef:
            terms["sft"] = Term((-mine[chosen] / count[chosen].clamp(min=1)).float(), weights, self.sft_coef)
        return terms, {name: value.float() for name, value in preference_metrics(*four, beta=self.beta).items()}

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, object]:
        real = [i for i, group in enumerate(batch.group.tolist()) if group >= 0 for _ in range(2)]  # the rest fills up the last batches
        rows = real or [0, 0]  # the other processes wait for this one's forwards
        held_out = self.pairs(Prompts(group=batch.group[rows], info=[batch.info[i] for i in rows]))
        finite = self.finite(held_out)
        known = finite.nonzero()[:, 0] if finite.any() else torch.arange(len(held_out))
        terms, metrics = self.of_pairs(self.minibatch(held_out, known), torch.ones(len(known) // 2, device=self.device))
        losses = torch.stack([term.coef * term.losses for term in terms.values()]).sum(0)
        count = int(finite.sum()) // 2 if real else 0
        numbers = {name: value if count else torch.zeros_like(value) for name, value in ({"loss": losses.mean()} | metrics).items()}
        self._held_out += [numbers | {"pairs": losses.new_tensor(count)}]
        return {"prompts": batch}

    def on_validation_epoch_end(self) -> None:
        names = ["loss", "rewards_chosen", "rewards_rejected", "margin", "accuracy", "logprobs_chosen", "logprobs_rejected"]
        rows = [torch.stack([row[name] * row["pairs"] for name in names] + [row["pairs"]]).double() for row in self._held_out]
        self._held_out = []
        summed = torch.stack(rows).sum(0) if rows else torch.zeros(len(names) + 1, dtype=torch.float64, device=self.device)
        summed = self.sum_of_ranks(summed)
        means = (summed[:-1] / summed[-1].clamp(min=1)).tolist()
        self.report({f"val/{name}": value for name, value in zip(names, means)}, bar=("val/accuracy",))

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


def pairs_of(rows: TokenRollout | Minibatch) -> tuple[Tensor, Tensor]:
    """Rows of the chosen and of the rejected answers, Int "P" each."""
    return pair_rows(rows.group, rows.columns["preference"])


def shorter(rows: TokenRollout | Minibatch) -> Tensor:
    """Int "B": for both answers of a pair the tokens of the shorter one."""
    (chosen, rejected), count = pairs_of(rows), rows.mask.sum(1)
    return of_both((chosen, rejected), torch.minimum(count[chosen], count[rejected]), count)


def pair_keys(rollout: TokenRollout) -> list[int]:
    """A number for each pair that only its tokens, and where its answers begin, decide."""
    rows = [row[:n] for row, n in zip(rollout.tokens.tolist(), rollout.lengths.tolist())]
    begin = [n - answered for n, answered in zip(rollout.lengths.tolist(), rollout.mask.sum(1).tolist())]
    chosen, rejected = (part.tolist() for part in pairs_of(rollout))
    return [seed_of(begin[i], *rows[i], "rejected", begin[j], *rows[j]) for i, j in zip(chosen, rejected)]
