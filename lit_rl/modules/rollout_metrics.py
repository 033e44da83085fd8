"""Numbers of a rollout of tokens over all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lit_rl.credit.groups import group_metrics
from lit_rl.credit.trajectories import voters
from lit_rl.types import TokenRollout


def row_table(rollout: TokenRollout, total: Tensor) -> Tensor:
    """Float64 "B C", what `row_metrics` asks of each row: total, group, tokens, whether it stopped, its rewards, its trajectory if any."""
    rewards = [values.to(total.device) for values in rollout.rewards.values()]
    columns = [total, rollout.group, rollout.mask.sum(1), rollout.stopped, *rewards]
    columns += [rollout.columns["trajectory"]] if "trajectory" in rollout.columns else []
    return torch.stack([column.double() for column in columns], dim=1)


def row_metrics(table: Tensor, rewards: Sequence[str]) -> dict[str, float]:
    """Metrics of the rows of all processes; a trajectory of several rows counts once among rewards, and each row as an answer.

    table: `row_table` of every process. rewards: Names of the rewards in it.
    """
    lengths, ids = table[:, 2], table[:, -1].long() if table.shape[1] > 4 + len(rewards) else None
    told = table[voters(table[:, 1].long(), ids, table[:, 0].isfinite())]
    metrics = group_metrics(told[:, 0], told[:, 1].long())
    metrics |= {f"reward/{name}": float(told[:, 4 + i].nanmean()) for i, name in enumerate(rewards)}
    metrics |= {"response_length/mean": float(lengths.mean()), "response_length/max": float(lengths.max())}
    metrics |= {"response_length/cut_off_fraction": 1 - float(table[:, 3].mean()), "samples": float(len(table))}
    return metrics | {"tokens": float(lengths.sum())}


def masked_means(streams: Mapping[str, Tensor], mask: Tensor, *, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The mean of each stream "B S" over the masked tokens of all processes. total: sums a tensor over them."""
    sums = [*(stream.double().where(mask, 0.0).sum() for stream in streams.values()), mask.sum().double()]
    *values, count = total(torch.stack(sums)).tolist()
    return {name: value / max(count, 1) for name, value in zip(streams, values)}
