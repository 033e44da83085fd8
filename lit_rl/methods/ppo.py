"""Proximal policy optimization with a critic on a language model's tokens (arXiv 1707.06347, 2203.02155)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from lit_rl.credit.tokens import gae
from lit_rl.errors import ConfigError
from lit_rl.losses.masked import COUNT_EPS
from lit_rl.losses.terms import Term, Terms
from lit_rl.losses.value import value_loss, value_metrics
from lit_rl.modules.gradient import LitPolicyGradient
from lit_rl.modules.policy import Shardable
from lit_rl.modules.tokens import TokenBatch
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.critic import Critic
from lit_rl.types import Minibatch, TokenRollout


class PPO(LitPolicyGradient):
    """Clipped policy gradient; a token's advantage is how much better things went from there on than a critic had expected.

    The critic sees every optimizer step, with a learning rate and a gradient norm of its own. It values a rollout before the first of
    them, while rewards are under way.

    Args:
        policy: The language model that is trained. See `LitPolicyGradient`, as for `clip_low`, `kl_in_reward`, `kl_target`, ...
        critic: Default: one of the policy's own size, trained whole, from the policy's initial weights.
        critic_lr: Peak learning rate of the critic; the optimizer's other settings and the scheduler are those of the policy.
        critic_gradient_clip_val: Largest gradient norm of the critic; default: trainer.gradient_clip_val, which is that of the policy.
        critic_warmup: Iterations at the start in which the critic alone learns: the policy does not change at all.
        gamma: Discount per token.
        lam: GAE's lambda: 1 looks at all that follows, 0 at the critic's next value.
        value_clip: The critic's new value is held within this of the old one, as PPO's ratio is; None = not at all.
        whiten_advantages: To mean 0 and standard deviation 1 over all tokens of an iteration, of all processes.
        group_size: Answers to each prompt.
        kwargs: See `LitPolicyGradient`.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        critic: Critic | None = None,
        critic_lr: float = 1e-5,
        critic_gradient_clip_val: float | None = None,
        critic_warmup: int = 0,
        gamma: float = 1.0,
        lam: float = 1.0,
        value_clip: float | None = 0.5,
        whiten_advantages: bool = True,
        group_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, group_size=group_size, **kwargs)
        for name, share in {"gamma": gamma, "lam": lam}.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"model.{name}={share} must be in [0, 1]; 1 is usual for language models")
        for name, value in {"critic_lr": critic_lr, "critic_gradient_clip_val": critic_gradient_clip_val, "value_clip": value_clip}.items():
            if value is not None and value <= 0:
                raise ConfigError(f"model.{name}={value} must be above 0{'' if name == 'critic_lr' else ', or null'}")
        if critic_warmup < 0:
            raise ConfigError(f"model.critic_warmup={critic_warmup} must not be negative; it counts iterations without the policy")
        self.critic = critic or Critic()
        self.critic_lr, self.critic_gradient_clip_val, self.critic_warmup = critic_lr, critic_gradient_clip_val, critic_warmup
        self.gamma, self.lam = gamma, lam
        self.value_clip = value_clip
        self.whiten_advantages = whiten_advantages

    # ------------------------------------------------------------------ the critic's life
    def setup(self, stage: str) -> None:
        self.critic.check_sizes(self.policy, max(self.longest_row(), self.longest_answered()))
        super().setup(stage)
        if self.critic_warmup:
            self.check_can_rest(f"model.critic_warmup={self.critic_warmup}")
        self.critic.load(beside=self.policy)
        self.critic.train()

    def models(self) -> Sequence[Shardable]:
        return [self.policy, self.critic]

    def parameter_groups(self) -> list[Any]:
        groups = [[p for p in model.parameters() if p.requires_grad] for model in (self.policy, self.critic)]
        return [{"params": groups[0]}, {"params": groups[1], "lr": self.critic_lr}]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Each has its own norm: errors of a young critic must not shorten the policy's steps. DeepSpeed clips both together."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for model, limit in ((self.policy, gradient_clip_val), (self.critic, self.critic_gradient_clip_val or gradient_clip_val)):
            if limit:
                clip(model.parameters(), limit)

    @property
    def critic_alone(self) -> bool:
        """Whether the policy waits for the critic."""
        return self.iteration < self.critic_warmup

    def resting(self) -> Iterable[nn.Parameter]:
        return self.policy.parameters() if self.critic_alone else ()

    # ------------------------------------------------------------------ values and returns
    def annotate(self, rollout: TokenRollout) -> TokenRollout:
        return replace(super().annotate(rollout), values=self.each_action(rollout, self.values))

    def values(self, batch: TokenBatch | Minibatch) -> Tensor:
        return self.critic.values(batch.tokens, batch.lengths, batch.mask)

    def advantages(self, rollout: TokenRollout, total: Tensor) -> Tensor:
        assert rollout.values is not None
        return gae(self.token_rewards(rollout, total), rollout.values.double(), rollout.mask, gamma=self.gamma, lam=self.lam)[0]

    def with_advantages(self, rollout: TokenRollout, total: Tensor) -> TokenRollout:
        assert rollout.values is not None
        mask, values = rollout.mask, rollout.values.double()
        advantages = self.advantages(rollout, total)
        returns = (advantages + values).where(mask, 0.0)
        self.rollout_metrics |= self.explain(values, returns, mask)
        if self.whiten_advantages:
            advantages = self.whiten(advantages, mask)
        return replace(rollout, advantages=advantages.float().where(mask, 0.0), returns=returns.float())

    def explain(self, values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
        """How well the critic knew the returns, over the tokens of all processes."""
        v, r = values[mask], returns[mask]
        sums = torch.stack([torch.ones_like(v).sum(), v.sum(), r.sum(), (r * r).sum(), (r - v).sum(), ((r - v) ** 2).sum()])
        n, value, total, square, error, square_error = self.all_ranks(sums[None]).sum(0).tolist()
        n = max(n, 1.0)
        unexplained = (square_error - error**2 / n) / (square - total**2 / n + COUNT_EPS)
        return {"value_mean": value / n, "return_mean": total / n, "explained_variance": 1 - unexplained}

    # ------------------------------------------------------------------ loss
    def loss(self, batch: Minibatch) -> Terms:
        """The critic's loss beside the policy's: they share no weight, so their sum has the gradients of both."""
        assert batch.values is not None and batch.returns is not None
        new = self.values(batch)
        value = Term(value_loss(new, batch.values, batch.returns, clip=self.value_clip), batch.weights)
        if self.value_clip is not None:
            found = value_metrics(new, batch.values, batch.returns, batch.mask, clip=self.value_clip)
            self.track({"value_clip_fraction": found["value_clip_fraction"]}, batch)
        if self.critic_alone:
            return {"value": replace(value, losses=value.losses + self.untouched())}
        return {**super().loss(batch), "value": value}

    def untouched(self) -> Tensor:
        """0, with a gradient of 0 for the policy: DDP waits for one of every parameter."""
        zero = torch.zeros((), device=self.device)
        if isinstance(self.trainer.strategy, DDPStrategy):
            for _, parameter in self.policy.trainable():
                zero = zero + parameter.flatten()[:0].sum()
        return zero
