"""Cutting the (sample, step) pairs of a rollout of denoising paths into minibatches.

Siblings are rows with the same group id, wherever they stand: rows may come in any order, and groups may have different numbers of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.samplers.windows import random_subset
from lit_rl.seeding import Key, generator


def sibling_numbers(group: Tensor) -> list[int]:
    """For each row how many rows before it are of its group: 0, 1, ... among siblings. group: Int "B"."""
    seen: dict[int, int] = {}
    numbers = []
    for g in group.tolist():
        numbers.append(seen.get(g, 0))
        seen[g] = numbers[-1] + 1
    return numbers


def first_siblings(group: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each group in order, Int "U", and for each row the place of its group's among them, Int "B". group: Int "B"."""
    place: dict[int, int] = {}
    members = torch.tensor([place.setdefault(g, len(place)) for g in group.tolist()], dtype=torch.long)
    leaders = torch.tensor([i for i, n in enumerate(sibling_numbers(group)) if n == 0], dtype=torch.long)
    return leaders, members


def random_pairs(mask: Tensor, *, fraction: float, keys: Sequence[tuple[Key, ...]]) -> Tensor:
    """Bool "B S": in each row its own max(1, int(S fraction)) of S steps. keys: Of each row's generator."""
    count, chosen = max(1, int(mask.shape[1] * fraction)), torch.zeros(mask.shape, dtype=torch.bool)
    for row, key in zip(chosen, keys, strict=True):
        row[random_subset(range(len(row)), count=count, generator=generator(*key))] = True
    return chosen.to(mask.device)


def split_pairs(group: Tensor, used: Tensor, *, key: tuple[Key, ...], updates: int, parts: int) -> list[Tensor]:
    """Minibatches of one pass: each of `updates` optimizer steps gets a share of the pairs of every group, in `parts` micro-batches.

    A group's pairs are shared out by a permutation of its own, so an optimizer step sees the same pairs whatever the number of processes
    and the size of micro-batches, and every prompt weighs alike in it. Pairs that are not used are left out. Minibatches hold flat indices
    b * S + s; an index r < 0 is pair ~r without its weight, for forwards that other processes wait for where this one has nothing to train.

    group: Int "B". used: Bool "B S". key: The permutation of group g is drawn from (*key, g).
    """
    flat, steps = used.flatten(), used.shape[1]
    shares: list[list[Tensor]] = [[] for _ in range(updates)]
    for g in group.unique().tolist():  # ascending
        pairs = ((group == g).nonzero() * steps + torch.arange(steps)).flatten()
        pairs = pairs[torch.randperm(len(pairs), generator=generator(*key, g))]
        turn = g * (len(pairs) % updates)  # what is over goes where the last group's ended, so that steps have equally many
        for i, part in enumerate(pairs.tensor_split(updates)):
            shares[(i + turn) % updates].append(part)
    return _minibatches([torch.cat(share) for share in shares], flat, parts=parts)


def split_steps(used: Tensor, *, updates: int, parts: int) -> list[Tensor]:
    """Minibatches of one pass with an optimizer step for each of the S denoising steps in order, as `split_pairs` has them.

    used: Bool "B S". updates: Optimizer steps, at least S; what is over has no pairs.
    """
    rows, steps = used.shape
    shares = [torch.arange(rows) * steps + step if step < steps else torch.empty(0, dtype=torch.long) for step in range(updates)]
    return _minibatches(shares, used.flatten(), parts=parts)


def _minibatches(shares: Sequence[Tensor], used: Tensor, *, parts: int) -> list[Tensor]:
    """The used pairs of each optimizer step in `parts` micro-batches, each of at least one pair. shares: Pairs of each step."""
    filler = ~(used.nonzero()[:1, 0] if used.any() else torch.zeros(1, dtype=torch.long))
    minibatches: list[Tensor] = []
    for pairs in shares:
        kept = pairs[used[pairs]]
        minibatches += torch.cat([kept, filler.expand(max(0, parts - len(kept)))]).tensor_split(parts)
    return minibatches


def micro_batches_within(pairs: int, *, size: int, present: int, updates: int) -> int:
    """Micro-batches of at most `size` pairs that an optimizer step of so many pairs needs, or more where the trainer asks for more.

    present: `trainer.accumulate_grad_batches`, 1 where it says nothing. updates: Optimizer steps of an iteration, for the message. Raises
    ConfigError where the trainer asks for some, but for too few.
    """
    needed = -(-pairs // size)
    if 1 < present < needed:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={present} micro-batches of model.train_micro_batch={size} hold {present * size} of the "
            f"{pairs} (sample, step) pairs that each of the {updates} optimizer steps of an iteration has on a process: leave out "
            f"trainer.accumulate_grad_batches, which becomes {needed}; if more optimizer steps are meant, set model.updates_per_iteration"
        )
    return max(present, needed)


def check_updates(pairs: int, *, updates: int, passes: int) -> None:
    """Raise ConfigError where a pass over a rollout has fewer pairs than optimizer steps."""
    if pairs < updates:
        raise ConfigError(
            f"model.updates_per_iteration={updates * passes} asks for {updates} optimizer steps of a pass that has "
            f"{pairs} (sample, step) pairs; lower it to at most {pairs * passes}"
        )


def check_micro_batches(pairs: int, *, parts: int) -> None:
    """Raise ConfigError where an optimizer step has fewer pairs on a process than micro-batches."""
    if pairs < parts:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={parts} asks for more micro-batches than an optimizer step has "
            f"(sample, step) pairs on a process ({pairs}); lower it to at most {pairs}"
        )
