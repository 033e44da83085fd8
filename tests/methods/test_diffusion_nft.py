"""DiffusionNFT on the toy: it learns, and what must change nothing changes nothing, bit for bit where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toy import ToyData, ToyPolicy, toy_trainer, weights, with_parts

from callbacks.old_policy import EMAOldPolicy, OldPolicySync
from lit_rl.credit.advantage import Advantage
from lit_rl.errors import ConfigError
from lit_rl.losses.point_surrogates import NFT, Matching
from lit_rl.methods.diffusion_nft import AWM, DiffusionNFT
from lit_rl.replay.pairs import sibling_numbers
from lit_rl.types import Prompts


def nft(cls: type[DiffusionNFT] = DiffusionNFT, *, lr: float = 1e-2, dropout: float = 0.0, **kwargs: Any) -> DiffusionNFT:
    defaults: dict[str, Any] = dict(
        prompts_per_iteration=4, group_size=4, num_steps=4, eval_num_steps=4, rollout_micro_batch=6, warmup_batch_size=24, kl_coef=0.0,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
    )  # fmt: skip
    return cls(ToyPolicy(dropout=dropout), **with_parts(cls, defaults | kwargs))


def run(
    folder: Path, method: DiffusionNFT, *, old: OldPolicySync | None = None, callbacks: Sequence[L.Callback] = (), **kwargs: Any
) -> DiffusionNFT:
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = toy_trainer(folder, callbacks=[old or OldPolicySync("slow"), *callbacks], **kwargs)
    trainer.fit(method, ToyData(), ckpt_path=ckpt_path)
    return method


# ---------------------------------------------------------------------- it learns
@pytest.mark.parametrize(
    "method, old",
    [
        *((lambda mode=mode: nft(adv_mode=mode), "slow") for mode in ("normal", "positive_only", "negative_only", "one_only", "binary")),
        (lambda: nft(beta=0.1, updates_per_iteration=3, kl_coef=0.01), "copy"),
        (lambda: nft(timesteps="uniform", timestep_range=(0.5, 1.0), solver="ode"), "late"),
        (lambda: nft(timesteps="logit_normal", timestep_shift=2.0, solver="ddim", eta=0.5), {"slope": 0.02, "end": 0.3}),
        (lambda: nft(AWM, updates_per_iteration=3), "slow"),
        (lambda: nft(storage_dtype="bfloat16", advantage=Advantage(std="group", drop_zero=True), solver="dpm1"), "ema"),
    ],
    ids=["normal", "positive_only", "negative_only", "one_only", "binary", "beta", "noisy half", "ddim", "awm", "ema as old"],
)
def test_reward_on_held_out_prompts_rises(tmp_path: Path, method: Any, old: Any) -> None:
    trained, data = method(), ToyData()
    sync = EMAOldPolicy() if old == "ema" else OldPolicySync(old)
    trainer = toy_trainer(tmp_path, max_epochs=30, limit_val_batches=1.0, check_val_every_n_epoch=100, callbacks=[sync])
    before = trainer.validate(trained, data, verbose=False)[0]["val/brightness"]
    trainer.fit(trained, data)
    after = trainer.validate(trained, data, verbose=False)[0]["val/brightness"]
    assert after > before + 0.1


# ---------------------------------------------------------------------- the old policy
def test_old_is_new_until_the_first_step_and_not_after_it(tmp_path: Path) -> None:
    """Three updates of one micro-batch in each of two iterations: old starts as a copy, and slow copies exactly at step 0 only."""
    deviations: list[float] = []

    class Watched(NFT):
        def __call__(self, new: Tensor, old: Tensor, *given: Any, **named: Any) -> Any:
            deviations.append(float((new - old).detach().abs().max()))
            return super().__call__(new, old, *given, **named)

    run(tmp_path, nft(surrogate=Watched(), updates_per_iteration=3))
    assert len(deviations) == 6 and deviations[0] == 0 and min(deviations[1:]) > 0


@pytest.mark.parametrize(
    "decay, kwargs, forwards",
    [
        ("copy", dict(updates_per_iteration=1), 1),  # one update per rollout: always on-policy
        ("copy", dict(updates_per_iteration=3), 1 + 2 + 2),  # three updates: the old forward in the last two
        ("frozen", dict(updates_per_iteration=1), 2),
    ],
)
def test_forwards_of_the_second_iteration(tmp_path: Path, decay: Any, kwargs: dict, forwards: int) -> None:
    """Beside 4 solver steps in 3 micro-batches."""
    method, counts = nft(**kwargs), []

    class Count(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            counts.append(module.policy.velocity_calls)

    run(tmp_path, method, old=OldPolicySync(decay), callbacks=[Count()])
    assert counts[1] - counts[0] == 4 * 3 + forwards


@pytest.mark.parametrize("decay", ["copy", "slow", "late"])
@pytest.mark.parametrize("cls", [DiffusionNFT, AWM])
def test_elision_changes_nothing(tmp_path: Path, decay: Any, cls: type[DiffusionNFT]) -> None:
    """Bit for bit: an old forward that is never left out gives the same weights."""

    class NeverCurrent(OldPolicySync):
        is_current = False  # type: ignore[assignment]

    ends = []
    for sync in (OldPolicySync(decay), NeverCurrent(decay)):
        method = nft(cls, updates_per_iteration=3, kl_coef=0.1, warmup_steps=2)
        ends.append((weights(run(tmp_path, method, old=sync, max_epochs=4)), method.policy.velocity_calls))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] < ends[1][1]


def test_rollouts_are_the_old_policys(tmp_path: Path) -> None:
    """Frozen: whatever is learned, samples with the same noise stay what they were."""

    class SameNoise(DiffusionNFT):
        def row_keys(self, prompts: Prompts) -> Any:
            return list(zip(prompts.group.tolist(), sibling_numbers(prompts.group)))

    class Kept(L.Callback):
        def __init__(self) -> None:
            self.seen: dict[str, list[Tensor]] = {}

        def on_rollout_end(self, trainer: L.Trainer, module: Any, rollout: Any) -> None:
            self.seen.setdefault(rollout.info[0]["prompt"], []).append(rollout.latents[:4])

    kept = {}
    for decay in ("frozen", "copy"):
        watch = Kept()
        run(tmp_path, nft(SameNoise), old=OldPolicySync(decay), callbacks=[watch], max_epochs=8)
        kept[decay] = [torch.equal(first, again) for first, *later in watch.seen.values() for again in later]
    assert kept["frozen"] and all(kept["frozen"]) and not any(kept["copy"])


def test_without_an_old_policy_it_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DiffusionNFT needs callbacks\.old_policy\.OldPolicySync"):
        toy_trainer(tmp_path).fit(nft(), ToyData())


# ---------------------------------------------------------------------- what is kept and trained
def test_a_rollout_is_one_latent_per_sample(tmp_path: Path) -> None:
    """N = 6 steps, 0.5 of them: 3 points each, without repetition, of the schedule and not the same for all samples."""
    method = run(tmp_path, nft(num_steps=6, timestep_fraction=0.5), max_epochs=1)
    rollout = method.rollout
    assert rollout is not None and rollout.latents.shape[:2] == (16, 1) and rollout.times.shape == (16, 3)
    schedule = method.policy.sigmas(6)[:-1].float()
    assert torch.isin(rollout.times, schedule).all()
    assert all(len(set(row)) == 3 for row in rollout.times.tolist())
    assert len({tuple(row) for row in rollout.times.tolist()}) > 3


@pytest.mark.parametrize("timesteps", ["schedule", "uniform", "logit_normal"])
def test_points_stay_in_their_range(tmp_path: Path, timesteps: Any) -> None:
    method = nft(num_steps=8, timesteps=timesteps, timestep_range=(0.5, 0.9), timestep_fraction=0.5)
    rollout = run(tmp_path, method, max_epochs=1).rollout
    assert rollout is not None and rollout.times.shape == (16, 4)  # 7/8, 6/8, 5/8 and 4/8
    assert rollout.times.min() >= 0.5 and rollout.times.max() <= 0.9


def test_what_a_method_adds_is_in_its_minibatches(tmp_path: Path) -> None:
    """Streams of an action, columns and media of a trajectory, whatever is cut how; what has no weight is harmless."""
    method = run(tmp_path, nft(), max_epochs=1)
    assert method.rollout is not None
    b, s = method.rollout.mask.shape
    numbers = torch.arange(b * s).view(b, s).float()
    numbers[0, 0] = torch.nan
    media = [[torch.full((2,), i)] for i in range(b)]
    added = replace(method.rollout.with_streams(number=numbers).with_columns(row=torch.arange(b)), media=media)
    pairs = torch.tensor([5, 2 * s + 1, ~0])  # the last only fills up
    batch = method.minibatch(added, pairs)
    assert batch.streams["number"].tolist() == [5, 2 * s + 1, 0] and batch.columns["row"].tolist() == [5 // s, 2, 0]
    assert [int(row[0][0]) for row in batch.media] == [5 // s, 2, 0] and method.minibatch(method.rollout, pairs).media == ()


def test_each_pass_draws_new_noise(tmp_path: Path) -> None:
    method = run(tmp_path, nft(inner_epochs=2), max_epochs=1)
    assert method.rollout is not None
    first, second = (torch.cat(method.split(method.rollout, e)).sort()[0] for e in (0, 1))
    a, b = method.minibatch(method.rollout, first), method.minibatch(method.rollout, second)
    assert torch.equal(a.x0, b.x0) and torch.equal(a.sigma, b.sigma) and torch.equal(a.weights, b.weights)
    assert not (a.noise == b.noise).any()


CUTS = [
    dict(train_micro_batch=None, accumulate_grad_batches=1, rollout_micro_batch=16),
    dict(train_micro_batch=16, accumulate_grad_batches=3, rollout_micro_batch=5),
    dict(train_micro_batch=6, accumulate_grad_batches=8, rollout_micro_batch=3),
]


@pytest.mark.parametrize("cut", CUTS[1:])
def test_size_of_micro_batches_and_accumulation_do_not_change_the_training(tmp_path: Path, cut: dict[str, Any]) -> None:
    def train(cut: dict[str, Any]) -> Tensor:
        cut = dict(cut)
        accumulate = cut.pop("accumulate_grad_batches")
        method = nft(warmup_steps=2, kl_coef=0.1, inner_epochs=2, **cut)
        return weights(run(tmp_path, method, accumulate_grad_batches=accumulate, max_epochs=4))

    torch.testing.assert_close(train(cut), train(CUTS[0]), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- resume
def checkpointing(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}-{step}", **kwargs)


@pytest.mark.parametrize("sync", [lambda: OldPolicySync({"value": 0.3, "end": 0.3}), EMAOldPolicy, lambda: OldPolicySync("copy")])
@pytest.mark.parametrize("kind", ["epoch end", "inside an iteration", "end of the warm-up", "last minibatch"])
def test_resume_equals_the_unbroken_run_bit_for_bit(tmp_path: Path, kind: str, sync: Any) -> None:
    """8 minibatches in epochs 1 ... 3 (2 passes x 4), 6 in the warm-up; accumulation of 2."""

    def method() -> DiffusionNFT:
        return nft(warmup_steps=3, warmup_lr=1e-3, updates_per_iteration=4, inner_epochs=2, kl_coef=0.1, beta=0.5)

    settings: dict[str, Any] = dict(accumulate_grad_batches=2, max_epochs=4, enable_checkpointing=True)
    every, name = {
        "epoch end": (dict(every_n_epochs=1, save_on_train_epoch_end=True), "epoch=1-step=7"),
        "inside an iteration": (dict(every_n_train_steps=1), "epoch=2-step=9"),
        "end of the warm-up": (dict(every_n_train_steps=1), "epoch=0-step=3"),
        "last minibatch": (dict(every_n_train_steps=1), "epoch=1-step=7"),
    }[kind]
    unbroken = run(tmp_path, method(), old=sync(), callbacks=[checkpointing(tmp_path / "a", **every)], **settings)
    path = str(tmp_path / "a" / f"{name}.ckpt")
    continued = run(tmp_path, method(), old=sync(), callbacks=[checkpointing(tmp_path / "b", **every)], ckpt_path=path, **settings)
    assert torch.equal(weights(unbroken), weights(continued))
    saved = [torch.load(tmp_path / d / "epoch=3-step=15.ckpt", weights_only=True)["old_policy"] for d in "ab"]
    assert saved[0]["synced_at"] == saved[1]["synced_at"]
    assert all(torch.equal(saved[0]["weights"][key], saved[1]["weights"][key]) for key in saved[0]["weights"])
    assert ("old_policy" in torch.load(path, weights_only=True)) == (kind != "end of the warm-up")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beta=0.0), "beta=0.0 must be above 0"),
        (dict(eta=0.5), "eta=0.5 is the noise of model.sampler.solver=ddim"),
        (dict(timestep_fraction=1.5), "points.fraction=1.5 must be in"),
        (dict(timestep_range=(0.9, 0.5)), r"points.range=\[0.9, 0.5\] must rise"),
        (dict(timestep_shift=0.0), "points.shift=0.0 be above 0"),
        (dict(kl_coef=-1.0), "kl.coef=-1.0 must not be negative"),
        (dict(kl_coef=0.1, advantage=Advantage(drop_zero=True)), "the divergence still trains"),
    ],
)
def test_out_of_range_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nft(**settings)


@pytest.mark.parametrize("bound", ["low", "high"])
def test_a_matching_range_is_within_0_and_1(bound: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.surrogate.{bound}=1.0 must be in \(0, 1\)"):
        Matching(**{bound: 1.0})


def test_a_range_with_too_few_points_is_refused(tmp_path: Path) -> None:
    """The schedule is 1, 3/4, 1/2, 1/4; 0.99 of 4 steps are 3 points."""
    with pytest.raises(ConfigError, match=r"asks for 3 points of 4, and model.points.range=\[0.3, 0.8\] holds 2: lower the first"):
        run(tmp_path, nft(timestep_range=(0.3, 0.8)))
