"""What processes with different numbers of rows exchange, as functions that each of them calls."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from callbacks.reward_scoring import RewardScoring
from lit_rl.credit import rules
from lit_rl.credit.rules import GroupCredit
from lit_rl.credit.tokens import place_scores
from lit_rl.credit.trajectories import closing_rows, trajectory_sums
from lit_rl.credit.weights import token_weights
from lit_rl.ranks import exchange_objects, gather_objects, gather_rows, gather_to_first, on_all_rows, place, sum_over_ranks
from lit_rl.rewards.base import Reward
from lit_rl.types import Info


def rank_and_size() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return place()


def rows_of(counts: list[int], dtype: str) -> Tensor:
    """Rows "B 2" that name their rank and number."""
    rank, _ = rank_and_size()
    return torch.tensor([[10 * rank, i] for i in range(counts[rank])]).view(-1, 2).to(getattr(torch, dtype))


def gathered_rows(counts: list[int], dtype: str) -> list[list[float]]:
    found = gather_rows(rows_of(counts, dtype))
    assert found.dtype == getattr(torch, dtype)
    return found.tolist()


def centred_in_groups(groups: list[list[int]], values: list[list[float]]) -> list[float]:
    """Each value here less the mean of its group, wherever its siblings are."""
    rank, _ = rank_and_size()

    def centred(x: Tensor, group: Tensor) -> Tensor:
        return torch.stack([value - x[group == g].mean() for value, g in zip(x, group)])

    mine = torch.tensor(values[rank], dtype=torch.float64), torch.tensor(groups[rank], dtype=torch.long)
    return on_all_rows(centred, *mine).tolist()


def other_collectives(values: list[list[float]]) -> dict[str, object]:
    rank, world = rank_and_size()
    return {
        "sum": sum_over_ranks(torch.tensor(values[rank])).tolist(),
        "objects": gather_objects({"rank": rank}),
        "first": sorted(gather_to_first(f"of {rank}").items()),
        "exchanged": exchange_objects([f"from {rank} to {r}" * (1 + 100 * r) for r in range(world)]),
    }


def credited(rows: list[list[int]], rule: str, columns: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Advantages and `traj-mean` weights of the rows of this process, of episodes that are split over several. rows: of each process."""
    rank, _ = rank_and_size()
    mine = torch.tensor(rows[rank], dtype=torch.long)
    scores, group, trajectory, lengths = (torch.tensor(columns[name])[mine] for name in ("scores", "group", "trajectory", "lengths"))
    mask, has_reward = torch.arange(4) < lengths[:, None], scores.isfinite()
    paid = on_all_rows(closing_rows, group, trajectory, has_reward & mask.any(1))
    rewards = place_scores(scores.double().nan_to_num().where(paid, 0.0), mask)
    made: GroupCredit = getattr(rules, rule)()
    advantages = made(
        rewards, group, mask, has_reward=has_reward, total=sum_over_ranks, columns={"trajectory": trajectory}, everywhere=on_all_rows
    )  # fmt: skip
    spent = on_all_rows(trajectory_sums, mask.sum(1), group, trajectory)
    sequences = int(sum_over_ranks(on_all_rows(closing_rows, group, trajectory, mask.any(1)).sum()))
    weights = token_weights(mask, "traj-mean", sequences=sequences, lengths=spent, dtype=torch.float64)
    return advantages.sum(1).tolist(), weights.sum(1).tolist()


class LessMean(Reward):
    """`spread` = the number that a text is, less the mean of its group: wrong for every text unless the group is whole."""

    outputs = ("spread",)
    medium, compares = "texts", True

    def score(self, media: Sequence[str], info: Sequence[Info]) -> dict[str, Tensor]:
        values = torch.tensor([float(text) for text in media], dtype=torch.float64)
        return {"spread": values - values.mean()}


def compared(groups: list[list[int]], values: list[list[float]], *, size: int) -> list[float]:
    """Scores of the texts of this process, submitted one by one; groups of `size` members have some of them elsewhere."""
    rank, _ = rank_and_size()
    queue = RewardScoring({"spread": LessMean()})
    queue._submissions.groups.size = size
    for group, value in zip(groups[rank], values[rank]):
        queue.submit([str(value)], [MappingProxyType({"prompt": str(group)})], groups=[group])
    try:
        return queue.gather()["spread"].tolist()
    finally:
        queue.close()
