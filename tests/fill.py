"""A miniature FLUX-Fill with style references, and prompts with images for it. For tests of everything but the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from datamodules.base import PromptDataModule
from lit_rl.miniatures.images import build_flux
from lit_rl.policies.flux_fill import FluxFillPolicy
from lit_rl.policies.style import StyleSettings
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.types import ALL, Info

HEIGHT, WIDTH, FEATURES, SIDE = 16, 24, 10, 12
RELEASED: dict[str, Any] = {"qformer": True, "heads": 2, "key_tokens": 2}
"""Style settings with a Q-Former, as the published adapter has one."""


def build_fill(folder: Path) -> Path:
    """`folder`/pipeline and `folder`/siglip."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sizes = {"hidden_size": FEATURES, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=SIDE, patch_size=4)).save_pretrained(folder / "siglip")
    build_flux(
        folder / "pipeline", height=HEIGHT, width=WIDTH, hidden=32, heads=2, layers=1, single_layers=1, text_hidden=16, text_length=16,
        t5_hidden=24, fill=True, image_channels=3,
    )  # fmt: skip
    return folder


def settings(folder: Path, *, style: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """`init_args` of a `FluxFillPolicy` over what `build_fill` built, as a YAML has them."""
    styled = {"encoder": str(folder / "siglip"), "tokens": 3} | (style or {})
    sizes = {"resolution": [HEIGHT, WIDTH], "max_sequence_length": 8, "context_height": 8, "guidance_scale": 3.5}
    return {"pretrained": str(folder / "pipeline"), "style": styled, **sizes, **({"lora": lora} if lora else {}), **changes}


def fill_policy(folder: Path, **changes: Any) -> FluxFillPolicy:
    given = settings(folder, **changes)
    lora = given.pop("lora", None)
    given |= {"style": StyleSettings(**given["style"]), "lora": LoraSettings(**lora) if lora else None}
    return FluxFillPolicy(**given | {"resolution": (HEIGHT, WIDTH)})


def rows(count: int, *, seed: int = 1) -> list[Info]:
    """Different images, masks and references."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
        mask[2 + i % 3 : 14, 3:21] = 255
        images = {name: torch.randint(0, 256, (3, *size), generator=g, dtype=torch.uint8) for name, size in SIZES.items()}
        found.append(MappingProxyType({"prompt": f"say {i}{i}", "mask": mask, **images}))
    return found


SIZES = {"source": (HEIGHT, WIDTH), "reference": (10, 20)}


class FillData(PromptDataModule):
    """4 prompts to train and 2 held out; the images to imitate are the sources with a black hole, every third is shown without style."""

    def __init__(self) -> None:
        found = rows(6)
        super().__init__(found[:4], found[4:], eval_batch_size=1)

    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Tensor]:
        chosen = [self.train_prompts[i % 4] for i in range(count)]
        images = torch.stack([row["source"] * (row["mask"] == 0) for row in chosen])
        return [MappingProxyType({**row, "styled": (step + i) % 3 > 0}) for i, row in enumerate(chosen)][part], images[part]
