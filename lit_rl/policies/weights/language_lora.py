"""Adapters of language models: where they sit by default, and folders as PEFT reads and writes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from lit_rl.checkpoints.weights import read_tensors
from lit_rl.errors import ConfigError, listed
from lit_rl.policies.weights.adapters import TRAINED, adapted_name, lora_config, named_tuner_layers
from lit_rl.policies.weights.lora import LoraSettings, check_initial, check_plain, inject, started_from
from lit_rl.policies.weights.lora_sites import adaptable, coverage, default_sites, named_sites, peft_targets

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"


def add_language_lora(lm: PreTrainedModel, lora: LoraSettings, *, seed: int, beside: str | None = None) -> None:
    """Freeze a language model and add its trainable adapter: a new one drawn from `seed`, or that of `lora.initial`.

    beside: Name of a module outside of the decoder, such as a vision tower, whose linear layers are adapted too.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    sites = default_sites(lm, beside) if lora.named is None else named_sites(lm, lora.named, beside)
    if lora.named is None and not lora.initial:
        rank_zero_info(coverage(lm, sites))
    if lora.initial:
        load_initial(lm, lora, layers=None if lora.targets is None else sites.names, beside=beside)
    else:
        if sites.experts and lora.dropout:
            raise ConfigError("lora.dropout: fused experts take none: set it to 0, or name targets without gate_up_proj and down_proj")
        inject(lm, lora.new_config(**peft_targets(lm, sites)), seed=seed)


def split_adapter(pretrained: str, lora: LoraSettings | None) -> tuple[str, LoraSettings | None, Path | None]:
    """(base, settings, folder) of a `pretrained` that is an adapter's folder: its base, and settings that start from it.

    Anything else comes back as it is, with None. Raises ConfigError where no adapter is to be trained, or another one is `lora.initial`.
    """
    folder = Path(pretrained).expanduser()
    if not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return pretrained, lora, None
    base = adapter_fields(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"pretrained: {pretrained!r} is an adapter whose {CONFIG_FILE} names no base: give that here, and this as lora.initial"
        )
    return (base, *started_from(pretrained, base, lora))


def load_initial(lm: PreTrainedModel, lora: LoraSettings, *, layers: set[str] | None, beside: str | None = None) -> None:
    """Add the adapter stored in `lora.initial` as the trained one, as stock PEFT reads it: its ranks, strengths and layers.

    Raises ConfigError for what is not plain LoRA, does not fit the model, or contradicts the settings.
    """
    from peft import set_peft_model_state_dict

    folder = Path(str(lora.initial)).expanduser()
    config, weights, places = read_adapter_config(folder), read_adapter_weights(folder), adaptable(lm, beside)
    config.lora_dropout, config.inference_mode, config.init_lora_weights = lora.dropout, False, True
    try:
        inject(lm, config)
        result = set_peft_model_state_dict(lm, _without_prefix(weights), adapter_name=TRAINED)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"lora.initial: {lora.initial!r} does not fit this {type(lm).__name__}: {error}") from error
    check_loaded(result, what=f"lora.initial: {lora.initial!r}")
    odd = sorted({adapted_name(name, layer) for name, layer in named_tuner_layers(lm)} - places)
    if odd:
        raise ConfigError(
            f"lora.initial: {lora.initial!r} adapts {listed(odd)}, and only linear layers and fused experts of the decoder, and the output "
            "layer, can be trained; merge it into its base (python -m lit_rl.merge) and start from that"
        )
    check_initial(lm, lora, layers=layers)


class LoadResult(Protocol):
    """The answer of `load_state_dict`."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def check_loaded(result: LoadResult, *, what: str) -> None:
    """Raise ConfigError unless every adapter tensor of the model was in the file, and every tensor of the file has its place."""
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{TRAINED}." in key]
    unknown = list(result.unexpected_keys)
    if missing or unknown:
        raise ConfigError(
            f"{what} is not the adapter that its configuration names: {len(missing)} tensors are missing ({listed(missing)}), "
            f"{len(unknown)} have no place ({listed(unknown)}); was it made for another model, or by another version?"
        )


def read_adapter_config(folder: Path) -> LoraConfig:
    """adapter_config.json of a plain LoRA adapter. Raises ConfigError for any other, naming the field."""
    from peft import LoraConfig

    stored = adapter_fields(folder)
    check_plain(stored, where=repr(str(folder / CONFIG_FILE)))
    make: Callable[..., LoraConfig] = LoraConfig
    known = LoraConfig.__dataclass_fields__.keys() - {"peft_type", "auto_mapping"}
    try:
        return make(**{field: value for field, value in stored.items() if field in known})
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"lora.initial: {CONFIG_FILE} of {str(folder)!r} is not one of PEFT's: {error}") from error


def adapter_fields(folder: Path) -> dict[str, object]:
    """The fields of adapter_config.json."""
    file = folder / CONFIG_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"lora.initial: {str(file)!r} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"lora.initial: {str(file)!r} holds no fields of an adapter")
    return fields


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors, or .bin."""
    file = next((f for name in ("safetensors", "bin") if (f := folder / f"adapter_model.{name}").is_file()), None)
    if file is None:
        raise ConfigError(f"lora.initial: {str(folder)!r} has neither adapter_model.safetensors nor adapter_model.bin")
    return read_tensors(file, what=f"lora.initial: {str(file)!r}")


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}


def merged(lm: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`lm` with the adapter of a folder in its weights, as PEFT adds it. Of tied embeddings the output layer gets weights of its own."""
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(lm, folder)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ConfigError(f"{str(folder)!r} cannot be added to this {type(lm).__name__}: {error}") from error
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    bare = [getattr(layer, "base_layer", layer) for layer in (head, embedding)]
    if bare[0].weight is bare[1].weight and bare != [head, embedding]:
        own = bare[0].weight
        assert isinstance(own, Tensor)
        bare[0].weight = nn.Parameter(own.detach().clone(), requires_grad=False)
        for config in (lm.config, lm.config.get_text_config()):
            config.tie_word_embeddings = False
        lm.all_tied_weights_keys = {}
    merge = getattr(model, "merge_and_unload", None)
    assert callable(merge), "LoRA can be merged"
    whole = merge(safe_merge=True)
    if hasattr(whole, "peft_config"):
        del whole.peft_config
    return whole


def save_adapter(lm: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor], *, base: str) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT names and reads them. base: the model that it belongs to."""
    from safetensors.torch import save_file

    config = copy.copy(lora_config(lm))
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{key.replace(f'.{TRAINED}.', '.')}": tensor for key, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
