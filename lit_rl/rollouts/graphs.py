"""Steps of decoding whose tensors have the same shapes and places each time, so that a GPU can replay them as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_rl.rollouts.cache import Cache
from lit_rl.rollouts.decoder import Decoder

BUCKET = 256
"""Columns of the cache that a step looks at are a multiple of this: one graph for each."""
Replay = Callable[[], Tensor]


class StaticSteps:
    """`Decoder.step` over all rows of a cache without shared prompts, whether an answer is under way in them or not.

    Every row looks at the first columns of the cache up to a multiple of BUCKET, of which those behind its own token are hidden; rows
    without an answer write where the next answer in them writes first. On a GPU a step of so many columns is captured at its first use
    and replayed from then on (one launch in place of hundreds); elsewhere it is computed each time.
    """

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self.decoder, self.cache = decoder, cache
        rows, device = cache.own.shape[2], cache.own.device
        self.tokens, self.positions = torch.zeros(2, rows, dtype=torch.long, device=device).unbind()
        self.replays: dict[int, Replay] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, *, newest: int) -> Tensor:
        """Logits Float32 "n V" after one more token in each of the first n rows.

        positions: Int "n", of these tokens in their sequences and in the cache. newest: the largest of them.
        """
        count = len(tokens)
        self.tokens[:count], self.positions[:count] = tokens, positions
        self.positions[count:] = 0
        return self.replay(min(-(-(newest + 1) // BUCKET) * BUCKET, self.cache.own.shape[4]))()[:count]

    def replay(self, columns: int) -> Replay:
        """A step that looks at so many columns."""
        if columns not in self.replays:
            self.cache.reserve(columns)  # not in the graph, which would make them 0 each time
            self.replays[columns] = captured(lambda: self.step(columns), self.tokens.device, others=list(self.replays.values()))
        return self.replays[columns]

    def step(self, columns: int) -> Tensor:
        """Logits of all rows."""
        return self.decoder.step(self.tokens, self.positions, self.cache, None, newest=columns - 1, columns=self.positions)


class Graph:
    """A captured computation, and where its result is. beside: One whose memory it may use, as they never run at once."""

    def __init__(self, compute: Replay, beside: Graph | None) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels and workspaces before the capture
            compute()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=beside.graph.pool() if beside else None):
            self.result = compute()

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result


def captured(compute: Replay, device: torch.device, *, others: Sequence[Replay]) -> Replay:
    """A computation over tensors that stay where they are, as a CUDA graph on a GPU. others: Computed before, whose memory it may use."""
    if device.type != "cuda":
        return compute
    return Graph(compute, next((other for other in others if isinstance(other, Graph)), None))
