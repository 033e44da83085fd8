"""Answers from the training weights in this process, at a multiple of the speed of `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.weights.shards import reshard
from lit_rl.rollouts.base import Request, RolloutEngine, Sample, Sampling
from lit_rl.rollouts.decoder import Decoder, unsupported
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.room import Plan, memory_for_answers, plan_rows
from lit_rl.rollouts.under_way import UnderWay


class NativeEngine(RolloutEngine):
    """For Qwen2, Qwen3 and Llama, with LoRA or without; other models are answered for by `HFEngine`.

    A prompt is read once for all who ask it, an answer that has ended makes room for the next request. While it generates it keeps copies
    of the weights that it joins (see `Decoder`), taken anew in each call and dropped after it: about 70 % of the blocks, everything where
    weights are sharded, computed with in another precision than they are kept in, or on a CPU. Sharded weights are gathered once per call,
    and all processes must make the same number of calls.

    Args:
        batch: Answers under way at most; None = as many as fit into 70 % of a GPU's free memory, or a quarter of the host's.
        max_batch_tokens: Tokens with their prompts for which keys and values may be kept at once, if that is less; None = no such limit.
        cuda_graphs: Replay each step of decoding as a CUDA graph: for small models, where launching kernels takes longer than they do. Each
            row then holds its prompt itself, and all rows are computed until the last answer ends. On a CPU the same steps without a graph.
    """

    def __init__(self, batch: int | None = None, max_batch_tokens: int | None = None, cuda_graphs: bool = False) -> None:
        for name, value in {"batch": batch, "max_batch_tokens": max_batch_tokens}.items():
            if value is not None and value < 1:
                raise ConfigError(f"engine.{name}={value} must be at least 1")
        self.batch = batch
        self.max_batch_tokens = max_batch_tokens
        self.cuda_graphs = cuda_graphs
        self.fallback: HFEngine | None = None

    def setup(self, policy: TokenPolicy, *, rank: int, world_size: int) -> None:
        """Choose HFEngine for a model that the decoder cannot run."""
        from lightning.pytorch.utilities.rank_zero import rank_zero_info

        super().setup(policy, rank=rank, world_size=world_size)
        self.processes = world_size
        reason = unsupported(policy.network.lm)
        self.fallback = None
        if reason:
            rank_zero_info(f"NativeEngine does not take this model, {reason}: lit_rl.rollouts.hf.HFEngine answers, more slowly")
            self.fallback = HFEngine(self.batch)
            self.fallback.setup(policy, rank=rank, world_size=world_size)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Answers by the decoder."""
        [(_, samples)] = self.stream([requests], sampling)
        return samples

    @torch.no_grad()
    def stream(self, chunks: Sequence[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """Answers by the decoder, those of later chunks under way with those of the first: what ends makes room for the next request."""
        requests = [request for chunk in chunks for request in chunk]
        if any(not request.prompt for request in requests):
            raise ConfigError("a prompt has no token, so there is nothing to continue: leave it out of the data")
        if self.fallback is not None or not chunks:
            yield from self.fallback.stream(chunks, sampling) if self.fallback is not None else ()
            return
        reshard(self.policy.network)
        lm = self.policy.network.lm
        decoder = Decoder(lm)
        plan = self.plan(decoder, requests, sampling)
        answers = UnderWay(decoder, requests, sampling, self.policy.stop_ids, plan=plan, static=self.cuda_graphs)
        first = 0
        for place, chunk in enumerate(chunks):
            places = range(first, first + len(chunk))
            with torch.autocast(self.policy.device.type, enabled=False):
                while not answers.are_done(places):
                    answers.advance()
            yield place, answers.samples[places.start : places.stop]
            first = places.stop

    def plan(self, decoder: Decoder, requests: Sequence[Request], sampling: Sampling) -> Plan:
        """Answers under way at once, by the memory that is left beside the decoder."""
        device = self.policy.device
        return plan_rows(
            requests,
            sampling.max_new_tokens,
            need=decoder.need(),
            memory=memory_for_answers(device, self.processes),
            most=self.batch,
            max_tokens=self.max_batch_tokens,
            may_share=not self.cuda_graphs,
            device=device.type,
        )
