"""Hooks that methods call of callbacks, beside Lightning's own; `callbacks.base.RLCallback` describes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L


def notify(module: L.LightningModule, hook: str, *args: object) -> None:
    """Call `hook(trainer, module, *args)` of every callback that has it: on_phase_start/end, on_rollout_chunk, on_rollout_end, ..."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        method = getattr(callback, hook, None)
        if method is not None:
            method(module.trainer, module, *args)


@contextmanager
def phase(module: L.LightningModule, name: str) -> Iterator[None]:
    """Tell the callbacks when a phase ("rollout", "score", ...) starts and ends."""
    notify(module, "on_phase_start", name)
    try:
        yield
    finally:
        notify(module, "on_phase_end", name)
