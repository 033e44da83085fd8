"""`generate` of transformers: for every model it knows, at its speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.weights.shards import reshard
from lit_rl.ranks import gather_objects
from lit_rl.rollouts.base import Request, RolloutEngine, Sample, Sampling, temperatures
from lit_rl.rollouts.room import memory_for_answers, need_of, plan_rows
from lit_rl.samplers.tokens import draw_tokens
from lit_rl.seeding import uniforms

WITH_PICTURES = 32
"""Answers at most that are generated together where prompts show pictures, whose reading no config tells the memory of."""


class HFEngine(RolloutEngine):
    """Over the training weights, in this process. `policy` is one whose network has a transformers model as `lm`.

    Under FSDP2 and ZeRO-3 the processes wait for each other in every forward, and all must make the same number of calls, with however many
    requests. Blocks are gathered for each token anew: a server, or the native engine where it can, answers faster.

    Args:
        batch: Answers generated together; None = as many as fit into 70 % of a GPU's free memory, or a quarter of the host's, at most 32
            where prompts show pictures.
    """

    def __init__(self, batch: int | None = None) -> None:
        self.batch = batch
        self.one_length = False  # whether only prompts of the same length are answered together: for models that do not see past padding

    def setup(self, policy: TokenPolicy, *, rank: int, world_size: int) -> None:
        """Keep the policy and the number of processes."""
        super().setup(policy, rank=rank, world_size=world_size)
        self.world_size = world_size

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Answers by transformers, in batches of prompts of similar length."""
        batches = self.batches(requests, self.rows(requests, sampling))
        most = max(gather_objects(len(batches))) if _waits(self.policy.network) else len(batches)
        found: dict[int, Sample] = {}
        for batch in batches:
            found |= zip(batch, self._generate([requests[i] for i in batch], sampling))
        samples = [found[i] for i in range(len(requests))]
        for _ in range(most - len(batches)):  # the others wait for this one's forwards
            self._generate([self._filler()], replace(sampling, max_new_tokens=1))
        reshard(self.policy.network)
        return samples

    def rows(self, requests: Sequence[Request], sampling: Sampling) -> int:
        """Answers that are generated together."""
        if self.batch is not None:
            return self.batch
        lm: Any = self.policy.network.lm
        device = self.policy.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else lm.dtype
        most = WITH_PICTURES if any(request.media for request in requests) else None
        return plan_rows(
            requests,
            sampling.max_new_tokens,
            need=need_of(lm.config, dtype),
            memory=memory_for_answers(device, self.world_size),
            most=most,
            max_tokens=None,
            device=device.type,
            may_share=False,
        ).rows

    def batches(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Indices of the requests that are answered together, at most so many."""
        kinds: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(len(request.prompt) if self.one_length else 0, []).append(i)
        return [rows[first : first + most] for rows in kinds.values() for first in range(0, len(rows), most)]

    def _filler(self) -> Request:
        """A request that others wait for, with all that the model reads."""
        prompt, media = self.policy.trial(self.policy.stop_ids[:1])
        return Request(prompt, (0,), media)

    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        from transformers import GenerationConfig, LogitsProcessorList

        lm: Any = self.policy.network.lm
        asked = len(requests)
        if _waits(lm) and self._filler().media and not any(request.media for request in requests):
            requests = [*requests, self._filler()]  # the others' vision towers wait for this one's
        longest = max(len(request.prompt) for request in requests)
        ids, mask = torch.zeros(2, len(requests), longest, dtype=torch.long, device=self.policy.device)
        for i, request in enumerate(requests):
            ids[i, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[i, longest - len(request.prompt) :] = 1
        stops = list(self.policy.stop_ids)
        uniform = uniforms([request.key for request in requests], sampling.max_new_tokens)
        temperature = temperatures(requests, sampling, self.policy.device)
        draw = _Draw(uniform, longest, sampling, self.policy.banned_ids, temperature)
        settings = GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0])
        # What the settings leave open comes from the model's own, such as Qwen2.5's repetition_penalty: another distribution.
        own, lm.generation_config = lm.generation_config, GenerationConfig()
        answer = partial(
            lm.generate,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([draw]),
            synced_gpus=_waits(lm),
            **self.policy.generation_inputs(ids, [request.media for request in requests]),
        )
        try:
            out = _as_forward(self.policy.network, answer, ids)
        finally:
            lm.generation_config = own
        tokens, logprobs = out[:, longest:].tolist(), torch.stack(draw.logprobs, 1).tolist()
        return [_sample(row, values, set(stops)) for row, values in zip(tokens[:asked], logprobs)]


def _waits(network: torch.nn.Module) -> bool:
    """True when every forward gathers weights from all processes."""
    from torch.distributed.tensor import DTensor

    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in network.parameters())


def _as_forward(network: torch.nn.Module, answer: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """`answer(ids)` in place of the network's forward, for which alone FSDP2 gathers the weights that belong to no block."""
    own = network.forward
    network.forward = answer
    try:
        return network(ids)
    finally:
        network.forward = own


class _Draw:
    """A logits processor after which only the drawn token is possible."""

    def __init__(self, uniform: Tensor, prompt: int, sampling: Sampling, banned: Sequence[int], temperature: float | Tensor) -> None:
        self.uniform, self.prompt, self.sampling, self.banned, self.temperature = uniform, prompt, sampling, banned, temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        s = self.sampling
        uniform = self.uniform[:, ids.shape[1] - self.prompt].to(scores.device)
        chosen, logprobs = draw_tokens(scores, uniform, temperature=self.temperature, top_p=s.top_p, top_k=s.top_k, banned=self.banned)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


def _sample(tokens: list[int], logprobs: list[float], stops: set[int]) -> Sample:
    """Up to and with the first stop token."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), None)
    return Sample(tokens[:end], logprobs[: end or len(tokens)], "length" if end is None else "stop")
