"""Vision-language models of transformers: Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL, which read pictures among the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_rl.errors import ConfigError, listed
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.language_model import TOWER, freeze_tower, save_processors
from lit_rl.policies.picture_tokens import PictureProcessor
from lit_rl.policies.sizes import read_config
from lit_rl.policies.weights.language_lora import add_language_lora
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.types import Media, Pictures, Size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Values of `model_type` in config.json."""


class VisionLanguageModel(CausalLM):
    """A language model that reads pictures, with its tokenizer and image processor from one folder or hub id.

    The language part is trained; the vision tower stays as it is unless `train_vision` is set.

    Args:
        pretrained: Folder in transformers format, or hub id, of a Qwen2.5-VL or Qwen3-VL of any size (experts too), or of its adapter.
        train_vision: Train the vision tower too: its linear layers get adapters as well with LoRA, else every weight is trained. An
            inference server must then take adapters of the tower (vLLM: --enable-tower-connector-lora).
        min_pixels: Smaller pictures are scaled up; None = as preprocessor_config.json says.
        max_pixels: Larger pictures are scaled down; None = as preprocessor_config.json says. A token stands for 28 x 28 pixels of
            Qwen2.5-VL, 32 x 32 of Qwen3-VL. With an inference server at least three times `min_pixels`, for it resizes what it is sent.
        kwargs: See `CausalLM`.
    """

    stored_with = (*CausalLM.stored_with, "train_vision")

    def __init__(
        self,
        pretrained: str,
        *,
        train_vision: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained, **kwargs)
        config = read_config(self.pretrained, **self.source)
        if config is not None and config.model_type not in FAMILIES:
            raise ConfigError(
                f"pretrained: {pretrained!r} is a {config.model_type}, and VisionLanguageModel reads {listed(FAMILIES)}: a model of "
                "text is lit_rl.policies.causal_lm.CausalLM"
            )
        self.train_vision = train_vision
        revision = self.source["revision"]
        self.pictures = PictureProcessor(
            self.pretrained, revision=str(revision) if revision else None, min_pixels=min_pixels, max_pixels=max_pixels
        )
        self.config: Any = config

    # ------------------------------------------------------------------ loading
    def load(self) -> None:
        """Read the weights (on the CPU). See `CausalLM.load`."""
        if "network" in self._modules:
            return
        super().load()
        self.config = self.network.lm.config
        if not self.train_vision:
            for network in self.networks():
                freeze_tower(network.get_submodule("lm"))

    def add_adapter(self, lm: PreTrainedModel, lora: LoraSettings) -> None:
        """Freeze a loaded model and add the trained adapter, to its vision tower too if that is trained."""
        add_language_lora(lm, lora, seed=torch.initial_seed(), beside=TOWER if self.train_vision else None)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers, and the blocks of the vision tower."""
        tower = network.get_submodule(f"lm.{TOWER}.blocks")
        return [*super().blocks(network), *tower.children()]

    def checkpoint_keys(self) -> set[str]:
        """See `TrainedPolicy.checkpoint_keys`; a vision tower that is not trained is read again."""
        keys = super().checkpoint_keys()
        return keys if self.train_vision else {key for key in keys if f".lm.{TOWER}." not in key}

    # ------------------------------------------------------------------ tokens
    @property
    def picture_id(self) -> int:
        """The token that stands for a piece of a picture."""
        return int(self.config.image_token_id)

    @property
    def banned_ids(self) -> list[int]:  # type: ignore[override]
        """Tokens that stand for pictures and films, and those around them: an answer that held one could not be read again."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return [int(i) for name in names if (i := getattr(self.config, name, None)) is not None]

    def with_pictures(self, ids: Sequence[int], learned: Sequence[bool], sizes: Sequence[Size]) -> tuple[list[int], list[bool]]:
        """See `TokenPolicy.with_pictures`. Raises ConfigError, too, for an answer that holds a place for a picture."""
        banned, places = set(self.banned_ids), [i for i, token in enumerate(ids) if token == self.picture_id]
        if any(kept and token in banned for token, kept in zip(ids, learned)):
            raise ConfigError("an answer that is learned holds a token that stands for pictures: take it out of the text")
        if len(places) != len(sizes):
            written = self.tokenizer.convert_ids_to_tokens(self.picture_id)
            raise ConfigError(
                f"{len(sizes)} images and {len(places)} places for them in the text: give the prompt as messages (data.chat: true for a "
                f'string), with {{"type": "image"}} or <image> where each belongs, and take {written} out of what is text'
            )
        count = dict(zip(places, map(self.pictures.tokens, sizes)))
        repeated = [(token, kept) for i, (token, kept) in enumerate(zip(ids, learned)) for _ in range(count.get(i, 1))]
        return [token for token, _ in repeated], [kept for _, kept in repeated]

    def one_place_each(self, ids: Sequence[int]) -> list[int]:
        """See `TokenPolicy.one_place_each`: of neighbouring places one is kept, for other tokens stand between two pictures."""
        return [token for i, token in enumerate(ids) if token != self.picture_id or not i or ids[i - 1] != token]

    def pieces(self, media: Sequence[Tensor]) -> int:
        """Tokens that stand for the pictures of a row."""
        return sum(self.pictures.pieces((picture.shape[1], picture.shape[2])) for picture in media)

    def misplaced(self, ids: Sequence[int], media: Sequence[Tensor]) -> str:
        """See `TokenPolicy.misplaced`."""
        places, pieces = list(ids).count(self.picture_id), self.pieces(media)
        return "" if places == pieces else f"its tokens hold {places} places for {pieces} pieces of its {len(media)} images"

    def media(self, pictures: Sequence[Tensor]) -> Sequence[Tensor]:
        """Pictures uint8 "3 H W" at the size at which the model reads them."""
        return [self.pictures.resized(picture) for picture in pictures]

    def generation_inputs(self, ids: Tensor, media: Media) -> dict[str, Tensor]:
        """See `TokenPolicy.generation_inputs`."""
        pictures = [picture for row in media for picture in row]
        if not pictures:
            return {}
        patches, grid = (x.to(ids.device) for x in self.pictures.patches(pictures))
        return {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == self.picture_id).int()}

    def trial(self, ids: Sequence[int]) -> tuple[list[int], Sequence[Tensor]]:
        """The words with a picture of 2 x 3 tokens among them."""
        side = self.pictures.cell
        shades = torch.arange(3 * 2 * side * 3 * side) % 251
        picture = self.pictures.resized(shades.to(torch.uint8).view(3, 2 * side, 3 * side))
        around = [int(getattr(self.config, name)) for name in ("vision_start_token_id", "vision_end_token_id")]
        return [*ids[:2], around[0], *[self.picture_id] * self.pieces([picture]), around[1], *ids[2:]], [picture]

    # ------------------------------------------------------------------ the network
    def look(self, inputs: Tensor, chosen: Tensor, media: Media) -> tuple[Tensor, Tensor | None, Pictures | None]:
        """See `TokenPolicy.look`. Raises ValueError where a row has more or fewer places than its pictures have pieces."""
        rows = media or [()] * len(inputs)
        pieces = torch.tensor([self.pieces(row) for row in rows], device=inputs.device)
        is_piece = inputs == self.picture_id
        sampled = pad(chosen, (1, 0))[:, :-1]
        # What a server let the policy sample is no picture's; the answer that holds it has no part in the loss.
        stray = is_piece & (is_piece.cumsum(1) > pieces[:, None]) & (sampled | ~chosen.any(1, keepdim=True))
        inputs, is_piece = inputs.masked_fill(stray, 0), is_piece & ~stray
        if (wrong := (is_piece.sum(1) != pieces).nonzero()[:, 0]).numel():
            i = int(wrong[0])
            raise ValueError(
                f"row {i} of a micro-batch has {int(is_piece[i].sum())} places for {int(pieces[i])} pieces of its {len(rows[i])} pictures"
            )
        shown = bool(is_piece.any())
        pictures = [picture for row in rows for picture in row] if shown else self.trial([])[1]
        patches, grid = (x.to(inputs.device) for x in self.pictures.patches(pictures))
        kinds = is_piece.int()
        found: Any = self.network.lm.get_submodule("model")
        positions, _ = found.get_rope_index(inputs, mm_token_type_ids=kinds, image_grid_thw=grid if shown else None)
        return inputs, positions, Pictures(patches, grid, kinds, shown)

    # ------------------------------------------------------------------ saving
    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """See `CausalLM.save`; a whole model has the vision tower of the folder that it was read from, and its processors' settings."""
        if self.full and not self.train_vision:
            tower = {f"network.lm.{key}": x for key, x in self._read().state_dict().items() if key.startswith(f"{TOWER}.")}
            weights = tower | weights
        super().save(folder, weights)
        if self.full:
            save_processors(self.pretrained, folder, revision=str(self.source["revision"] or "main"))
