"""DeepGen-RL's SFT-aux configuration (mmengine's Python): the lists of pictures that it names, read without executing it."""

from __future__ import annotations

import difflib
from pathlib import Path

from lit_rl.errors import ConfigError
from lit_rl.own_code.assignments import assigned

Entry = dict[str, object]

KEYS = ("type", "image_size", "data_path", "image_folder", "image_process", "sample_weight", "ceph_folder", "ceph_config")
RESIZES = {"fix_pixels": "area", "dynamic": "longest", "resize2square": "square"}
"""Ways in which pictures are scaled."""


def python_sources(file: Path) -> tuple[list[Entry], str]:
    """Path, folder, weight and size of each list, and how pictures are scaled. Raises ConfigError that names file and key."""
    entries = entries_of(file)
    ways = {str(entry.get("image_process", "fix_pixels")) for entry in entries}
    if odd := sorted(ways - {*RESIZES}):
        raise ConfigError(f"{file}: image_process {odd[0]} cannot be had here; there are {', '.join(RESIZES)}")
    if len(ways) > 1:
        raise ConfigError(f"{file}: image_process differs from source to source: here all pictures of a run are scaled in one way")
    names = {"data_path": "path", "image_folder": "folder", "sample_weight": "weight", "image_size": "size"}
    lists = [{ours: entry[theirs] for theirs, ours in names.items() if entry.get(theirs) is not None} for entry in entries]
    return lists, RESIZES[ways.pop()]


def entries_of(file: Path) -> list[Entry]:
    """The sources of `train_dataloader`. Raises ConfigError for a file that has none, and for keys that nobody knows."""
    loader = assigned(file).get("train_dataloader")
    if not isinstance(loader, dict) or not isinstance(data := loader.get("dataset"), dict):
        raise ConfigError(f"{file}: there is no train_dataloader = dict(dataset=...): it is no SFT-aux configuration")
    entries = [entry for entry in data.get("datasets", [data]) if isinstance(entry, dict)]
    for i, entry in enumerate(entries):
        for key in entry:
            if key not in KEYS:
                near = difflib.get_close_matches(str(key), KEYS, n=1)
                meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(KEYS)}"
                raise ConfigError(f"{file}, source {i}: key {key} is unknown; {meant}")
        if "data_path" not in entry:
            raise ConfigError(f"{file}, source {i}: missing required data_path")
    if not entries:
        raise ConfigError(f"{file}: train_dataloader names no sources")
    return entries
