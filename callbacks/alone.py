"""Callbacks of which a run can have one."""

from __future__ import annotations

import lightning as L

from lit_rl.errors import ConfigError


def check_alone(trainer: L.Trainer, kind: type[L.Callback], remedy: str) -> None:
    """Raise ConfigError where trainer.callbacks, if it has them, has several of `kind`, its subclasses included.

    In `setup`: no model is loaded yet.
    """
    found = [type(callback).__name__ for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, kind)]
    if len(found) > 1:
        raise ConfigError(f"trainer.callbacks has {' and '.join(found)}, of which a run can have one: {remedy}")
