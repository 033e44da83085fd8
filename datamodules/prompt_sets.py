"""Several prompt files that one YAML lists, each with the rewards that count for its prompts and how often it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import overload

import torch
from torch import Tensor

from datamodules.base import PromptDataModule
from datamodules.captions import Captions
from datamodules.prompt_sets_yaml import PromptSet, SetsFile, read_sets
from lit_rl.credit.row_weights import KEY
from lit_rl.errors import ConfigError
from lit_rl.seeding import generator
from lit_rl.types import Info


class SetRows(Sequence[Info]):
    """The prompts of all sets, one set behind the other, with `reward_weights` and the name of their set as `data_source`."""

    def __init__(self, sets: Sequence[PromptSet]) -> None:
        self.sets, self.files = sets, [Captions(own.path) for own in sets]
        self.ends = list(accumulate(map(len, self.files)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, i: int) -> Info: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Info]: ...
    def __getitem__(self, i: int | slice) -> Info | Sequence[Info]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        at, row = self._find(range(len(self))[i])
        return self._told(at, self.files[at][row])

    def __iter__(self) -> Iterator[Info]:
        return (self._told(at, row) for at, rows in enumerate(self.files) for row in rows)

    def where(self, i: int) -> str:
        """File and line, or row, of prompt `i`."""
        at, row = self._find(i)
        return self.files[at].where(row)

    def weights(self, mode: str) -> Tensor:
        """Float64 "N": how often each prompt is drawn, beside the others. mode: see `PromptSets`."""
        shares = [own.sample_weight / (len(rows) if mode == "weight_only" else 1) for own, rows in zip(self.sets, self.files, strict=True)]
        return torch.cat([torch.full((len(rows),), share, dtype=torch.float64) for share, rows in zip(shares, self.files, strict=True)])

    def _find(self, i: int) -> tuple[int, int]:
        at = next(n for n, end in enumerate(self.ends) if i < end)
        return at, i - (self.ends[at - 1] if at else 0)

    def _told(self, at: int, row: Info) -> Info:
        own = self.sets[at]
        return MappingProxyType({**row, KEY: own.rewards, "data_source": own.name})


class PromptSets(PromptDataModule):
    """Prompts of the files that a YAML lists. The rewards of a file are asked about its prompts alone, and count as it says.

    The YAML has `datasets`, a list of `name`, `path` (.txt, .jsonl or .parquet; relative to the YAML), `sample_weight` (1) and `rewards`, a
    list such as [{ocr: 0.7}, {clip_sim: 0.3}] of names of scores and their weights; and `sampling_mode`: a prompt is drawn in proportion to
    `sample_weight` (`sample_proportional`, the default), or to `sample_weight` / prompts of its file (`weight_only`: a file then counts
    by its weight, however long it is). Where all prompts are drawn equally often, each comes once before any comes again; otherwise an
    iteration draws with replacement, anew in each iteration.

    Args:
        train: The YAML; default: $DATASET_CONFIG.
        val: Held-out prompts: another such YAML, or one file of prompts.
        predict: Prompts that `predict` renders, likewise; default: the held-out ones.
        eval_batch_size, shuffle, seed: See `PromptDataModule`.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        predict: str | None = None,
        *,
        eval_batch_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if not train:
            raise ConfigError("data.train: no file of prompt sets; name the YAML there, or in $DATASET_CONFIG")
        self.file: SetsFile = read_sets(Path(train))
        rows = SetRows(self.file.sets)
        super().__init__(rows, _held_out(val), _held_out(predict), eval_batch_size=eval_batch_size, shuffle=shuffle, seed=seed)
        self.draw_weights = rows.weights(self.file.sampling_mode)
        self.reward_places = self.file.reward_places

    def prompts(self, iteration: int, count: int) -> list[Info]:
        """The parent's prompts where all weigh the same; otherwise prompts drawn with replacement by (seed, iteration)."""
        if bool((self.draw_weights == self.draw_weights[0]).all()):
            return super().prompts(iteration, count)
        picked = drawn(self.draw_weights, count, draw=generator(self.seed, "prompts", iteration))
        return [self.train_prompts[i] for i in picked]

    def rows_to_score(self, stage: str) -> Iterator[Info]:
        """The parent's rows, each with its file and line as `where`."""
        for rows in (self.train_prompts if stage == "fit" else (), self.held_out):
            told = rows.where if isinstance(rows, SetRows | Captions) else None
            yield from rows if told is None else ({**row, "where": told(i)} for i, row in enumerate(rows))


def drawn(weights: Tensor, count: int, *, draw: torch.Generator) -> list[int]:
    """`count` numbers of rows, with replacement, each in proportion to its weight."""
    return torch.multinomial(weights, count, replacement=True, generator=draw).tolist()


def _held_out(given: str | None) -> Sequence[Info]:
    if given is None:
        return ()
    path = Path(given).expanduser()
    return SetRows(read_sets(path).sets) if path.suffix in (".yaml", ".yml") else Captions(path)
