"""Memory of pictures in prompts: the vision tower of a language model over imagined patches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_rl.doctor.ledger import Ledger, mixed
from lit_rl.doctor.placement import Line
from lit_rl.policies.language_model import TOWER
from lit_rl.policies.vision_language import VisionLanguageModel


def patches_at_most(policy: VisionLanguageModel, tokens: int) -> int:
    """Patches of the pictures of a prompt: of one as large as is read, and no more than stand for `tokens` tokens."""
    pictures = policy.pictures
    most = pictures.pixels.longest_edge
    assert most is not None
    return min(most // pictures.cell**2, tokens) * int(pictures.stock.merge_size) ** 2


def looked_at(network: nn.Module, pictures: int, patches: int, lower: torch.dtype | None) -> list[float]:
    """Bytes that are held when a tower has read so many pictures of so many patches, and the most while it does, or learns.

    Attention is computed as of each picture whole: windows take no memory of their own. A tower that is not trained keeps nothing but its
    outputs.
    """
    tower: Any = network.get_submodule(f"lm.{TOWER}")
    config = tower.config
    numbers = config.in_channels * config.temporal_patch_size * config.patch_size**2
    ends = np.arange(pictures + 1) * patches  # of a tensor the numbers would be imagined, too
    with Ledger() as ledger:
        pixels = torch.zeros(pictures * patches, numbers)
        turns = torch.zeros(len(pixels), config.hidden_size // config.num_heads)
        with mixed(lower):
            found = _read(tower, pixels, turns, ends)
        held = ledger.now
        if any(part.requires_grad for part in found):
            torch.autograd.backward(torch.stack([part.float().sum() for part in found]).sum())
    return [held, ledger.peak]


def _read(tower: Any, pixels: Tensor, turns: Tensor, ends: np.ndarray) -> list[Tensor]:
    """Read pixels: a vector for each token of the language model, and where the family has them vectors of earlier blocks."""
    hidden = tower.patch_embed(pixels)
    for block in tower.blocks:
        hidden = block(hidden, cu_seqlens=ends, position_embeddings=(turns, turns))
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    return [merger(hidden) for merger in mergers]


def lines(held: float, peak: float, *, what: str, activations: float) -> Iterator[Line]:
    """Lines of a tower beside the activations of the language model, which come after what the tower holds only while it reads."""
    yield Line(what, held, "training")
    yield Line("the vision tower at work", max(0.0, peak - held - activations), "training")
