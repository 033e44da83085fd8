"""Samples that a callback shows, for the loggers that take them one by one, as the platform's does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import lightning as L
from torch import Tensor

from callbacks.base import Method
from callbacks.image_writer import to_image
from lit_rl.modules.reporting import logged_step
from lit_rl.trackers.samples import Sample
from lit_rl.types import Prompts, Rollout

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Shown(NamedTuple):
    """A row of a rollout or an evaluation with its prompt, and its answer or its image uint8 "3 H W"."""

    row: int
    prompt: str
    text: str | None = None
    image: Tensor | None = None


def report_rows(
    trainer: L.Trainer, module: Method, source: str, shown: Iterable[Shown], prompts: Prompts, rewards: Mapping[str, Tensor]
) -> None:
    """Tell rows with their group, their rewards "B" by name and, of a rollout, their mean advantage. On the first process."""
    if not _takers(trainer):
        return
    step = logged_step(trainer, module)
    samples = [
        Sample(
            step, prompt, source, text=text, group=int(prompts.group[row]), advantage=advantage(prompts, row),
            rewards={name: float(values[row]) for name, values in rewards.items()}, picture=None if image is None else to_image(image),
        )
        for row, prompt, text, image in shown
    ]  # fmt: skip
    _report(trainer, samples)


def report_films(trainer: L.Trainer, module: Method, films: Sequence[tuple[str, int, float, Picture]]) -> None:
    """Tell film strips of episodes, each with its instruction, its group and its reward. On the first process."""
    step = logged_step(trainer, module)
    _report(
        trainer,
        [Sample(step, told, "episodes", group=group, rewards={"reward": reward}, picture=film) for told, group, reward, film in films],
    )


def advantage(prompts: Prompts, row: int) -> float | None:
    """The mean advantage of a row's actions; None of an evaluation, and of a row without any."""
    if not isinstance(prompts, Rollout) or prompts.advantages is None or not bool(prompts.mask[row].any()):
        return None
    return float(prompts.advantages[row][prompts.mask[row]].mean())


def _takers(trainer: L.Trainer) -> list[object]:
    return [logger for logger in trainer.loggers if hasattr(logger, "log_samples")]


def _report(trainer: L.Trainer, samples: Sequence[Sample]) -> None:
    for logger in _takers(trainer) if samples else ():
        logger.log_samples(samples)  # type: ignore[attr-defined]
