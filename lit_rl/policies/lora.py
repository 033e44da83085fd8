"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a transformer of diffusers or transformers, through peft.

The trained adapter is called "default". Others may sit frozen beside it in the same base weights (a reference, an average, an old
policy): they are switched to by name, and never by peft's own calls, which change `requires_grad` on the way.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_rl.errors import ConfigError
from lit_rl.policies.shards import local

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

TRAINED = "default"


@dataclass(kw_only=True)
class LoraSettings:
    """W x + (alpha / rank) B A x on every targeted linear layer.

    targets: ends of module names; None means the family's list, which for language models is that of `all-linear`. init: "default" draws
    A uniformly as a linear layer's weight, "gaussian" with std 1 / rank; B starts at 0 either way. dropout: on the adapter's input,
    in supervised fine-tuning; other methods train without dropout. initial: a LoRA folder as `save` writes it to start from, of the same
    rank, alpha and targets.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: list[str] | Literal["all-linear"] | None = None
    init: Literal["gaussian", "default"] = "gaussian"
    dropout: float = 0.0
    initial: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank: must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha: must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout: must be in [0, 1), got {self.dropout}")
        if self.targets is not None and not self.targets:
            raise ConfigError("lora.targets: the list is empty; name at least one module, or leave it out for the family's list")
        if self.targets not in (None, "all-linear") and isinstance(self.targets, str):
            raise ConfigError(f"lora.targets: {self.targets!r} must be a list of module names, or all-linear")
        if self.initial is not None and not Path(self.initial).expanduser().is_dir():
            raise ConfigError(f"lora.initial: no such folder {self.initial!r}")

    @property
    def named(self) -> list[str] | None:
        """The targets that are named one by one."""
        return None if isinstance(self.targets, str) else self.targets


def add_lora(network: nn.Module, settings: LoraSettings, *, targets: list[str], name: str = TRAINED, seed: int = 0) -> None:
    """Freeze `network` and add a trainable adapter in float32, drawn from `seed` alone. Raises when a target names no module."""
    from peft import LoraConfig

    names = [n for n, module in network.named_modules() if isinstance(module, nn.Linear)]
    missing = [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]
    if missing:
        there = sorted({n.split(".0.", 1)[1] for n in names if ".0." in n})
        raise ConfigError(f"lora.targets: no linear layer ends in {', '.join(missing)}; a block has {', '.join(there)}")
    network.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft computes with it, whole or not
        target_modules=list(targets),
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=name)  # type: ignore[operator]
    _to_float32(network, name)


def add_frozen_copy(network: nn.Module, name: str) -> None:
    """Add adapter `name`, frozen and equal to the trained one, which stays the active one."""
    config = copy.deepcopy(network.peft_config[TRAINED])  # type: ignore[union-attr, index]
    with using_adapter(network, TRAINED), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted
        network.add_adapter(config, adapter_name=name)  # type: ignore[operator]
    for adapter, trained in ((name, False), (TRAINED, True)):
        for parameter in adapter_parameters(network, adapter).values():
            parameter.requires_grad_(trained)
    _to_float32(network, name)
    copy_adapter(network, source=TRAINED, target=name)


def _to_float32(network: nn.Module, name: str) -> None:
    # peft gives a new adapter the precision of its base layer; in bfloat16 an optimizer's small steps would round to nothing.
    for parameter in adapter_parameters(network, name).values():
        parameter.data = parameter.data.float()


@torch.no_grad()
def copy_adapter(network: nn.Module, *, source: str, target: str) -> None:
    """target <- source, in place; local shards when sharded."""
    targets = adapter_parameters(network, target)
    for key, parameter in adapter_parameters(network, source).items():
        local(targets[key]).copy_(local(parameter))


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their name in diffusers' LoRA files ("...to_q.lora_A.weight")."""
    return {key.replace(f".{name}.", "."): p for key, p in network.named_parameters() if f".{name}." in key and ".lora_" in key}


@torch.no_grad()
def load_adapter(network: nn.Module, folder: str, settings: LoraSettings, *, pipeline: type) -> None:
    """Copy the adapter stored in `folder` into the trained one. Raises when it has another rank, alpha or other targets."""
    stored, metadata = pipeline.lora_state_dict(str(Path(folder).expanduser()), return_lora_metadata=True)  # type: ignore[attr-defined]
    weights = {key.removeprefix("transformer."): value for key, value in stored.items()}
    alpha = (metadata or {}).get("transformer.lora_alpha", settings.alpha)
    targets = adapter_parameters(network, TRAINED)
    if weights.keys() != targets.keys() or alpha != settings.alpha or any(weights[key].shape != targets[key].shape for key in targets):
        rank = next(value.shape[0] for key, value in weights.items() if ".lora_A." in key)
        raise ConfigError(
            f"lora.initial: {folder!r} holds {len(weights)} tensors of rank {rank} and alpha {alpha}, the settings ask for {len(targets)} "
            f"of rank {settings.rank} and alpha {settings.alpha}; set lora.rank, lora.alpha and lora.targets to those of the folder"
        )
    for key, parameter in targets.items():
        parameter.copy_(weights[key])


def save_adapter(network: nn.Module, folder: Path, weights: Mapping[str, Tensor], *, pipeline: type) -> None:
    """Write `weights`, named as the trained adapter's parameters in `network`, as stock `pipe.load_lora_weights(folder)` reads them."""
    named = {key.replace(f".{TRAINED}.", "."): tensor for key, tensor in weights.items()}
    expected = adapter_parameters(network, TRAINED).keys()
    if named.keys() != expected:
        raise ConfigError(
            f"save: the adapter has {len(expected)} tensors, got {len(named)}, {len(named.keys() & expected)} of them its own"
        )
    metadata = network.peft_config[TRAINED].to_dict()  # type: ignore[union-attr, index]  # without it alpha would be read as the rank
    pipeline.save_lora_weights(folder, transformer_lora_layers=named, transformer_lora_adapter_metadata=metadata)  # type: ignore[attr-defined]


def active_factors(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(low "N R", up "O R"): low up^T is what the adapters that answer in `layer` add to its output for x "N I"; None where none does."""
    if not hasattr(layer, "base_layer") or layer.disable_adapters:
        return None
    layers: Any = layer
    names = [name for name in layers.active_adapters if name in layers.lora_A]
    if not names:
        return None
    downs = [layers.lora_A[n](layers.lora_dropout[n](x.to(layers.lora_A[n].weight.dtype))) * layers.scaling[n] for n in names]
    return torch.cat(downs, -1), torch.cat([layers.lora_B[n].weight for n in names], -1)


@contextmanager
def disabled_adapters(network: nn.Module) -> Iterator[None]:
    """Inside it only the base weights answer."""
    with _switched(network, "_disable_adapters", True):
        yield


@contextmanager
def using_adapter(network: nn.Module, name: str) -> Iterator[None]:
    """Inside it adapter `name` answers in place of the active one."""
    with _switched(network, "_active_adapter", [name]):
        yield


@contextmanager
def _switched(network: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    # peft's enable_adapters and set_adapter would also flip requires_grad, which DDP, FSDP and the optimizer have already read.
    layers = tuner_layers(network)
    before = [getattr(layer, attribute) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, attribute, value)
        yield
    finally:
        for layer, old in zip(layers, before):
            setattr(layer, attribute, old)


def tuner_layers(network: nn.Module) -> list[BaseTunerLayer]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
