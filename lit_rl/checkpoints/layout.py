"""Compares the weights and adapters in a checkpoint with those of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rl.errors import ConfigError, listed


class Shardable(Protocol):
    """A model whose networks are cut into shards, block by block."""

    def networks(self) -> Sequence[nn.Module]: ...
    def blocks(self, network: nn.Module) -> Sequence[nn.Module]: ...


class Weights(Protocol):
    """A module with weights, as `torch.nn.Module` is one."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Checkpointed(Weights, Protocol):
    """A method whose runs are checkpointed and continued."""

    def configured_optimizer(self) -> Optimizer:
        """A new optimizer as this run has it."""

    def models(self) -> Sequence[Shardable]:
        """Everything with trained weights."""


@runtime_checkable
class KeepsSome(Protocol):
    """A part of a module of whose weights a checkpoint holds some."""

    def checkpoint_keys(self) -> set[str]: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...


class Geometry(TypedDict):
    """A LoRA adapter: its rank and alpha, and by layer [rank, alpha / rank]."""

    rank: float
    alpha: float
    layers: Mapping[str, Sequence[float]]
    use_rslora: NotRequired[bool]


def checkpointed(module: object) -> Checkpointed:
    """`module` as a method. Raises ConfigError for any other."""
    if not isinstance(module, Checkpointed):
        raise ConfigError(f"model: {type(module).__name__} does not say what its checkpoints hold; use a method of lit_rl.methods")
    return module


def checkpoint_keys(module: Weights) -> set[str]:
    """Names in `state_dict()` of the weights that a checkpoint holds: all but what a policy reads again from its pretrained folder."""
    parts = [(name, part) for name, part in module.named_children() if isinstance(part, KeepsSome)]
    left_out = {f"{name}.{key}" for name, part in parts for key in part.state_dict().keys() - part.checkpoint_keys()}
    return module.state_dict().keys() - left_out


def checkpoint_shapes(module: Weights) -> dict[str, list[int]]:
    """Shape by name of those weights, whole."""
    keys = checkpoint_keys(module)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors if name in keys}


def adapters_of(module: Weights) -> dict[str, Geometry]:
    """Layers and strengths of the trained adapters by model, see `check_adapters`."""
    found = {name: getattr(part, "adapter", None) for name, part in module.named_children()}
    return {name: adapter for name, adapter in found.items() if adapter}


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


def check_adapters(stored: Mapping[str, Geometry], wanted: Mapping[str, Geometry]) -> None:
    """The adapters of a checkpoint have the layers, ranks and strengths of this run's: weights alone do not tell their strength.

    Arguments: `lit_rl.policies.weights.adapters.geometry` by model ("policy", "critic"). Raises ConfigError that names option, both values
    and the remedy. A model that the checkpoint does not tell about is passed over: it is from before this was stored.
    """
    for model in stored.keys() & wanted.keys():
        _check_adapter(stored[model], wanted[model], f"model.init_args.{model}.init_args.lora")


def _check_adapter(there: Geometry, here: Geometry, option: str) -> None:
    if there["layers"].keys() != here["layers"].keys():
        odd = sorted(there["layers"].keys() ^ here["layers"].keys())
        raise ConfigError(
            f"{option}.targets: the checkpoint's adapter sits on {len(there['layers'])} layers and this run's on {len(here['layers'])}, "
            f"e.g. {odd[0]} in one of them only; continue with the {option}.targets it was trained with"
        )
    settings: tuple[Literal["rank", "alpha"], ...] = ("rank", "alpha")
    for at, name in enumerate(settings):
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
