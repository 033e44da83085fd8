"""The old policy is the recursion it says, acts exactly, and survives everything exactly."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from copies import OneFrozen, equal, keep_all, weights
from golden_numbers import assert_close, load
from torch import Tensor
from toy import ToyData, ToyPolicy, toy_method, toy_trainer, with_parts

from callbacks.old_policy import EMAOldPolicy, OldPolicySync
from lit_rl.errors import ConfigError
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.policies.weights.copies import WeightCopy
from lit_rl.policies.weights.decay import DECAY_TYPES, OLD_POLICY_DECAYS, ramp_decay

RAMP = {"start": 2, "value": 0.1, "slope": 0.05, "end": 0.2}


def nft(policy: ToyPolicy | None = None, **kwargs: Any) -> DiffusionNFT:
    """16 images and 48 pairs an iteration."""
    adam = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2)}
    sizes = {"prompts_per_iteration": 4, "group_size": 4, "num_steps": 4, "warmup_batch_size": 8}
    return DiffusionNFT(policy or ToyPolicy(), **with_parts(DiffusionNFT, {"kl_coef": 0.0} | sizes | adam | kwargs))


class Watch(L.Callback):
    """The trained weights after every step and at every rollout, and those that sampled."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Tensor]]] = []
        self.sampled: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.events.append(("step", weights(module)))

    def on_phase_start(self, trainer: L.Trainer, module: Any, name: str) -> None:
        if name == "rollout":
            self.events.append(("rollout", weights(module)))
            self.sampled.append({})

    def on_rollout_chunk(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.sampled[-1] = weights(module)


def hand_rolled(watch: Watch, ramp: dict[str, float], *, every: str, warmup: int) -> list[dict[str, Tensor]]:
    """The old policy of every rollout, one tensor after another, in float64; s counts the steps after the warm-up."""
    old: dict[str, Tensor] | None = None
    seen, s = [], -warmup
    for event, live in watch.events:
        s += event == "step"
        if event == "rollout" and old is None:
            old = {name: w.double() for name, w in live.items()}
        elif old is not None and event == every:
            d = ramp_decay(s, **ramp)
            old = {name: d * o + (1 - d) * live[name].double() for name, o in old.items()}
        if event == "rollout":
            assert old is not None
            seen.append(old)
    return seen


@pytest.mark.parametrize("decay, ramp", [("copy", {}), (0, {"value": 1.0, "end": 1.0}), ("fast", OLD_POLICY_DECAYS["fast"]), (RAMP, RAMP)])
@pytest.mark.parametrize("every", ["rollout", "step"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_equals_the_recursion(tmp_path: Path, decay: Any, ramp: dict, every: Any, warmup: int) -> None:
    sync, watch = OldPolicySync(decay, every=every), Watch()
    trainer = toy_trainer(tmp_path, callbacks=[sync, watch], max_epochs=5, accumulate_grad_batches=2)
    trainer.fit(nft(updates_per_iteration=3, warmup_steps=warmup), ToyData())
    expected = hand_rolled(watch, ramp, every=every, warmup=warmup)
    assert len(expected) == len(watch.sampled) == 5 - bool(warmup)
    for old, sampled in zip(expected, watch.sampled):
        for name, tensor in sampled.items():
            torch.testing.assert_close(tensor.double(), old[name], rtol=0, atol=1e-6)


def test_numbers_are_other_words_for_names() -> None:
    assert [OldPolicySync(i).ramp for i in DECAY_TYPES] == [OldPolicySync(name).ramp for name in ("frozen", "slow", "late")]
    assert (EMAOldPolicy().ramp, EMAOldPolicy().every) == (OLD_POLICY_DECAYS["slow"], "step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_trained_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    sync, module, trainer = started(dtype)
    old = weights(module)
    for p in module.policy.parameters():
        p.data.copy_(torch.randn_like(p))
    trainer.global_step += 1
    live = weights(module)
    assert not sync.is_current
    with pytest.raises(RuntimeError, match="broken"), sync.acting():
        assert equal(weights(module), old)
        raise RuntimeError("broken rollout")
    assert equal(weights(module), live)


def started(dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[OldPolicySync, Any, Any]:
    policy = torch.nn.Linear(3, 2).to(dtype)
    policy.trainable = policy.named_parameters  # type: ignore[assignment]
    module, trainer = SimpleNamespace(policy=policy, old_policy=None, warmup_steps=0), SimpleNamespace(global_step=0, strategy=None)
    sync = OldPolicySync(**kwargs)
    sync.setup(trainer, module, "fit")  # type: ignore[arg-type]
    sync.on_train_start(trainer, module)  # type: ignore[arg-type]
    sync.on_phase_start(trainer, module, "rollout")  # type: ignore[arg-type]
    assert module.old_policy is sync and sync.is_current
    return sync, module, trainer


def test_each_policy_answers_with_its_own_weights_under_autocast() -> None:
    """Autocast remembers the bfloat16 copies of float32 weights, which would answer for the next weights in the same step."""
    policy = ToyPolicy()
    policy.load()
    old = WeightCopy(policy)
    with torch.no_grad():
        for _, weight in policy.trainable():
            weight.add_(1.0)
    x, t, cond = torch.ones(3, 1, 2, 2), torch.full((3,), 0.5), policy.encode(["1", "2", "3"])

    def answer() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return policy.velocity(x, t, cond)

    live = answer()
    with old.applied(policy):
        copied = answer()
    assert (live - copied).abs().max() > 0.1, "or the test could not tell them apart"
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), old.applied(policy):
            assert torch.equal(policy.velocity(x, t, cond), copied)
        new = policy.velocity(x, t, cond)
    assert torch.equal(new, live)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        policy.velocity(x, t, cond)
        with old.applied(policy):
            assert torch.equal(policy.velocity(x, t, cond), copied)


def test_it_is_current_only_while_nothing_moved() -> None:
    """slow: d is 0 at step 0 only; copy: at every rollout."""
    for decay, later in (("slow", False), ("copy", True)):
        sync, module, trainer = started(decay=decay)
        sync.on_phase_start(trainer, module, "rollout")
        assert sync.is_current
        trainer.global_step = 1
        assert not sync.is_current
        sync.on_phase_start(trainer, module, "rollout")
        assert sync.is_current is later


# ---------------------------------------------------------------------- the authors' numbers
def updated(decay: Any, step: int, old: Tensor, new: Tensor) -> Tensor:
    """The old tensors after the callback's update before a rollout at this step."""
    policy = torch.nn.Module()
    policy.weight = torch.nn.Parameter(old.clone())
    policy.trainable = policy.named_parameters  # type: ignore[assignment]
    trainer = SimpleNamespace(global_step=step, strategy=None, is_global_zero=True)
    module, sync = SimpleNamespace(policy=policy, old_policy=None, warmup_steps=0), OldPolicySync(decay)
    sync.on_phase_start(trainer, module, "rollout")  # type: ignore[arg-type]
    policy.weight.data.copy_(new)
    sync.on_phase_start(trainer, module, "rollout")  # type: ignore[arg-type]
    return sync.old_weights(trainer, module)["weight"]  # type: ignore[arg-type]


@pytest.mark.golden
def test_diffusion_nfts_updates(golden_dir: Path) -> None:
    data = load(golden_dir / "diffusion", "ema")
    for step in data["oldpolicy_steps"].tolist():
        found = updated("slow", step, data["oldpolicy_tgt"], data["oldpolicy_src"])
        assert_close(found, data[f"oldpolicy_type1_step{step}"], what=f"step {step}")


@pytest.mark.golden
def test_the_flux_fill_trainers_updates(golden_dir: Path) -> None:
    """Its code's types; its guide calls type 0 frozen, its code copies."""
    folder = golden_dir / "calligrapher"
    described = [case for case in json.loads((folder / "rl.json").read_text())["cases"] if re.fullmatch(r"old\d_\d+", case.get("key", ""))]
    assert {case["decay_type"] for case in described} == {0, 1, 2}
    with np.load(folder / "rl.npz", allow_pickle=False) as data:
        for case in described:
            name = "copy" if case["decay_type"] == 0 else DECAY_TYPES[case["decay_type"]]
            for key in (k for k in data.files if k.startswith(case["key"] + "/cur")):
                old, new, expected = (torch.from_numpy(data[key.replace("/cur", kind)]) for kind in ("/old", "/cur", "/out"))
                assert_close(updated(name, case["step"], old, new), expected, what=key)


# ---------------------------------------------------------------------- checkpoints
def test_a_checkpoint_without_an_old_policy_starts_one(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, callbacks=[keep_all(tmp_path)], max_epochs=1, enable_checkpointing=True)
    trainer.fit(toy_method(), ToyData())
    sync, watch = OldPolicySync("frozen"), Watch()
    toy_trainer(tmp_path, callbacks=[sync, watch], max_epochs=3).fit(nft(), ToyData(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len(watch.sampled) == 2 and all(equal(sampled, watch.events[0][1]) for sampled in watch.sampled)


def test_the_old_policy_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, callbacks=[OldPolicySync(), keep_all(tmp_path)], max_epochs=1, enable_checkpointing=True)
    trainer.fit(nft(), ToyData())
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    del saved["optimizer"]
    torch.save(saved | {"lr_schedulers": [], "optimizer_states": [nothing()]}, tmp_path / "fresh.ckpt")
    with pytest.raises(ConfigError, match=r"old policy is of other weights.*network\.0\.0\.weight"):
        toy_trainer(tmp_path, callbacks=[OldPolicySync()]).fit(nft(OneFrozen()), ToyData(), ckpt_path=tmp_path / "fresh.ckpt")


def nothing() -> dict:
    """The state of an optimizer of three tensors that made no step."""
    module = nft()
    module.policy.load()
    return torch.optim.AdamW(list(module.policy.network.parameters())[1:], lr=1e-2).state_dict()


# ---------------------------------------------------------------------- what is refused
def test_methods_without_an_old_policy_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OldPolicySync has no part in FlowGRPO"):
        toy_trainer(tmp_path, callbacks=[OldPolicySync()]).fit(toy_method(), ToyData())


@pytest.mark.parametrize(
    "wrong, message", [({"stop": 0.5}, "has stop"), ({"end": 1.5}, "decay.end=1.5 must be in"), ({"value": -1}, "value=-1")]
)
def test_impossible_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OldPolicySync(wrong)
