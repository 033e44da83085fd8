"""Packing sequences of different lengths into rows, and laying rows out so that their segments do not see each other.

A plan is a list of rows, each a list of pieces (sequence, start, end): it knows lengths only, and is applied to ids and labels alike.
"""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_rl.losses.supervised import IGNORE

Strategy = Literal["bfd", "bfd_split", "wrapped"]
"""Best fit decreasing, with longer sequences cut off or cut into pieces; or everything end to end, cut every `length` tokens."""

T = TypeVar("T")


class Piece(NamedTuple):
    """Tokens start ... end of a sequence."""

    sequence: int
    start: int
    end: int


Plan = list[list[Piece]]


def pack(lengths: Sequence[int], *, length: int, strategy: Strategy = "bfd") -> Plan:
    """Rows of at most `length` tokens.

    bfd puts the longest sequence that is left into the row with the least room for it, else into a new one; none is cut except those longer
    than a row: cut off (bfd) or continued as pieces of their own (bfd_split). `wrapped` fills every row but cuts sequences anywhere.
    Empty sequences are left out.
    """
    if length < 1:
        raise ValueError(f"packing into rows of {length} tokens: set the row length to at least 1, usually the longest sequence allowed")
    if strategy == "wrapped":
        return _wrapped(lengths, length)
    pieces = []
    for sequence, size in enumerate(lengths):
        cuts = range(0, size if strategy == "bfd_split" else min(size, 1), length)
        pieces += [Piece(sequence, start, min(start + length, size)) for start in cuts]
    pieces.sort(key=lambda piece: piece.start - piece.end)  # stable: equal lengths in the order they came
    return _best_fit(pieces, length)


def take(plan: Plan, sequences: Sequence[Sequence[T]]) -> list[list[T]]:
    """The rows of the plan, of ids, labels or whatever goes along with them."""
    return [[item for piece in row for item in sequences[piece.sequence][piece.start : piece.end]] for row in plan]


def row_lengths(plan: Plan) -> list[list[int]]:
    """Lengths of the pieces of each row: what `packed_layout` needs to keep them apart."""
    return [[piece.end - piece.start for piece in row] for row in plan]


class PackedRow(NamedTuple):
    """Segments end to end, in one row. No attention mask: with one, even all ones, segments attend to each other (transformers 5.23)."""

    ids: Int[Tensor, "1 N"]
    labels: Int[Tensor, "1 N"]  # -100 on the first token of every segment: nothing before it is its own
    positions: Int[Tensor, "1 N"]  # start again with every segment
    segment: Int[Tensor, "1 N"]
    bounds: Int[Tensor, "K"]  # 0 and the end of every segment (cu_seqlens of varlen attention)
    longest: int


def packed_layout(ids: Sequence[int], labels: Sequence[int], segments: Sequence[int]) -> PackedRow:
    """One row without padding from its tokens and the lengths of its segments."""
    if sum(segments) != len(ids):
        raise ValueError(f"segments of {sum(segments)} tokens in all cannot be those of a row of {len(ids)}")
    sizes = torch.tensor(segments, dtype=torch.long)
    bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    segment = torch.arange(len(sizes)).repeat_interleave(sizes)
    positions = torch.arange(len(ids)) - bounds[segment]
    kept = torch.where(positions == 0, IGNORE, torch.tensor(labels, dtype=torch.long))
    return PackedRow(
        torch.tensor(ids, dtype=torch.long)[None], kept[None], positions[None], segment[None], bounds, int(sizes.max()) if len(sizes) else 0
    )


def padded_layout(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], *, pad: int
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """ids, labels and attention mask, padded on the right. The mask comes from the lengths: `pad` may be a token that is also used."""
    longest = max((len(row) for row in ids), default=0)
    mask = torch.arange(longest) < torch.tensor([len(row) for row in ids])[:, None]

    def fill(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        out = torch.full(mask.shape, value, dtype=torch.long)
        for k, row in enumerate(rows):
            out[k, : len(row)] = torch.tensor(row, dtype=torch.long)
        return out

    return fill(ids, pad), fill(labels, IGNORE), mask


def _best_fit(pieces: Sequence[Piece], length: int) -> Plan:
    plan: Plan = []
    rows_with: dict[int, deque[int]] = defaultdict(deque)  # room -> rows, in the order in which they came to have it
    rooms: list[int] = []  # sorted; those of which there are rows
    for piece in pieces:
        size = piece.end - piece.start
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(plan), length
            plan.append([])
        else:
            room = rooms[at]
            row = rows_with[room].popleft()
            if not rows_with[room]:
                del rooms[at]
        plan[row].append(piece)
        left = room - size
        if left:
            if not rows_with[left]:
                bisect.insort(rooms, left)
            rows_with[left].append(row)
    return plan


def _wrapped(lengths: Sequence[int], length: int) -> Plan:
    plan: Plan = []
    room = 0
    for sequence, size in enumerate(lengths):
        start = 0
        while start < size:
            if room == 0:
                plan.append([])
                room = length
            end = min(start + room, size)
            plan[-1].append(Piece(sequence, start, end))
            room -= end - start
            start = end
    return plan
