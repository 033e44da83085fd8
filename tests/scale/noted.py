"""A method with a stream, a column and media that nothing else knows of: each minibatch must hold those of its own rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import text_runs
import torch
from torch import Tensor

from lit_rl.methods.grpo import DAPO
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.replay.batches import TokenBatch
from lit_rl.types import Prompts, TokenRollout


def pictures(tokens: Tensor) -> list[Tensor]:
    """None to two pictures of different sizes that only these tokens could have."""
    total = int(tokens.sum())
    return [torch.full((3, len(tokens), 1 + total % 5 + i), (total + i) % 251, dtype=torch.uint8) for i in range(total % 3)]


class Noted(DAPO):
    """DAPO, whose groups are joined over generations and change processes."""

    def sample(self, prompts: Prompts) -> TokenRollout:
        rollout = super().sample(prompts)
        rows = [row[:length] for row, length in zip(rollout.tokens, rollout.lengths.tolist())]
        noted = rollout.with_streams(doubled=2 * rollout.tokens[:, 1:]).with_columns(
            total=torch.stack([row.sum() for row in rows]), home=torch.full((len(rows),), self.global_rank)
        )
        return replace(noted, media=[pictures(row) for row in rows])

    def minibatch(self, rollout: TokenRollout, rows: Tensor) -> TokenBatch:
        batch = super().minibatch(rollout, rows)
        for i, length in enumerate(batch.lengths.tolist()):
            tokens = batch.tokens[i, :length]
            expected = pictures(tokens)
            assert len(batch.media[i]) == len(expected) and all(map(torch.equal, batch.media[i], expected))
            if batch.mask[i].any():
                assert batch.columns["total"][i] == tokens.sum()
                assert torch.equal(batch.streams["doubled"][i, : length - 1], 2 * tokens[1:])
            SEEN["moved"] += int(batch.columns["home"][i] != self.global_rank)
            SEEN["pictures"] += len(expected)
        return batch


SEEN = {"moved": 0, "pictures": 0}
text_runs.METHODS["noted"] = partial(
    Noted, **text_runs.ANSWERS, dynamic_sampling=DynamicSampling(prompts_per_generation=6, max_generations=20)
)


def fit(**arguments: Any) -> dict[str, int]:
    """What the minibatches of a run held: rows that were sampled elsewhere, and pictures."""
    SEEN.update(moved=0, pictures=0)
    text_runs.fit(**arguments, method="noted")
    return dict(SEEN)
