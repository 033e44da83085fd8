"""Adapters in a network: their layers, their parameters and copies of them."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_rl.checkpoints.layout import Geometry
from lit_rl.policies.weights.shards import local

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

TRAINED = "default"


def lora_config(network: nn.Module) -> LoraConfig:
    """PEFT's configuration of the trained adapter."""
    return getattr(network, "peft_config", {})[TRAINED]


def add_frozen_copy(network: nn.Module, name: str) -> None:
    """Add adapter `name`, frozen and equal to the trained one, which stays the active one."""
    config = copy.deepcopy(lora_config(network))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted
        network.add_adapter(config, adapter_name=name)  # type: ignore[operator]
    for layer in tuner_layers(network):
        layer.set_adapter(TRAINED)
    for adapter, trained in ((name, False), (TRAINED, True)):
        for parameter in adapter_parameters(network, adapter).values():
            parameter.requires_grad_(trained)
    to_float32(network, name)
    copy_adapter(network, source=TRAINED, target=name)


def to_float32(network: nn.Module, name: str) -> None:
    """Keep an adapter in float32, whatever the precision of its base."""
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


def geometry(network: nn.Module) -> Geometry:
    """Facts about the trained adapter that a checkpoint keeps beside its weights: rank, alpha, and (rank, scaling) by layer."""
    config = lora_config(network)
    layers = {
        name: [int(layer.r[TRAINED]), float(layer.scaling[TRAINED])] for name, layer in named_tuner_layers(network) if TRAINED in layer.r
    }
    return {"rank": int(config.r), "alpha": float(config.lora_alpha), "use_rslora": bool(config.use_rslora), "layers": layers}


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


def adapted_name(name: str, layer: LoraLayer) -> str:
    """The linear layer, or the parameter, that the adapter in a module of this name is for."""
    parameter = getattr(layer, "parameter_name", "weight")
    module = name.replace(".base_layer", "")  # wrappers of several parameters of a module lie in each other
    return module if parameter == "weight" else f"{module}.{parameter}"


def adapted_parameters(network: nn.Module) -> list[str]:
    """Names of the parameters that are adapted past the layer around them: fused experts."""
    return sorted({adapted_name(name, layer) for name, layer in named_tuner_layers(network) if hasattr(layer, "parameter_name")})


def tuner_layers(network: nn.Module) -> list[LoraLayer]:
    """PEFT's layers."""
    return [layer for _, layer in named_tuner_layers(network)]


def named_tuner_layers(network: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Names and modules of PEFT's layers."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]
