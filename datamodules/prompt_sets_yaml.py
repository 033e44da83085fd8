"""The YAML of prompt sets, read strictly: errors name the file, the line and the key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from datamodules.captions import SUFFIXES
from lit_rl.errors import ConfigError
from lit_rl.evaluation.yaml_lines import Document, read_document

MODES = ("sample_proportional", "weight_only")
KEYS = ("name", "path", "sample_weight", "rewards")


@dataclass(frozen=True)
class PromptSet:
    """One file of prompts. rewards: weights by name of the score."""

    name: str
    path: Path
    rewards: Mapping[str, float]
    sample_weight: float


@dataclass(frozen=True)
class SetsFile:
    """The content of a YAML of prompt sets. reward_places: the place where each reward is named first, `file:line: key`."""

    sampling_mode: str
    sets: tuple[PromptSet, ...]
    reward_places: Mapping[str, str]


def read_sets(file: Path, *, known: Collection[str] | None = None, strict: bool = True) -> SetsFile:
    """Read a YAML of prompt sets. Raises ConfigError with file, line and key for what is wrong with it.

    known: Names of rewards that may be used; None leaves them to the rewards of the run. strict: False passes over entries of `rewards`
    that are no mappings, and sets without rewards, as DeepGen-RL does.
    """
    file = file.expanduser()
    document = read_document(file)
    content = document.content
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list):
        raise ConfigError(f"{document.where('datasets')}: datasets: must be a list of name, path, sample_weight and rewards")
    _check_keys(document, content, ("sampling_mode", "datasets"))
    mode = content.get("sampling_mode", MODES[0])
    if mode not in MODES:
        raise ConfigError(f"{document.where('sampling_mode')}: sampling_mode: {mode!r} must be one of {', '.join(MODES)}")
    places: dict[str, str] = {}
    sets = tuple(_set(document, i, entry, places, known=known, strict=strict) for i, entry in enumerate(content["datasets"]))
    if not sets:
        raise ConfigError(f"{document.where('datasets')}: datasets: is empty; list at least one file of prompts")
    return SetsFile(str(mode), sets, places)


def _set(document: Document, i: int, entry: object, places: dict[str, str], *, known: Collection[str] | None, strict: bool) -> PromptSet:
    key = f"datasets[{i}]"
    if not isinstance(entry, dict):
        raise ConfigError(f"{document.where('datasets', i)}: {key}: must have the keys {', '.join(KEYS)}, found {entry!r}")
    _check_keys(document, entry, KEYS, "datasets", i)
    name, weight = str(entry.get("name", "unnamed")), entry.get("sample_weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        place = document.where("datasets", i, "sample_weight")
        raise ConfigError(f"{place}: {key}.sample_weight: {weight!r} of {name} must be a number above 0")
    path, rewards = _path(document, i, entry), _rewards(document, i, entry.get("rewards", []), known=known, strict=strict)
    for reward, at in rewards.items():
        places.setdefault(reward, at[1])
    return PromptSet(name, path, MappingProxyType({reward: at[0] for reward, at in rewards.items()}), float(weight))


def _rewards(document: Document, i: int, given: object, *, known: Collection[str] | None, strict: bool) -> dict[str, tuple[float, str]]:
    """Weight and place by name of the reward; the last of a name counts."""
    entries = [given] if isinstance(given, dict) else given
    at, key = ("datasets", i, "rewards"), f"datasets[{i}].rewards"
    if not isinstance(entries, list) or (strict and not entries):
        raise ConfigError(f"{document.where(*at)}: {key}: must be a list such as [ocr: 0.7, clip_sim: 0.3], found {given!r}")
    found: dict[str, tuple[float, str]] = {}
    for n, entry in enumerate(entries):
        place, here = document.where(*at, n), f"{key}[{n}]" if isinstance(given, list) else key
        if not isinstance(entry, dict):
            if strict:
                raise ConfigError(f"{place}: {here}: {entry!r} has no weight; write `{entry}: 1.0`")
            continue
        for name, weight in entry.items():
            if known is not None and name not in known:
                raise ConfigError(f"{place}: {here}: unknown reward {name!r}{_near(name, known)}; there are {', '.join(sorted(known))}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"{place}: {here}.{name}: the weight {weight!r} must be a finite number")
            found[str(name)] = float(weight), f"{place}: {here}"
    return found


def _path(document: Document, i: int, entry: Mapping[str, object]) -> Path:
    place, key = document.where("datasets", i, "path"), f"datasets[{i}].path"
    if not isinstance(entry.get("path"), str):
        raise ConfigError(f"{place}: {key}: names no file of prompts; give one of {', '.join(SUFFIXES)}")
    path = document.file.parent / Path(str(entry["path"])).expanduser()
    if not path.is_file():
        raise ConfigError(f"{place}: {key}: {path} does not exist; a relative path starts at the folder of this YAML")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{place}: {key}: {path.name} is not read; prompts come from {', '.join(SUFFIXES)} files")
    return path


def _check_keys(document: Document, found: Mapping[str, object], known: Collection[str], *path: str | int) -> None:
    for name in found:
        if name not in known:
            raise ConfigError(f"{document.where(*path, name)}: unknown key {name!r}{_near(name, known)}; there are {', '.join(known)}")


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
