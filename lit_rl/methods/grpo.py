"""GRPO: policy gradients on a language model's tokens, relative to the other answers to the same prompt, and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.advantages import group_advantages, leave_one_out
from lit_rl.errors import ConfigError
from lit_rl.generation_module import LitGeneration
from lit_rl.losses.aggregation import Aggregation
from lit_rl.losses.kl import KLEstimator, kl_estimate
from lit_rl.losses.off_policy import Level, importance_weights, mismatch_metrics
from lit_rl.losses.policy_gradient import clipped_ratio_loss
from lit_rl.losses.surrogates import cispo_loss, geo_mean_loss, reinforce_loss, sapo_loss, sequence_log_ratio, surrogate_metrics
from lit_rl.policies.base import TokenPolicy
from lit_rl.token_advantages import (
    length_weighted_advantages,
    overlong_penalty,
    pass_at_k_advantages,
    rewards_to_go,
    spread,
    token_rewards,
)
from lit_rl.types import Minibatch, TokenRollout

Surrogate = Literal["clip", "gspo", "cispo", "sapo", "gmpo", "reinforce"]
Estimator = Literal["group", "leave_one_out", "length_weighted", "pass_at_k", "returns", "returns_baseline"]


@dataclass(kw_only=True)
class Correction:
    """Truncated importance sampling: the loss of a token times trainer's / sampler's probability, at most `high` (arXiv 2501.03262).

    For samplers that compute a little differently than the trainer, such as an inference server.

    level: whose ratio, the token's, the product of the row, or its geometric mean. low, high: its bounds. outside: what becomes of ratios
    beyond them: `clamp`, or `zero`, which takes the token (or row) out of the loss.
    """

    level: Level = "token"
    low: float | None = None
    high: float = 2.0
    outside: Literal["clamp", "zero"] = "clamp"


class GRPO(LitGeneration):
    """Clipped policy gradient on every token; an answer's advantage is its reward relative to its group's (arXiv 2402.03300).

    Args:
        policy: See `LitGeneration`, as for `engine`, `sampling`, `prompts_per_update`, ...
        surrogate: `clip`: the clipped ratio of PPO; `gspo`: that of the whole sequence (arXiv 2507.18071); `cispo`: clipped weights that
            keep every token's gradient (arXiv 2506.13585); `sapo`: soft clipping (arXiv 2511.20347); `gmpo`: the geometric mean of the
            tokens' clipped ratios (arXiv 2507.20673); `reinforce`: none.
        clip_low, clip_high: The ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: Bound of the ratio for negative advantages (arXiv 1912.09729); None = none.
        estimator: `group`: reward - mean of the group, over its standard deviation if `std`; `leave_one_out`: reward - mean of the others
            (RLOO); `length_weighted`: the same with longer answers counting more (OPO, arXiv 2505.23585); `pass_at_k`: the lead of the
            best answer, 0 for the others (arXiv 2503.19595); `returns`: rewards from a token on, whitened over all tokens (REINFORCE++);
            `returns_baseline`: reward - mean of the group, whitened likewise.
        std: Divide by the group's standard deviation (unbiased) + 1e-6.
        gamma: Discount of `returns` per token.
        kl_coef: Weight in the loss of the divergence from the reference; 0 spends no forward on it.
        kl_kind: Its estimate, see `lit_rl.losses.kl.kl_estimate`; verl's low_var_kl is k3.
        kl_in_reward: Weight of log p - log p_ref that is taken off the reward at every token.
        entropy_coef: Weight in the loss of minus the entropy.
        correction: Of samplers that are not the trainer.
        overlong_buffer: Tokens before `sampling.max_new_tokens` within which a reward falls linearly, by `overlong_factor` at the limit
            (DAPO, eq. 13); 0 = off.
        kwargs: See `LitGeneration`.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        surrogate: Surrogate = "clip",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        estimator: Estimator = "group",
        std: bool = True,
        gamma: float = 1.0,
        kl_coef: float = 0.0,
        kl_kind: KLEstimator = "k3",
        kl_in_reward: float = 0.0,
        entropy_coef: float = 0.0,
        correction: Correction | None = None,
        overlong_buffer: int = 0,
        overlong_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        if clip_low < 0 or clip_high < 0:
            raise ConfigError(f"model.clip_low={clip_low} and clip_high={clip_high} must not be negative; 0.2 is usual")
        if dual_clip is not None and dual_clip <= 1:
            raise ConfigError(f"model.dual_clip={dual_clip} must be above 1 (3 is usual), or null for none")
        if kl_coef < 0 or kl_in_reward < 0:
            raise ConfigError(f"model.kl_coef={kl_coef} and kl_in_reward={kl_in_reward} must not be negative; 0 turns the reference off")
        if kl_coef or kl_in_reward:
            policy.check_reference(after_warmup=False)
        if self.group_size == 1 and estimator != "returns":
            raise ConfigError("model.group_size=1 gives every answer advantage 0, as there is no sibling to compare it with: use 4 to 16")
        if not 0 <= overlong_buffer <= self.sampling.max_new_tokens:
            raise ConfigError(f"model.overlong_buffer={overlong_buffer} must be in 0..{self.sampling.max_new_tokens}, the longest answer")
        self.surrogate: Surrogate = surrogate
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.estimator: Estimator = estimator
        self.std, self.gamma = std, gamma
        self.kl_coef, self.kl_kind, self.kl_in_reward = kl_coef, kl_kind, kl_in_reward
        self.entropy_coef = entropy_coef
        self.correction = correction
        self.overlong_buffer, self.overlong_factor = overlong_buffer, overlong_factor

    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.kl_in_reward > 0

    def needs_logprobs(self) -> bool:
        return super().needs_logprobs() or self.correction is not None

    # ------------------------------------------------------------------ credit
    def advantages(self, rollout: TokenRollout, total: Tensor) -> Tensor:
        rewards = self.token_rewards(rollout, total)
        if self.estimator == "returns":
            return self.whiten(rewards_to_go(rewards, rollout.mask, gamma=self.gamma), rollout.mask)
        scores = torch.where(total.isfinite(), rewards.sum(1), torch.nan)
        if self.estimator == "returns_baseline":
            return self.whiten(spread(group_advantages(scores, rollout.group, std="none"), rollout.mask), rollout.mask)
        return spread(self.of_groups(rollout, scores), rollout.mask)

    def of_groups(self, rollout: TokenRollout, scores: Tensor) -> Tensor:
        """Float64 "B" relative to the group."""
        if self.estimator == "leave_one_out":
            return leave_one_out(scores, rollout.group)
        if self.estimator == "length_weighted":
            return length_weighted_advantages(scores, rollout.mask.sum(1), rollout.group)
        if self.estimator == "pass_at_k":
            return pass_at_k_advantages(scores, rollout.group, std=self.std)
        return group_advantages(scores, rollout.group, std="group" if self.std else "none", ddof=1, eps=1e-6)

    def token_rewards(self, rollout: TokenRollout, total: Tensor) -> Tensor:
        """Float64 "B S": the reward, less what its length costs, at an answer's last token; minus the divergence at each."""
        scores = total.nan_to_num()
        if self.overlong_buffer:
            limit, lengths = self.sampling.max_new_tokens, rollout.mask.sum(1)
            scores = scores + overlong_penalty(lengths, max_length=limit, buffer=self.overlong_buffer, factor=self.overlong_factor)
        kl = kl_estimate(rollout.logprobs, rollout.reference, kind="k1") if self.kl_in_reward and rollout.reference is not None else None
        return token_rewards(scores, rollout.mask, kl=kl, kl_coef=self.kl_in_reward)

    def useful(self, rollout: TokenRollout) -> Tensor:
        """Where only the advantage drives the loss, an answer with advantage 0 has no gradient and costs no forward."""
        assert rollout.advantages is not None
        some = super().useful(rollout)
        return some if self.kl_coef or self.entropy_coef else some & (rollout.advantages != 0).any(1)

    # ------------------------------------------------------------------ loss
    def loss(self, batch: Minibatch) -> tuple[Tensor, Tensor]:
        temperature, look = self.sampling.temperature, self.entropy_coef != 0
        new, entropy = self.policy.logprobs(batch.tokens, batch.lengths, batch.mask, temperature=temperature, entropy=look)
        old = batch.logprobs if self.needs_logprobs() or self.old_logprobs == "rollout" else new.detach()
        losses, log_ratio = self.surrogate_loss(new, old, batch)
        metrics = surrogate_metrics(log_ratio, batch.advantages, batch.mask, clip_low=self.clip_low, clip_high=self.clip_high)
        if self.correction is not None and batch.behaviour is not None:
            c = self.correction
            given = {"level": c.level, "low": c.low, "high": c.high, "outside": c.outside}
            losses = losses * importance_weights(batch.logprobs, batch.behaviour, batch.mask, **given)  # type: ignore[arg-type]
        metrics["policy_loss"] = self.whole_step((losses.detach() * batch.weights).sum())
        if self.kl_coef:
            assert batch.reference is not None
            kl = kl_estimate(new, batch.reference, kind=self.kl_kind)
            metrics["kl_divergence"] = (kl.detach() * batch.mask).sum() / batch.mask.sum().clamp(min=1)
            losses = losses + self.kl_coef * kl
        if entropy is not None:
            metrics["entropy"] = (entropy.detach() * batch.mask).sum() / batch.mask.sum().clamp(min=1)
            losses = losses - self.entropy_coef * entropy
        if batch.behaviour is not None:
            metrics["rollout_kl"] = mismatch_metrics(batch.logprobs, batch.behaviour, batch.mask)["kl"]
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return losses, batch.weights

    def surrogate_loss(self, new: Tensor, old: Tensor, batch: Minibatch) -> tuple[Tensor, Tensor]:
        """The loss of each token Float "N S", and the log-ratio that it clips."""
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        log_ratio = sequence_log_ratio(new, old, batch.mask) if self.surrogate == "gspo" else new - old
        if self.surrogate in ("clip", "gspo"):
            return clipped_ratio_loss(log_ratio, batch.advantages, dual_clip=self.dual_clip, **clip), log_ratio
        if self.surrogate == "cispo":
            return cispo_loss(new, old, batch.advantages, **clip), log_ratio
        if self.surrogate == "gmpo":
            return geo_mean_loss(new, old, batch.advantages, batch.mask, **clip), log_ratio
        return (sapo_loss(new, old, batch.advantages) if self.surrogate == "sapo" else reinforce_loss(new, batch.advantages)), log_ratio

    def whole_step(self, part: Tensor) -> Tensor:
        """A micro-batch's share of a step's sum, scaled so that the mean over micro-batches and processes is the sum."""
        return part * self.trainer.accumulate_grad_batches * self.trainer.world_size


