"""Language models of transformers: read from a folder or hub id, and wrapped so that a forward gives log-probabilities."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_rl.errors import ConfigError
from lit_rl.losses.token_logprobs import token_logprobs
from lit_rl.policies.lm_head import LMHead, body, own_logprobs, picked
from lit_rl.policies.pretrained import without_bars
from lit_rl.policies.unread import frozen_of, leaves_weights
from lit_rl.policies.weights.adapters import active_factors
from lit_rl.policies.weights.language_lora import adapter_fields
from lit_rl.types import Pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


P = ParamSpec("P")
T = TypeVar("T")


TOWER = "model.visual"
"""The vision tower in a model of transformers, the layer that ends it included."""

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def seen_by(lm: PreTrainedModel, pictures: Pictures | None) -> dict[str, object]:
    """The arguments by which the forward of a vision-language model sees pictures.

    Those that no token stands for go through the tower and no further: then each forward of each process runs it once, as sharded weights
    and DDP want it, and its gradient is 0.
    """
    if pictures is None:
        return {}
    if pictures.shown:
        return {"pixel_values": pictures.patches, "image_grid_thw": pictures.grid, "mm_token_type_ids": pictures.kinds}
    model: Any = lm.base_model
    outputs = model.get_image_features(pictures.patches, pictures.grid, return_dict=True)
    outputs.pooler_output = [part[:0] for part in outputs.pooler_output]
    if getattr(outputs, "deepstack_features", None) is not None:
        outputs.deepstack_features = [[part[:0] for part in layer] for layer in outputs.deepstack_features]
    return {"mm_encoder_outputs": {"image": outputs}}


def freeze_tower(lm: nn.Module) -> None:
    """Have the vision tower of a model, where it has one, keep its weights."""
    for name, parameter in lm.named_parameters():
        if name.startswith(f"{TOWER}."):
            parameter.requires_grad_(False)


class TokenNetwork(nn.Module):
    """A language model whose forward goes from tokens to the log-probabilities of chosen ones.

    One forward, so that a sharding strategy gathers the output layer for it, and no logits but of a chunk of the chosen places.
    """

    def __init__(self, lm: PreTrainedModel, head: LMHead) -> None:
        super().__init__()
        self.lm, self.head = lm, head

    def forward(
        self,
        tokens: Tensor,
        places: Tensor,
        targets: Tensor,
        *,
        positions: Tensor | None,
        temperature: float | Tensor,
        entropy: bool,
        arriving: Tensor | None = None,
        pictures: Pictures | None = None,
        plain: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """log p Float32 "N" of `targets`, and the entropies. tokens: Int "B T"; places: Int "N", flat indices of the tokens before them.

        positions: Int "1 T" of sequences side by side in one row: where they start again at 0, attention does not look back further. Of
        models that place pictures in a plane "3 B T", and "4 1 T" of sequences side by side, the first of them as above.
        temperature: Of all tokens, or Float "N" of each.
        arriving: The gradient "N" that will come back to log p, but for one factor: see `token_logprobs`.
        plain: Of the logits that the model's forward gives, all of them at once.
        """
        # No attention mask: padding is on the right, where causal attention never looks from a real token. A mask of ones would let the
        # sequences of one row see each other.
        seen = seen_by(self.lm, pictures)
        if plain or self.head.kind == "whole":
            placed = {} if positions is None else {"position_ids": positions}
            logits = self.lm(input_ids=tokens, use_cache=False, **placed, **seen).logits.flatten(0, 1)[places]
            return picked(logits, targets, temperature=temperature, entropy=entropy)
        outputs = body(self.lm)(input_ids=tokens, position_ids=positions, use_cache=False, **seen)
        hidden = outputs.last_hidden_state.flatten(0, 1)[places]
        if self.head.kind == "own":
            return own_logprobs(self.lm, hidden, targets, temperature=temperature, entropy=entropy)
        return self._affine(hidden, targets, temperature=temperature, entropy=entropy, arriving=arriving)

    def _affine(
        self, hidden: Tensor, targets: Tensor, *, temperature: float | Tensor, entropy: bool, arriving: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        head = self.lm.get_output_embeddings()
        expect(self, head)
        low_rank = active_factors(head, hidden) if hasattr(head, "base_layer") else None  # PEFT's layers have one
        scale, softcap = self.head.scale, self.head.softcap
        found = token_logprobs(
            hidden, head.weight, targets, bias=head.bias, low_rank=low_rank, scale=scale, softcap=softcap, temperature=temperature,
            entropy=entropy, arriving=arriving,
        )  # fmt: skip
        return found.logprobs, found.entropy


def expect(reader: nn.Module, head: nn.Module) -> None:
    """Have ZeRO-3 gather the weights of `head` for every forward and backward of `reader`: unasked it gathers what a module owns."""
    for parameter in head.parameters():
        if hasattr(parameter, "ds_id") and id(parameter) not in getattr(reader, "_external_params", {}):
            import deepspeed

            deepspeed.zero.register_external_parameter(reader, parameter)
            parameter.all_gather()  # type: ignore[attr-defined]


def read_lm(pretrained: str, *, dtype: torch.dtype | str, attention: str | None, **source: str | bool | None) -> PreTrainedModel:
    """A frozen model of transformers from a folder or hub id, which may read pictures too."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    without_bars()
    chosen = {"attn_implementation": attention} if attention else {}
    try:
        config = AutoConfig.from_pretrained(pretrained, **source)
        text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
        auto = AutoModelForCausalLM if text else AutoModelForImageTextToText
        if leaves_weights():
            return frozen_of(auto.from_config, config, dtype=dtype, **chosen)
        lm = auto.from_pretrained(pretrained, dtype=dtype, **chosen, **source)
    except OSError as error:
        raise ConfigError(f"pretrained: {pretrained!r} is neither a folder nor a hub repository that can be read: {error}") from error
    if getattr(lm, "peft_config", None):
        raise ConfigError(
            f"pretrained: {pretrained!r} is an adapter with its base around it; give the base, and the adapter as lora.initial"
        )
    return lm.requires_grad_(False)


