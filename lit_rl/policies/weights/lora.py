"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a transformer of diffusers or transformers, through peft.

The trained adapter is called "default". Others may sit frozen beside it in the same base weights (a reference, an average, an old
policy): they are switched to by name, and never by peft's own calls, which change `requires_grad` on the way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from lit_rl.errors import ConfigError
from lit_rl.policies.weights.adapters import TRAINED, adapted_name, geometry, named_tuner_layers, to_float32
from lit_rl.policies.weights.lora_fields import check_readable

if TYPE_CHECKING:
    from peft import LoraConfig

PLACES = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules", "target_parameters"} | {
    "layers_to_transform", "layers_pattern", "fan_in_fan_out"
}  # fmt: skip
"""Fields of PEFT's configuration that say where a plain adapter sits and how strong it is: PEFT computes with them."""
NOTES = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type", "auto_mapping", "peft_version"} | {
    "lora_dropout", "init_lora_weights", "runtime_config", "megatron_config", "megatron_core", "loftq_config", "eva_config"
}  # fmt: skip
"""Fields that say nothing about what a finished adapter computes."""
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Those that leave the base weights as they are."""


@dataclass(kw_only=True)
class LoraSettings:
    """W x + (alpha / rank) B A x on every targeted linear layer.

    Args:
        rank: Rows of A and columns of B; None means that of `initial`, or 32 without it.
        alpha: The adapter's output is multiplied by alpha / rank; None means that of `initial`, or 64 without it.
        targets: Ends of module names; None means those of `initial`, or the family's list, which for language models is that of
            `all-linear`.
        init: "default" draws A uniformly as a linear layer's weight, "gaussian" with std 1 / rank; B starts at 0 either way.
        dropout: On the adapter's input, in supervised fine-tuning; other methods train without dropout.
        initial: A LoRA folder (or file, for image models) to start from, as stock PEFT or diffusers reads it: its strength, ranks by layer
            and layers are kept. The reference is then the policy that starts, not the base without it.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: list[str] | Literal["all-linear"] | None = None
    init: Literal["gaussian", "default"] = "gaussian"
    dropout: float = 0.0
    initial: str | None = None
    given: tuple[int | None, float | None] = field(init=False, repr=False, compare=False)
    """Rank and alpha before the values that an adapter without `initial` gets."""

    def __post_init__(self) -> None:
        self.given = self.rank, self.alpha
        if self.initial is None:
            self.rank, self.alpha = 32 if self.rank is None else self.rank, 64.0 if self.alpha is None else self.alpha
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"lora.rank: must be at least 1, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"lora.alpha: must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout: must be in [0, 1), got {self.dropout}")
        if self.targets is not None and not self.targets:
            raise ConfigError("lora.targets: the list is empty; name at least one module, or leave it out for the family's list")
        if self.targets not in (None, "all-linear") and isinstance(self.targets, str):
            raise ConfigError(f"lora.targets: {self.targets!r} must be a list of module names, or all-linear")
        if self.initial is not None and not Path(self.initial).expanduser().exists():
            raise ConfigError(f"lora.initial: no such folder {self.initial!r}")

    @property
    def named(self) -> list[str] | None:
        """The targets that are named one by one."""
        return None if isinstance(self.targets, str) else self.targets

    def new_config(self, **targets: list[str]) -> LoraConfig:
        """The configuration of an adapter that is drawn. targets: `target_modules`, `target_parameters` of PEFT."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,  # type: ignore[arg-type]
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft computes with it, whole or not
            lora_dropout=self.dropout,
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            **targets,  # type: ignore[arg-type]
        )


def add_lora(network: nn.Module, settings: LoraSettings, *, targets: list[str], seed: int = 0) -> None:
    """Freeze `network` and add a new trainable adapter in float32, drawn from `seed` alone. Raises when a target names no module."""
    missing = [t for t in targets if not linear_names(network, [t])]
    if missing:
        there = sorted({n.split(".0.", 1)[1] for n in linear_names(network) if ".0." in n})
        raise ConfigError(f"lora.targets: no linear layer ends in {', '.join(missing)}; a block has {', '.join(there)}")
    inject(network, settings.new_config(target_modules=list(targets)), seed=seed)


def linear_names(network: nn.Module, targets: list[str] | None = None) -> list[str]:
    """Names of the linear layers, of those that end in one of `targets` where given."""
    names = [n for n, module in network.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in n]
    return names if targets is None else [n for n in names if any(n == t or n.endswith("." + t) for t in targets)]


def inject(network: nn.Module, config: LoraConfig, *, name: str = TRAINED, seed: int = 0) -> None:
    """Freeze `network` and add a trainable adapter of this config in float32."""
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=name)  # type: ignore[operator]
    to_float32(network, name)


def check_initial(network: nn.Module, settings: LoraSettings, *, layers: Collection[str] | None) -> None:
    """Raise ConfigError where the settings name another rank, alpha or other layers than the adapter that was read from `initial` has.

    layers: names of what the settings' targets stand for; None where they name none.
    """
    found = geometry(network)
    same = settings.rank in (None, found["rank"]) and settings.alpha in (None, found["alpha"])
    there = {adapted_name(name, layer) for name, layer in named_tuner_layers(network)}
    if same and (layers is None or there == set(layers)):
        return
    count = len(there)
    wanted = f"{'as many' if layers is None else len(layers)} of rank {settings.rank or 'any'} and alpha {settings.alpha or 'any'}"
    raise ConfigError(
        f"lora.initial: {settings.initial!r} holds adapters of {count} layers of rank {found['rank']} and alpha {found['alpha']:g}, the "
        f"settings ask for {wanted}; set lora.rank, lora.alpha and lora.targets to those of the folder, or leave them out"
    )


def check_plain(fields: Mapping[str, object], *, where: str) -> None:
    """Raise ConfigError unless an adapter with this configuration of PEFT computes low-rank matrices alone, naming the field."""
    from peft import LoraConfig

    if (kind := fields.get("peft_type", "LORA")) != "LORA":
        raise ConfigError(f"lora.initial: {where} holds a {kind} adapter, and only LORA can be trained here")
    check_readable(fields, where=where)
    plain = LoraConfig().to_dict()
    for name, value in fields.items():
        if name not in PLACES | NOTES and value != plain.get(name) and value:
            raise ConfigError(
                f"lora.initial: {where} is no plain LoRA: its configuration has {name}={value!r}, whose effect is not that of low-rank "
                "matrices alone; merge it into its base with the library that made it, and start from that"
            )
    if (drawn := fields.get("init_lora_weights", True)) not in INITIALIZATIONS:
        raise ConfigError(
            f"lora.initial: {where} was drawn by init_lora_weights={drawn!r}, which changes the base weights too; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )


def base_name(pretrained: str | Path) -> str:
    """The name of a base model in an adapter's file: a folder as an absolute path, a hub id as it is."""
    path = Path(pretrained).expanduser()
    return str(path.absolute()) if path.exists() else str(pretrained)


def started_from(adapter: str, base: str, lora: LoraSettings | None) -> tuple[LoraSettings, Path]:
    """(settings, folder) of a run whose `pretrained` is an adapter of `base`: settings that start from it."""
    if lora is None:
        raise ConfigError(
            f"pretrained: {adapter!r} is a LoRA adapter of {base}: set model.policy.lora, e.g. to {{}}, to go on training it, or make a "
            f"model of both by `python -m lit_rl.merge {adapter} --base {base} --out FOLDER` and give that"
        )
    folder = Path(adapter).expanduser()
    if lora.initial is not None and Path(lora.initial).expanduser().resolve() != folder.resolve():
        raise ConfigError(
            f"pretrained: {adapter!r} is a LoRA adapter, and lora.initial names another, {lora.initial!r}: leave lora.initial out, or "
            f"give the base {base} as pretrained"
        )
    return replace(lora, rank=lora.given[0], alpha=lora.given[1], initial=adapter), folder
