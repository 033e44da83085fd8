"""Proximal policy optimization with a critic on a language model's tokens (arXiv 1707.06347, 2203.02155)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rl.credit.rules import GAE
from lit_rl.credit.trajectories import Episodes
from lit_rl.errors import ConfigError
from lit_rl.losses.masked import COUNT_EPS
from lit_rl.losses.off_policy import sampler_kl
from lit_rl.losses.terms import Term, Terms, token_means
from lit_rl.losses.value import clipped_share, value_loss
from lit_rl.modules.gradient import LitPolicyGradient
from lit_rl.modules.models import Shardable
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.critic import Critic
from lit_rl.types import Minibatch, TokenRollout


@dataclass(frozen=True, kw_only=True)
class CriticTraining:
    """How the critic learns beside the policy.

    Args:
        lr: Its peak learning rate; the optimizer's other settings and the scheduler are those of the policy.
        gradient_clip_val: Its largest gradient norm; default: trainer.gradient_clip_val, which is that of the policy.
        warmup: Iterations at the start in which the critic alone learns: the policy does not change at all.
        value_clip: Its new value is held within this of the old one, as PPO's ratio is; None = not at all.
    """

    lr: float = 1e-5
    gradient_clip_val: float | None = None
    warmup: int = 0
    value_clip: float | None = 0.5

    def __post_init__(self) -> None:
        for name in ("lr", "gradient_clip_val", "value_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"model.critic_training.{name}={value} must be above 0{'' if name == 'lr' else ', or null'}")
        if self.warmup < 0:
            raise ConfigError(f"model.critic_training.warmup={self.warmup} must not be negative; it counts iterations without the policy")


class PPO(LitPolicyGradient):
    """Clipped policy gradient; a token's advantage is how much better things went from there on than a critic had expected.

    The critic sees every optimizer step, with a learning rate and a gradient norm of its own. It values a rollout before the first of
    them, while rewards are under way.

    Args:
        policy: The language model that is trained. See `LitPolicyGradient`, as for `answers`, `surrogate`, `kl_in_reward`, ...
        critic: Default: one of the policy's own size, trained whole, from the policy's initial weights.
        critic_training: How it learns.
        credit: How rewards and values become advantages.
        group_size: Answers to each prompt.
        kwargs: See `LitPolicyGradient`.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        critic: Critic | None = None,
        critic_training: CriticTraining | None = None,
        credit: GAE | None = None,
        group_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, group_size=group_size, **kwargs)
        self.critic = critic or Critic()
        self.critic_training = critic_training or CriticTraining()
        self.rule = credit or GAE()

    # ------------------------------------------------------------------ the critic's life
    def setup(self, stage: str) -> None:
        self.critic.check_sizes(self.policy, max(self.longest_row(), self.longest_answered()))
        super().setup(stage)
        if self.critic_training.warmup:
            self.check_can_freeze(f"model.critic_training.warmup={self.critic_training.warmup}")
        self.critic.load(beside=self.policy)
        self.critic.train()

    def models(self) -> Sequence[Shardable]:
        return [self.policy, self.critic]

    def parameter_groups(self) -> list[dict[str, object]]:
        groups = [[p for p in model.parameters() if p.requires_grad] for model in (self.policy, self.critic)]
        return [{"params": groups[0]}, {"params": groups[1], "lr": self.critic_training.lr}]

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Each has its own norm: errors of a young critic must not shorten the policy's steps. DeepSpeed clips both together."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for model, limit in ((self.policy, gradient_clip_val), (self.critic, self.critic_training.gradient_clip_val or gradient_clip_val)):
            if limit:
                clip(model.parameters(), limit)

    @property
    def critic_alone(self) -> bool:
        """The policy waits for the critic."""
        return self.iteration < self.critic_training.warmup

    def frozen_now(self) -> Iterable[nn.Parameter]:
        return self.policy.parameters() if self.critic_alone else ()

    # ------------------------------------------------------------------ values and returns
    def annotate(self, rollout: TokenRollout) -> TokenRollout:
        return super().annotate(rollout).with_streams(values=self.each_action(rollout, self.values))

    def values(self, batch: Minibatch) -> Tensor:
        return self.critic.values(batch.tokens, batch.lengths, batch.mask, media=batch.media, beside=self.policy)

    def with_advantages(self, rollout: TokenRollout, total: Tensor) -> TokenRollout:
        mask, values = rollout.mask, rollout.streams["values"].double()
        episodes = Episodes(rollout.group, rollout.columns["trajectory"]) if "trajectory" in rollout.columns else None
        advantages, returns = self.rule(self.token_rewards(rollout, total), values, mask, total=self.sum_of_ranks, episodes=episodes)
        self.rollout_metrics |= self.explain(values, returns, mask)
        return replace(rollout.with_streams(returns=returns.float()), advantages=advantages.float().where(mask, 0.0))

    def explain(self, values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
        """How well the critic knew the returns, over the tokens of all processes."""
        v, r = values[mask], returns[mask]
        sums = torch.stack([torch.ones_like(v).sum(), v.sum(), r.sum(), (r * r).sum(), (r - v).sum(), ((r - v) ** 2).sum()])
        n, value, total, square, error, square_error = self.sum_of_ranks(sums).tolist()
        n = max(n, 1.0)
        unexplained = (square_error - error**2 / n) / (square - total**2 / n + COUNT_EPS)
        return {"value_mean": value / n, "return_mean": total / n, "explained_variance": 1 - unexplained}

    # ------------------------------------------------------------------ loss
    def loss(self, batch: Minibatch) -> Terms:
        """The critic's loss beside the policy's: they share no weight, so their sum has the gradients of both."""
        clip, values = self.critic_training.value_clip, self.values(batch)
        old_values, returns = batch.streams["values"], batch.streams["returns"]
        value = Term(value_loss(values, old_values, returns, clip=clip), batch.weights)
        metrics = {} if clip is None else {"value_clip_fraction": clipped_share(values, old_values, returns, batch.mask, clip=clip)}
        counted = batch.mask & (batch.weights != 0)  # a minibatch without weight only fills up
        if self.critic_alone:
            self.meters.mean(metrics, weight=counted.sum())
            return {"value": replace(value, losses=value.losses + self.untouched())}
        temperature, look = self.answers.sampling.temperature, self.entropy_coef != 0
        new, entropy = self.policy.logprobs(
            batch.tokens, batch.lengths, batch.mask, media=batch.media, temperature=temperature, entropy=look
        )
        behaviour = batch.streams.get("behaviour")
        stored = behaviour is not None or self.answers.old_logprobs == "rollout"
        old = batch.logprobs if stored else new.detach()  # one optimizer step per rollout: the ratio is 1
        losses, found = self.surrogate(new, old, batch.advantages, batch.mask, behaviour=behaviour)
        if self.correction is not None:
            losses = losses * self.correction(batch.logprobs, behaviour, batch.mask)
        terms = {"policy": Term(losses, batch.weights), "value": value}
        if self.kl.coef:
            terms["kl"] = Term(self.kl(new, batch.streams["reference"]), batch.weights, self.kl.coef)
        if entropy is not None:
            terms["entropy"] = Term(-entropy, batch.weights, self.entropy_coef)
        if behaviour is not None:
            metrics["rollout_kl"] = sampler_kl(batch.logprobs, behaviour, batch.mask)
        self.meters.mean(metrics | found | token_means(terms, batch.mask), weight=counted.sum())
        return terms

    def untouched(self) -> Tensor:
        """0, with a gradient of 0 for the policy: DDP waits for one of every parameter."""
        zero = torch.zeros((), device=self.device)
        if isinstance(self.trainer.strategy, DDPStrategy):
            for _, parameter in self.policy.trainable():
                zero = zero + parameter.flatten()[:0].sum()
        return zero
