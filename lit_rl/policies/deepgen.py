"""DeepGen (deepgenteam/deepgen_rl): Qwen2.5-VL reads the prompt, a bridge carries what it read to the transformer of SD3.5."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_rl.checkpoints.deepgen import check_checkpoint, check_whole, read_deepgen, split_parts
from lit_rl.errors import ConfigError, listed
from lit_rl.net.environment import DEEPGEN, variable_of
from lit_rl.policies.conditioner import Conditioner, blocks_of
from lit_rl.policies.deepgen_files import check_sd3_folder, read_sd3, read_transformer, write_export
from lit_rl.policies.deepgen_parts import FrozenBridge, FrozenLanguageAdapter, build_conditioner
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.frozen import filled_up
from lit_rl.policies.language_model import check_folder, recompute
from lit_rl.policies.pretrained import Pipeline, given_or_set
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.policies.tokenizer import Tokenizer, read_tokenizer
from lit_rl.policies.unread import leaves_weights
from lit_rl.policies.weights.adapters import geometry
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.policies.weights.reference import Combined, NoReference, Reference
from lit_rl.types import Cond

log = logging.getLogger(__name__)

FRAME = "<|im_start|>user\nGenerate an image: {prompt}<|im_end|>\n<|im_start|>assistant\n"
"""A prompt as the language model reads it; the empty one of guidance, too."""

TrainedPart = Literal["transformer", "bridge", "adapter"]
STARTS: Mapping[TrainedPart, str] = {"transformer": "network.", "bridge": "conditioner.bridge.", "adapter": "conditioner.language."}
"""How the names of each part's parameters begin."""