def check_folder(pretrained: str) -> str:
    """The folder or hub id as transformers takes it. Raises ConfigError for a folder without config.json; whether a hub id (owner/name)
    exists is found when it is loaded."""
    folder = Path(pretrained).expanduser()
    if not folder.exists():
        if len(pretrained.split("/")) == 2 and not pretrained.startswith((".", "~", "/")) and not Path(pretrained.split("/")[0]).exists():
            return pretrained
        raise ConfigError(f"pretrained: no such folder {pretrained!r}; give a folder in transformers format or a hub id like 'owner/name'")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = adapter_fields(folder).get("base_model_name_or_path")
        raise ConfigError(
            f"pretrained: {pretrained!r} is a LoRA adapter of {base}: give {base} here, and this folder as lora.initial; or make a "
            f"model of both by `python -m lit_rl.merge {pretrained} --base {base} --out FOLDER`"
        )
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing" if folder.is_dir() else "a file"
        raise ConfigError(f"pretrained: {pretrained!r} is not a transformers model: no config.json there, found {found}")
    return str(folder)


def save_lm(lm: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a whole model, or these weights in its place, as its published files have them: so does vLLM read it.

    Published experts of Qwen3-VL are "experts in out", and in memory "experts out in"; transformers reads both and would write the latter.
    """
    if lm.config.model_type != "qwen3_vl_moe":
        lm.save_pretrained(folder, state_dict=weights)
        return
    given = lm.state_dict() if weights is None else weights
    turned = {name: x.transpose(1, 2).contiguous() if ".mlp.experts." in name else x for name, x in given.items()}
    lm.save_pretrained(folder, state_dict=turned, save_original_format=False)


def save_processors(pretrained: str, folder: Path, *, revision: str = "main") -> None:
    """Copy the settings by which a model reads pictures, where the folder or hub repository has them."""
    from transformers.utils import cached_file

    for name in PROCESSOR_FILES:
        file = cached_file(pretrained, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, folder / name)


def recompute(blocks: Sequence[nn.Module]) -> None:
    """Have each block keep no activations for the backward pass, in evaluation mode too, where transformers' own switch does nothing."""
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)  # hooks of sharding stay outside of it


def _recomputed(forward: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    again: Callable[P, T] = partial(checkpoint, forward, use_reentrant=False)
    return again(*args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)
