"""Models and adapters that a path can stand for: folders of transformers, diffusers and PEFT, and checkpoints of runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_rl.checkpoints.deepgen_tensors import REFERENCE
from lit_rl.checkpoints.files import refuse_damaged, what_is_missing
from lit_rl.checkpoints.layout import Geometry
from lit_rl.checkpoints.reading import content
from lit_rl.checkpoints.tensors import Tensors, of_safetensors, open_weights, shard_files
from lit_rl.errors import ConfigError, listed
from lit_rl.policies.weights.adapters import TRAINED
from lit_rl.policies.weights.language_lora import CONFIG_FILE, adapter_fields
from lit_rl.policies.weights.pipeline_lora import METADATA, PREFIX, adapter_file, adapter_metadata

Kind = Literal["language", "pipeline"]
GROUPS = ("", "transformer/")
"""Folders in a model's folder whose weights are merged; what else an image pipeline has was not trained."""
LANGUAGE = "lm."
FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
POLICY = re.compile(r"^(?:_forward_module\.)?policy\.network\.")


@dataclass(frozen=True)
class Model:
    """A whole model. Names of tensors begin with the folder in which their file lies; a checkpoint has no folder of its own."""

    tensors: Tensors
    folder: Path | None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    tensors: "LAYER.lora_A.weight" "R I" and "LAYER.lora_B.weight" "O R" of each layer, whose product counts times its scale.

    fields: PEFT's configuration of it. folder: None for that of a checkpoint.
    """

    tensors: Tensors
    scales: Mapping[str, float]
    fields: Mapping[str, object]
    kind: Kind
    folder: Path | None

    @property
    def base(self) -> str | None:
        """The model that it says it belongs to."""
        named = self.fields.get("base_model_name_or_path")
        return str(named) if named else None

    def rank(self, layer: str) -> int:
        """The rank in one layer."""
        return self.tensors.facts[f"{layer}.lora_A.weight"].shape[0]


def open_input(place: Path) -> Model | Adapter:
    """The model or adapter at a path, of which nothing but names and shapes is read. Raises ConfigError that names the path."""
    if not place.exists():
        raise ConfigError(f"no such file or folder: {place}")
    if (place / CONFIG_FILE).is_file() and not (place / "config.json").is_file():
        return _peft(place)
    if place.suffix == ".safetensors" or (place / "pytorch_lora_weights.safetensors").is_file():
        return _diffusers_lora(place)
    if files := {group: found for group in GROUPS if (found := shard_files(place / group))} if place.is_dir() else {}:
        return Model(of_safetensors(place, files), place)
    return _checkpoint(place)


def open_base(base: str) -> Model:
    """The model that differences are taken from, or that adapters are added to."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"base: {base!r} is no folder here: `python -m lit_rl.prepare model --from {base} --out FOLDER` makes one; name it"
        )
    found = open_input(folder)
    if not isinstance(found, Model) or found.folder is None:
        raise ConfigError(f"base: {base!r} is no model in the format of transformers or diffusers")
    return found


def _peft(folder: Path) -> Adapter:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ConfigError(f"{folder} has no adapter_model.safetensors: save it by PEFT's save_pretrained(safe_serialization=True)")
    tensors = of_safetensors(folder, {"": [file]})
    named = tensors.renamed({name: name.removeprefix("base_model.model.") for name in tensors.facts})
    return _adapter(named, adapter_fields(folder), "language", folder)


def _diffusers_lora(place: Path) -> Adapter:
    file = adapter_file(place)
    tensors, fields = of_safetensors(place, {"": [file]}), adapter_metadata(file)
    if odd := [name for name in tensors.facts if not name.startswith(PREFIX)]:
        raise ConfigError(f"{file} holds {listed(odd)}: only adapters of the transformer, as diffusers names them, are merged")
    named = tensors.renamed({name: name.removeprefix(PREFIX) for name in tensors.facts})
    return _adapter(named, fields or {METADATA: None}, "pipeline", place if place.is_dir() else None)


def _adapter(tensors: Tensors, fields: Mapping[str, object], kind: Kind, folder: Path | None) -> Adapter:
    matches = {name: FACTOR.fullmatch(name) for name in tensors.facts}
    odd = [name for name, match in matches.items() if match is None]
    if odd or fields.get("target_parameters") or fields.get("fan_in_fan_out"):
        more = listed(odd) if odd else "adapters of fused experts or of transposed layers"
        raise ConfigError(
            f"{tensors.place} holds {more}, and only plain LoRA is merged here; `python -m lit_rl.merge ADAPTER` takes PEFT's way"
        )
    layers = list(dict.fromkeys(match[1] for match in matches.values() if match))
    if lacking := [f"{layer}.lora_{f}.weight" for layer in layers for f in "AB" if f"{layer}.lora_{f}.weight" not in matches]:
        raise ConfigError(f"{tensors.place} lacks {listed(lacking)}")
    ranks = {layer: tensors.facts[f"{layer}.lora_A.weight"].shape[0] for layer in layers}
    return Adapter(tensors, {layer: _scale(fields, layer, ranks[layer]) for layer in layers}, fields, kind, folder)


def _scale(fields: Mapping[str, object], layer: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank). Without a configuration alpha is the rank, as diffusers has it."""
    patterns = fields.get("alpha_pattern")
    named = patterns if isinstance(patterns, Mapping) else {}
    alpha = next((value for pattern, value in named.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer)), fields.get("lora_alpha", rank))
    return float(str(alpha)) / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _checkpoint(place: Path) -> Model | Adapter:
    if place.is_dir() and not any((place / name).exists() for name in ("checkpoint", ".metadata", "meta.pt")):
        there = listed(sorted(child.name for child in place.iterdir()), shown=8) or "nothing"
        raise ConfigError(f"{place} is no model (*.safetensors), no adapter and no checkpoint: found {there}")
    refuse_damaged(place, what_is_missing(place))
    tensors = _of_policy(open_weights(place))
    language = all(name.startswith(LANGUAGE) for name in tensors.facts)
    plain = tensors.renamed({name: name.removeprefix(LANGUAGE) for name in tensors.facts}) if language else tensors
    if not any(".lora_" in name for name in plain.facts):
        group = "" if language else "transformer/"
        return Model(plain.renamed({name: group + name for name in plain.facts}), None)
    stored: Geometry | None = content(place).get("adapters", {}).get("policy")
    if stored is None:
        raise ConfigError(f"{place} does not say how strong its adapter is: it is of an earlier release; merge an export of the run")
    named = plain.renamed({name: name.replace(f".{TRAINED}.", ".") for name in plain.facts if ".lora_" in name})
    fields = {"peft_type": "LORA", "r": stored["rank"], "lora_alpha": stored["alpha"], "task_type": "CAUSAL_LM" if language else None}
    found = _adapter(named, fields, "language" if language else "pipeline", None)
    return Adapter(found.tensors, {layer: float(stored["layers"][layer][1]) for layer in found.scales}, fields, found.kind, None)


def _of_policy(stored: Tensors) -> Tensors:
    """The weights of a checkpoint's policy, without frozen copies and without the beginnings of their names."""
    names = {name: POLICY.sub("", name) for name in stored.facts if POLICY.match(name) and not REFERENCE.search(name)}
    if not names:
        raise ConfigError(f"{stored.place} holds no weights of a policy: it is no checkpoint of a run here")
    return stored.renamed(names)
