"""Base of the methods on token sequences: micro-batches of them, and the weight of a token in an optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_rl.checkpoints.options import options_of
from lit_rl.credit.trajectories import closing_rows, trajectory_sums
from lit_rl.credit.weights import Aggregation, token_weights
from lit_rl.errors import ConfigError
from lit_rl.modules.base import LitRL
from lit_rl.modules.evaluation import count_not_finite
from lit_rl.modules.media import media_of
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.ranks import on_all_rows, sum_over_ranks
from lit_rl.replay.batches import TokenBatch, finite_rows, token_batch, without_rows
from lit_rl.replay.micro_batches import cut_evenly, split_rows
from lit_rl.replay.rows import restored
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.start_check import check_logprobs
from lit_rl.types import Info, Media, Minibatch, Prompts, TokenRollout


class LitTokens(LitRL[TokenRollout]):
    """Base of the methods on token sequences.

    Args:
        policy: The model, e.g. `lit_rl.policies.causal_lm.CausalLM`.
        answers: How prompts are answered, for methods that do it: in training or in evaluation. The datamodule is then one of texts: it
            has `prompt_ids(info) -> list[int]`.
        prompts_per_update: Prompts in one optimizer step, over all processes; None = all of an iteration. Fewer make several steps of it.
        aggregation: How the losses of tokens become one number, see `lit_rl.credit.weights.token_weights`; decided over the whole
            optimizer step, so that micro-batches and processes do not change the gradient.
        micro_batch_tokens: Tokens, padding among them, that a micro-batch holds at most: `trainer.accumulate_grad_batches` becomes what
            that takes at the longest sequences that the data and `answers.sampling` allow.
        kwargs: See `LitRL`. `trainer.accumulate_grad_batches` is the number of micro-batches of an optimizer step on each process:
            sequences are sorted by length and cut so that each costs about the same.
    """

    samples, actions = "answers", "tokens"
    policy: TokenPolicy
    unit_size = 1
    """Neighbouring sequences that must stand in the same micro-batch."""

    stored_with: Sequence[str] = ("prompts_per_update",)

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        answers: Answers | None = None,
        prompts_per_update: int | None = None,
        aggregation: Aggregation = "token-mean",
        micro_batch_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        self.answers = copy(answers)  # which keeps answers that are drawn ahead
        self.micro_batch_tokens = micro_batch_tokens
        self.prompts_per_update = prompts_per_update or self.prompts_per_iteration
        if self.prompts_per_iteration % self.prompts_per_update:
            raise ConfigError(
                f"model.prompts_per_update={prompts_per_update} must divide model.prompts_per_iteration={self.prompts_per_iteration}"
            )
        self.aggregation: Aggregation = aggregation

    # ------------------------------------------------------------------ life
    def setup(self, stage: str) -> None:
        self.check_sizes()
        super().setup(stage)
        if self.answers is not None:
            self.answers.engine.setup(self.policy, rank=self.global_rank, world_size=self.trainer.world_size)
            what, remedy = self.lengths()
            self.answers.check_room(self.longest_answered(), what=what, remedy=remedy)

    def teardown(self, stage: str) -> None:
        if self.answers is not None:
            self.answers.close()

    def stored_options(self) -> dict[str, object]:
        return super().stored_options() | (options_of(self.answers, "model.answers") if self.answers is not None else {})

    def check_sizes(self) -> None:
        """Raise ConfigError on tokens and lengths that the model does not have, before any weights are read."""
        if isinstance(self.policy, CausalLM):
            self.policy.check_sizes(self.longest_row(), what="the longest sequence of the data has", remedy="set data.max_length to less")
            if self.answers is not None:
                what, remedy = self.lengths()
                self.policy.check_sizes(self.longest_answered(), what=what, remedy=remedy)

    def longest_row(self) -> int:
        """Tokens of the longest sequence in the data, as far as the datamodule has looked at them."""
        return max(getattr(self.data, "max_tokens", {}).values(), default=0)

    def longest_answered(self) -> int:
        """Tokens of the longest prompt with the longest answer, 0 where no prompt is known or nothing is generated."""
        prompt = getattr(self.data, "max_tokens", {}).get("prompt", 0)
        return prompt + self.longest_answer() if prompt and self.generates() else 0

    def longest_answer(self) -> int:
        """Tokens of the longest answer that this stage may generate."""
        assert self.answers is not None
        training = self.trainer.state.fn == "fit"
        return max(self.answers.eval_sampling.max_new_tokens, self.answers.sampling.max_new_tokens if training else 0)

    def generates(self) -> bool:
        """Prompts are answered in this run."""
        return self.answers is not None

    def lengths(self) -> tuple[str, str]:
        """For messages: the sequence that is too long, and what to do about it."""
        shown = f"the longest prompt ({getattr(self.data, 'max_tokens', {}).get('prompt', 0)} tokens) with its answer has"
        return shown, f"set model.answers.sampling.max_new_tokens (now {self.longest_answer()}) or data.max_prompt_length to less"

    def on_fit_start(self) -> None:
        """Compare forward, sampler and trainer, and say what the numbers of the YAML multiply to."""
        if isinstance(self.policy, CausalLM):
            coarsest = getattr(self.trainer.strategy, "gather_dtype", None)
            check_logprobs(self.policy, world_size=self.trainer.world_size, coarsest=coarsest)
        if self.answers is not None:
            self.check_sampler()
            rank_zero_info(self.plan())

    def check_sampler(self) -> None:
        """Raise ConfigError unless an engine over the training weights samples with the log-probabilities that train."""
        if self.answers is None or (self.reward_queue is None and not self.trainer.predicting):
            return
        mixed = "mixed" in str(self.trainer.precision)
        autocast = self.trainer.precision_plugin.forward_context() if mixed else None
        self.answers.check_sampler(self.policy, world_size=self.trainer.world_size, autocast=autocast)

    def plan(self) -> str:
        """A sentence on the sizes of an iteration."""
        answers, parts = self.prompts_per_iteration * self.group_size, self.micro_batches_per_update
        return (
            f"An iteration: {self.prompts_per_iteration} prompts x {self.group_size} samples = {answers} answers; optimizer steps: "
            f"{self.inner_epochs * self.updates}, each of {answers // self.updates} answers in {parts} micro-batches on each of "
            f"{self.trainer.world_size} processes"
        )

    def check_geometry(self) -> None:
        if self.micro_batch_tokens is not None:
            self.micro_batches_per_update = self.micro_batches_within(self.micro_batch_tokens)
        super().check_geometry()
        world, accumulate = self.trainer.world_size, self.micro_batches_per_update
        if self.prompts_per_update % world:
            raise ConfigError(
                f"model.prompts_per_update={self.prompts_per_update} does not divide among {world} processes; use a multiple of {world}"
            )
        units = self.prompts_per_update // world * self.units_per_prompt
        if units < accumulate:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={accumulate} asks for more micro-batches than there is to share out in an optimizer "
                f"step on a process ({units}); lower it to at most {units}"
            )

    def micro_batches_within(self, tokens: int) -> int:
        """How many an optimizer step needs on each process so that the longest sequences there can be fit into so many tokens each."""
        longest = self.longest_sequence()
        fit = tokens // longest // self.unit_size * self.unit_size
        if fit < 1:
            raise ConfigError(
                f"model.micro_batch_tokens={tokens} holds no {self.unit_size} of the longest sequences, which have {longest} tokens: set "
                f"it to at least {longest * self.unit_size}, or allow shorter ones"
            )
        needed = -(-self.prompts_per_update // self.trainer.world_size * self.group_size // fit)
        if self.trainer.accumulate_grad_batches not in (1, needed):
            raise ConfigError(
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches} and model.micro_batch_tokens={tokens}, which asks "
                f"for {needed}, both set the number of micro-batches: leave one out"
            )
        return needed

    @abstractmethod
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the options let through."""

    @property
    def units_per_prompt(self) -> int:
        """Pieces of a prompt's sequences that may stand in different micro-batches, at least."""
        return self.group_size // self.unit_size

    @property
    def updates(self) -> int:
        """Optimizer steps of one pass over a rollout."""
        return self.prompts_per_iteration // self.prompts_per_update

    def step_of(self, rollout: TokenRollout) -> Tensor:
        """Int "B": the optimizer step of a pass that a sequence belongs to, whatever the number of processes."""
        return rollout.group % self.updates

    def sum_of_ranks(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes, element by element. Collective."""
        return sum_over_ranks(x.to(self.device)) if self.trainer.world_size > 1 else x

    def everywhere(self, of: Callable[..., Tensor], *columns: Tensor) -> Tensor:
        """The rows here of a function of the rows of all processes, see `lit_rl.ranks.on_all_rows`. Collective."""
        return on_all_rows(of, *columns) if self.trainer.world_size > 1 else of(*columns)

    def media(self, info: Sequence[Info]) -> Media:
        """Pictures of the rows, see `lit_rl.modules.media`."""
        return media_of(self.data, info)

    # ------------------------------------------------------------------ weights
    def constant_length(self) -> float | None:
        """The constant length that the aggregation `dr-grpo` divides by."""
        return None if self.answers is None else float(self.answers.sampling.max_new_tokens)

    def token_weights(self, rollout: TokenRollout) -> Tensor:
        """Float "B S": each optimizer step aggregates over the tokens, and sequences or trajectories, of all processes."""
        step, answered, lengths = self.step_of(rollout), rollout.mask.any(1), rollout.mask.sum(1)
        if self.aggregation == "traj-mean" and (trajectory := rollout.columns.get("trajectory")) is not None:
            answered = self.everywhere(closing_rows, rollout.group, trajectory, answered)  # one row of each trajectory
            lengths = self.everywhere(trajectory_sums, lengths, rollout.group, trajectory)
        result = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
        for update in range(self.updates):
            rows = step == update
            counts = self.sum_of_ranks(torch.stack([rollout.mask[rows].sum(), answered[rows].sum()]).double())
            tokens, sequences = map(int, counts.clamp(min=1).tolist())
            mask, scale = rollout.mask[rows], self.constant_length()
            result[rows] = token_weights(mask, self.aggregation, tokens=tokens, sequences=sequences, scale=scale, lengths=lengths[rows])
        return result

    # ------------------------------------------------------------------ micro-batches
    def split(self, rollout: TokenRollout, inner_epoch: int) -> list[Tensor]:
        """Micro-batches of one pass in order of optimizer steps, without the sequences that have no gradient."""
        step, useful, lengths = self.step_of(rollout).cpu(), self.useful(rollout).cpu(), rollout.lengths.cpu()
        units, parts = partial(self.units, rollout), self.micro_batches_per_update
        return split_rows(step, useful, lengths, units=units, updates=self.updates, parts=parts)

    def useful(self, rollout: TokenRollout) -> Tensor:
        """Bool "B": sequences whose loss has a gradient."""
        assert rollout.weights is not None
        return (rollout.weights != 0).any(1)

    def units(self, rollout: TokenRollout, rows: Tensor) -> list[Tensor]:
        """`rows` in pieces that stay whole."""
        return list(rows[:, None])

    def minibatch(self, rollout: TokenRollout, rows: Tensor) -> TokenBatch:
        return token_batch(rollout, rows)

    def finite(self, rollout: TokenRollout) -> Tensor:
        """Bool "B": sequences of which all that was computed of their chosen tokens is finite."""
        return finite_rows(rollout)

    def without_broken(self, rollout: TokenRollout) -> TokenRollout:
        """Sequences that are not finite have no score, no chosen token and no part in the loss; they are counted and named. Collective."""
        finite = self.finite(rollout)
        what = "log-probabilities of policy, sampler or reference, or values"
        where = f"iteration {self.iteration + 1}"
        self.non_finite = count_not_finite(finite, rollout.rewards, rollout.info, reward_queue=self.reward_queue, where=where, what=what)
        return without_rows(rollout, finite) if self.non_finite else rollout

    def count_actions(self, batch: Minibatch) -> int:
        return int(batch.mask.sum())

    def all_logprobs(self, rollout: TokenRollout, *, temperature: float = 1.0, rows: Tensor | None = None) -> Tensor:
        """Log-probabilities Float32 "B S" of the chosen tokens (of `rows` alone, if given), micro-batch by micro-batch.

        temperature: Of rows that have none of their own, in the column `temperature`.
        """

        def of(batch: TokenBatch) -> Tensor:
            own = batch.columns.get("temperature", temperature)
            return self.policy.logprobs(batch.tokens, batch.lengths, batch.mask, media=batch.media, temperature=own)[0]

        return self.each_action(rollout, of, rows=rows)

    @torch.no_grad()
    def each_action(self, rollout: TokenRollout, of: Callable[[TokenBatch], Tensor], *, rows: Tensor | None = None) -> Tensor:
        """`of` every micro-batch of `rows` (default: all), as Float32 "B S"; 0 for the other rows. Collective."""
        result = torch.zeros(rollout.mask.shape, device=self.device)
        everything = torch.arange(len(rollout))
        units = self.units(rollout, everything if rows is None else rows.cpu())
        counts = self.all_ranks(torch.tensor([len(units)], device=self.device))
        if not counts.any():
            return result
        asked = units or self.units(rollout, everything)[:1]  # sharded weights want as many forwards on every process
        parts = min(self.updates * self.micro_batches_per_update, max(1, int(counts.min())))
        for here in cut_evenly(asked, rollout.lengths.cpu(), parts=parts):
            batch = self.minibatch(rollout, here)
            values = of(batch).float()
            if units:
                result[here.to(self.device), : values.shape[1]] = values
        return result

    def restore_rollout(self, fields: dict[str, Any]) -> TokenRollout:
        return restored(fields)

    # ------------------------------------------------------------------ evaluation and prediction
    def on_validation_start(self) -> None:
        if self.answers is not None:
            if self.trainer.state.fn != "fit":
                self.check_sampler()
            self.answers.refresh(self.iteration)

    def validation_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, object]:
        self.evaluated.append(batch)
        return self.predict_step(batch, batch_idx)

    on_test_start = on_predict_start = on_validation_start
    test_step = validation_step

    def predict_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, object]:
        if self.answers is None:
            raise ConfigError(
                f"{type(self).__name__} has no engine that answers: predict with the run of a method that has one, such as "
                "configs/grpo/qwen25_7b_gsm8k.yaml, and with this run's export as model.policy.pretrained"
            )
        return {"texts": self.answers.evaluate(self, batch), "prompts": batch}
