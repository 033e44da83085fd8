"""GRPO: policy gradients on a language model's tokens, relative to the other answers to the same prompt, and its relatives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_rl.credit.groups import group_advantages, leave_one_out
from lit_rl.credit.tokens import groups_that_teach, length_weighted_advantages, pass_at_k_advantages, rewards_to_go, spread
from lit_rl.credit.weights import Aggregation
from lit_rl.errors import ConfigError
from lit_rl.modules.gradient import LitPolicyGradient, Surrogate
from lit_rl.policies.base import TokenPolicy
from lit_rl.replay.exchange import handed_over
from lit_rl.replay.partition import fair_owners
from lit_rl.replay.sequences import joined
from lit_rl.types import TokenRollout

Estimator = Literal["group", "leave_one_out", "length_weighted", "pass_at_k", "returns", "returns_baseline"]


class GRPO(LitPolicyGradient):
    """Clipped policy gradient on every token; an answer's advantage is its reward relative to its group's (arXiv 2402.03300).

    Args:
        policy: The language model that is trained. See `LitPolicyGradient`, as for `surrogate`, `clip_low`, `kl_coef`, ...
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


class DAPO(GRPO):
    """Groups whose answers are all equally good teach nothing and are replaced by others, until a batch is full (arXiv 2503.14476).

    The clip range is wider above, every token weighs the same, there is no divergence to pay for, and answers that come near the length
    limit lose reward.

    Args:
        policy: The language model that is trained. See `GRPO`.
        prompts_per_generation: Prompts that are answered at a time, over all processes; default: `prompts_per_iteration`. What is left over
            when the batch is full is thrown away.
        filter_metric: The score that must differ within a group; default: the total reward, without what its length costs.
        max_generations: So often at most in an iteration.
        on_limit: What becomes of an iteration whose batch is not full then: it stops the run (`error`), trains on the groups that there are
            (`train_partial`), or leaves all weights as they are (`skip_step`).
        overlong_buffer: Tokens before the length limit within which a reward falls; default: a fifth of the longest answer.
        kwargs: See `GRPO`.
    """

    stored_with: Sequence[str] = ("prompts_per_generation", "filter_metric")
    asks_once = False

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        prompts_per_generation: int | None = None,
        filter_metric: str | None = None,
        max_generations: int = 10,
        on_limit: Literal["error", "train_partial", "skip_step"] = "error",
        clip_high: float = 0.28,
        overlong_buffer: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, clip_high=clip_high, **kwargs)
        self.prompts_per_generation = prompts_per_generation or self.prompts_per_iteration
        if self.prompts_per_generation * max_generations < self.prompts_per_iteration or max_generations < 1:
            raise ConfigError(
                f"model.max_generations={max_generations} of prompts_per_generation={self.prompts_per_generation} cannot fill "
                f"prompts_per_iteration={self.prompts_per_iteration}: raise max_generations to at least "
                f"{max(1, -(-self.prompts_per_iteration // self.prompts_per_generation))}"
            )
        self.set_overlong(self.sampling.max_new_tokens // 5 if overlong_buffer is None else overlong_buffer)
        self.filter_metric = filter_metric
        self.max_generations, self.on_limit = max_generations, on_limit
        self.generations = 0  # drawn so far, over all iterations
        self._counted: dict[str, float] = {}

    def check_geometry(self) -> None:
        super().check_geometry()
        if self.on_limit != "error":
            self.check_can_rest(f"model.on_limit={self.on_limit}")
        if self.prompts_per_generation % self.trainer.world_size:
            raise ConfigError(
                f"model.prompts_per_generation={self.prompts_per_generation} does not divide among {self.trainer.world_size} processes"
            )

    # ------------------------------------------------------------------ dynamic sampling
    def scored(self) -> TokenRollout:
        """Generation after generation until enough groups teach; log-probabilities are computed for those alone."""
        self.engine.update_weights(self.iteration)
        drawn: list[TokenRollout] = []
        teaches: list[bool] = []  # of all groups so far, on all processes, in order
        while sum(teaches) < self.prompts_per_iteration and len(drawn) < self.max_generations:
            with self.rolling_out():
                prompts = self.draw(self.generations, self.prompts_per_generation)
                answers = self.sample(replace(prompts, group=prompts.group + len(teaches)))
            self.generations += 1
            drawn.append(self.score(answers))
            teaches += self.all_ranks(self.teaching(drawn[-1])).tolist()
        self._count(drawn, teaches)
        with self.rolling_out():
            rollout = self.chosen(joined(drawn), teaches)
            self.notify("on_rollout_chosen", rollout)
            return self.annotate(rollout)

    def teaching(self, rollout: TokenRollout) -> Tensor:
        """Bool for each group here: whether its answers are told apart."""
        if self.filter_metric is not None and self.filter_metric not in rollout.rewards:
            raise ConfigError(f"model.filter_metric={self.filter_metric} is no score; there are {', '.join(sorted(rollout.rewards))}")
        metric = self.total(rollout) if self.filter_metric is None else rollout.rewards[self.filter_metric].to(self.device)
        return groups_that_teach(metric, rollout.group).view(-1, self.group_size).any(1)

    def chosen(self, drawn: TokenRollout, teaches: list[bool]) -> TokenRollout:
        """The first groups that teach, numbered anew and dealt evenly; others fill up where they are few, without a part in the loss."""
        first = [g for g, good in enumerate(teaches) if good] + [g for g, good in enumerate(teaches) if not good]
        first = first[: self.prompts_per_iteration]
        world, share = self.trainer.world_size, self.prompts_per_generation // self.trainer.world_size
        owners = fair_owners([g % self.prompts_per_generation // share for g in first], parts=self.updates, world=world)
        number = torch.full((len(teaches),), -1)
        number[first] = torch.arange(len(first))
        group = number[drawn.group.cpu()]
        return handed_over(replace(drawn, group=group.to(drawn.group.device)), torch.tensor([*owners, -1])[group])

    def _count(self, drawn: list[TokenRollout], teaches: list[bool]) -> None:
        """What sampling took. Raises ConfigError where too few groups teach and that is an error."""
        kept, wanted = sum(teaches), self.prompts_per_iteration
        if kept < wanted and self.on_limit == "error":
            raise ConfigError(
                f"Only {kept} of {len(teaches)} groups in model.max_generations={self.max_generations} generations have answers of "
                f"different reward, and model.prompts_per_iteration={wanted} are wanted: the task is too easy, too hard or badly scored. "
                "Raise model.max_generations or group_size, lower prompts_per_iteration, or set model.on_limit to train_partial or "
                "skip_step; continue with --ckpt_path last"
            )
        trained = min(kept, wanted) if self.on_limit == "train_partial" else wanted * (kept >= wanted)
        rewards = self.all_ranks(torch.cat([self.total(rollout) for rollout in drawn]))
        self._counted = {
            "dapo/generations": float(len(drawn)),
            "dapo/kept_share": kept / len(teaches),
            "dapo/groups": float(trained),
            "dapo/reward_mean_of_all": float(rewards.nanmean()),
        }

    def with_advantages(self, rollout: TokenRollout, total: Tensor) -> TokenRollout:
        self.rollout_metrics |= self._counted
        trained = rollout.group < self._counted["dapo/groups"]
        return super().with_advantages(replace(rollout, mask=rollout.mask & trained[:, None]), total)

    def resting(self) -> Iterable[nn.Parameter]:
        return self.parameters() if self.rollout_metrics.get("dapo/groups") == 0 else ()

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["generations"] = self.generations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.generations = checkpoint.get("generations", 0)  # other methods draw none
