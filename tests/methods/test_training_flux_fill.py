"""Warm-up, policy gradient and DiffusionNFT on a miniature FLUX-Fill: the adapter alone, with LoRA beside it, and every weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from fill import FillData, build_fill, fill_policy, rows
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from toy import toy_trainer, with_parts

from callbacks.ema import EMA
from callbacks.old_policy import OldPolicySync
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.types import Examples

Method = FlowGRPO | DiffusionNFT
KINDS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "adapter, frozen reference": {"keep_reference": True},
    "adapter and LoRA": {"lora": {"rank": 4, "alpha": 8.0}},
    "everything": {"train": "full", "keep_reference": True},
}
RATES = {"adapter": 3e-2, "adapter, frozen reference": 3e-2, "adapter and LoRA": 1e-2, "everything": 3e-3}
CLASSES = [FlowGRPO, DiffusionNFT]
HALF: dict[str, float] = {"value": 0.5, "end": 0.5}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fill(tmp_path_factory.mktemp("fill"))


def method(places: Path, cls: type[Method] = FlowGRPO, kind: str = "adapter", **changes: Any) -> Method:
    own: dict[str, Any] = dict(clip_low=1e-2, clip_high=1e-2) if cls is FlowGRPO else dict(beta=0.5)
    sizes = dict(prompts_per_iteration=4, group_size=4, num_steps=4, eval_num_steps=4, rollout_micro_batch=8, warmup_batch_size=8)
    settings: dict[str, Any] = own | sizes | dict(kl_coef=1e-3, optimizer=lambda params: torch.optim.AdamW(params, lr=RATES[kind]))
    torch.manual_seed(0)
    return cls(fill_policy(places, **KINDS[kind]), **with_parts(cls, settings | changes))


def train(
    folder: Path, module: Method, *callbacks: L.Callback, decay: Any = "slow", ckpt_path: str | None = None, **changes: Any
) -> L.Trainer:
    old = [OldPolicySync(decay)] if isinstance(module, DiffusionNFT) else []
    trainer = toy_trainer(folder, callbacks=[*old, *callbacks], **changes)
    trainer.fit(module, FillData(), ckpt_path=ckpt_path)
    return trainer


# ---------------------------------------------------------------------- it learns
@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("kind", "rise"), [("adapter", 0.03), ("adapter and LoRA", 0.03), ("everything", 0.1)])
def test_reward_of_held_out_images_rises(places: Path, tmp_path: Path, cls: type[Method], kind: str, rise: float) -> None:
    module = method(places, cls, kind, group_size=8)
    before = toy_trainer(tmp_path, limit_val_batches=1.0).validate(module, FillData(), verbose=False)[0]["val/brightness"]
    risen = EarlyStopping("val/brightness", mode="max", stopping_threshold=before + rise, patience=100)
    trainer = train(tmp_path, module, risen, max_epochs=20, limit_val_batches=1.0, check_val_every_n_epoch=5)
    assert trainer.callback_metrics["val/brightness"] > before + rise


@pytest.mark.parametrize("kind", ["adapter", "adapter and LoRA", "everything"])
def test_the_warm_up_imitates_the_examples(places: Path, tmp_path: Path, kind: str) -> None:
    """Flow matching on the same noises before and after."""

    def loss(module: Method) -> float:
        info, images = FillData().examples(1, 8)
        with torch.no_grad():
            return float(module.supervised.losses(module, Examples(info=info, images=images, step=10**6, first=0)).mean())

    module = method(places, FlowGRPO, kind, warmup_steps=40)
    module.policy.load()
    before = loss(module)
    train(tmp_path, module, max_epochs=1)
    assert loss(module) < 0.98 * before


def test_an_example_without_style_teaches_the_adapter_nothing(places: Path) -> None:
    """Style dropout: its loss has the gradient 0 in every weight of the adapter; that of an example with style has not, in the values."""
    module = method(places, warmup_steps=1)
    module.policy.load()
    images = torch.stack([row["source"] for row in rows(2)])

    def gradients(*, styled: bool) -> dict[str, Tensor]:
        module.zero_grad()
        info = [{**row, "styled": styled} for row in rows(2)]
        module.supervised.losses(module, Examples(info=info, images=images, step=0, first=0, weights=torch.ones(2))).sum().backward()
        return {name: p.grad.abs().max() for name, p in module.policy.trainable() if p.grad is not None}

    assert not any(gradients(styled=False).values())
    assert all(largest > 0 for name, largest in gradients(styled=True).items() if "to_v_ip" in name)


# ---------------------------------------------------------------------- the reference
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("kind", "divergent"),
    [("adapter", True), ("adapter and LoRA", True), ("adapter, frozen reference", False), ("everything", False)],
)
def test_the_reference_after_a_warm_up(places: Path, tmp_path: Path, cls: type[Method], kind: str, divergent: bool) -> None:
    """The first update of the first iteration: nothing separates the policy from what the warm-up left, its style from the base."""
    module = method(places, cls, kind, warmup_steps=4)
    trainer = train(tmp_path, module, max_epochs=2)
    assert (float(trainer.callback_metrics["kl_divergence"]) > 1e-8) == divergent


@pytest.mark.parametrize("cls", CLASSES)
def test_the_divergence_holds_the_style_back(places: Path, tmp_path: Path, cls: type[Method]) -> None:
    """After 4 iterations of a strong pull to "no style" the adapter says less than after 4 without."""
    said = []
    for kl_coef in (0.0, 100.0):
        module = method(places, cls, kl_coef=kl_coef)
        train(tmp_path, module, max_epochs=4)
        policy = module.policy
        cond = policy.condition(rows(2))
        x, t = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(1)), torch.tensor([0.9, 0.4])
        with torch.no_grad(), policy.reference():
            plain = policy.velocity(x, t, cond)
        with torch.no_grad():
            said.append(float((policy.velocity(x, t, cond) - plain).square().mean()))
    assert 0 < said[1] < 0.5 * said[0]


# ---------------------------------------------------------------------- the old policy, and going on
@pytest.mark.parametrize("kind", KINDS)
def test_the_old_policy_is_of_every_trained_weight(places: Path, tmp_path: Path, kind: str) -> None:
    """One update per iteration: before the third rollout old = (first + second) / 2 in the adapter's weights as in LoRA's."""
    seen: list[dict[str, Tensor]] = []

    class Watch(L.Callback):
        def on_phase_start(self, trainer: L.Trainer, module: Any, name: str) -> None:
            if name == "rollout":
                seen.append({name: p.detach().clone() for name, p in module.policy.trainable()})

    module = method(places, DiffusionNFT, kind)
    old = OldPolicySync(HALF)
    trainer = toy_trainer(tmp_path, callbacks=[old, Watch()], max_epochs=2)
    trainer.fit(module, FillData())
    held = old.old_weights(trainer, module)
    assert held.keys() == seen[0].keys() and any("to_v_ip" in name for name in held) and any("image_proj" in name for name in held)
    for name, weight in held.items():
        torch.testing.assert_close(weight, (seen[0][name] + seen[1][name]) / 2)
    moved = {name for name in held if not torch.equal(seen[0][name], seen[1][name])}
    assert {name for name in held if "to_v_ip" in name} <= moved


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("kind", "cls"), zip(KINDS, CLASSES * 2, strict=True))
def test_a_continued_run_ends_as_the_unbroken_one(places: Path, tmp_path: Path, cls: type[Method], kind: str) -> None:
    """From inside the warm-up, its end, and inside an iteration whose images, masks and references are in the checkpoint then."""

    def run(folder: Path, **how: Any) -> dict[str, Tensor]:
        save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        average, module = EMA(0.9), method(places, cls, kind, warmup_steps=2, updates_per_iteration=2)
        trainer = train(folder, module, average, save, decay=HALF, max_epochs=3, enable_checkpointing=True, **how)
        assert trainer.global_step == 2 + 2 * 2
        ema = {f"ema {name}": weight for name, weight in average.averaged_weights(trainer, module).items()}
        return {name: p.detach().clone() for name, p in module.policy.named_parameters()} | ema

    unbroken = run(tmp_path / "unbroken")
    for step in (1, 2, 3):
        continued = run(tmp_path / str(step), ckpt_path=str(tmp_path / "unbroken" / f"step={step}.ckpt"))
        assert unbroken.keys() == continued.keys()
        assert [name for name in unbroken if not torch.equal(unbroken[name], continued[name])] == [], step
