"""One adapter of several: by sums of their products, which are exact, or factor by factor as PEFT does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_rl.checkpoints.manifest import MANIFEST
from lit_rl.checkpoints.tensors import Facts
from lit_rl.errors import ConfigError, listed
from lit_rl.policies.weights.language_lora import CONFIG_FILE
from lit_rl.policies.weights.pipeline_lora import FILE, METADATA, PREFIX
from lit_rl.surgery.formulas import combined
from lit_rl.surgery.inputs import Adapter
from lit_rl.surgery.settings import Settings
from lit_rl.surgery.writing import write_file

SUMS = ("linear", "task_arithmetic")


def check_adapters(adapters: Sequence[Adapter]) -> None:
    """Raise ConfigError for adapters of different models."""
    if kinds := [other for other in adapters if other.kind != adapters[0].kind]:
        raise ConfigError(f"{adapters[0].tensors.place} is of a {adapters[0].kind} model and {kinds[0].tensors.place} of another kind")
    bases = {adapter.base: adapter for adapter in adapters if adapter.base}
    if len(bases) > 1:
        raise ConfigError("adapters of different bases: " + listed([f"{one.tensors.place} of {base}" for base, one in bases.items()]))


class AdapterMerge:
    """An adapter that is about to be written. Its strength is 1 in every layer: alpha is the rank.

    linear and task_arithmetic put the factors of all side by side, so that the product is the sum of the products and the rank that of the
    ranks (PEFT's `cat`); linear divides the weights by their sum. The others combine A with A and B with B, each weighted with the root of
    weight times strength, a sign on A, as PEFT's `add_weighted_adapter` does.
    """

    def __init__(self, adapters: Sequence[Adapter], settings: Settings, base: str | None) -> None:
        self.adapters, self.settings, self.base = adapters, settings, base
        total = sum(settings.weights) if settings.method == "linear" else 1.0
        self.weights = [weight / total for weight in settings.weights]
        self.layers = list(dict.fromkeys(layer for adapter in adapters for layer in adapter.scales))
        for layer in self.layers:
            self._check(layer)
        self.ranks = {layer: self._rank(layer) for layer in self.layers}

    def _check(self, layer: str) -> None:
        there = [adapter.tensors for adapter in self.adapters if layer in adapter.scales]
        down, up = ([tensors.facts[f"{layer}.lora_{factor}.weight"].shape for tensors in there] for factor in "AB")
        if len({shape[1:] for shape in down}) > 1 or len({(shape[0], *shape[2:]) for shape in up}) > 1:
            raise ConfigError(f"{layer} has another size in {there[-1].place} than in {there[0].place}: adapters of different models")
        if self.settings.method not in SUMS and (len({*down}) > 1 or len({*up}) > 1):
            raise ConfigError(
                f"method {self.settings.method} wants adapters of one rank, and {layer} has {[s[0] for s in down]}: use linear"
            )

    def _rank(self, layer: str) -> int:
        ranks = [adapter.rank(layer) for adapter in self.adapters if layer in adapter.scales]
        return sum(ranks) if self.settings.method in SUMS else ranks[0]

    def files(self) -> dict[str, dict[str, Facts]]:
        """The names, shapes and precisions of the file."""
        facts = {}
        for layer in self.layers:
            first = next(adapter.tensors.facts for adapter in self.adapters if layer in adapter.scales)
            for factor in "AB":
                name = f"{layer}.lora_{factor}.weight"
                shape = list(first[name].shape)
                shape["AB".index(factor)] = self.ranks[layer]  # A is "R I", B "O R"
                facts[name] = self.settings.precise(Facts(tuple(shape), first[name].dtype))
        return {"": facts}

    def copied(self) -> int:
        """Bytes of other files."""
        return 0

    def tensor(self, name: str) -> Tensor:
        """One factor of one layer."""
        layer, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        found, strengths = [], []
        for adapter, weight in zip(self.adapters, self.weights):
            if layer in adapter.scales:
                found.append(adapter.tensors.number(name).float())
                strengths.append(weight * adapter.scales[layer])
        if self.settings.method in SUMS:
            return torch.cat(found, 0) if factor == "A" else torch.cat([part * s for part, s in zip(found, strengths)], 1)
        roots = [math.copysign(math.sqrt(abs(s)), s if factor == "A" else 1.0) for s in strengths]
        return combined(self.settings.method, found, roots, density=self.settings.density, seed=self.settings.seed, name=name)

    def write(self, folder: Path, done: Callable[[str], None]) -> None:
        """Write the adapter as PEFT or diffusers reads it, with the other files of the first one."""
        first = self.adapters[0]
        for file in sorted(first.folder.iterdir()) if first.folder else []:
            if file.is_file() and file.suffix not in (".safetensors", ".bin") and file.name not in (CONFIG_FILE, MANIFEST):
                shutil.copy(file, folder)
        begins = PREFIX if first.kind == "pipeline" else "base_model.model."

        def tensor(name: str) -> Tensor:
            plain = name.removeprefix(begins)
            found = self.tensor(plain)
            done(plain)
            return found

        facts = {begins + name: about for name, about in self.files()[""].items()}
        fields = self._fields()
        metadata = {"format": "pt"}
        if first.kind == "pipeline":
            metadata[METADATA] = json.dumps({PREFIX + name: value for name, value in fields.items()}, sort_keys=True)
            write_file(folder / FILE, facts, tensor, metadata=metadata)
            return
        write_file(folder / "adapter_model.safetensors", facts, tensor, metadata=metadata)
        (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _fields(self) -> Mapping[str, object]:
        """PEFT's configuration: the first adapter's, with these layers and ranks."""
        from peft import LoraConfig

        rank = max(self.ranks.values())
        odd = {layer: other for layer, other in self.ranks.items() if other != rank}
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(self.layers), rank_pattern=odd, alpha_pattern=dict(odd), inference_mode=True
        )
        fields = config.to_dict() | {"target_modules": sorted(self.layers), "base_model_name_or_path": self.base}
        kept = self.adapters[0].fields
        return fields | {name: kept[name] for name in ("task_type",) if name in kept} | {"peft_type": "LORA"}
