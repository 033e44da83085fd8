"""What all methods on token sequences share: micro-batches of them, and what a token weighs in an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.aggregation import Aggregation, token_weights
from lit_rl.partition import balanced_parts
from lit_rl.policies.base import TokenPolicy
from lit_rl.policy_module import LitPolicy
from lit_rl.types import Minibatch, Prompts, TokenRollout

STREAMS = ("mask", "advantages", "weights", "logprobs", "behaviour", "reference", "values", "returns")


class TokenBatch(Minibatch):
    """N sequences, padded to the longest of them; S actions."""

    tokens: Tensor  # Int "N S+1"
    lengths: Tensor  # Int "N"
    mask: Tensor  # Bool "N S"
    advantages: Tensor  # Float "N S"
    weights: Tensor  # Float "N S"
    logprobs: Tensor  # Float "N S"
    behaviour: Tensor | None  # Float "N S"
    reference: Tensor | None  # Float "N S"
    values: Tensor | None  # Float "N S"
    returns: Tensor | None  # Float "N S"


class LitToken(LitPolicy[TokenRollout]):
    """Base of the methods on token sequences.

    Args:
        policy: The model, e.g. `lit_rl.policies.causal_lm.CausalLM`.
        prompts_per_update: Prompts in one optimizer step, over all processes; None = all of an iteration. Fewer make several steps of it.
        aggregation: How the losses of tokens become one number, see `lit_rl.losses.aggregation.token_weights`; decided over the whole
            optimizer step, so that micro-batches and processes do not change the gradient.
        kwargs: See `LitRL`. `trainer.accumulate_grad_batches` is the number of micro-batches of an optimizer step on each process:
            sequences are sorted by length and cut so that each costs about the same.
    """

    samples, actions = "answers", "tokens"
    policy: TokenPolicy
    together = 1
    """Neighbouring sequences that must stand in the same micro-batch."""

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        prompts_per_update: int | None = None,
        aggregation: Aggregation = "token-mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        self.prompts_per_update = prompts_per_update or self.prompts_per_iteration
        if self.prompts_per_iteration % self.prompts_per_update:
            raise ConfigError(
                f"model.prompts_per_update={prompts_per_update} must divide model.prompts_per_iteration={self.prompts_per_iteration}"
            )
        self.aggregation: Aggregation = aggregation

    def check_geometry(self) -> None:
        super().check_geometry()
        world, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if self.prompts_per_update % world:
            raise ConfigError(
                f"model.prompts_per_update={self.prompts_per_update} does not divide among {world} processes; use a multiple of {world}"
            )
        units = self.prompts_per_update // world * self.group_size // self.together
        if units < accumulate:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={accumulate} asks for more micro-batches than there is to share out in an optimizer "
                f"step on a process ({units}); lower it to at most {units}"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps of one pass over a rollout."""
        return self.prompts_per_iteration // self.prompts_per_update

    def step_of(self, rollout: TokenRollout) -> Tensor:
        """Int "B": the optimizer step of a pass that a sequence belongs to, whatever the number of processes."""
        return rollout.group % self.updates

    # ------------------------------------------------------------------ weights
    def longest(self) -> float | None:
        """The constant length that the aggregation `dr-grpo` divides by."""
        return None

    def token_weights(self, rollout: TokenRollout) -> Tensor:
        """Float "B S": each optimizer step aggregates over the tokens and sequences of all processes."""
        step = self.step_of(rollout)
        result = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
        for update in range(self.updates):
            rows = step == update
            mask = rollout.mask[rows]
            counts = torch.stack([mask.sum(), mask.any(1).sum()]).double()
            tokens, sequences = map(int, self.all_ranks(counts[None]).sum(0).clamp(min=1).tolist())
            result[rows] = token_weights(mask, self.aggregation, tokens=tokens, sequences=sequences, scale=self.longest())
        return result

    # ------------------------------------------------------------------ micro-batches
    def minibatches_per_pass(self) -> int:
        return self.updates * self.trainer.accumulate_grad_batches

    def split(self, rollout: TokenRollout, inner_epoch: int) -> list[Tensor]:
        """Micro-batches of one pass in order of optimizer steps, without the sequences that have no gradient."""
        step, useful, parts = self.step_of(rollout).cpu(), self.useful(rollout).cpu(), self.trainer.accumulate_grad_batches
        minibatches: list[Tensor] = []
        for update in range(self.updates):
            rows = (step == update).nonzero()[:, 0]
            kept, filler = rows[useful[rows]], rows[~useful[rows]]  # every process needs a forward for each micro-batch, even of weight 0
            needed = max(0, parts * self.together - len(kept))
            minibatches += self.micro_batches(rollout, torch.cat([kept, filler[:needed]]), parts)
        return minibatches

    def useful(self, rollout: TokenRollout) -> Tensor:
        """Bool "B": sequences whose loss has a gradient."""
        assert rollout.weights is not None
        return (rollout.weights != 0).any(1)

    def micro_batches(self, rollout: TokenRollout, rows: Tensor, parts: int) -> list[Tensor]:
        """`rows` in `parts` of about equal cost, each of similar lengths."""
        units = rows.view(-1, self.together)
        lengths = rollout.lengths.cpu()[units].amax(1).tolist()
        return [units[torch.tensor(part, dtype=torch.long)].flatten() for part in balanced_parts(lengths, parts=parts)]

    def minibatch(self, rollout: TokenRollout, rows: Tensor) -> TokenBatch:
        """The rows of a rollout, as wide as the longest of them."""
        rows = rows.to(rollout.lengths.device)
        width = int(rollout.lengths[rows].max())
        streams = {name: None if (v := getattr(rollout, name)) is None else v[rows, : width - 1] for name in STREAMS}
        return TokenBatch(tokens=rollout.tokens[rows, :width], lengths=rollout.lengths[rows], **streams)

    def count_actions(self, batch: Minibatch) -> int:
        return int(batch.mask.sum())

    @torch.no_grad()
    def all_logprobs(self, rollout: TokenRollout, *, temperature: float = 1.0) -> Tensor:
        """Log-probabilities Float32 "B S" of the chosen tokens, micro-batch by micro-batch."""
        result = torch.zeros(rollout.mask.shape, device=self.device)
        parts = min(self.minibatches_per_pass(), len(rollout) // self.together)
        for rows in self.micro_batches(rollout, torch.arange(len(rollout)), parts):
            batch = self.minibatch(rollout, rows)
            values, _ = self.policy.logprobs(batch.tokens, batch.lengths, batch.mask, temperature=temperature)
            result[rows.to(self.device), : values.shape[1]] = values.float()
        return result

    def restore_rollout(self, fields: dict[str, Any]) -> TokenRollout:
        return TokenRollout(**fields)


def sequences(prompts: Prompts, ids: Sequence[Sequence[int]], chosen: Sequence[Sequence[bool]]) -> TokenRollout:
    """Token ids as they are and which of them the policy answers for: a rollout on the CPU, padded on the right with 0."""
    lengths = torch.tensor([len(row) for row in ids])
    width = max(int(lengths.max()), 2)
    tokens, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.bool)
    for i, (row, which) in enumerate(zip(ids, chosen, strict=True)):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(which)
    zeros = torch.zeros(len(ids), width - 1)
    return TokenRollout(group=prompts.group, info=prompts.info, logprobs=zeros, mask=mask[:, 1:], tokens=tokens, lengths=lengths)
