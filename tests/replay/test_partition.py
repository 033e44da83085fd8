"""Micro-batches of sequences."""

import random
from itertools import combinations, pairwise

import pytest

from lit_rl.replay.partition import balanced_parts


def cost(lengths: list[int], groups: list[list[int]]) -> int:
    return max(len(g) * max(max(lengths[i] for i in g), 1) for g in groups)


def best(lengths: list[int], parts: int) -> int:
    """By trying every place to cut the sorted lengths."""
    falling = sorted(lengths, reverse=True)
    n = len(falling)
    cuts = ([0, *c, n] for c in combinations(range(1, n), parts - 1))
    return min(max((b - a) * max(falling[a], 1) for a, b in pairwise(c)) for c in cuts)


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_once_and_no_cut_is_cheaper(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 7, 64, 512, draw.randrange(1, 600)]) for _ in range(draw.randrange(4, 11))]
    parts = draw.randrange(1, 5)
    groups = balanced_parts(lengths, parts=parts)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert len(groups) == parts and all(groups)
    assert cost(lengths, groups) == best(lengths, parts)


def test_one_long_sequence_stands_alone() -> None:
    """100 | 10 x 5: two parts cost 100 and 50, where 3 + 3 would cost 300."""
    assert balanced_parts([10, 10, 100, 10, 10, 10], parts=2) == [[2], [0, 1, 3, 4, 5]]


def test_more_parts_than_sequences_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 sequences cannot be cut into 3 parts"):
        balanced_parts([4, 4], parts=3)
