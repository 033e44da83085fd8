"""Memory of pictures in prompts beside what a vision tower really allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory import allocated, unread

from lit_rl.doctor import phases
from lit_rl.doctor.ledger import imagined, mixed
from lit_rl.doctor.placement import Placement
from lit_rl.doctor.shallow import extrapolated
from lit_rl.doctor.towers import lines, looked_at, patches_at_most
from lit_rl.methods.sft import SFT
from lit_rl.miniatures.vlm import Family, build_vlm
from lit_rl.policies.language_model import TOWER
from lit_rl.policies.vision_language import VisionLanguageModel

PICTURES, SIDE = 3, 32


def sft(folder: Path, **options: Any) -> SFT:
    return SFT(VisionLanguageModel(str(folder), **options), prompts_per_iteration=PICTURES)


@pytest.mark.parametrize(
    ("family", "options", "autocast"),
    [
        ("qwen25_vl", {}, torch.bfloat16),
        ("qwen25_vl", {"train_vision": True, "gradient_checkpointing": True}, None),
        ("qwen3_vl", {"train_vision": True}, None),
    ],
)
def test_a_tower_holds_what_a_real_one_does(family: Family, options: dict[str, Any], autocast: torch.dtype | None, tmp_path: Path) -> None:
    """The most bytes within 15 %, of three pictures through five blocks, told from two of them."""
    folder = build_vlm(tmp_path, family=family, vision_hidden=256, vision_layers=5)
    real = sft(folder, **options).policy
    real.load()
    phases.freed({real.network: ()})
    tower = real.network.get_submodule(f"lm.{TOWER}")
    config, grid = tower.config, torch.tensor([[1, SIDE, SIDE]] * PICTURES)
    numbers = config.in_channels * config.temporal_patch_size * config.patch_size**2

    def look() -> None:
        with mixed(autocast):
            out = tower(torch.zeros(PICTURES * SIDE**2, numbers), grid_thw=grid)
        found = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        if out.pooler_output.requires_grad:
            torch.autograd.backward(torch.stack([part.sum() for part in found]).sum())

    measured = allocated(look)
    method = unread(sft(folder, **options))
    blocks = {method.policy.network: method.policy.blocks(method.policy.network)}
    with imagined(gpu=False):
        phases.prepared(blocks, Placement(gpu=False))
        held, peak = extrapolated(blocks, lambda: looked_at(method.policy.network, PICTURES, SIDE**2, autocast))
    assert peak == pytest.approx(measured, rel=0.15)
    assert 0 < held < peak


def test_pictures_are_as_large_as_is_read_and_as_prompts_have_places_for(tmp_path: Path) -> None:
    """224 x 224 pixels at most are 64 tokens of 28 x 28 pixels, each of four patches."""
    policy = VisionLanguageModel(str(build_vlm(tmp_path)))
    assert [patches_at_most(policy, tokens) for tokens in (1000, 64, 10)] == [256, 256, 40]
    told = {line.what: line.bytes for line in lines(5.0, 30.0, what="pictures", activations=20.0)}
    assert told == {"pictures": 5.0, "the vision tower at work": 5.0}
    assert [line.bytes for line in lines(5.0, 20.0, what="pictures", activations=20.0)] == [5.0, 0.0]
