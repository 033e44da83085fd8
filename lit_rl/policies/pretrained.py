"""Facts about a pipeline in a folder or hub repository, without reading any weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lit_rl.errors import ConfigError


class Pipeline(Protocol):
    """A diffusers pipeline: its components are attributes, and which there are depends on the family."""

    @property
    def components(self) -> dict[str, object]: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...


def without_bars() -> None:
    """Have transformers and diffusers load without a progress bar for each part of a model."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if "diffusers" in sys.modules:
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()


def given_or_set(value: str | None, *, option: str, variable: str) -> str:
    """An option's value, or that of its environment variable. Raises ConfigError where neither is there."""
    found = value or os.environ.get(variable)
    if not found:
        raise ConfigError(f"{option}: give it, or set the environment variable {variable}")
    return found


def check_pretrained(pretrained: str, *, pipeline: str, policies: dict[str, str]) -> Path | None:
    """The pipeline's folder, or None for a hub id (owner/name, found to exist or not when it is loaded).

    pipeline: the class that `model_index.json` must name; policies: which of our classes serves which pipeline, for the message.
    Raises ValueError when there is no such folder, or it holds something else.
    """
    folder = Path(pretrained).expanduser()
    if not folder.exists():
        if _is_hub_id(pretrained):
            return None
        raise ConfigError(f"pretrained: no such folder {pretrained!r}; give a folder in diffusers format or a hub id like 'owner/name'")
    index = folder / "model_index.json"
    if not index.is_file():
        found = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing" if folder.is_dir() else "a file"
        raise ConfigError(f"pretrained: {pretrained!r} is not a diffusers pipeline: no model_index.json there, found {found}")
    check_index(json.loads(index.read_text()), pretrained, pipeline=pipeline, policies=policies)
    return folder


def check_components(pretrained: str, names: Sequence[str]) -> Path | None:
    """The folder of a pipeline of any class, or None for a hub id. Raises ConfigError where one of its components is missing."""
    folder = Path(pretrained).expanduser()
    if not folder.exists() and _is_hub_id(pretrained):
        return None
    if missing := [name for name in names if not any((folder / name).glob("*.json"))]:
        raise ConfigError(f"pretrained: {pretrained!r} has no {', '.join(missing)}; give a folder in diffusers format or a hub id")
    return folder


def check_index(index: dict[str, object], pretrained: str, *, pipeline: str, policies: Mapping[str, str]) -> None:
    """Raises ValueError when `model_index.json` is of another pipeline class than `pipeline`."""
    stored = str(index.get("_class_name"))
    if stored != pipeline:
        hint = f"; {policies[stored]} serves that" if stored in policies else ""
        raise ConfigError(f"pretrained: {pretrained!r} holds a {stored}, not a {pipeline}{hint}")


def component_config(folder: Path, name: str) -> dict[str, object]:
    """config.json of one component of a local pipeline."""
    return json.loads((folder / name / "config.json").read_text())


def whole_numbers(config: Mapping[str, object]) -> dict[str, int]:
    """The fields of a component's config.json that are whole numbers: sizes and counts."""
    return {key: value for key, value in config.items() if isinstance(value, int)}


def vae_factor(config: Mapping[str, object]) -> int:
    """Pixels per latent cell, as diffusers' pipelines count it: 2^(levels - 1)."""
    levels = config["block_out_channels"]
    if not isinstance(levels, list | tuple):
        raise ConfigError(f"pretrained: block_out_channels={levels!r} of the VAE's config.json must be a list, one entry for each level")
    return 2 ** (len(levels) - 1)


def check_resolution(resolution: int | tuple[int, int], *, cell: int | None) -> tuple[int, int]:
    """(height, width) in pixels, both positive multiples of `cell` pixels (None: not known yet)."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if min(height, width) < 1 or (cell and (height % cell or width % cell)):
        step = cell or 1
        near = tuple(max(step, round(side / step) * step) for side in (height, width))
        raise ConfigError(
            f"resolution: {height} x {width} (height x width) must be multiples of {step} for this model; {near[0]} x {near[1]} fits"
        )
    return height, width


def _is_hub_id(name: str) -> bool:
    """owner/name, where `owner` is not a folder here: anything else that does not exist was meant as a path."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and "\\" not in name and not Path(parts[0]).exists()
