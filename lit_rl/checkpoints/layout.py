"""Compares the weights and adapters in a checkpoint with those of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lit_rl.errors import ConfigError, listed


@runtime_checkable
class Checkpointed(Protocol):
    """A module that names the weights its checkpoints hold."""

    def checkpoint_keys(self) -> set[str]:
        """Names in `state_dict()` of the weights that a checkpoint holds."""

    def checkpoint_shapes(self) -> dict[str, list[int]]:
        """Shape by name of those weights, whole."""

    def check_moments(self, stored: Mapping[str, object]) -> None:
        """Raise ConfigError if `checkpoint["optimizer"]` tells of another optimizer than this run's."""

    def networks(self) -> Sequence[nn.Module]:
        """Every network that is trained, each cut into shards as a whole."""


def checkpointed(module: object) -> Checkpointed:
    """`module` as one that names its weights. Raises ConfigError for any other."""
    if not isinstance(module, Checkpointed):
        raise ConfigError(f"model: {type(module).__name__} does not say what its checkpoints hold; use a method of lit_rl.methods")
    return module


def check_layout(stored: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Every wanted weight is stored, in its shape, and no adapter or reference is stored that is not wanted.

    Arguments: shape by name; more may be stored otherwise, e.g. the base weights of a LoRA run. Raises ConfigError that names the first
    weights which are missing, have another shape, or would be dropped.
    """
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {len(missing)} of the {len(wanted)} weights of this run: {listed(missing)}; "
            "continue with the model.init_args.policy it was written with (pretrained, lora, keep_reference)"
        )
    other = [name for name, shape in wanted.items() if list(stored[name]) != list(shape)]
    if other:
        shapes = [f"{name} is {list(stored[name])} there and {list(wanted[name])} here" for name in other]
        raise ConfigError(
            f"{len(other)} of {len(wanted)} weights have another shape in the checkpoint: {listed(shapes)}; "
            "continue with the model.init_args.policy it was written with (pretrained, lora.rank, lora.targets)"
        )
    dropped = [name for name in stored if name not in wanted and re.search(r"\.lora_|\breference_network\.|\.frozen\.", name)]
    if dropped:
        raise ConfigError(
            f"the checkpoint has {len(dropped)} weights of adapters or of a reference that this run would drop: {listed(dropped)}; "
            "continue with the model.init_args.policy it was written with (lora.targets, lora.initial, keep_reference)"
        )


def check_adapters(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """The adapters of a checkpoint have the layers, ranks and strengths of this run's: weights alone do not tell their strength.

    Arguments: `lit_rl.policies.weights.adapters.geometry` by model ("policy", "critic"). Raises ConfigError that names option, both values
    and the remedy. A model that the checkpoint does not tell about is passed over: it is from before this was stored.
    """
    for model in stored.keys() & wanted.keys():
        _check_adapter(stored[model], wanted[model], f"model.init_args.{model}.init_args.lora")


def _check_adapter(there: Mapping[str, Any], here: Mapping[str, Any], option: str) -> None:
    if there["layers"].keys() != here["layers"].keys():
        odd = sorted(there["layers"].keys() ^ here["layers"].keys())
        raise ConfigError(
            f"{option}.targets: the checkpoint's adapter sits on {len(there['layers'])} layers and this run's on {len(here['layers'])}, "
            f"e.g. {odd[0]} in one of them only; continue with the {option}.targets it was trained with"
        )
    for at, name in enumerate(("rank", "alpha")):
        unlike = [layer for layer, values in there["layers"].items() if values[at] != here["layers"][layer][at]]
        if not unlike:
            continue
        what = "rank" if name == "rank" else "strength alpha / rank"
        if there[name] == here[name]:  # they differ by layer, as those of lora.initial may
            first = unlike[0]
            raise ConfigError(
                f"{option}.initial: {len(unlike)} layers have another {what} in the checkpoint, e.g. {first} "
                f"{there['layers'][first][at]:g} there and {here['layers'][first][at]:g} here; continue with the {option}.initial it was "
                "trained with"
            )
        raise ConfigError(
            f"{option}.{name}: the checkpoint's adapter was trained with {there[name]:g} and this run has {here[name]:g}, another "
            f"{what}; set {option}.{name} to {there[name]:g}"
        )
