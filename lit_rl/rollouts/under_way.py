"""The answers of one call of `NativeEngine`: rows of a cache that requests come to and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rl.rollouts.base import Request, Sample, Sampling, temperatures
from lit_rl.rollouts.cache import Siblings
from lit_rl.rollouts.decoder import Decoder
from lit_rl.rollouts.graphs import StaticSteps
from lit_rl.rollouts.room import Plan
from lit_rl.samplers.tokens import draw_tokens
from lit_rl.seeding import uniforms


class UnderWay:
    """The answers of one call: waiting, under way in the first `len(self.under_way)` rows of the cache, or done."""

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        sampling: Sampling,
        stops: Collection[int],
        *,
        plan: Plan,
        static: bool = False,
    ) -> None:
        self.decoder, self.requests, self.sampling, self.stops = decoder, requests, sampling, set(stops)
        self.rows, self.shared, self.steps = plan.rows, plan.shared, 0
        self.samples, self.done = [Sample([], [], "length") for _ in requests], [False] * len(requests)
        self.same = first_of_equals(requests)
        self.waiting = deque(sorted(range(len(requests)), key=lambda i: (self.same[i], i)))  # equal prompts side by side
        # By row: the request, the place of its prompt, and the column of its next token at step 0.
        self.under_way: list[int] = []
        self.place_of: list[int] = []
        self.offset: list[int] = []
        self.places: list[int] = []  # the first request of the prompt, by place
        self.siblings: Siblings | None = None
        self.awaited: Awaited | None = None
        self._take_memory()
        self.static = StaticSteps(decoder, self.cache) if static else None

    def _take_memory(self) -> None:
        device, most, rows = self.decoder.embedding.device, self.sampling.max_new_tokens, self.rows
        longest = max((len(request.prompt) for request in self.requests), default=1)
        places = min(len(set(self.same)), rows + 1) if self.shared else 0
        columns = most - 1 if self.shared else longest + most - 1
        self.cache = self.decoder.cache(rows=rows, columns=columns, places=places, prompt=longest)
        # By row: the last token, its position in the sequence, and where in `uniform` the next random number is.
        self.state = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.first = torch.arange(0, rows * most, most, device=device)
        self.uniform = torch.zeros(rows, most, dtype=torch.float64, device=device)

    def are_done(self, places: Iterable[int]) -> bool:
        return all(self.done[i] for i in places)

    def advance(self) -> None:
        """Begin answers where there is room, else lengthen those under way by a token."""
        free = self.rows - len(self.under_way)
        if self.waiting and free >= max(1, self.rows // 8):  # prompts together, for a forward costs much the same for one
            self.admit(min(free, len(self.waiting)))
        else:
            self.proceed()

    # ------------------------------------------------------------------ coming
    def admit(self, count: int) -> None:
        """Read the prompts of the next `count` requests and draw their first tokens."""
        chosen = [self.waiting.popleft() for _ in range(count)]
        rows = slice(len(self.under_way), len(self.under_way) + count)
        lengths = [len(self.requests[i].prompt) for i in chosen]
        logits = self.read(chosen, rows.start)
        self.under_way += chosen
        self.offset += [(0 if self.shared else length) - self.steps for length in lengths]
        self.state[1, rows] = torch.tensor(lengths).to(self.state.device) - 1
        self.state[2, rows] = self.first[rows]
        self.uniform[rows] = uniforms([self.requests[i].key for i in chosen], self.sampling.max_new_tokens).to(self.uniform.device)
        self.draw(logits, rows)

    def read(self, chosen: Sequence[int], start: int) -> Tensor:
        """Keys and values of the prompts of these requests, for rows from `start` on. Logits "n V" after them."""
        prompts = list(dict.fromkeys(self.same[i] for i in chosen))
        known = {} if self.awaited is None else {self.awaited.prompt: self.awaited.logits}
        unread = [prompt for prompt in prompts if prompt not in known]
        first_row = {prompt: start + [self.same[i] for i in chosen].index(prompt) for prompt in prompts}
        place = {prompt: i for i, prompt in enumerate([*self.places, *unread])}
        if unread:
            at = place if self.shared else first_row
            read = self.decoder.prefill([self.requests[i].prompt for i in unread], [at[i] for i in unread], self.cache)
            known |= dict(zip(unread, read))
        if self.shared:
            self.places += unread
            self.siblings = None
            self.place_of += [place[self.same[i]] for i in chosen]
        else:
            self.copy_prompts(chosen, start, first_row)
        self.keep(known, first_row)
        return torch.stack([known[self.same[i]] for i in chosen])

    def copy_prompts(self, chosen: Sequence[int], start: int, first_row: Mapping[int, int]) -> None:
        """Copy what was read into the first row of each prompt, or kept, to the rows of all its siblings."""
        for row, i in enumerate(chosen, start):
            prompt, length = self.same[i], len(self.requests[i].prompt)
            if self.awaited is not None and self.awaited.prompt == prompt and self.awaited.entry is not None:
                self.cache.own[:, :, row, :, :length] = self.awaited.entry
            elif row != first_row[prompt]:
                self.cache.move(first_row[prompt], row, length)

    def keep(self, known: Mapping[int, Tensor], first_row: Mapping[int, int]) -> None:
        """Remember what was read of a prompt that further requests have."""
        prompt = self.same[self.waiting[0]] if self.waiting else None
        if prompt is None or prompt not in known:
            self.awaited = None
        elif self.awaited is None or self.awaited.prompt != prompt:
            length = len(self.requests[prompt].prompt)
            entry = None if self.shared else self.cache.own[:, :, first_row[prompt], :, :length].clone()
            self.awaited = Awaited(prompt, known[prompt], entry)

    # ------------------------------------------------------------------ under way
    def proceed(self) -> None:
        """One more token for every answer under way."""
        rows = slice(0, len(self.under_way))
        last, position, place = self.state[:, rows]
        newest = max(self.offset) + self.steps
        if self.static is not None:
            logits = self.static(last, position, newest=newest)
        else:
            columns = None
            if newest > min(self.offset) + self.steps:
                columns = place - self.first[rows] - 1 if self.shared else position
            logits = self.decoder.step(last, position, self.cache, self.related(), newest=newest, columns=columns)
        self.steps += 1
        self.draw(logits, rows)

    def related(self) -> Siblings | None:
        """The rows by their prompts, where siblings share those."""
        if self.shared and self.siblings is None:
            lengths = [len(self.requests[prompt].prompt) for prompt in self.places]
            self.siblings = Siblings.of(self.place_of, lengths, self.state.device)
        return self.siblings

    def draw(self, logits: Tensor, rows: slice) -> None:
        """Choose a token for each of the rows, and retire those that it ends."""
        s = self.sampling
        last, _, place = self.state[:, rows]
        temperature = temperatures([self.requests[i] for i in self.under_way[rows]], s, logits.device)
        tokens, logprobs = draw_tokens(logits, self.uniform.take(place), temperature=temperature, top_p=s.top_p, top_k=s.top_k)
        last.copy_(tokens)
        self.state[1:, rows] += 1
        ended = []
        # One transfer for both; float64 holds every token id.
        for row, token, logprob in zip(range(rows.start, rows.stop), *torch.stack([tokens.double(), logprobs.double()]).tolist()):
            sample = self.samples[self.under_way[row]]
            sample.ids.append(int(token))
            sample.logprobs.append(logprob)
            if token in self.stops:
                sample.finish = "stop"
                ended.append(row)
            elif len(sample.ids) == s.max_new_tokens:
                ended.append(row)
        if ended:
            self.retire(ended)

    # ------------------------------------------------------------------ leaving
    def retire(self, rows: Sequence[int]) -> None:
        """Hand out these answers; the last rows take their places."""
        for row in rows:
            self.done[self.under_way[row]] = True
        for row in reversed(rows):
            last = len(self.under_way) - 1
            if row != last:
                self.cache.move(last, row, self.offset[last] + self.steps)
                self.uniform[row] = self.uniform[last]
                self.state[:, row] = self.state[:, last]
                self.state[2, row] -= (last - row) * self.sampling.max_new_tokens
            for by_row in (self.under_way, self.place_of, self.offset) if self.shared else (self.under_way, self.offset):
                by_row[row] = by_row[last]
                del by_row[last]
        if self.shared:
            self.vacate()

    def vacate(self) -> None:
        """Free the places of prompts that nobody answers or waits for; the last ones move there."""
        self.siblings, used = None, set(self.place_of)
        for place in reversed(range(len(self.places))):
            if place in used or (self.awaited is not None and self.places[place] == self.awaited.prompt):
                continue
            last = len(self.places) - 1
            if place != last:
                self.cache.move_prompt(last, place)
                self.places[place] = self.places[last]
                self.place_of = [place if other == last else other for other in self.place_of]
            del self.places[last]


@dataclass(frozen=True)
class Awaited:
    """A prompt that was read and is still waited for: its logits, and where siblings do not share it its keys and values."""

    prompt: int
    logits: Tensor
    entry: Tensor | None


def first_of_equals(requests: Sequence[Request]) -> list[int]:
    """For each request the place of the first one with the same prompt."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(request.prompt), i) for i, request in enumerate(requests)]