class DeepGenPolicy(SD3Policy):
    """SD3.5's transformer behind a vision-language model with learned queries; each of its three parts can be trained.

    Every prompt is read without padding, or with padding that nobody looks at: its condition depends on nothing else in the batch.

    Args:
        pretrained: Folder with SD3.5's `transformer`, `vae` and `scheduler`, or hub id; by default the environment's
            SD3_5_MODEL_NAME_OR_PATH.
        language_model: Folder or hub id of Qwen2.5-VL; by default the environment's QWEN2_5_VL_MODEL_NAME_OR_PATH.
        checkpoint: DeepGen's checkpoint from before RL, or one of a run: a file, flat or with "state_dict", or a DeepSpeed folder; by
            default the environment's CHECKPOINT. It has the bridge, and may have the transformer and the language model's adapter.
        train: Any of transformer, bridge (queries, projectors, connector) and adapter (of the language model); default: transformer.
            Conditions that depend on what is trained are computed again, with gradient, in the loss.
        learning_rates: Of trained parts, where they differ from the optimizer's.
        adapter: Rank and alpha of the language model's adapter, which no checkpoint tells; default: rank 64, alpha 128.
        connector_heads: Attention heads of the connector, which no checkpoint tells.
        max_sequence_length: Tokens of a prompt with its frame; a longer one loses its beginning.
        lora: Of the transformer; None trains every weight of it.
        keep_reference: Keep frozen copies of what is trained, that `reference()` answers with.
        kwargs: See `SD3Policy`. guidance_scale 1 asks for the prompt alone.
    """

    stored_with: Sequence[str] = ("train_parts",)
    conditioner: Conditioner

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        language_model: str | None = None,
        checkpoint: str | None = None,
        train: Sequence[TrainedPart] | None = None,
        learning_rates: dict[TrainedPart, float] | None = None,
        adapter: LoraSettings | None = None,
        connector_heads: int = 32,
        max_sequence_length: int = 512,
        **kwargs: Any,
    ) -> None:
        given = {"pretrained": pretrained, "language_model": language_model, "checkpoint": checkpoint}
        found = {o: given_or_set(v, option=f"model.policy.{o}", variable=variable_of(DEEPGEN, o)) for o, v in given.items()}
        super().__init__(found["pretrained"], max_sequence_length=max_sequence_length, **kwargs)
        self.language_folder, self.checkpoint = check_folder(found["language_model"]), check_checkpoint(found["checkpoint"])
        self.train_parts = _checked_parts(["transformer"] if train is None else list(train), learning_rates or {}, self.lora)
        self.rates, self.connector_heads = learning_rates or {}, connector_heads
        self.language_lora = adapter or LoraSettings(rank=64, alpha=128)
        self.trains_condition = set(self.train_parts) != {"transformer"}
        self.reference_weights = self._reference()
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def checked_folder(cls, pretrained: str) -> Path | None:
        """The folder, None for a hub id; whichever pipeline's it is, its transformer, VAE and scheduler are read."""
        return check_sd3_folder(pretrained)

    def _reference(self) -> Reference:
        """That of the transformer where it alone is trained; else copies of all that is."""
        if not self.trains_condition:
            return self.reference_weights
        if not self.keep_reference:
            return NoReference()
        beside = {"bridge": FrozenBridge(self), "adapter": FrozenLanguageAdapter(self)}
        kept: list[Reference] = [self.reference_weights] if "transformer" in self.train_parts else []
        return Combined(*kept, *(reference for part, reference in beside.items() if part in self.train_parts))

    @property
    def full(self) -> bool:
        """Every weight of the transformer is trained."""
        return self.lora is None and "transformer" in self.train_parts

    def learning_rates(self) -> Mapping[str, float]:
        """The rate of each part that has its own, by the beginning of its parameters' names."""
        return {STARTS[part]: rate for part, rate in self.rates.items()}

    # ------------------------------------------------------------------ loading
    def load(self) -> None:
        """Read the folders and lay the checkpoint over them; freeze what is not trained."""
        if "network" in self._modules:
            return
        super().load()
        if "transformer" not in self.train_parts:
            self.network.requires_grad_(False)
        if "adapter" in self.train_parts:
            language = geometry(self.conditioner.language)
            own = self.adapter or language
            self.adapter = {**own, "layers": {**own["layers"], **{f"language.{n}": v for n, v in language["layers"].items()}}}

    def _read_pipeline(self) -> Pipeline:
        from lit_rl.policies.joint_attention import mask_text

        parts, where = split_parts(read_deepgen(self.checkpoint, sizes=leaves_weights())), str(self.folder or self.pretrained)
        if parts.unknown:
            log.warning("checkpoint: %r has %d unknown weights: %s", str(self.checkpoint), len(parts.unknown), listed(parts.unknown))
        transformer = read_transformer(where, dtype=torch.float32 if self.full else self.dtype, **self.source)
        if parts.transformer:
            own = transformer.state_dict()
            check_whole(parts.transformer, own, what=f"checkpoint: the transformer of {str(self.checkpoint)!r}")
            transformer.load_state_dict(parts.transformer)
        mask_text(transformer)
        conditioner = build_conditioner(
            parts, self.language_folder, train=self.train_parts, adapter=self.language_lora, heads=self.connector_heads, dtype=self.dtype,
            what=f"checkpoint: {str(self.checkpoint)!r}",
        )  # fmt: skip
        if self.trains_condition:
            self.conditioner = conditioner
        pipe = read_sd3(where, transformer.requires_grad_(False), vae_dtype=self.vae_dtype, **self.source)
        pipe.conditioner = conditioner  # an attribute, not a component: it is moved with the other frozen parts and not saved
        return pipe

    # ------------------------------------------------------------------ the networks
    def networks(self) -> list[nn.Module]:
        """The transformer, its frozen copy where one is kept, and the conditioner where some of it is trained."""
        return [*super().networks(), *([self.conditioner] if self.trains_condition else [])]

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks, or the layers of language model and connectors."""
        if not isinstance(network, Conditioner):
            return super().blocks(network)
        bridges = [bridge for bridge in (network.bridge, network.frozen) if bridge is not None]
        return [*blocks_of(network.language), *(block for bridge in bridges for block in blocks_of(bridge.connector))]

    def recompute(self, network: nn.Module) -> None:
        """The conditioner's layers keep no activations either."""
        if isinstance(network, Conditioner):
            recompute(self.blocks(network))
        else:
            super().recompute(network)

    # ------------------------------------------------------------------ conditions
    def condition_shapes(self, before: int = 0) -> dict[str, tuple[int, ...]]:
        """The shapes of the longest prompt, with the queries behind it; of prompts of one length, for which no mask is needed."""
        return DiffusersFlowPolicy.condition_shapes(self, before + self._pipe.conditioner.bridge.sizes.queries)

    def tokens(self, prompt: str) -> list[int]:
        """A prompt in its frame, as token ids."""
        self._tokenizer = self._tokenizer or read_tokenizer(self.language_folder)
        ids: list[int] = self._tokenizer(FRAME.format(prompt=prompt))["input_ids"]
        return ids[-self.max_sequence_length :]

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditions of U prompts: remembered ones, each read alone; or, where they are trained, of one forward over all of them."""
        if self.trains_condition:
            rows = self.read([*prompts, *([""] if self.guided else [])], self.conditioner)
            last = len(prompts)
            cond = {name: row[:last] for name, row in rows.items()} | {
                f"negative_{n}": row[last:] for n, row in rows.items() if self.guided
            }
        else:
            cond = super().encode(prompts)
        masks = [name for name in cond if name.endswith("real")]
        if all(bool(cond[name].all()) for name in masks) and len({cond[name].shape[1] for name in masks}) == 1:  # nothing fills up
            return {name: tensor for name, tensor in cond.items() if name not in masks}
        return cond

    def encode_one(self, prompt: str) -> Cond:
        """The conditions of a prompt that is read alone."""
        return self.read([prompt], self._pipe.conditioner)

    def read(self, prompts: Sequence[str], conditioner: Conditioner) -> Cond:
        """prompt_embeds "U L J", pooled "U P" and real Bool "U L": its tokens that do not just fill up."""
        ids = [self.tokens(prompt) for prompt in prompts]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.device)
        found = conditioner(padded, [len(row) for row in ids])
        ends = torch.tensor([len(row) for row in ids], device=self.device) + conditioner.bridge.sizes.queries
        real = torch.arange(found.sequence.shape[1], device=self.device) < ends[:, None]
        return {"prompt_embeds": found.sequence, "pooled": found.pooled, "real": real}

    def text(self, cond: Cond) -> tuple[Tensor, Tensor, Tensor | None]:
        """The empty prompt's rows first where guidance is on. The mask is None where nothing fills up."""
        names = [name for name in ("prompt_embeds", "pooled", "real") if name in cond]
        found = {name: cond[name] for name in names}
        if self.guided:
            longest = max(cond["prompt_embeds"].shape[1], cond["negative_prompt_embeds"].shape[1])
            for name in names:
                pair = [cond[name], cond[f"negative_{name}"]]
                positive, negative = pair if name == "pooled" else (filled_up(part, longest) for part in pair)
                found[name] = torch.cat([negative.expand_as(positive), positive])
        return found["prompt_embeds"], found["pooled"], found.get("real")

    # ------------------------------------------------------------------ saving
    def checkpoint_keys(self) -> set[str]:
        """Everything that is trained, with its frozen copies; adapters without what they sit in."""

        def kept(name: str) -> bool:
            if name.startswith(STARTS["adapter"]):
                return ".lora_" in name and "adapter" in self.train_parts
            if name.startswith("conditioner."):
                return "bridge" in self.train_parts
            return "transformer" in self.train_parts and (".lora_" in name or not self.lora)

        return {name for name in self.state_dict() if kept(name)}

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """`model.safetensors` under DeepGen's names with the trained weights in place of the checkpoint's; LoRA merged, and beside it."""
        network = {name: tensor for name, tensor in weights.items() if name.startswith("network.")}
        if self.lora and network:
            super().save(folder, network)
        strengths = {} if self.adapter is None else {n: values[1] for n, values in self.adapter["layers"].items()}
        where = str(self.folder or self.pretrained)
        write_export(folder, weights, checkpoint=self.checkpoint, pretrained=where, strengths=strengths if self.lora else {}, **self.source)


def _checked_parts(train: list[TrainedPart], rates: Mapping[TrainedPart, float], lora: LoraSettings | None) -> list[TrainedPart]:
    if not train or len(set(train)) < len(train):
        raise ConfigError(f"model.policy.train={train}: name at least one of {', '.join(get_args(TrainedPart))}, each once")
    if others := [part for part in rates if part not in train]:
        raise ConfigError(f"model.policy.learning_rates names {listed(others)}, which model.policy.train={train} does not train")
    if any(rate <= 0 for rate in rates.values()):
        raise ConfigError(f"model.policy.learning_rates={dict(rates)} must be above 0; leave a part out to give it the optimizer's own")
    if lora is not None and "transformer" not in train:
        raise ConfigError(
            f"model.policy.lora is of the transformer, and model.policy.train={train} does not train it: leave one of them out"
        )
    return train
