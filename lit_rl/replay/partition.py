"""Cutting sequences of different lengths into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balanced_parts(lengths: Sequence[int], *, parts: int) -> list[list[int]]:
    """Indices in exactly `parts` groups, none empty: neighbours in order of length, cut so that the costliest is as cheap as possible.

    A group costs its number of sequences times its longest one: what it takes when padded. Groups come with the longest first, so that
    memory that does not suffice shows at once. Raises ValueError for fewer sequences than parts.
    """
    if not 1 <= parts <= len(lengths):
        raise ValueError(f"{len(lengths)} sequences cannot be cut into {parts} parts")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    low, high = 1, len(lengths) * max(max(lengths), 1)
    while low < high:  # the smallest budget that `parts` groups keep
        middle = (low + high) // 2
        if len(_cut(order, lengths, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    groups = _cut(order, lengths, low)
    while len(groups) < parts:  # halve the most numerous until there are enough
        most = max(range(len(groups)), key=lambda g: len(groups[g]))
        half = (len(groups[most]) + 1) // 2
        groups[most : most + 1] = [groups[most][:half], groups[most][half:]]
    return groups


def places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a minibatch names, and Bool "N": those that keep their weight. A row r < 0 is row ~r without its weight."""
    return torch.where(rows < 0, ~rows, rows), rows >= 0


def fair_owners(owners: Sequence[int], *, parts: int, world: int) -> list[int]:
    """Who of `world` is to have each thing, so that all have as many of each part as any other, thing i being of part i % parts.

    As few things change hands as that takes. Every part must divide among all. Raises ValueError where it does not.
    """
    result = list(owners)
    for part in range(parts):
        members = range(part, len(owners), parts)
        if len(members) % world:
            raise ValueError(f"{len(members)} things do not divide among {world}")
        room = [len(members) // world] * world
        surplus = []
        for i in members:
            if room[owners[i]]:
                room[owners[i]] -= 1
            else:
                surplus.append(i)
        places = [rank for rank in range(world) for _ in range(room[rank])]
        for i, rank in zip(surplus, places, strict=True):
            result[i] = rank
    return result


def _cut(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """As few groups of neighbours as keep each within the budget; a sequence longer than it stands alone."""
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * max(lengths[groups[-1][0]], 1) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
