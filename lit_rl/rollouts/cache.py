"""Keys and values of answers under way, with those of a prompt once for all its siblings, and attention over both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Columns that are made ready at once."""


@dataclass(frozen=True)
class Siblings:
    """Rows of answers by the place of their prompt. All siblings' queries are one matrix to their prompt's keys.

    lengths: tokens of the prompt at each of n places. width: the most siblings of a place. rows: Int "n width", the rows at each place,
    filled up with row 0; place, number: Int "rows", where each row stands in it. All three None where rows lie in that order as they are.
    hidden: Bool "n P", True beyond the end of a prompt; None where all are of the same length.
    """

    lengths: Sequence[int]
    width: int
    rows: Tensor | None
    place: Tensor | None
    number: Tensor | None
    hidden: Tensor | None

    @classmethod
    def of(cls, places: Sequence[int], lengths: Sequence[int], device: torch.device) -> Siblings:
        """places: of each row, every one of `range(len(lengths))` at least once."""
        members: list[list[int]] = [[] for _ in lengths]
        number = []
        for row, place in enumerate(places):
            number.append(len(members[place]))
            members[place].append(row)
        width = max(map(len, members))
        hidden = None
        if min(lengths) != max(lengths):
            hidden = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
            hidden = hidden.to(device)
        if [row for rows in members for row in rows] == list(range(len(lengths) * width)):
            return cls(lengths, width, None, None, None, hidden)
        filled = torch.tensor([rows + [0] * (width - len(rows)) for rows in members])
        return cls(lengths, width, filled.to(device), torch.tensor(places).to(device), torch.tensor(number).to(device), hidden)

    def by_prompt(self, x: Tensor) -> Tensor:
        """Float "rows heads G N" of each answer -> Float "n*heads width*G N" of each prompt."""
        _, heads, queries, size = x.shape
        grouped = x.view(-1, self.width, heads, queries, size) if self.rows is None else x[self.rows]
        return grouped.transpose(1, 2).reshape(-1, self.width * queries, size)

    def by_row(self, x: Tensor, heads: int) -> Tensor:
        """The way back: Float "n*heads width*G N" -> Float "rows heads G N"."""
        grouped = x.view(len(self.lengths), heads, self.width, -1, x.shape[-1])
        if self.place is None:
            return grouped.transpose(1, 2).flatten(0, 1)
        return grouped[self.place, :, self.number]


class Cache:
    """Keys and values, all memory taken at once: nothing is copied when an answer grows. On a CPU a page is there when it is written.

    own: Float "layers 2 rows heads columns D", the tokens of each row from column 0 on: of its answer, where prompts are shared, else of
    prompt and answer. prompts: Float "layers 2 places heads P D". What attention may see is 0 where nothing was written: what is
    hidden is multiplied by 0, and 0 * NaN is NaN.
    """

    def __init__(self, *, layers: int, rows: int, columns: int, places: int, prompt: int, heads: int, size: int, like: Tensor) -> None:
        self.own = like.new_empty(layers, 2, rows, heads, columns, size)
        self.prompts = like.new_empty(layers, 2, places, heads, prompt, size)
        self.shared = places > 0
        self.columns = 0  # that may be looked at

    def reserve(self, columns: int) -> None:
        """Make so many columns of each row ready."""
        if columns > self.columns:
            ready = min(-(-columns // BLOCK) * BLOCK, self.own.shape[4])
            self.own[:, :, :, :, self.columns : ready] = 0
            self.columns = ready

    def put(self, layer: int, at: Tensor, pair: Tensor) -> None:
        """Keys and values Float "2 n heads T D" of the first tokens of n prompts, to places or, where prompts are not shared, to rows."""
        width = pair.shape[3]
        if self.shared:
            self.prompts[layer, :, at, :, width:] = 0
        else:
            self.reserve(width)
        (self.prompts if self.shared else self.own)[layer, :, at, :, :width] = pair

    def move(self, source: int, target: int, length: int) -> None:
        """A row to another."""
        self.own[:, :, target, :, :length] = self.own[:, :, source, :, :length]

    def move_prompt(self, source: int, target: int) -> None:
        self.prompts[:, :, target] = self.prompts[:, :, source]


@dataclass(frozen=True)
class Seen:
    """The parts of a cache that the rows of one step look at, by layer.

    own: Float "2 rows heads C D". prompts: Float "2 n*heads P D". siblings: None where each row has its prompt itself. hidden: Bool
    "rows C", True in columns that a row has not written; None where all have written all. outside: minus infinity there.
    """

    own: Sequence[Tensor]
    prompts: Sequence[Tensor]
    siblings: Siblings | None
    hidden: Tensor | None
    outside: Tensor | None

    @classmethod
    def of(cls, cache: Cache, siblings: Siblings | None, rows: int, columns: int, hidden: Tensor | None) -> Seen:
        own = cache.own[:, :, :rows, :, :columns].unbind()
        if siblings is not None:
            prompts = cache.prompts[:, :, : len(siblings.lengths), :, : max(siblings.lengths)].flatten(2, 3).unbind()
            return cls(own, prompts, siblings, hidden, None)
        outside = None
        if hidden is not None:
            outside = own[0].new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
        return cls(own, (), None, hidden, outside)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """softmax(q K') V, Float "rows heads G D" of the same. `query` is scaled."""
        if self.siblings is None:
            keys, values = self.own[layer].unbind()
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.outside, scale=1.0)
        return self._attend_shared(self.siblings, self.own[layer].flatten(1, 2), self.prompts[layer], query)

    def _attend_shared(self, siblings: Siblings, own: Tensor, prompts: Tensor, query: Tensor) -> Tensor:
        """softmax([q K_prompt', q K_own']) [V_prompt; V_own], own: Float "2 rows*heads C D".

        Probabilities are float32 at least, as in fused kernels; the two products are rounded to the precision of `query` as one.
        """
        rows, heads, queries, _ = query.shape
        to_prompt = product(siblings.by_prompt(query), prompts[0].transpose(1, 2))
        if siblings.hidden is not None:
            to_prompt.view(len(siblings.hidden), -1, to_prompt.shape[-1]).masked_fill_(siblings.hidden[:, None], -torch.inf)
        to_own = product(query.flatten(0, 1), own[0].transpose(1, 2)).view(rows, heads, queries, -1)
        if self.hidden is not None:
            to_own.view(rows, heads * queries, -1).masked_fill_(self.hidden[:, None], -torch.inf)
        shares = torch.cat([siblings.by_row(to_prompt, heads), to_own], -1).softmax(-1).to(query.dtype)
        split = to_prompt.shape[-1]
        mixed = product(shares[..., split:].flatten(0, 1), own[1]).view(rows, heads, queries, -1)
        from_prompt = product(siblings.by_prompt(shares[..., :split]), prompts[1])
        return (mixed + siblings.by_row(from_prompt, heads)).to(query.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches of matrices; Float32 of those in 16 bits."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.bmm(a.float(), b.float())
