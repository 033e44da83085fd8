"""How much one has to know to read a method: files that its step enters, storeys of its classes, options of its constructor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from toy import ToyData, toy_trainer
from toy_text import Digits, policy, trainer

from benchmarks.house import FORMULAS, ROOT, arguments, depth
from lit_rl.losses.flow import FlowKL
from lit_rl.losses.kl import KL
from lit_rl.losses.step_surrogates import Clip as StepClip
from lit_rl.losses.surrogates import Clip
from lit_rl.methods.diffusion_nft import AWM, DiffusionNFT
from lit_rl.methods.dpo import DPO
from lit_rl.methods.flow_grpo import DanceGRPO, FlowGRPO, FlowGRPOFast, GRPOGuard, MixGRPO
from lit_rl.methods.grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePP
from lit_rl.methods.gspo_mixed import MixedGSPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.sft import SFT
from lit_rl.miniatures.images import build_sd3
from lit_rl.modules.base import LitRL
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.samplers.flow import SDE

METHODS: list[type[LitRL[Any]]] = [SFT, DPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePP, CISPO, DAPO, PPO, MixedGSPO]
FLOWS: list[type[LitRL[Any]]] = [FlowGRPO, FlowGRPOFast, MixGRPO, DanceGRPO, GRPOGuard, DiffusionNFT, AWM]


def entered(call: Callable[[], Any]) -> set[str]:
    """Files of ours whose functions are called, but for the rooms of formulas."""
    found: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT / "lit_rl"):
            found.add(".".join(file.relative_to(ROOT).with_suffix("").parts))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {name for name in found if not name.startswith(FORMULAS)}


def test_a_step_of_grpo_enters_six_files(sorting_lm: Path) -> None:
    """With the parts of the shipped recipe: a divergence from a kept reference, dual clipping, recomputed activations."""
    seen: set[str] = set()

    class Watched(GRPO):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result: list[Any] = []
            step = super().training_step
            seen.update(entered(lambda: result.append(step(batch, batch_idx))))
            return result[0]

    method = Watched(
        policy(sorting_lm, keep_reference=True, gradient_checkpointing=True),
        prompts_per_iteration=8,
        prompts_per_update=4,
        group_size=4,
        answers=Answers(sampling=Sampling(max_new_tokens=5)),
        surrogate=Clip(dual=3.0),
        kl=KL(coef=0.001),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    trainer(max_epochs=1, limit_val_batches=0).fit(method, datamodule=Digits())
    assert {"lit_rl.methods.grpo", "lit_rl.modules.base"} <= seen and len(seen) <= 6, sorted(seen)


def test_a_step_of_flow_grpo_enters_four_files_and_those_of_its_policy(tmp_path: Path) -> None:
    """With the parts of the shipped recipe: its sampler, clip range and divergence from the reference, which is the base of the adapter."""
    seen: set[str] = set()

    class Watched(FlowGRPO):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result: list[Any] = []
            step = super().training_step
            seen.update(entered(lambda: result.append(step(batch, batch_idx))))
            return result[0]

    build_sd3(tmp_path / "sd3")
    method = Watched(
        SD3Policy(str(tmp_path / "sd3"), resolution=(16, 32), guidance_scale=4.5, lora=LoraSettings(rank=2), max_sequence_length=8),
        prompts_per_iteration=2,
        group_size=2,
        num_steps=3,
        rollout_micro_batch=4,
        sde=SDE(dynamics="flow_sde", noise_level=0.7),
        surrogate=StepClip(low=1e-4, high=1e-4),
        kl=FlowKL(coef=0.04),
        optimizer=partial(torch.optim.AdamW, lr=1e-4),
    )
    toy_trainer(tmp_path, max_epochs=1).fit(method, ToyData(prompts=2))
    own = {name for name in seen if not name.startswith("lit_rl.policies")}
    assert own == {"lit_rl.methods.flow_grpo", *(f"lit_rl.modules.{name}" for name in ("base", "flow", "meters"))}
    assert len(seen) <= 10, " ".join(sorted(seen))


@pytest.mark.parametrize("method", FLOWS)
def test_a_flow_method_is_three_storeys_above_the_base_at_most(method: type[LitRL[Any]]) -> None:
    assert depth(method) <= 3


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_four_storeys_above_the_base_at_most(method: type[LitRL[Any]]) -> None:
    assert depth(method) <= 4


@pytest.mark.parametrize("method", METHODS)
def test_a_constructor_has_twenty_options_at_most(method: type[LitRL[Any]]) -> None:
    """Those of `**kwargs` included, as the command line resolves them."""
    names = arguments(method)
    assert len(names) <= 20, sorted(names)
