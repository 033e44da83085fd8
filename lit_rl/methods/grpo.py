"""GRPO: policy gradients on a language model's tokens, relative to the other answers to the same prompt, and its relatives."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lit_rl.checkpoints.options import options_of
from lit_rl.credit.length_penalty import LengthPenalty
from lit_rl.credit.rules import Credit, Group, LeaveOneOut, Returns
from lit_rl.credit.weights import Aggregation
from lit_rl.errors import ConfigError
from lit_rl.losses.off_policy import sampler_kl
from lit_rl.losses.surrogates import Cispo, Clip, SequenceClip, Surrogate
from lit_rl.losses.terms import Term, Terms, token_means
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.modules.gradient import LitPolicyGradient
from lit_rl.policies.base import TokenPolicy
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.types import Minibatch, TokenRollout


class GRPO(LitPolicyGradient):
    """Clipped policy gradient on every token; an answer's advantage is its reward relative to its group's (arXiv 2402.03300).

    Args:
        policy: The language model that is trained. See `LitPolicyGradient`, as for `answers`, `surrogate`, `kl`, ...
        credit: How rewards become advantages, see `lit_rl.credit.rules`; default: `Group`.
        dynamic_sampling: Replace groups whose answers are all equally good by others; default: no.
        kwargs: See `LitPolicyGradient`.
    """

    def __init__(
        self, policy: TokenPolicy, *, credit: Credit | None = None, dynamic_sampling: DynamicSampling | None = None, **kwargs: Any
    ) -> None:
        super().__init__(policy, **kwargs)
        self.rule = credit or Group()
        self.dynamic_sampling = copy(dynamic_sampling)  # which counts generations
        if self.group_size == 1 and self.rule.siblings:
            self.refuse_alone()
        if self.dynamic_sampling is not None:
            self.dynamic_sampling.check(self.prompts_per_iteration)
            self.refuse_ahead()
            self.asks_once = False

    def refuse_alone(self) -> None:
        """Raise ConfigError for groups of one, of a rule that compares siblings."""
        raise ConfigError("model.group_size=1 gives every answer advantage 0, as there is no sibling to compare it with: use 4 to 16")

    # ------------------------------------------------------------------ credit
    def with_advantages(self, rollout: TokenRollout, total: Tensor) -> TokenRollout:
        if self.dynamic_sampling is not None:
            self.rollout_metrics |= self.dynamic_sampling.metrics
            rollout = self.dynamic_sampling.trained(rollout)
        rewards = self.token_rewards(rollout, total)
        advantages = self.rule(
            rewards,
            rollout.group,
            rollout.mask,
            has_reward=total.isfinite(),
            total=self.sum_of_ranks,
            columns=rollout.columns,
            everywhere=self.everywhere,
        )
        return replace(rollout, advantages=advantages.float().where(rollout.mask, 0.0))

    def useful(self, rollout: TokenRollout) -> Tensor:
        """Where only the advantage drives the loss, an answer with advantage 0 has no gradient and costs no forward."""
        assert rollout.advantages is not None
        some = super().useful(rollout)
        return some if self.kl.coef or self.entropy_coef else some & (rollout.advantages != 0).any(1)

    # ------------------------------------------------------------------ loss
    def loss(self, batch: Minibatch) -> Terms:
        temperature, look = batch.columns.get("temperature", self.answers.sampling.temperature), self.entropy_coef != 0
        new, entropy = self.policy.logprobs(
            batch.tokens, batch.lengths, batch.mask, media=batch.media, temperature=temperature, entropy=look
        )
        behaviour = batch.streams.get("behaviour")
        stored = behaviour is not None or self.answers.old_logprobs == "rollout"
        old = batch.logprobs if stored else new.detach()  # one optimizer step per rollout: the ratio is 1
        losses, metrics = self.surrogate(new, old, batch.advantages, batch.mask, behaviour=behaviour)
        if self.correction is not None:
            losses = losses * self.correction(batch.logprobs, behaviour, batch.mask)
        terms = {"policy": Term(losses, batch.weights)}
        if self.kl.coef:
            terms["kl"] = Term(self.kl(new, batch.streams["reference"]), batch.weights, self.kl.coef)
        if entropy is not None:
            terms["entropy"] = Term(-entropy, batch.weights, self.entropy_coef)
        if behaviour is not None:
            metrics["rollout_kl"] = sampler_kl(batch.logprobs, behaviour, batch.mask)
        counted = batch.mask & (batch.weights != 0)  # a minibatch without weight only fills up
        self.meters.mean(metrics | token_means(terms, batch.mask), weight=counted.sum())
        return terms

    # ------------------------------------------------------------------ dynamic sampling
    def check_geometry(self) -> None:
        super().check_geometry()
        if self.dynamic_sampling is not None:
            self.dynamic_sampling.check_geometry(self)

    def stored_options(self) -> dict[str, object]:
        parts = {} if self.dynamic_sampling is None else options_of(self.dynamic_sampling, "model.dynamic_sampling")
        return super().stored_options() | parts

    def rollout_with_rewards(self) -> TokenRollout:
        return super().rollout_with_rewards() if self.dynamic_sampling is None else self.dynamic_sampling.fill(self)

    def frozen_now(self) -> Iterable[nn.Parameter]:
        return self.parameters() if self.rollout_metrics.get("dapo/groups") == 0 else ()

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.dynamic_sampling is not None:
            checkpoint |= self.dynamic_sampling.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.dynamic_sampling is not None:
            self.dynamic_sampling.load_state_dict(checkpoint)


class DrGRPO(GRPO):
    """Without the biases to short wrong answers and easy prompts: no std, and one constant length for all (arXiv 2503.20783)."""

    defines: ClassVar = {"credit": Group}
    presets: ClassVar = {"credit": Group(std=False)}

    def __init__(self, policy: TokenPolicy, *, credit: Credit | None = None, aggregation: Aggregation = "dr-grpo", **kwargs: Any) -> None:
        super().__init__(policy, credit=credit or self.presets["credit"], aggregation=aggregation, **kwargs)


class GSPO(GRPO):
    """The ratio of whole sequences is clipped, in a range a thousand times narrower (arXiv 2507.18071)."""

    defines: ClassVar = {"surrogate": SequenceClip}

    def __init__(
        self, policy: TokenPolicy, *, surrogate: Surrogate | None = None, aggregation: Aggregation = "seq-mean-token-mean", **kwargs: Any
    ) -> None:
        super().__init__(policy, surrogate=surrogate or SequenceClip(), aggregation=aggregation, **kwargs)


class RLOO(GRPO):
    """The others in the group are the baseline; with `kl_in_reward` the divergence is part of the reward (arXiv 2402.14740)."""

    defines: ClassVar = {"credit": LeaveOneOut}

    def __init__(self, policy: TokenPolicy, *, credit: Credit | None = None, **kwargs: Any) -> None:
        super().__init__(policy, credit=credit or LeaveOneOut(), **kwargs)


class ReinforcePP(GRPO):
    """REINFORCE++: returns, with `kl_in_reward` at every token, whitened over the batch; no groups needed (arXiv 2501.03262)."""

    defines: ClassVar = {"credit": Returns}

    def __init__(self, policy: TokenPolicy, *, credit: Credit | None = None, **kwargs: Any) -> None:
        super().__init__(policy, credit=credit or Returns(), **kwargs)


class CISPO(GRPO):
    """Importance weights are clipped instead of updates, so that no token loses its gradient (arXiv 2506.13585)."""

    defines: ClassVar = {"surrogate": Cispo}

    def __init__(self, policy: TokenPolicy, *, surrogate: Surrogate | None = None, **kwargs: Any) -> None:
        super().__init__(policy, surrogate=surrogate or Cispo(), **kwargs)


class DAPO(GRPO):
    """Dynamic sampling, a clip range that is wider above, and less reward near the length limit (arXiv 2503.14476).

    Every token weighs the same, and there is no divergence to pay for.

    Args:
        policy: The language model that is trained. See `GRPO`.
        surrogate: Default: `Clip` from 0.8 to 1.28.
        dynamic_sampling: How a batch is filled with groups that teach.
        length_penalty: Default: within the last fifth of the longest answer.
        answers: See `GRPO`.
        kwargs: See `GRPO`.
    """

    presets: ClassVar = {"surrogate": Clip(high=0.28)}

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        answers: Answers | None = None,
        surrogate: Surrogate | None = None,
        dynamic_sampling: DynamicSampling | None = None,
        length_penalty: LengthPenalty | None = None,
        **kwargs: Any,
    ) -> None:
        limit = (answers.sampling if answers is not None else Sampling()).max_new_tokens
        super().__init__(
            policy,
            answers=answers,
            surrogate=surrogate or self.presets["surrogate"],
            dynamic_sampling=dynamic_sampling or DynamicSampling(),
            length_penalty=length_penalty or LengthPenalty(buffer=limit // 5),
            **kwargs,
        )
