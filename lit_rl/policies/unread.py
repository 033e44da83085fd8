"""Networks as their config.json describes them, without weights: for sizes and memory, in seconds whatever their size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

M = TypeVar("M", bound=nn.Module)

_leaves_weights: ContextVar[bool] = ContextVar("leaves_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside it policies build what they would read from the configs in its folder alone.

    Enter it with `torch.device("meta")`, on which tensors have a size and no memory.
    """
    token = _leaves_weights.set(True)
    try:
        yield
    finally:
        _leaves_weights.reset(token)


def leaves_weights() -> bool:
    """True inside `without_weights`."""
    return _leaves_weights.get()


def frozen_of(build: Callable[..., M], config: PreTrainedConfig, *, dtype: torch.dtype | str, **options: object) -> M:
    """A frozen model of transformers in evaluation mode. build: `from_config` of an auto class, or `_from_config` of a model."""
    model = build(config, dtype=dtype, **options).requires_grad_(False).eval()
    if dtype == torch.float16:  # as `from_pretrained` leaves what overflows there, T5's `wo`
        for name in getattr(model, "_keep_in_fp32_modules", None) or ():
            for path, module in model.named_modules():
                if path.rpartition(".")[2] == name:
                    module.float()
    return model


def parts_of(index: Mapping[str, object], where: str, *, dtypes: Mapping[str, torch.dtype], **source: str | None) -> dict[str, object]:
    """The components of a pipeline of diffusers by name: networks without weights, its scheduler, None for whatever else there is."""
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple)}
    return {name: _part(name, entry[0], entry[1], where, dtypes.get(name, dtypes["default"]), source) for name, entry in parts.items()}


def _part(name: str, library: str | None, kind: str | None, where: str, dtype: torch.dtype, source: Mapping[str, str | None]) -> object:
    if library is None or kind is None:
        return None
    found = getattr(import_module(library), kind)
    given: dict[str, object] = {"revision": source.get("revision")}
    try:
        if kind.endswith("Scheduler"):
            return found.from_pretrained(where, subfolder=name, **given)
        if not issubclass(found, nn.Module):
            return None
        if hasattr(found, "config_class"):
            return frozen_of(found._from_config, found.config_class.from_pretrained(where, subfolder=name, **given), dtype=dtype)
        network = found.from_config(found.load_config(where, subfolder=name, **given)).requires_grad_(False).eval()
        return nn.Module.to(network, dtype)  # diffusers' own warns
    except OSError as error:
        raise ConfigError(f"pretrained: {where!r} has no readable {name}/config.json: {error}") from error
