"""What policy-gradient methods on language models share: surrogate losses, divergence from the reference, shaped rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from lit_rl.credit.groups import total_reward
from lit_rl.credit.tokens import overlong_penalty, token_rewards
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import AdaptiveKL, FixedKL, KLEstimator, kl_estimate
from lit_rl.losses.masked import masked_mean, row_mean
from lit_rl.losses.off_policy import Level, importance_weights, mismatch_metrics
from lit_rl.losses.policy_gradient import clipped_ratio_loss
from lit_rl.losses.surrogates import cispo_loss, geo_mean_loss, reinforce_loss, sapo_loss, sequence_log_ratio, surrogate_metrics
from lit_rl.losses.terms import Term, Terms
from lit_rl.modules.answers import LitGeneration
from lit_rl.policies.base import TokenPolicy
from lit_rl.types import Minibatch, TokenRollout

Surrogate = Literal["clip", "gspo", "cispo", "sapo", "gmpo", "reinforce"]
RewardKL = Literal["k1", "k2", "k3", "abs"]


@dataclass(kw_only=True)
class Correction:
    """Truncated importance sampling: the loss of a token times trainer's / sampler's probability, at most `high` (arXiv 2501.03262).

    For samplers that compute a little differently than the trainer, such as an inference server.

    Args:
        level: Whose ratio: the token's, the product of the row, or its geometric mean.
        low: The ratio's lower bound; None = none.
        high: Its upper bound.
        outside: What becomes of ratios beyond them: `clamp`, or `zero`, which takes the token (or row) out of the loss.
    """

    level: Level = "token"
    low: float | None = None
    high: float = 2.0
    outside: Literal["clamp", "zero"] = "clamp"


class LitPolicyGradient(LitGeneration):
    """Clipped policy gradient on every token; a method adds the advantages.

    Args:
        policy: The language model that is trained. See `LitGeneration`, as for `engine`, `sampling`, `prompts_per_update`, ...
        surrogate: `clip`: the clipped ratio of PPO; `gspo`: that of the whole sequence (arXiv 2507.18071); `cispo`: clipped weights that
            keep every token's gradient (arXiv 2506.13585); `sapo`: soft clipping (arXiv 2511.20347); `gmpo`: the geometric mean of the
            tokens' clipped ratios (arXiv 2507.20673); `reinforce`: none.
        clip_low: The ratio is clipped from below at 1 - clip_low.
        clip_high: The ratio is clipped from above at 1 + clip_high.
        dual_clip: Bound of the ratio for negative advantages (arXiv 1912.09729); None = none.
        kl_coef: Weight in the loss of the divergence from the reference; 0 spends no forward on it.
        kl_kind: Its estimate, see `lit_rl.losses.kl.kl_estimate`; verl's low_var_kl is k3.
        kl_in_reward: Weight of the divergence that is taken off the reward at every token; the first one, where it adapts.
        kl_in_reward_kind: Its estimate; k1 = log p - log p_ref.
        kl_target: The weight adapts so that the mean divergence stays here (arXiv 1909.08593); None = it is constant.
        kl_horizon: Answers in which it may change by a factor of about e^0.2.
        entropy_coef: Weight in the loss of minus the entropy.
        correction: Of samplers that are not the trainer.
        overlong_buffer: Tokens before `sampling.max_new_tokens` within which a reward falls linearly, by `overlong_factor` at the limit
            (DAPO, eq. 13); 0 = off.
        overlong_factor: How much lower the reward of an answer is that reaches the limit.
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
        kl_coef: float = 0.0,
        kl_kind: KLEstimator = "k3",
        kl_in_reward: float = 0.0,
        kl_in_reward_kind: RewardKL = "k1",
        kl_target: float | None = None,
        kl_horizon: int = 10000,
        entropy_coef: float = 0.0,
        correction: Correction | None = None,
        overlong_buffer: int = 0,
        overlong_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        if self.asynchronous and correction is None and self.old_logprobs != "rollout":
            raise ConfigError(
                "model.asynchronous=true trains on answers of the weights of an iteration ago, and nothing corrects for that: set "
                "model.correction, e.g. to {level: token, high: 2.0} (decoupled PPO), or model.old_logprobs to rollout (ratios to them)"
            )
        if clip_low < 0 or clip_high < 0:
            raise ConfigError(f"model.clip_low={clip_low} and clip_high={clip_high} must not be negative; 0.2 is usual")
        if dual_clip is not None and dual_clip <= 1:
            raise ConfigError(f"model.dual_clip={dual_clip} must be above 1 (3 is usual), or null for none")
        if kl_coef < 0 or kl_in_reward < 0:
            raise ConfigError(f"model.kl_coef={kl_coef} and kl_in_reward={kl_in_reward} must not be negative; 0 turns the reference off")
        if kl_coef or kl_in_reward:
            policy.check_reference(after_warmup=False)
        if kl_target is not None and not (kl_in_reward and kl_target > 0 and kl_horizon > 0):
            raise ConfigError(
                f"model.kl_target={kl_target} and kl_horizon={kl_horizon} must be above 0 (0.1 and 10000 are usual), and so must "
                f"model.kl_in_reward={kl_in_reward}, which they adapt; for a constant weight leave kl_target out"
            )
        self.surrogate: Surrogate = surrogate
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.kl_coef, self.kl_kind = kl_coef, kl_kind
        self.kl_in_reward = FixedKL(kl_in_reward) if kl_target is None else AdaptiveKL(kl_in_reward, target=kl_target, horizon=kl_horizon)
        self.kl_in_reward_kind: RewardKL = kl_in_reward_kind
        self.entropy_coef = entropy_coef
        self.correction = correction
        self.overlong_factor = overlong_factor
        self.set_overlong(overlong_buffer)

    def set_overlong(self, buffer: int) -> None:
        if not 0 <= buffer <= self.sampling.max_new_tokens:
            raise ConfigError(f"model.overlong_buffer={buffer} must be in 0..{self.sampling.max_new_tokens}, the longest answer")
        self.overlong_buffer = buffer

    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.kl_in_reward.coef > 0

    def needs_logprobs(self) -> bool:
        """Also for a divergence in the reward, where the engine's come from a copy of the weights and are rounded otherwise."""
        return super().needs_logprobs() or self.correction is not None or (self.kl_in_reward.coef > 0 and self.engine.has_copy)

    # ------------------------------------------------------------------ credit
    @abstractmethod
    def advantages(self, rollout: TokenRollout, total: Tensor) -> Tensor:
        """Float "B S" of the answers here. total: Float64 "B", their weighted rewards, NaN where there is none: the mask is False there."""

    def credit(self, rollout: TokenRollout) -> TokenRollout:
        """Advantages, and weights so that each optimizer step's loss is the aggregation over all its answers on all processes."""
        rollout = self.without_broken(rollout)
        total = self.total(rollout)
        self.rollout_metrics = self.describe(rollout, total) | {"non_finite": float(self.non_finite)}
        rollout = self.with_advantages(replace(rollout, mask=rollout.mask & total.isfinite()[:, None]), total)
        return replace(rollout, weights=self.token_weights(rollout))

    def total(self, rollout: TokenRollout) -> Tensor:
        """Float64 "B": the weighted rewards, NaN where one is missing."""
        weights = {name: weight for name, weight in self.scores().weights.items() if weight}
        return total_reward({name: rollout.rewards[name] for name in weights}, weights).to(self.device)

    def with_advantages(self, rollout: TokenRollout, total: Tensor) -> TokenRollout:
        """`rollout` with its advantages, 0 where the mask is False."""
        return replace(rollout, advantages=self.advantages(rollout, total).float().where(rollout.mask, 0.0))

    # ------------------------------------------------------------------ rewards of single tokens
    def token_rewards(self, rollout: TokenRollout, total: Tensor) -> Tensor:
        """Float64 "B S": the reward, less what its length costs, at an answer's last token; minus the divergence at each."""
        scores = total.nan_to_num()
        if self.overlong_buffer:
            limit, lengths = self.sampling.max_new_tokens, rollout.mask.sum(1)
            scores = scores + overlong_penalty(lengths, max_length=limit, buffer=self.overlong_buffer, factor=self.overlong_factor)
        if not self.kl_in_reward.coef:
            return token_rewards(scores, rollout.mask)
        assert rollout.reference is not None
        kl = kl_estimate(rollout.logprobs, rollout.reference, kind=self.kl_in_reward_kind)
        rewards = token_rewards(scores, rollout.mask, kl=kl, kl_coef=self.kl_in_reward.coef)
        self.adapt_kl(kl, rollout.mask)
        return rewards

    def adapt_kl(self, kl: Tensor, mask: Tensor) -> None:
        """Take note of the divergence of this rollout, for the weight that the next one sees."""
        answered = mask.any(1)
        table = self.all_ranks(torch.stack([row_mean(kl.double(), mask).sum(), answered.sum().double()])[None]).sum(0)
        mean, answers = float(table[0] / table[1].clamp(min=1)), int(table[1])
        self.rollout_metrics |= {"kl_in_reward": mean, "kl_in_reward_coef": self.kl_in_reward.coef}
        self.kl_in_reward.update(mean, sequences=answers)

    # ------------------------------------------------------------------ what is told of a rollout
    def describe(self, rollout: TokenRollout, total: Tensor) -> dict[str, float]:
        """Also `entropy` and `kl_divergence`, estimated from the sampled tokens, where the loss does not look at them itself.

        The mean of -log p over a policy's own tokens is its entropy, where sampling.top_p and top_k leave none out.
        """
        streams = {} if self.entropy_coef else {"entropy": -rollout.logprobs}
        if not self.kl_coef and rollout.reference is not None:
            streams["kl_divergence"] = kl_estimate(rollout.logprobs, rollout.reference, kind=self.kl_kind)
        sums = [*(stream.double().where(rollout.mask, 0.0).sum() for stream in streams.values()), rollout.mask.sum().double()]
        *values, count = self.all_ranks(torch.stack(sums)[None]).sum(0).tolist()
        return super().describe(rollout, total) | {name: value / max(count, 1) for name, value in zip(streams, values)}

    # ------------------------------------------------------------------ weights that wait
    def resting(self) -> Iterable[nn.Parameter]:
        """Parameters that the optimizer must not touch in this iteration, by weight decay neither."""
        return ()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        for parameter in self.resting():
            parameter.grad = None

    def check_can_rest(self, setting: str) -> None:
        """Raise ConfigError under strategies whose optimizer moves all weights or none."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            raise ConfigError(
                f"{setting} leaves weights as they are for a while, which DeepSpeed's optimizer cannot: "
                "run with configs/base/ddp.yaml or fsdp.yaml, or do without it"
            )

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_in_reward"] = self.kl_in_reward.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if isinstance(self.kl_in_reward, AdaptiveKL) and "kl_in_reward" in checkpoint:  # a constant one is what the run's file says
            self.kl_in_reward.load_state_dict(checkpoint["kl_in_reward"])

    # ------------------------------------------------------------------ loss
    def loss(self, batch: Minibatch) -> Terms:
        terms, metrics = self.policy_terms(*self.forward_policy(batch), batch)
        self.track(metrics, batch)
        return terms

    def track(self, metrics: dict[str, Tensor], batch: Minibatch) -> None:
        """Take note of means over the tokens of a minibatch; one without weight, which only fills up, does not count."""
        self.meters.mean(metrics, weight=(batch.mask & (batch.weights != 0)).sum())

    def forward_policy(self, batch: Minibatch) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities Float "N S" as the policy has them now, and the entropies where they are in the loss."""
        temperature, look = self.sampling.temperature, self.entropy_coef != 0
        return self.policy.logprobs(batch.tokens, batch.lengths, batch.mask, temperature=temperature, entropy=look)

    def policy_terms(self, new: Tensor, entropy: Tensor | None, batch: Minibatch) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """The surrogate, the divergence and the entropy of each token, and what to log."""
        old = batch.logprobs if self.needs_logprobs() or self.old_logprobs == "rollout" else new.detach()
        losses, log_ratio = self.surrogate_loss(new, old, batch)
        metrics = surrogate_metrics(log_ratio, batch.advantages, batch.mask, clip_low=self.clip_low, clip_high=self.clip_high)
        if self.correction is not None and batch.behaviour is not None:
            c = self.correction
            given = {"level": c.level, "low": c.low, "high": c.high, "outside": c.outside}
            losses = losses * importance_weights(batch.logprobs, batch.behaviour, batch.mask, **given)  # type: ignore[arg-type]
        terms = {"policy": Term(losses, batch.weights)}
        if self.kl_coef:
            assert batch.reference is not None
            kl = kl_estimate(new, batch.reference, kind=self.kl_kind)
            metrics["kl_divergence"] = masked_mean(kl.detach(), batch.mask)
            terms["kl"] = Term(kl, batch.weights, self.kl_coef)
        if entropy is not None:
            metrics["entropy"] = masked_mean(entropy.detach(), batch.mask)
            terms["entropy"] = Term(-entropy, batch.weights, self.entropy_coef)
        if batch.behaviour is not None:
            metrics["rollout_kl"] = mismatch_metrics(batch.logprobs, batch.behaviour, batch.mask)["kl"]
        return terms, metrics

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
