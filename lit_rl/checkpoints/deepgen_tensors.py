"""Reads the trained weights of a run of DeepGen, whatever they were saved as: tensors stay on the disk until they are used (`mmap`).

Names are the file's own where DeepGen's trainer or an export wrote it; those of this project's checkpoints become DeepGen's.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from lit_rl.checkpoints.tensors import open_weights
from lit_rl.errors import ConfigError, listed

Tensors = dict[str, Tensor]

OURS = {
    "network.": "transformer.",
    "conditioner.bridge.queries.weight": "meta_queries",
    "conditioner.bridge.": "",
    "conditioner.language.": "lmm.model.",
}
"""Beginnings of the policy's names, and what DeepGen has in their place."""
REFERENCE = re.compile(r"reference_network\.|conditioner\.frozen\.|\.lora_\w+\.reference\b|\.lora_\w+\.frozen\b")
"""Frozen copies of what is trained."""


def rl_tensors(place: Path) -> Tensors:
    """The tensors of a checkpoint by name. Nothing in it is executed.

    place: A file or folder that `open_weights` reads, this project's checkpoints included; of a file they stay on the disk, DeepSpeed's
    and FSDP2's are put together in memory. Raises ConfigError for anything else, for what is not whole, for NaN, and for weights that
    DeepGen's file has no place for.
    """
    tensors = open_weights(place).numbers()
    if not tensors:
        raise ConfigError(f"{place} holds no weights")
    return _theirs(tensors, place) if any(re.match(r"(_forward_module\.)?policy\.", name) for name in tensors) else tensors


def _theirs(tensors: Tensors, place: Path) -> Tensors:
    """Weights of this project's checkpoint under DeepGen's names, without frozen copies."""
    kept = {re.sub(r"^(_forward_module\.)?(policy\.)?", "", name): tensor for name, tensor in tensors.items() if not REFERENCE.search(name)}
    if adapters := [name for name in kept if name.startswith("network.") and ".lora_" in name]:
        raise ConfigError(
            f"{place} holds adapters of the transformer ({listed(adapters)}), and not what they are added to: convert an export of the run "
            "(callbacks.export.Export), in which they are merged"
        )
    found: Tensors = {}
    for name, tensor in kept.items():
        begins = next((own for own in OURS if name.startswith(own)), None)
        if begins is None:
            raise ConfigError(f"{place} holds {name}, which DeepGen's file has no place for: it would be lost")
        found[OURS[begins] + name.removeprefix(begins)] = tensor
    return found