class DrGRPO(GRPO):
    """Without the biases to short wrong answers and easy prompts: no std, and one constant length for all (arXiv 2503.20783)."""

    def __init__(self, policy: TokenPolicy, *, std: bool = False, aggregation: Aggregation = "dr-grpo", **kwargs: Any) -> None:
        super().__init__(policy, std=std, aggregation=aggregation, **kwargs)


class GSPO(GRPO):
    """The ratio of whole sequences is clipped, in a range a thousand times narrower (arXiv 2507.18071)."""

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        surrogate: Surrogate = "gspo",
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        aggregation: Aggregation = "seq-mean-token-mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, surrogate=surrogate, clip_low=clip_low, clip_high=clip_high, aggregation=aggregation, **kwargs)


class RLOO(GRPO):
    """The others in the group are the baseline, the divergence from the reference is part of the reward (arXiv 2402.14740)."""

    def __init__(self, policy: TokenPolicy, *, estimator: Estimator = "leave_one_out", kl_in_reward: float = 0.0, **kwargs: Any) -> None:
        super().__init__(policy, estimator=estimator, kl_in_reward=kl_in_reward, **kwargs)


class ReinforcePP(GRPO):
    """REINFORCE++: returns with the divergence at every token, whitened over the batch; no groups needed (arXiv 2501.03262)."""

    def __init__(self, policy: TokenPolicy, *, estimator: Estimator = "returns", kl_in_reward: float = 0.0, **kwargs: Any) -> None:
        super().__init__(policy, estimator=estimator, kl_in_reward=kl_in_reward, **kwargs)


class CISPO(GRPO):
    """Importance weights are clipped instead of updates, so that no token loses its gradient (arXiv 2506.13585)."""

    def __init__(
        self, policy: TokenPolicy, *, surrogate: Surrogate = "cispo", clip_low: float = 1.0, clip_high: float = 4.0, **kwargs: Any
    ) -> None:
        super().__init__(policy, surrogate=surrogate, clip_low=clip_low, clip_high=clip_high, **kwargs)
