"""GRPO: policy gradients on a language model's tokens, relative to the other answers to the same prompt, and its relatives."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.advantages import group_advantages, leave_one_out
from lit_rl.errors import ConfigError
from lit_rl.losses.aggregation import Aggregation
from lit_rl.policies.base import TokenPolicy
from lit_rl.policy_gradient_module import LitPolicyGradient, Surrogate
from lit_rl.token_advantages import length_weighted_advantages, pass_at_k_advantages, rewards_to_go, spread
from lit_rl.types import TokenRollout

Estimator = Literal["group", "leave_one_out", "length_weighted", "pass_at_k", "returns", "returns_baseline"]


class GRPO(LitPolicyGradient):
    """Clipped policy gradient on every token; an answer's advantage is its reward relative to its group's (arXiv 2402.03300).

    Args:
        policy: See `LitPolicyGradient`, as for `surrogate`, `clip_low`, `kl_coef`, ...
        estimator: `group`: reward - mean of the group, over its standard deviation if `std`; `leave_one_out`: reward - mean of the others
            (RLOO); `length_weighted`: the same with longer answers counting more (OPO, arXiv 2505.23585); `pass_at_k`: the lead of the
            best answer, 0 for the others (arXiv 2503.19595); `returns`: rewards from a token on, whitened over all tokens (REINFORCE++);
            `returns_baseline`: reward - mean of the group, whitened likewise.
        std: Divide by the group's standard deviation (unbiased) + 1e-6.
        gamma: Discount of `returns` per token.
        kwargs: See `LitPolicyGradient`.
    """

    def __init__(self, policy: TokenPolicy, *, estimator: Estimator = "group", std: bool = True, gamma: float = 1.0, **kwargs: Any) -> None:
        super().__init__(policy, **kwargs)
        if self.group_size == 1 and estimator != "returns":
            raise ConfigError("model.group_size=1 gives every answer advantage 0, as there is no sibling to compare it with: use 4 to 16")
        self.estimator: Estimator = estimator
        self.std, self.gamma = std, gamma

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

    def useful(self, rollout: TokenRollout) -> Tensor:
        """Where only the advantage drives the loss, an answer with advantage 0 has no gradient and costs no forward."""
        assert rollout.advantages is not None
        some = super().useful(rollout)
        return some if self.kl_coef or self.entropy_coef else some & (rollout.advantages != 0).any(1)


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
