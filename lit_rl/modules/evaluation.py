"""Scores of an evaluation over all processes, and samples that have none because they are not finite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_rl.credit.row_weights import counting
from lit_rl.ranks import gather_objects
from lit_rl.rewards.base import RewardError, RewardQueue
from lit_rl.types import Info, Prompts

NAMED = 5
"""Prompts that a warning names."""


def named(prompts: Sequence[str]) -> str:
    """Prompts and how often each of them occurs, the first few."""
    counts = Counter(prompts)
    listed = [f"{name!r}" + (f" ({n} times)" if n > 1 else "") for name, n in list(counts.items())[:NAMED]]
    return ", ".join(listed) + (f" and {len(counts) - NAMED} more prompts" if len(counts) > NAMED else "")


def all_prompts(batches: Sequence[Prompts]) -> Prompts:
    """The prompts of an evaluation's batches on this process, in order."""
    return Prompts(group=torch.cat([batch.group.cpu() for batch in batches]), info=[row for batch in batches for row in batch.info])


def summaries(rewards: Mapping[str, Tensor], prompts: Prompts, *, highest: Mapping[str, float]) -> Iterator[tuple[str, dict[str, float]]]:
    """Metrics `val/{score}` of each score over all processes, then those of each `data_source` in the data. Collective.

    rewards: Float "B" by name, NaN where there is no score. Prompts with a group below 0 fill up the last batch and do not count.
    highest: The highest value of scores that have one: they also get `_perfect`, the share of samples that reach it.
    """
    real = prompts.group >= 0
    here = [(str(row["data_source"]), i) for i, row in enumerate(prompts.info) if real[i] and row.get("data_source") is not None]
    sources = sorted({source for rank in gather_objects([source for source, _ in here]) for source in rank})
    for name, values in rewards.items():
        yield f"val/{name}", _summary(f"val/{name}", values[real].double(), highest.get(name))
        for source in sources:
            rows = torch.tensor([i for s, i in here if s == source], dtype=torch.long)
            yield f"val/{name}/{source}", _summary(f"val/{name}/{source}", values[rows].double(), highest.get(name))


def _summary(name: str, values: Tensor, highest: float | None) -> dict[str, float]:
    """The mean over all processes and, with a highest value, the share of samples that reach it."""
    everywhere = torch.cat(gather_objects(values))
    known = everywhere[~everywhere.isnan()]
    full = {} if highest is None else {f"{name}_perfect": float((known >= highest - 1e-6).double().mean())}
    return {name: float(known.mean())} | full


def count_not_finite(
    finite: Tensor, rewards: Mapping[str, Tensor], info: Sequence[Info], *, reward_queue: RewardQueue | None, where: str, what: str
) -> int:
    """Count the samples here that are not finite over all processes, and name their prompts in a warning. Collective.

    finite: Bool "B". where, what: for the message. Raises RewardError on all processes if they and those without a score are more than
    the run can do without.
    """
    lost, weights = ~finite.cpu(), reward_queue.weights if reward_queue is not None else {}
    counts = counting(info, weights)
    missing = [~values.isfinite().cpu() & counts[name] for name, values in rewards.items() if name in counts]
    failed = torch.stack([lost, *missing]).any(0)
    prompts = [str(info[i]["prompt"]) for i in lost.nonzero()[:, 0].tolist()]
    everyone = gather_objects((prompts, int(failed.sum()), len(finite)))
    names, total = [name for rank, _, _ in everyone for name in rank], sum(size for _, _, size in everyone)
    if not names:
        return 0
    sentence = f"{where}: {len(names)} of {total} samples are not finite ({what}): {named(names)}"
    allowed = total - 1 if reward_queue is None else reward_queue.max_failed_fraction * total
    if sum(lacking for _, lacking, _ in everyone) > allowed:
        raise RewardError(
            f"{sentence}. They have no score, and more samples have none than "
            + (f"max_failed_fraction={reward_queue.max_failed_fraction} allows" if reward_queue else "can be left out")
            + ". Look at the precision first: a VAE or text encoder may overflow in float16 (model.policy.vae_dtype, dtype, "
            "trainer.precision); continue with --ckpt_path last"
        )
    rank_zero_warn(f"{sentence}. They have no score and no part in the loss")
    return len(names)
