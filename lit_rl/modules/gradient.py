"""Base of the policy-gradient methods on language models: answers for a rollout, shaped rewards, weights of tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rl.checkpoints.options import REMEDY
from lit_rl.credit.length_penalty import LengthPenalty
from lit_rl.credit.row_weights import total_of_rows
from lit_rl.credit.tokens import token_rewards
from lit_rl.credit.trajectories import closing_rows
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import KL, AdaptiveKL, RewardKL, kl_estimate
from lit_rl.losses.masked import row_mean
from lit_rl.losses.off_policy import Correction
from lit_rl.losses.surrogates import Clip, Surrogate
from lit_rl.modules.media import with_media
from lit_rl.modules.rollout_metrics import masked_means, row_metrics, row_table
from lit_rl.modules.tokens import LitTokens
from lit_rl.policies.base import TokenPolicy
from lit_rl.replay.pairs import sibling_numbers
from lit_rl.replay.sequences import assemble
from lit_rl.replay.sources import PromptSource, TextSource
from lit_rl.rollouts.answers import Answers, Keys
from lit_rl.types import Prompts, TokenRollout


class LitPolicyGradient(LitTokens):
    """Base of the methods that learn from a language model's own answers; a method adds the advantages and the loss.

    Args:
        policy: The language model that is trained. See `LitTokens`, as for `prompts_per_update`, ...
        answers: Who answers, how tokens are drawn, and which log-probabilities ratios are relative to.
        surrogate: The policy-gradient loss, see `lit_rl.losses.surrogates`; default: `Clip`.
        kl: Divergence from the reference in the loss; default: none.
        kl_in_reward: Divergence from the reference that is taken off the reward; default: none.
        entropy_coef: Weight in the loss of minus the entropy.
        correction: Of samplers that are not the trainer.
        length_penalty: Of answers near the length limit; default: none.
        kwargs: See `LitTokens`.
    """

    sources: Sequence[Callable[..., PromptSource]] = (TextSource,)
    datamodules = "datamodules.prompts_text.TextPrompts"
    answers: Answers
    defines: ClassVar[Mapping[str, type]] = {}
    """Class by option of the components that make a relative what it is; the command line says where a run sets another."""

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        answers: Answers | None = None,
        surrogate: Surrogate | None = None,
        kl: KL | None = None,
        kl_in_reward: RewardKL | None = None,
        entropy_coef: float = 0.0,
        correction: Correction | None = None,
        length_penalty: LengthPenalty | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, answers=answers or Answers(), **kwargs)
        self.surrogate = surrogate or Clip()
        self.kl, self.reward_kl = kl or KL(), kl_in_reward or RewardKL()
        self.kl_in_reward = self.reward_kl.controller()
        self.entropy_coef, self.correction = entropy_coef, correction
        self.length_penalty = length_penalty or LengthPenalty()
        self.length_penalty.check(self.answers.sampling.max_new_tokens)
        if self.needs_reference():
            policy.check_reference(after_warmup=False)
        if self.answers.asynchronous and correction is None and self.answers.old_logprobs != "rollout":
            raise ConfigError(
                "model.answers.asynchronous=true trains on answers of the weights of an iteration ago, and nothing corrects for that: set "
                "model.correction, e.g. to {level: token, high: 2.0} (decoupled PPO), or model.answers.old_logprobs to rollout (ratios to "
                "them)"
            )

    def refuse_ahead(self) -> None:
        """Raise ConfigError for methods whose prompts are not known before an iteration begins."""
        if self.answers.asynchronous:
            raise ConfigError(
                f"model.answers.asynchronous=true: {type(self).__name__} chooses what to generate while it generates, which cannot be done "
                "ahead; set it to false"
            )

    @property
    def on_policy(self) -> bool:
        """The weights that train are those that sampled, in every optimizer step."""
        return self.updates * self.inner_epochs == 1 and not self.answers.asynchronous

    def longest_sequence(self) -> int:
        return self.source(TextSource).max_prompt_length + self.answers.sampling.max_new_tokens

    # ------------------------------------------------------------------ collect
    def collect(self, prompts: Prompts) -> TokenRollout:
        """Generate, and compute what training needs of the answers while their rewards are under way."""
        if self.answers.asynchronous:
            return self.annotate(with_media(self.sample_ahead(prompts), self.policy, self.data))
        self.answers.engine.update_weights(self.iteration)
        return self.annotate(with_media(self.sample(prompts), self.policy, self.data))

    def sample(self, prompts: Prompts) -> TokenRollout:
        """The engine's answers, submitted for scoring."""
        return assemble(prompts, *self.answers.generate(self, prompts, self.keys(prompts), self.answers.sampling)).to(self.device)

    def sample_ahead(self, prompts: Prompts) -> TokenRollout:
        """The answers that were drawn while the last iteration trained; those to the next one's prompts are begun."""
        ready = self.answers.take_ahead(self, prompts, self.iteration)
        rollout = self.sample(prompts) if ready is None else assemble(prompts, *ready).to(self.device)
        following = self.iteration + 1
        if self.trainer.max_epochs in (None, -1) or following < self.trainer.max_epochs - self.warmup_epochs:
            prompts = self.ask(following)
            self.answers.begin(self, prompts, self.keys(prompts, following), following)
        return rollout

    def keys(self, prompts: Prompts, iteration: int | None = None) -> Keys:
        """Keys of the randomness of each answer of a rollout; default: of the present iteration."""
        iteration = self.iteration if iteration is None else iteration
        return [(self.seed, "rollout", iteration, g, n) for g, n in zip(prompts.group.tolist(), sibling_numbers(prompts.group))]

    def annotate(self, rollout: TokenRollout) -> TokenRollout:
        """Log-probabilities of the trainer and of the reference, where the method needs them."""
        temperature = self.answers.sampling.temperature
        if self.needs_logprobs():
            mine = self.all_logprobs(rollout, temperature=temperature)
            rollout = replace(rollout.with_streams(behaviour=rollout.logprobs), logprobs=mine)
        if self.needs_reference():
            with self.policy.reference():
                rollout = rollout.with_streams(reference=self.all_logprobs(rollout, temperature=temperature))
        return rollout

    def needs_reference(self) -> bool:
        return self.kl.coef > 0 or self.kl_in_reward.coef > 0

    def needs_logprobs(self) -> bool:
        """The trainer computes log-probabilities of its own before the first step on a rollout.

        Also for a divergence in the reward, where the engine's come from a copy of the weights and are rounded otherwise.
        """
        recomputed = self.answers.old_logprobs == "recompute" or (self.answers.old_logprobs == "auto" and not self.on_policy)
        return recomputed or self.correction is not None or (self.kl_in_reward.coef > 0 and self.answers.engine.has_copy)

    # ------------------------------------------------------------------ credit
    @abstractmethod
    def with_advantages(self, rollout: TokenRollout, total: Tensor) -> TokenRollout:
        """`rollout` with its advantages, 0 where the mask is False.

        total: Float64 "B", the weighted rewards of the answers here, NaN where there is none: the mask is False there.
        """

    def credit(self, rollout: TokenRollout) -> TokenRollout:
        """Advantages, and weights so that each optimizer step's loss is the aggregation over all its answers on all processes."""
        rollout = self.without_broken(rollout)
        total = self.total(rollout)
        self.rollout_metrics = self.describe(rollout, total) | {"non_finite": float(self.non_finite)}
        rollout = self.with_advantages(replace(rollout, mask=rollout.mask & total.isfinite()[:, None]), total)
        return replace(rollout, weights=self.token_weights(rollout))

    def total(self, rollout: TokenRollout) -> Tensor:
        """Float64 "B": the weighted rewards, NaN where one is missing."""
        return total_of_rows(rollout.rewards, rollout.info, self.queue().weights).to(self.device)

    def token_rewards(self, rollout: TokenRollout, total: Tensor) -> Tensor:
        """Float64 "B S": the reward, less what its length costs, at an answer's last token; minus the divergence at each.

        A trajectory of several rows has its reward once, at the end of its last row that has one.
        """
        at_end = total.nan_to_num()
        if (trajectory := rollout.columns.get("trajectory")) is not None:
            payable = total.isfinite() & rollout.mask.any(1)  # a row without a token has no place for a reward
            at_end = at_end.where(self.everywhere(closing_rows, rollout.group, trajectory, payable), 0.0)
        at_end = at_end + self.length_penalty(rollout.mask.sum(1), limit=self.answers.sampling.max_new_tokens)
        if not self.kl_in_reward.coef:
            return token_rewards(at_end, rollout.mask)
        kl = kl_estimate(rollout.logprobs, rollout.streams["reference"], kind=self.reward_kl.kind)
        rewards = token_rewards(at_end, rollout.mask, kl=kl, kl_coef=self.kl_in_reward.coef)
        self.adapt_kl(kl, rollout.mask)
        return rewards

    def adapt_kl(self, kl: Tensor, mask: Tensor) -> None:
        """Take note of the divergence of this rollout, for the weight that the next one sees."""
        answered = mask.any(1)
        above, count = self.sum_of_ranks(torch.stack([row_mean(kl.double(), mask).sum(), answered.sum().double()]))
        mean = float(above / count.clamp(min=1))
        self.rollout_metrics |= {"kl_in_reward": mean, "kl_in_reward_coef": self.kl_in_reward.coef}
        self.kl_in_reward.update(mean, sequences=int(count))

    # ------------------------------------------------------------------ metrics of a rollout
    def describe(self, rollout: TokenRollout, total: Tensor) -> dict[str, float]:
        """Numbers of a rollout over all processes; a trajectory of several rows counts once among rewards.

        Among them `entropy` and `kl_divergence`, estimated from the sampled tokens, where the loss does not look at them itself: the mean
        of -log p over a policy's own tokens is its entropy, where sampling.top_p and top_k leave none out.
        """
        metrics = row_metrics(self.all_ranks(row_table(rollout, total)).cpu(), list(rollout.rewards)) | self.answers.metrics
        streams = {} if self.entropy_coef else {"entropy": -rollout.logprobs}
        if not self.kl.coef and "reference" in rollout.streams:
            streams["kl_divergence"] = kl_estimate(rollout.logprobs, rollout.streams["reference"], kind=self.kl.kind)
        return metrics | masked_means(streams, rollout.mask, total=self.sum_of_ranks)

    # ------------------------------------------------------------------ weights that wait
    def frozen_now(self) -> Iterable[nn.Parameter]:
        """Parameters that the optimizer must not touch in this iteration, by weight decay neither."""
        return ()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        for parameter in self.frozen_now():
            parameter.grad = None

    def check_can_freeze(self, setting: str) -> None:
        """Raise ConfigError under strategies whose optimizer moves all weights or none."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            raise ConfigError(
                f"{setting} leaves weights as they are for a while, which DeepSpeed's optimizer cannot: "
                "run with configs/base/ddp.yaml or fsdp.yaml, or do without it"
            )

    # ------------------------------------------------------------------ checkpoints
    def check_rollout(self, rollout: TokenRollout) -> None:
        super().check_rollout(rollout)
        lacks = {
            "the reference, which model.kl or kl_in_reward needs": self.needs_reference() and "reference" not in rollout.streams,
            "the sampler beside the trainer's, which model.answers.old_logprobs or correction needs": self.needs_logprobs()
            and "behaviour" not in rollout.streams,
        }
        if missing := [name for name, lacking in lacks.items() if lacking]:
            raise ConfigError(
                f"the checkpoint was written inside an iteration, whose rollout has no log-probabilities of {missing[0]}: continue with "
                f"the options it was written with, {REMEDY}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint |= self.answers.state_dict() | {"kl_in_reward": self.kl_in_reward.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.answers.load_state_dict(checkpoint, rank=self.global_rank, world_size=self.trainer.world_size)
        if isinstance(self.kl_in_reward, AdaptiveKL) and "kl_in_reward" in checkpoint:  # a constant one is what the run's file says
            self.kl_in_reward.load_state_dict(checkpoint["kl_in_reward"])
