"""Base of all datamodules: prompts by iteration, evaluation batches, and the method's own training loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lightning as L
import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.modules.base import LitRL
from lit_rl.replay.loader import ReplayLoader
from lit_rl.replay.sources import PromptSource
from lit_rl.seeding import generator
from lit_rl.types import Info, Prompts


class Batches:
    """A sized iterable that Lightning takes as *one* loader (a list would be several) and whose rows it does not redistribute."""

    def __init__(self, batches: Sequence[Prompts]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Prompts]:
        return iter(self.batches)


class PromptDataModule(L.LightningDataModule, PromptSource):
    """Training prompts in seeded order, and held-out prompts in file order.

    Args:
        train_prompts: The prompts of fit, each a read-only mapping with at least `prompt`.
        held_out: Those of validate and test.
        to_predict: Those of predict; default: the held-out ones.
        eval_batch_size: Held-out prompts per batch and process.
        shuffle: Draw training prompts in a new random order each time all have been used; otherwise in file order.
        seed: Of that order. The CLI sets it to `seed_everything`.
    """

    def __init__(
        self,
        train_prompts: Sequence[Info] = (),
        held_out: Sequence[Info] = (),
        to_predict: Sequence[Info] = (),
        *,
        eval_batch_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if eval_batch_size < 1:
            raise ConfigError(f"data.eval_batch_size={eval_batch_size} must be at least 1")
        self.train_prompts, self.held_out, self.to_predict = train_prompts, held_out, to_predict
        self.eval_batch_size = eval_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self._drawn: dict[tuple[int, int, int], Tensor] = {}

    def prompts(self, iteration: int, count: int) -> list[Info]:
        """Prompts number iteration * count ... of an endless sequence of permutations: every prompt once before any comes again."""
        if not self.train_prompts:
            raise ConfigError("No training prompts: set data.train")
        n, wanted = len(self.train_prompts), range(iteration * count, (iteration + 1) * count)
        orders = {round_: self._order(round_) for round_ in {k // n for k in wanted}}
        # Kept for the next call: a million numbers take 40 ms.
        self._drawn = {(n, self.seed, round_): order for round_, order in orders.items() if isinstance(order, Tensor)}
        return [self.train_prompts[int(orders[k // n][k % n])] for k in wanted]

    def _order(self, round_: int) -> Sequence[int] | Tensor:
        n = len(self.train_prompts)
        if not self.shuffle:
            return range(n)
        known = self._drawn.get((n, self.seed, round_))
        return torch.randperm(n, generator=generator(self.seed, "prompts", round_)) if known is None else known

    def rows_to_score(self, stage: str) -> Iterator[Info]:
        """The prompts of a stage whose answers will be scored, for rewards to look at before it starts.

        Those from files that know it say where they stand: `place` is file and line.
        """
        for rows in (self.train_prompts if stage == "fit" else (), self.held_out):
            place = getattr(rows, "place", None)
            yield from rows if place is None else ({**row, "place": place(i)} for i, row in enumerate(rows))

    def train_dataloader(self) -> ReplayLoader:
        """The rollouts of this epoch, which the method collects itself."""
        method = self._trainer().lightning_module
        if not isinstance(method, LitRL):
            raise ConfigError(f"{type(self).__name__} feeds methods of lit_rl.methods, not {type(method).__name__}")
        return method.train_loader()

    def val_dataloader(self) -> Batches | list[Batches]:
        """Batches of the held-out prompts, and behind them those of evaluation sets that a callback has given the method."""
        further = getattr(self._trainer().lightning_module, "further_evaluation", ())
        loaders = [self._batches(rows) for rows in (self.held_out, *further) if rows]
        return loaders if len(loaders) > 1 else loaders[0] if loaders else Batches(())

    def test_dataloader(self) -> Batches:
        """Batches of the held-out prompts."""
        return self._batches(self.held_out)

    def predict_dataloader(self) -> Batches:
        """Batches of the prompts of predict, or of the held-out ones."""
        if not (rows := self.to_predict or self.held_out):
            raise ConfigError("nothing to predict: set data.predict, or data.val, to prompts that are to be answered")
        return self._batches(rows)

    def _batches(self, info: Sequence[Info]) -> Batches:
        """This rank's batches. All ranks get equally many of equal size: the last are filled up with copies whose group is -1."""
        trainer = self._trainer()
        if not info:
            return Batches(())
        size, world = self.eval_batch_size, trainer.world_size
        per_rank = -(-len(info) // (size * world)) * size if world > 1 else len(info)
        ids = list(range(trainer.global_rank * per_rank, (trainer.global_rank + 1) * per_rank))
        rows = [(i if i < len(info) else -1, info[min(i, len(info) - 1)]) for i in ids]
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        return Batches([Prompts(group=torch.tensor([i for i, _ in b]), info=[row for _, row in b]) for b in batches])

    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "the datamodule is used through a Trainer"
        return self.trainer
