"""Answers from the training weights in this process, at a multiple of the speed of `generate`."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.weights.shards import reshard
from lit_rl.rollouts.base import Request, RolloutEngine, Sample, Sampling
from lit_rl.rollouts.decoder import Cache, Decoder, unsupported
from lit_rl.rollouts.hf import HFEngine
from lit_rl.samplers.tokens import draw_tokens
from lit_rl.seeding import uniforms


class NativeEngine(RolloutEngine):
    """For Qwen2, Qwen3 and Llama, with LoRA or without; other models are answered for by `HFEngine`.

    A prompt is read once for all who ask it, an answer that has ended makes room for the next request. While it generates it keeps copies
    of the weights that it joins (see `Decoder`), taken anew in each call and dropped after it: about 70 % of the blocks, everything where
    weights are sharded, computed with in another precision than they are kept in, or on a CPU. Sharded weights are gathered once per call,
    and all processes must make the same number of calls.

    Args:
        batch: Answers under way at most.
        max_batch_tokens: Tokens with their prompts for which keys and values may be kept at once; answers under way are fewer where
            `batch` of the longest prompt with `max_new_tokens` would be more.
    """

    def __init__(self, batch: int = 64, max_batch_tokens: int = 131072) -> None:
        for name, value in {"batch": batch, "max_batch_tokens": max_batch_tokens}.items():
            if value < 1:
                raise ConfigError(f"engine.{name}={value} must be at least 1")
        self.batch = batch
        self.max_batch_tokens = max_batch_tokens
        self.fallback: HFEngine | None = None

    def setup(self, policy: TokenPolicy, *, rank: int, world_size: int) -> None:
        """Choose HFEngine for a model that the decoder cannot run."""
        from lightning.pytorch.utilities.rank_zero import rank_zero_info

        super().setup(policy, rank=rank, world_size=world_size)
        reason = unsupported(policy.network.lm)
        self.fallback = None
        if reason:
            rank_zero_info(f"NativeEngine does not take this model, {reason}: lit_rl.rollouts.hf.HFEngine answers, more slowly")
            self.fallback = HFEngine(self.batch)
            self.fallback.setup(policy, rank=rank, world_size=world_size)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Answers by the decoder, in batches of similar length."""
        if self.fallback is not None:
            return self.fallback.generate(requests, sampling)
        if any(not request.prompt for request in requests):
            raise ConfigError("a prompt has no token, so there is nothing to continue: leave it out of the data")
        reshard(self.policy.network)
        lm = self.policy.network.lm
        decoder = Decoder(lm)
        with torch.autocast(self.policy.device.type, enabled=False):
            return Answers(decoder, requests, sampling, self.policy.stop_ids).run(self.rows(requests, sampling))

    def rows(self, requests: Sequence[Request], sampling: Sampling) -> int:
        """Answers under way at once."""
        longest = max((len(request.prompt) for request in requests), default=1) + sampling.max_new_tokens
        return max(1, min(self.batch, self.max_batch_tokens // longest, len(requests)))


class Answers:
    """The answers of one call: waiting, under way in the first `len(self.under_way)` rows of the cache, or done."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request], sampling: Sampling, stops: Collection[int]) -> None:
        self.decoder, self.requests, self.sampling, self.stops = decoder, requests, sampling, set(stops)
        self.samples = [Sample([], [], "length") for _ in requests]
        self.under_way: list[int] = []  # requests, by row
        self.lengths: list[int] = []  # tokens in the cache, by row
        first: dict[tuple[int, ...], int] = {}
        same = [first.setdefault(tuple(request.prompt), i) for i, request in enumerate(requests)]
        # Equal prompts side by side, and those of similar lengths: little padding.
        self.waiting = deque(sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt), same[i], i)))
        self.prefilled: dict[int, tuple[Tensor, Tensor]] = {}  # cache entry and logits of a prompt that is still waited for
        self.same = same

    def run(self, rows: int) -> list[Sample]:
        device, count = self.decoder.embedding.device, self.sampling.max_new_tokens
        self.cache = Cache(self.decoder, rows)
        # By row: the last token, how many are in the cache, and where in `uniform` the next random number is.
        self.state = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.uniform = torch.zeros(rows, count, dtype=torch.float64, device=device)
        while self.waiting or self.under_way:
            free = rows - len(self.under_way)
            if self.waiting and free >= max(1, rows // 8):  # prompts together, for a forward costs much the same for one
                self.admit(min(free, len(self.waiting)))
            else:
                self.proceed()
        return self.samples

    def admit(self, count: int) -> None:
        """Read the prompts of the next `count` requests and draw their first tokens."""
        chosen = [self.waiting.popleft() for _ in range(count)]
        unread = [i for i in dict.fromkeys(self.same[i] for i in chosen) if i not in self.prefilled]
        if unread:
            entries, logits = self.decoder.prefill([self.requests[i].prompt for i in unread])
            self.prefilled |= {i: (entry, row) for i, entry, row in zip(unread, entries, logits)}
        start = len(self.under_way)
        for prompt in dict.fromkeys(self.same[i] for i in chosen):
            siblings = [i for i in chosen if self.same[i] == prompt]
            self.cache.put(len(self.under_way), len(siblings), self.prefilled[prompt][0])
            self.under_way += siblings
            self.lengths += [len(self.requests[prompt].prompt)] * len(siblings)
        logits = torch.stack([self.prefilled[self.same[i]][1] for i in chosen])
        rows = slice(start, start + count)
        first = torch.arange(start, start + count) * self.sampling.max_new_tokens
        self.state[1:, rows] = torch.stack([torch.tensor(self.lengths[rows]), first]).to(self.state.device)
        self.uniform[rows] = uniforms([self.requests[i].key for i in chosen], self.sampling.max_new_tokens).to(self.uniform.device)
        still = self.same[self.waiting[0]] if self.waiting else None
        self.prefilled = {i: known for i, known in self.prefilled.items() if i == still}
        self.draw(logits, rows)

    def proceed(self) -> None:
        """One more token for every answer under way."""
        rows = slice(0, len(self.under_way))
        last, at, _ = self.state[:, rows]
        logits = self.decoder.step(last, at, self.lengths, self.cache)
        at += 1
        self.lengths = [length + 1 for length in self.lengths]
        self.draw(logits, rows)

    def draw(self, logits: Tensor, rows: slice) -> None:
        """Choose a token for each of the rows, and retire those that it ends."""
        s = self.sampling
        last, _, place = self.state[:, rows]
        uniform = self.uniform.take(place)
        place += 1
        tokens, logprobs = draw_tokens(logits, uniform, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)
        last.copy_(tokens)
        ended = []
        # One transfer for both; float64 holds every token id.
        for row, token, logprob in zip(range(rows.start, rows.stop), *torch.stack([tokens.double(), logprobs.double()]).tolist()):
            sample = self.samples[self.under_way[row]]
            sample.ids.append(int(token))
            sample.logprobs.append(logprob)
            if int(token) in self.stops:
                sample.finish = "stop"
            if int(token) in self.stops or len(sample.ids) == s.max_new_tokens:
                ended.append(row)
        for row in reversed(ended):
            self.retire(row)

    def retire(self, row: int) -> None:
        """The last row takes the place of this one."""
        last = len(self.under_way) - 1
        if row != last:
            self.cache.move(last, row, self.lengths[last])
            self.uniform[row] = self.uniform[last]
            self.state[:, row] = self.state[:, last]
            self.state[2, row] -= (last - row) * self.sampling.max_new_tokens
            self.under_way[row], self.lengths[row] = self.under_way[last], self.lengths[last]
        del self.under_way[last], self.lengths[last]
