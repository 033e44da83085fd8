"""How prompts are answered: who generates, how tokens are drawn, and when."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol, final

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.ranks import gather_to_first
from lit_rl.rewards.base import RewardQueue
from lit_rl.rollouts.ahead import Ahead, SavedAhead
from lit_rl.rollouts.base import EvalSampling, Request, RolloutEngine, Sample, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.rollouts.start_check import check_sampler
from lit_rl.seeding import Key
from lit_rl.types import Answer, Info, Media, Prompts

OldLogprobs = Literal["auto", "rollout", "recompute"]
Keys = Sequence[tuple[Key, ...]]
"""For each answer all that its randomness depends on."""


class Run(Protocol):
    """Parts of a method that generation needs."""

    policy: TokenPolicy
    reward_queue: RewardQueue | None

    @property
    def data(self) -> object: ...

    @property
    def device(self) -> torch.device: ...

    def all_ranks(self, x: Tensor) -> Tensor: ...

    def media(self, info: Sequence[Info]) -> Media: ...

    def notify(self, hook: str, *args: object) -> None: ...


@final
class Answers:
    """Answers to prompts, chunk by chunk; each finished chunk is scored while others are generated.

    Args:
        engine: Who generates; default: in this process, over the training weights.
        sampling: Of rollouts.
        eval_sampling: Of evaluation and prediction; what it leaves out stays: the likeliest tokens, as long answers as in rollouts.
        eval_seed: Of evaluation and prediction where they draw.
        chunk: Answers that are scored together. How many are under way at once the engine says.
        old_logprobs: The log-probabilities that ratios are relative to: as the engine reported them (`rollout`), computed anew by the
            trainer before its first step (`recompute`), or (`auto`) the latter where there is more than one optimizer step per rollout,
            and none where there is not: the ratio is 1.
        asynchronous: Draw the answers of the next iteration while this one trains, with the weights that it began with: they are one
            iteration old when they train. For engines with a copy of the weights, on devices of its own.
    """

    stored_with = ("sampling", "old_logprobs")

    def __init__(
        self,
        *,
        engine: RolloutEngine | None = None,
        sampling: Sampling | None = None,
        eval_sampling: EvalSampling | Sampling | None = None,
        eval_seed: int = 0,
        chunk: int = 64,
        old_logprobs: OldLogprobs = "auto",
        asynchronous: bool = False,
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"model.answers.chunk={chunk} must be at least 1")
        self.engine = engine or NativeEngine()
        self.sampling = sampling or Sampling()
        partial = eval_sampling or EvalSampling()
        self.eval_sampling = partial if isinstance(partial, Sampling) else partial.over(self.sampling)
        self.eval_seed, self.chunk = eval_seed, chunk
        self.old_logprobs: OldLogprobs = old_logprobs
        self.asynchronous = asynchronous
        self.ahead: Ahead | None = None
        self.metrics: dict[str, float] = {}
        if not self.sampling.temperature:
            raise ConfigError(
                "model.answers.sampling.temperature=0 makes all answers to a prompt equal, so there is nothing to learn from: use 1.0"
            )
        if asynchronous and not self.engine.has_copy:
            raise ConfigError(
                f"model.answers.asynchronous=true needs an engine with a copy of the weights, and {type(self.engine).__name__} answers "
                "from those that train: set model.answers.engine to lit_rl.rollouts.http.HTTPEngine, or model.answers.asynchronous to false"
            )

    # ------------------------------------------------------------------ life
    def close(self) -> None:
        self.ahead = None
        self.engine.close()

    def check_room(self, longest: int, *, what: str, remedy: str) -> None:
        """Raise ConfigError where an engine that tells its limit cannot hold the longest prompt with its answer."""
        if self.engine.max_model_len is not None and longest > self.engine.max_model_len:
            raise ConfigError(
                f"{what} {longest} tokens, and the inference server takes {self.engine.max_model_len} (--max-model-len): {remedy}"
            )

    def check_sampler(self, policy: TokenPolicy, *, world_size: int, autocast: AbstractContextManager[object] | None) -> None:
        """Raise ConfigError unless an engine of ours over the training weights samples with the log-probabilities that train."""
        if isinstance(policy, CausalLM) and isinstance(self.engine, NativeEngine | HFEngine):
            check_sampler(policy, self.engine, self.sampling, world_size=world_size, autocast=autocast)

    # ------------------------------------------------------------------ answers
    def ask(self, run: Run, prompts: Prompts) -> list[list[int]]:
        """The prompts' token ids."""
        encode = getattr(run.data, "prompt_ids", None)
        if not callable(encode):
            raise ConfigError(f"data: {type(run.data).__name__} gives no token ids of prompts: use datamodules.prompts_text.TextPrompts")
        known: dict[int, list[int]] = {}
        for row in prompts.info:
            if id(row) not in known:
                known[id(row)] = encode(row)
        return [known[id(row)] for row in prompts.info]

    def requests(self, run: Run, prompt_ids: Sequence[list[int]], keys: Keys, info: Sequence[Info]) -> list[Request]:
        """One for each prompt, with its pictures."""
        media = run.media(info) or [()] * len(info)
        return [Request(*asked) for asked in zip(prompt_ids, keys, media, info, strict=True)]

    def generate(
        self, run: Run, prompts: Prompts, keys: Keys, sampling: Sampling, *, tell: bool = True
    ) -> tuple[list[list[int]], list[Sample]]:
        """Prompt ids and answers; each finished chunk is submitted for scoring and, if `tell`, told to the callbacks."""
        prompt_ids = self.ask(run, prompts)
        most = int(run.all_ranks(torch.tensor([len(prompts)], device=run.device)).max())  # as many chunks on every process
        chunks = [slice(first, first + self.chunk) for first in range(0, most, self.chunk)]
        requests = self.requests(run, prompt_ids, keys, prompts.info)
        answers: list[list[Sample]] = [[] for _ in chunks]
        texts: dict[int, list[Answer]] = {}  # of chunks that the callbacks have not been told of, which is done in order
        told, before = 0, 0 if run.reward_queue is None else run.reward_queue.submitted
        for place, samples in self.engine.stream([requests[chunk] for chunk in chunks], sampling):
            chunk, answers[place] = chunks[place], samples
            groups = prompts.group[chunk].tolist() if tell else None
            texts[place] = self._score(run, samples, prompt_ids[chunk], prompts.info[chunk], groups, place=before + place)
            while told in texts:
                if (of_chunk := texts.pop(told)) and tell:
                    run.notify("on_rollout_chunk", of_chunk, prompts.info[chunks[told]], len(prompts))
                told += 1
        return prompt_ids, [sample for samples in answers for sample in samples]

    def submit(self, run: Run, samples: Sequence[Sample], prompt_ids: Sequence[Sequence[int]], prompts: Prompts) -> None:
        """Have the answers of a rollout scored, and tell the callbacks."""
        texts = self._score(run, samples, prompt_ids, prompts.info, prompts.group.tolist())
        if texts:
            run.notify("on_rollout_chunk", texts, prompts.info, len(prompts))

    def _score(
        self,
        run: Run,
        samples: Sequence[Sample],
        prompt_ids: Sequence[Sequence[int]],
        info: Sequence[Info],
        groups: Sequence[int] | None,
        place: int | None = None,
    ) -> list[Answer]:
        """The texts of answers, submitted for scoring."""
        texts = [run.policy.reply(sample.ids, prompt_ids=ids, info=row) for sample, ids, row in zip(samples, prompt_ids, info, strict=True)]
        if run.reward_queue is not None and texts:
            run.reward_queue.submit(texts, info, groups=groups, place=place)
        return texts

    def evaluate(self, run: Run, prompts: Prompts) -> list[str]:
        """One answer to each prompt; where `eval_sampling` draws, it depends on `eval_seed` and the prompt's group id."""
        keys: Keys = [(self.eval_seed, "eval", int(group)) for group in prompts.group]
        _, samples = self.generate(run, prompts, keys, self.eval_sampling, tell=False)
        return [run.policy.decode(sample.ids) for sample in samples]

    def refresh(self, iteration: int) -> None:
        """Have the engine take over the present weights, after the answers that it draws with those that it has. Collective."""
        if self.ahead is not None:
            self.ahead.answers.result()
        self.engine.update_weights(iteration)

    # ------------------------------------------------------------------ answers drawn ahead
    def take_ahead(self, run: Run, prompts: Prompts, iteration: int) -> tuple[list[list[int]], list[Sample]] | None:
        """The answers that were drawn while the last iteration trained, submitted for scoring; None where there are none."""
        began = time.perf_counter()
        ahead, self.ahead = self.ahead, None
        answers = ahead.answers.result() if ahead is not None and ahead.iteration == iteration else None
        self.metrics = {"async/staleness": float(answers is not None), "async/wait_seconds": time.perf_counter() - began}
        self.engine.update_weights(iteration)
        if answers is None:
            return None
        prompt_ids = self.ask(run, prompts)
        self.submit(run, answers, prompt_ids, prompts)
        return prompt_ids, answers

    def begin(self, run: Run, prompts: Prompts, keys: Keys, iteration: int) -> None:
        """Have the prompts of an iteration answered in the background."""
        requests = self.requests(run, self.ask(run, prompts), keys, prompts.info)
        self.ahead = Ahead(iteration, self.engine.begin(requests, self.sampling))

    def state_dict(self) -> dict[str, SavedAhead]:
        """Answers under way, on all processes or on none: the weights that drew them will be gone. Collective."""
        if self.ahead is None:
            return {}
        return {"ahead": {"iteration": self.ahead.iteration, "ranks": gather_to_first(self.ahead.plain())}}

    def load_state_dict(self, checkpoint: Mapping[str, SavedAhead], *, rank: int, world_size: int) -> None:
        saved = checkpoint.get("ahead")
        if self.asynchronous and saved is not None and None not in saved["ranks"].values():
            answers = [row for _, rows in sorted(saved["ranks"].items()) for row in rows or ()]
            share = len(answers) // world_size
            self.ahead = Ahead.of_plain(saved["iteration"], answers[rank * share : (rank + 1) * share])
