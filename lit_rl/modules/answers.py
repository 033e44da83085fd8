"""What all methods share that learn from a language model's own answers: an engine that generates, rewards, evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_rl.checkpoints.options import REMEDY
from lit_rl.credit.groups import group_metrics
from lit_rl.errors import ConfigError
from lit_rl.modules.tokens import LitToken
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.ranks import gather_to_first
from lit_rl.replay.sequences import assemble
from lit_rl.rollouts.ahead import Ahead
from lit_rl.rollouts.base import EvalSampling, Request, RolloutEngine, Sample, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.rollouts.start_check import check_sampler
from lit_rl.seeding import Key
from lit_rl.types import Info, Prompts, TokenRollout

OldLogprobs = Literal["auto", "rollout", "recompute"]


class LitGeneration(LitToken):
    """Base of the methods on a language model's answers. The datamodule is one of texts: it has `prompt_ids(info) -> list[int]`.

    Args:
        policy: The language model that is trained. See `LitToken`.
        engine: Who generates; default: in this process, over the training weights.
        sampling: Of rollouts.
        eval_sampling: Of evaluation and prediction; what it leaves out stays: the likeliest tokens, as long answers as in rollouts.
        eval_seed: Of evaluation and prediction where they draw.
        rollout_chunk: Answers generated at once; each finished chunk is scored while the next one is generated.
        old_logprobs: The log-probabilities that ratios are relative to: as the engine reported them (`rollout`), computed anew by the
            trainer before its first step (`recompute`), or (`auto`) the latter where there is more than one optimizer step per rollout,
            and none where there is not: the ratio is 1.
        asynchronous: Draw the answers of the next iteration while this one trains, with the weights that it began with: they are one
            iteration old when they train. For engines with a copy of the weights, on devices of its own.
        kwargs: See `LitToken`.
    """

    asks: Sequence[str] = ("prompts", "prompt_ids", "max_prompt_length")
    datamodules = "datamodules.prompts_text.TextPrompts"

    stored_with: Sequence[str] = ("sampling", "old_logprobs")

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        engine: RolloutEngine | None = None,
        sampling: Sampling | None = None,
        eval_sampling: EvalSampling | Sampling | None = None,
        eval_seed: int = 0,
        rollout_chunk: int = 64,
        old_logprobs: OldLogprobs = "auto",
        asynchronous: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        if rollout_chunk < 1:
            raise ConfigError(f"model.rollout_chunk={rollout_chunk} must be at least 1")
        self.engine = engine or NativeEngine()
        self.sampling = sampling or Sampling()
        partial = eval_sampling or EvalSampling()
        self.eval_sampling = partial if isinstance(partial, Sampling) else partial.over(self.sampling)
        self.eval_seed = eval_seed
        self.rollout_chunk = rollout_chunk
        if not self.sampling.temperature:
            raise ConfigError(
                "model.sampling.temperature=0 makes all answers to a prompt equal, so there is nothing to learn from: use 1.0"
            )
        self.old_logprobs: OldLogprobs = old_logprobs
        self.asynchronous = asynchronous
        self.ahead: Ahead | None = None
        self.ahead_metrics: dict[str, float] = {}
        if asynchronous:
            self.check_ahead()

    def check_ahead(self) -> None:
        """Raise ConfigError where the next iteration's answers cannot be drawn before this one has trained."""
        if not self.engine.has_copy:
            raise ConfigError(
                f"model.asynchronous=true needs an engine with a copy of the weights, and {type(self.engine).__name__} answers from those "
                "that train: set model.engine to lit_rl.rollouts.http.HTTPEngine, or model.asynchronous to false"
            )
        own = LitGeneration
        if (type(self).scored, type(self).collect, type(self).sample) != (own.scored, own.collect, own.sample):
            raise ConfigError(
                f"model.asynchronous=true: {type(self).__name__} chooses what to generate while it generates, which cannot be done ahead; "
                "set it to false"
            )

    # ------------------------------------------------------------------ life
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.engine.setup(self.policy, rank=self.global_rank, world_size=self.trainer.world_size)
        self.check_engine()

    def check_sizes(self) -> None:
        super().check_sizes()
        if isinstance(self.policy, CausalLM):
            what, remedy = self.lengths()
            self.policy.check_sizes(self.longest_answered(), what=what, remedy=remedy)

    def check_engine(self) -> None:
        """Raise ConfigError where an engine that tells its limit cannot hold the longest prompt with its answer."""
        most, longest = self.engine.longest, self.longest_answered()
        if most is not None and longest > most:
            what, remedy = self.lengths()
            raise ConfigError(f"{what} {longest} tokens, and the inference server takes {most} (--max-model-len): {remedy}")

    def longest_answered(self) -> int:
        """Tokens of the longest prompt with the longest answer, 0 where no prompt is known or nothing is generated."""
        prompt = getattr(self.data, "longest", {}).get("prompt", 0)
        return prompt + self._answer_tokens() if prompt and self.generates() else 0

    def generates(self) -> bool:
        """Whether the run has prompts answered."""
        return True

    def _answer_tokens(self) -> int:
        training = self.trainer.state.fn == "fit"
        return max(self.eval_sampling.max_new_tokens, self.sampling.max_new_tokens if training else 0)

    def lengths(self) -> tuple[str, str]:
        """For messages: whose length is too much, and what to do about it."""
        shown = f"the longest prompt ({getattr(self.data, 'longest', {}).get('prompt', 0)} tokens) with its answer has"
        return shown, f"set model.sampling.max_new_tokens (now {self._answer_tokens()}) or data.max_prompt_length to less"

    def teardown(self, stage: str) -> None:
        self.ahead = None
        self.engine.close()

    def on_fit_start(self) -> None:
        """Compare sampler and trainer, and say what the numbers of the YAML multiply to."""
        super().on_fit_start()
        self.check_sampler()
        answers, parts = self.prompts_per_iteration * self.group_size, self.micro_batches_per_update
        rank_zero_info(
            f"An iteration: {self.prompts_per_iteration} prompts x {self.group_size} samples = {answers} answers; optimizer steps: "
            f"{self.inner_epochs * self.updates}, each of {answers // self.updates} answers in {parts} micro-batches on each of "
            f"{self.trainer.world_size} processes"
        )

    def check_sampler(self) -> None:
        """Raise ConfigError unless an engine of ours over the training weights samples with the log-probabilities that train."""
        answers = self.scorer is not None or self.trainer.predicting
        if isinstance(self.policy, CausalLM) and isinstance(self.engine, NativeEngine | HFEngine) and answers:
            mixed = "mixed" in str(self.trainer.precision)
            autocast = self.trainer.precision_plugin.forward_context() if mixed else None
            check_sampler(self.policy, self.engine, self.sampling, world_size=self.trainer.world_size, autocast=autocast)

    @property
    def on_policy(self) -> bool:
        """Whether the weights that train are those that sampled, in every optimizer step."""
        return self.updates * self.inner_epochs == 1 and not self.asynchronous

    def longest(self) -> float:
        return float(self.sampling.max_new_tokens)

    def longest_sequence(self) -> int:
        return self.data.max_prompt_length + self.sampling.max_new_tokens  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ collect
    def collect(self, prompts: Prompts) -> TokenRollout:
        """Generate, and compute what training needs of the answers while their scores are under way."""
        if self.asynchronous:
            return self.annotate(self.sample_ahead(prompts))
        self.engine.update_weights(self.iteration)
        return self.annotate(self.sample(prompts))

    def sample_ahead(self, prompts: Prompts) -> TokenRollout:
        """The answers that were drawn while the last iteration trained; those to the next one's prompts are begun."""
        began = time.perf_counter()
        ahead, self.ahead = self.ahead, None
        answers = ahead.answers.result() if ahead is not None and ahead.iteration == self.iteration else None
        self.ahead_metrics = {"async/staleness": float(answers is not None), "async/wait_seconds": time.perf_counter() - began}
        self.engine.update_weights(self.iteration)
        if answers is None:
            rollout = self.sample(prompts)
        else:
            asked = self.asked(prompts)
            self.deliver(answers, asked, prompts.info, show=True, total=len(prompts))
            rollout = assemble(prompts, asked, answers).to(self.device)
        following = self.iteration + 1
        if self.trainer.max_epochs in (None, -1) or following < self.trainer.max_epochs - self.warmup_epochs:
            prompts = self.ask(following)
            requests = [Request(ids, key) for ids, key in zip(self.asked(prompts), self.keys(prompts, following))]
            self.ahead = Ahead(following, self.engine.begin(requests, self.sampling))
        return rollout

    def sample(self, prompts: Prompts) -> TokenRollout:
        """The engine's answers, submitted for scoring."""
        asked, answers = self.generate(prompts, self.keys(prompts), self.sampling, show=True)
        return assemble(prompts, asked, answers).to(self.device)

    def keys(self, prompts: Prompts, iteration: int | None = None) -> list[tuple[Key, ...]]:
        """What the randomness of each answer of a rollout depends on; default: of the present iteration."""
        iteration = self.iteration if iteration is None else iteration
        return [(self.seed, "rollout", iteration, int(group), i % self.group_size) for i, group in enumerate(prompts.group)]

    def asked(self, prompts: Prompts) -> list[list[int]]:
        """The prompts' token ids."""
        known: dict[int, list[int]] = {}
        for row in prompts.info:
            if id(row) not in known:
                known[id(row)] = self.data.prompt_ids(row)  # type: ignore[attr-defined]
        return [known[id(row)] for row in prompts.info]

    def generate(
        self, prompts: Prompts, keys: Sequence[tuple[Key, ...]], sampling: Sampling, *, show: bool
    ) -> tuple[list[list[int]], list[Sample]]:
        """Prompt ids and answers; each finished chunk is submitted for scoring and, if `show`, told to the callbacks."""
        asked, answers = self.asked(prompts), []
        most = int(self.all_ranks(torch.tensor([len(prompts)], device=self.device)).max())  # as many calls on every process
        for first in range(0, most, self.rollout_chunk):
            chunk = slice(first, first + self.rollout_chunk)
            samples = self.engine.generate([Request(ids, key) for ids, key in zip(asked[chunk], keys[chunk])], sampling)
            self.deliver(samples, asked[chunk], prompts.info[chunk], show=show, total=len(prompts))
            answers += samples
        return asked, answers

    def deliver(self, samples: Sequence[Sample], asked: Sequence[Sequence[int]], info: Sequence[Info], *, show: bool, total: int) -> None:
        """Have answers scored and, if `show`, tell the callbacks; `total`: of the rollout."""
        texts = [self.policy.reply(sample.ids, prompt_ids=ids, info=row) for sample, ids, row in zip(samples, asked, info, strict=True)]
        if self.scorer is not None and texts:
            self.scorer.submit(texts, info)
        if show and texts:
            self.notify("on_rollout_chunk", texts, info, total)

    def annotate(self, rollout: TokenRollout) -> TokenRollout:
        """Log-probabilities of the trainer and of the reference, where the method needs them."""
        temperature = self.sampling.temperature
        if self.needs_logprobs():
            rollout = replace(rollout, behaviour=rollout.logprobs, logprobs=self.all_logprobs(rollout, temperature=temperature))
        if self.needs_reference():
            with self.policy.reference():
                rollout = replace(rollout, reference=self.all_logprobs(rollout, temperature=temperature))
        return rollout

    def needs_logprobs(self) -> bool:
        """Whether the trainer computes log-probabilities of its own before the first step on a rollout."""
        return self.old_logprobs == "recompute" or (self.old_logprobs == "auto" and not self.on_policy)

    def needs_reference(self) -> bool:
        """Whether `loss` or `credit` looks at the reference's log-probabilities."""
        return False

    # ------------------------------------------------------------------ what is told of a rollout
    def describe(self, rollout: TokenRollout, total: Tensor) -> dict[str, float]:
        """Numbers of a rollout over all processes."""
        names = list(rollout.rewards)
        columns = [total, rollout.group, rollout.mask.sum(1), rollout.stopped, *(rollout.rewards[n].to(self.device) for n in names)]
        table = self.all_ranks(torch.stack([column.double() for column in columns], dim=1)).cpu()
        lengths = table[:, 2]
        metrics = group_metrics(table[:, 0], table[:, 1].long())
        metrics |= {f"reward/{name}": float(table[:, 4 + i].nanmean()) for i, name in enumerate(names)}
        metrics |= {"response_length/mean": float(lengths.mean()), "response_length/max": float(lengths.max())}
        metrics |= {"response_length/cut_off_fraction": 1 - float(table[:, 3].mean()), "samples": float(len(table))}
        return metrics | {"tokens": float(lengths.sum())} | self.ahead_metrics

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        """(x - mean) / std over the masked tokens of all processes, 0 elsewhere."""
        kept, count = x.double().where(mask, 0.0), mask.sum().double()
        total, n = self.all_ranks(torch.stack([kept.sum(), count])[None]).sum(0)
        centred = (kept - total / n.clamp(min=1)).where(mask, 0.0)
        square = self.all_ranks(centred.pow(2).sum()[None]).sum()
        return centred * torch.rsqrt(square / (n - 1).clamp(min=1) + 1e-8)

    # ------------------------------------------------------------------ checkpoints
    def check_rollout(self, rollout: TokenRollout) -> None:
        super().check_rollout(rollout)
        lacks = [
            name
            for name, missing in {
                "the reference, which model.kl_coef or kl_in_reward needs": self.needs_reference() and rollout.reference is None,
                "the sampler beside the trainer's, which model.old_logprobs or correction needs": self.needs_logprobs()
                and rollout.behaviour is None,
            }.items()
            if missing
        ]
        if lacks:
            raise ConfigError(
                f"the checkpoint was written inside an iteration, whose rollout has no log-probabilities of {lacks[0]}: continue with the "
                f"options it was written with, {REMEDY}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.ahead is not None:  # on all processes, or on none; the weights that drew them will be gone
            checkpoint["ahead"] = {"iteration": self.ahead.iteration, "ranks": gather_to_first(self.ahead.plain())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("ahead")
        if self.asynchronous and saved is not None and None not in saved["ranks"].values():
            answers = [row for rank in sorted(saved["ranks"]) for row in saved["ranks"][rank]]
            self.ahead = Ahead.of_plain(saved["iteration"], answers[self.local(len(answers))])

    # ------------------------------------------------------------------ evaluation and prediction
    def answer(self, batch: Prompts) -> list[str]:
        """One answer to each prompt; where `eval_sampling` draws, it depends on `eval_seed` and the prompt's group id."""
        keys: list[tuple[Key, ...]] = [(self.eval_seed, "eval", int(group)) for group in batch.group]
        _, samples = self.generate(batch, keys, self.eval_sampling, show=False)
        return [self.policy.decode(sample.ids) for sample in samples]

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":
            self.check_sampler()
        if self.ahead is not None:
            self.ahead.answers.result()  # they are drawn with the weights that the engine has now
        self.engine.update_weights(self.iteration)

    def validation_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, Any]:
        texts = self.answer(batch)
        self.evaluated.append(batch)
        return {"texts": texts, "prompts": batch}

    on_test_start = on_predict_start = on_validation_start
    test_step = validation_step

    def predict_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, Any]:
        return {"texts": self.answer(batch), "prompts": batch}
