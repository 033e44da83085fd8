"""Pictures with a masked part, the text that should be written there, and the style it should have.

`python -m datamodules.inpainting BENCHMARK_FOLDER OUT.json` writes a benchmark folder as a JSON file.
"""

from __future__ import annotations

import bisect
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.base import PromptDataModule
from datamodules.inpainting_files import read_items, read_rows
from datamodules.inpainting_items import Item
from datamodules.lazy import ImageCache, LazyRow, Reader, unreadable
from datamodules.picture_files import read_mask, read_picture
from lit_rl.errors import ConfigError
from lit_rl.modules.base import LitRL
from lit_rl.replay.sources import ExampleSource
from lit_rl.seeding import generator
from lit_rl.types import ALL, Info, Size

HELD_OUT = ("val", "test")
LONGEST_REFERENCE = 1024
"""Pixels of the longer side to which a larger reference is reduced, or the width of the canvas if that is more."""


class Inpainting(PromptDataModule, ExampleSource):
    """Inpainting items from .json or .jsonl files or a benchmark folder; docs/inpainting.md has the format.

    An item is as many prompts as it has references, one after the other. A prompt has `prompt`, `id`, `text` and `target` (both the wanted
    text; rewards look at `target`), and, read from disk when asked for, `source` uint8 "3 H W", `mask` uint8 "H W" (255 is painted) and
    `reference` uint8 "3 h w".

    Args:
        train: Items to train on, those with split val or test left out; these are the held-out ones unless `val` is given.
        val: Held-out items: those with split val or test; if none has, all but those with split train.
        predict: What `predict` renders, whatever its split; default: the held-out items.
        resolution: Side of the images in pixels, or (height, width), as the policy's; sources, masks and targets are stretched to it.
        template: Prompt of the items that have none; {text} is the wanted text.
        style_dropout: Share of the warm-up examples without style tokens, in [0, 1).
        max_train: Train on only so many prompts, from the start.
        max_val: Evaluate on only so many prompts, from the start.
        eval_batch_size, shuffle, seed: See `PromptDataModule`.

    A `weight` w says how often an item comes in a round: w times on average, the fraction spread evenly over rounds (0.5: in every second
    one). Warm-up examples are drawn in proportion to it.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        predict: str | None = None,
        *,
        resolution: int | tuple[int, int] = 512,
        template: str = "The text is '{text}'.",
        style_dropout: float = 0.05,
        max_train: int | None = None,
        max_val: int | None = None,
        eval_batch_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.size: Size = (resolution, resolution) if isinstance(resolution, int) else (resolution[0], resolution[1])
        if min(self.size) < 1:
            raise ConfigError(f"data.resolution={resolution} must be at least 1 pixel")
        if "{text}" not in template:
            raise ConfigError(f"data.template={template!r} must contain {{text}}, where the wanted text goes")
        if not 0 <= style_dropout < 1:
            raise ConfigError(f"data.style_dropout={style_dropout} must be in [0, 1); 0.05 takes the style from every 20th example")
        self.template, self.style_dropout = template, style_dropout
        self._cache = ImageCache()

        everything = self._read(train)
        to_train = [item for item in everything if item.split not in HELD_OUT]
        to_hold_out = self._read(val) if val else everything
        held_out = [item for item in to_hold_out if item.split in HELD_OUT]
        if val and not held_out:
            held_out = [item for item in to_hold_out if item.split is None]
        if train and not to_train:
            raise ConfigError(f"data.train={train}: all {len(everything)} items have split val or test; nothing is left to train on")
        if val and not held_out:
            raise ConfigError(f"data.val={val}: all items have split train; nothing is left to evaluate")
        samples = [(item, row) for item in to_train for row in self._rows(item)][:max_train]
        evaluation = [row for item in held_out for row in self._rows(item)][:max_val]
        rendered = [row for item in self._read(predict) for row in self._rows(item)]
        super().__init__([row for _, row in samples], evaluation, rendered, eval_batch_size=eval_batch_size, shuffle=shuffle, seed=seed)
        self._weights = np.array([item.weight for item, _ in samples])
        # The golden ratio spreads the rounds in which items of fractional weight come.
        self._phases = (np.arange(len(samples)) * 0.6180339887498949) % 1
        self._imitable = [i for i, (item, _) in enumerate(samples) if item.target is not None]
        self._targets = [
            partial(read_picture, item.target, self.size, None, None, where=f"{item.where}: target")
            for item, _ in samples
            if item.target is not None
        ]

    def _read(self, path: str | None) -> list[Item]:
        return read_items(Path(path), size=self.size) if path else []

    def _rows(self, item: Item) -> list[LazyRow]:
        """A prompt for each reference of the item."""
        longest = max(LONGEST_REFERENCE, self.size[1])
        whole = [partial(read_picture, path, None, None, longest, where=f"{item.where}: reference") for path in item.references]
        references: list[Reader] = whole or [
            partial(read_picture, item.source, None, item.box, longest, where=f"{item.where}: source, of which the reference is a part")
        ]
        images: dict[str, Reader] = {
            "source": partial(read_picture, item.source, self.size, None, None, where=f"{item.where}: source"),
            "mask": partial(read_mask, item.mask, self.size, where=f"{item.where}: mask"),
        }
        prompt = item.prompt or self.template.replace("{text}", item.text)
        values = {"prompt": prompt, "id": item.id, "text": item.text, "target": item.text}
        ids = [item.id] if len(references) == 1 else [f"{item.id}#{k}" for k in range(1, len(references) + 1)]
        return [LazyRow(values | {"id": id_}, images | {"reference": ref}, self._cache) for id_, ref in zip(ids, references)]

    # ------------------------------------------------------------------ before any model is read
    def unreadable(self) -> list[str]:
        """A sentence for every image file whose pixels cannot be decoded. The constructor reads no more than headers and masks."""
        rows = [row for part in (self.train_prompts, self.held_out, self.to_predict) for row in part]
        return unreadable([*self._targets, *(reader for row in rows for reader in row.readers())])  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Compare with the method what it will ask of the data."""
        method = self._trainer().lightning_module
        if stage == "fit" and isinstance(method, LitRL) and method.supervised:
            self._check_targets()
        wanted = getattr(getattr(method, "policy", None), "image_size", None)
        if wanted is not None and tuple(wanted) != self.size:
            raise ConfigError(
                f"data.resolution is {list(self.size)} and model.policy.resolution {list(wanted)} (height, width): set both to the same"
            )

    def _check_targets(self) -> None:
        if not self._imitable:
            raise ConfigError(
                "model.supervised asks for pictures to imitate, and no item of data.train has one: give items a target, or the "
                "source_text of their source where it equals text; or leave model.supervised out"
            )

    # ------------------------------------------------------------------ training prompts
    def prompts(self, iteration: int, count: int) -> list[Info]:
        """Prompts number iteration * count ... of an endless sequence of rounds, in each of which a prompt comes as its weight says."""
        if not self.train_prompts:
            return super().prompts(iteration, count)  # which says what is missing
        first, rows = iteration * count, list[Info]()
        highest = int((first + len(self._weights)) / self._weights.sum()) + 2
        round_ = bisect.bisect_right(range(highest), first, key=lambda r: int(self._before(r).sum())) - 1
        while len(rows) < count:
            order, start = self._order(round_), int(self._before(round_).sum())
            rows += [self.train_prompts[i] for i in order[max(0, first - start) : first + count - start]]
            round_ += 1
        return rows

    def _before(self, round_: int) -> np.ndarray:
        """Times that each prompt has come before a round."""
        return np.floor(round_ * self._weights + self._phases).astype(np.int64)

    def _order(self, round_: int) -> list[int]:
        rows = np.repeat(np.arange(len(self._weights)), self._before(round_ + 1) - self._before(round_))
        if not self.shuffle:
            return rows.tolist()
        return rows[torch.randperm(len(rows), generator=generator(self.seed, "prompts", round_)).numpy()].tolist()

    # ------------------------------------------------------------------ supervised examples
    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Tensor]:
        """The prompts in `part` of `count` ones with a ground truth, and that as uint8 "B 3 H W"; a function of (seed, step).

        `style_dropout` of them have `styled` False. Only pictures in `part` are read.
        """
        self._check_targets()
        draw = generator(self.seed, "examples", step)
        weights = torch.from_numpy(self._weights[self._imitable])
        chosen = torch.multinomial(weights, count, replacement=True, generator=draw).tolist()
        plain = (torch.rand(count, generator=draw) < self.style_dropout).tolist()
        rows = [self.train_prompts[self._imitable[i]] for i in chosen[part]]
        info = [row.but(styled=False) if drop else row for row, drop in zip(rows, plain[part])]
        return info, torch.stack([self._cache.read(self._targets[i]) for i in chosen[part]])


def convert(folder: Path, out: Path) -> int:
    """Write a benchmark folder as a JSON file whose paths count from the folder; returns the number of items."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    read_items(folder, size=(512, 512))  # everything that would be wrong with the file
    rows, _ = read_rows(folder)
    content = {"version": 1, "root": os.path.relpath(folder, out.parent), "items": [row.fields for row in rows]}
    out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(rows)


def main(arguments: Sequence[str]) -> None:
    """Convert a benchmark folder from the command line."""
    if len(arguments) != 2:
        raise SystemExit("usage: python -m datamodules.inpainting BENCHMARK_FOLDER OUT.json")
    try:
        count = convert(Path(arguments[0]), Path(arguments[1]))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{count} items in {arguments[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
