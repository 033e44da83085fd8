"""One epoch is one rollout: what must not depend on how the work is cut, and what must survive a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toy import Brightness, Broken, Metrics, ToyData, toy_method, toy_trainer, weights

from lit_rl.credit.advantage import Advantage
from lit_rl.errors import ConfigError
from lit_rl.losses.step_surrogates import DPPO
from lit_rl.methods.flow_grpo import DanceGRPO, FlowGRPO, FlowGRPOFast, GRPOGuard, MixGRPO
from lit_rl.types import Info


def run(folder: Path, method: FlowGRPO, *, ckpt_path: str | None = None, **kwargs: Any) -> FlowGRPO:
    toy_trainer(folder, **kwargs).fit(method, ToyData(), ckpt_path=ckpt_path)
    return method


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
        return weights(run(tmp_path, toy_method(warmup_steps=2, kl_coef=0.1, **cut), accumulate_grad_batches=accumulate, max_epochs=4))

    torch.testing.assert_close(train(cut), train(CUTS[0]), rtol=1e-5, atol=1e-6)


def test_several_updates_per_rollout_see_every_pair_once_and_every_group_alike(tmp_path: Path) -> None:
    method = toy_method(updates_per_iteration=8, train_micro_batch=4, inner_epochs=2)
    trainer = toy_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(method, ToyData())
    assert method.rollout is not None
    rollout = method.rollout
    pairs, per_group = rollout.logprobs.numel(), method.group_size * rollout.logprobs.shape[1]
    plan = method.split(rollout, 0)
    assert sorted(torch.cat(plan).tolist()) == list(range(pairs))
    updates = [torch.cat(plan[i : i + 3]) for i in range(0, len(plan), 3)]
    assert len(updates) == trainer.global_step // 2 > 1
    for update in updates:
        counts = (update // per_group).bincount(minlength=method.prompts_per_iteration)
        assert counts.max() - counts.min() <= 1
    assert rollout.weights is not None
    torch.testing.assert_close(rollout.weights.sum(), torch.tensor(float(len(updates))))
    assert not torch.equal(plan[0], method.split(rollout, 1)[0])


def test_first_update_is_on_policy(tmp_path: Path) -> None:
    metrics = Metrics()
    run(tmp_path, toy_method(), callbacks=[metrics])
    assert all(row["ratio_first_update_max_dev"] < 1e-6 for row in metrics.rows)


def test_second_update_is_not(tmp_path: Path) -> None:
    metrics = Metrics()
    run(tmp_path, toy_method(updates_per_iteration=2), callbacks=[metrics])
    assert metrics.rows[-1]["ratio_max_dev"] > 1e-4 and metrics.rows[-1]["ratio_first_update_max_dev"] < 1e-6


@pytest.mark.parametrize(
    "method",
    [
        lambda: toy_method(dynamics="cps", noise_level=0.7),
        lambda: toy_method(kl_coef=0.01),
        lambda: toy_method(FlowGRPOFast, window_size=2, window_range=(0, 3), same_latent=True, clip_low=1e-2, clip_high=1e-2),
        lambda: toy_method(MixGRPO, num_steps=6, window_size=2, iterations_per_window=5),
        lambda: toy_method(DanceGRPO, noise_level=0.6),
        lambda: toy_method(GRPOGuard, clip_low=1e-3, clip_high=1e-3),
        lambda: toy_method(surrogate=DPPO(threshold=1e-3), updates_per_iteration=2),
        lambda: toy_method(surrogate=DPPO(threshold=1e-3), updates_per_iteration=2, seed=1),
        lambda: toy_method(advantage=Advantage(kind="history")),
        lambda: toy_method(advantage=Advantage(kind="gdpo")),
        lambda: toy_method(advantage=Advantage(std="group", drop_zero=True), storage_dtype="bfloat16"),
    ],
    ids=["cps", "kl", "fast", "mix", "dance", "guard", "dppo", "dppo, another seed", "history", "gdpo", "bf16"],
)
def test_reward_on_held_out_prompts_rises(tmp_path: Path, method: Any) -> None:
    trained, data = method(), ToyData()
    trainer = toy_trainer(tmp_path, max_epochs=30, limit_val_batches=1.0, check_val_every_n_epoch=100)
    before = trainer.validate(trained, data, verbose=False)[0]["val/brightness"]
    trainer.fit(trained, data)
    after = trainer.validate(trained, data, verbose=False)[0]["val/brightness"]
    assert after > before + 0.1


def test_reference_costs_nothing_without_kl(tmp_path: Path) -> None:
    calls = [run(tmp_path, toy_method(kl_coef=kl), max_epochs=1).policy.velocity_calls for kl in (0.0, 0.1)]
    assert calls[1] == calls[0] + 1


class Gradients(L.Callback):
    """Counts the gradients that are there when a phase starts and when an epoch ends."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {"rollout": [], "score": [], "end": []}

    def on_phase_start(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        self.seen[name].append(sum(p.grad is not None for p in pl_module.parameters()))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_phase_start(trainer, pl_module, "end")


def test_gradients_take_no_memory_while_the_policy_acts(tmp_path: Path) -> None:
    run(tmp_path, toy_method(), max_epochs=2, callbacks=[gradients := Gradients()])
    assert gradients.seen["rollout"] == gradients.seen["score"] == [0, 0] and all(gradients.seen["end"])


def test_each_prompt_is_encoded_once_per_rollout(tmp_path: Path) -> None:
    method = run(tmp_path, toy_method(), max_epochs=1)
    assert len(method.policy.encoded) == method.prompts_per_iteration


def test_shared_prefix_is_computed_once_per_group(tmp_path: Path) -> None:
    """N = 6, window {2, 3}: two steps for 4 groups (1 call each), four steps for 16 samples in micro-batches of 4 (4 calls each)."""

    class Late(FlowGRPOFast):
        def window(self, iteration: int) -> range:
            return range(2, 4)

    method = toy_method(Late, num_steps=6, same_latent=True, rollout_micro_batch=4)
    run(tmp_path, method, max_epochs=1)
    assert method.policy.velocity_calls == 2 * 1 + 4 * 4 + 1  # and one training forward
    assert method.rollout is not None and method.rollout.latents.shape[:2] == (16, 3)
    starts = method.rollout.latents[:, 0].view(4, 4, -1)
    assert torch.equal(starts, starts[:, :1].expand_as(starts)) and not torch.equal(starts[0], starts[1])


def test_unscored_samples_leave_the_loss(tmp_path: Path) -> None:
    method, metrics = toy_method(prompts_per_iteration=6), Metrics()
    run(tmp_path, method, max_epochs=1, callbacks=[metrics], rewards={"brightness": Broken()}, max_failed_fraction=0.5)
    rollout = method.rollout
    assert rollout is not None and rollout.weights is not None
    lost = torch.tensor([row["prompt"] == "1" for row in rollout.info])
    assert (rollout.weights[lost] == 0).all() and (rollout.weights[~lost] > 0).all()
    torch.testing.assert_close(rollout.weights.sum(), torch.tensor(1.0))
    assert metrics.rows[0]["nan_ratio"] == pytest.approx(1 / 6) and weights(method).isfinite().all()


def test_unscored_images_are_not_counted_as_wrong(tmp_path: Path) -> None:
    """Prompt "1" of 0 ... 4 has no score, the others have 1.0."""

    class AllRight(Broken):
        def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
            scores = super().score(media, info)["brightness"]
            return {"brightness": torch.where(scores.isnan(), scores, 1.0)}

    data = ToyData()
    data.held_out = [data.train_prompts[i] for i in range(5)]
    trainer = toy_trainer(tmp_path, rewards={"brightness": AllRight()}, max_failed_fraction=0.5, limit_val_batches=1.0)
    (metrics,) = trainer.validate(toy_method(), data, verbose=False)
    assert metrics == {"val/brightness": 1.0, "val/brightness_perfect": 1.0}

    class Unbounded(AllRight):
        highest: Mapping[str, float] = MappingProxyType({})

    trainer = toy_trainer(tmp_path, rewards={"brightness": Unbounded()}, max_failed_fraction=0.5, limit_val_batches=1.0)
    assert trainer.validate(toy_method(), data, verbose=False) == [{"val/brightness": 1.0}]


def test_checkpoints_are_named_by_the_iterations_behind_them(tmp_path: Path) -> None:
    """Also those that are written at an evaluation, within the epoch."""
    names = dict(filename="iteration-{iteration:.0f}", auto_insert_metric_name=False, save_top_k=-1)
    newest = ModelCheckpoint(tmp_path / "all", save_on_train_epoch_end=True, **names)
    best = ModelCheckpoint(tmp_path / "best", save_on_train_epoch_end=False, monitor="val/brightness", mode="max", **names)
    trainer = toy_trainer(tmp_path, callbacks=[newest, best], max_epochs=3, limit_val_batches=1.0, enable_checkpointing=True)
    trainer.fit(toy_method(warmup_steps=2), ToyData())
    for folder in ("all", "best"):
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == [f"iteration-{i}.ckpt" for i in range(3)]


def test_dance_grpo_decodes_the_predicted_clean_image(tmp_path: Path) -> None:
    levels = toy_method(DanceGRPO, num_steps=5).noise_levels(range(4))
    assert levels == [0.3] * 4 + [0.0]
    assert toy_method(DanceGRPO, num_steps=5, timestep_fraction=1.0).noise_levels(range(5)) == [0.3] * 5


@pytest.mark.parametrize(("schedule", "second"), [("pipeline", 0.75), ("linear", 0.75), ("shifted", 0.9)])
def test_schedule_is_an_option(tmp_path: Path, schedule: Any, second: float) -> None:
    """u = 3/4 shifted by 3: 3 u / (1 + 2 u) = 2.25 / 2.5."""
    method = run(tmp_path, toy_method(schedule_kind=schedule, schedule_shift=3.0), max_epochs=1)
    assert method.rollout is not None
    assert method.rollout.times[0, :2].tolist() == pytest.approx([1.0, second])


def test_images_can_be_rendered_from_a_checkpoint_of_another_number_of_processes(tmp_path: Path) -> None:
    every = checkpointing(tmp_path / "a", every_n_train_steps=1)
    run(tmp_path, toy_method(updates_per_iteration=4), callbacks=[every], max_epochs=1, enable_checkpointing=True)
    path = tmp_path / "a" / "epoch=0-step=1.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["rollout"]["world_size"] = 8
    torch.save(saved, path)
    with pytest.raises(ConfigError, match="written inside an iteration by 8 processes"):
        run(tmp_path, toy_method(updates_per_iteration=4), ckpt_path=str(path))
    toy_trainer(tmp_path).predict(toy_method(), ToyData(), ckpt_path=str(path))


def checkpointing(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}-{step}", **kwargs)


@pytest.mark.parametrize("kind", ["epoch end", "inside an iteration", "inside the warm-up", "end of the warm-up", "last minibatch"])
def test_resume_equals_the_unbroken_run_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """8 minibatches in epochs 1 ... 3 (2 passes x 4), 6 in the warm-up; accumulation of 2."""

    def method() -> FlowGRPO:
        return toy_method(
            warmup_steps=3,
            warmup_lr=1e-3,
            updates_per_iteration=4,
            train_micro_batch=12,
            inner_epochs=2,
            kl_coef=0.1,
            advantage=Advantage(kind="history"),
        )

    settings: dict[str, Any] = dict(accumulate_grad_batches=2, max_epochs=4, enable_checkpointing=True)
    every, name = {
        "epoch end": (dict(every_n_epochs=1, save_on_train_epoch_end=True), "epoch=1-step=7"),
        "inside an iteration": (dict(every_n_train_steps=1), "epoch=2-step=9"),
        "inside the warm-up": (dict(every_n_train_steps=1), "epoch=0-step=2"),
        "end of the warm-up": (dict(every_n_train_steps=1), "epoch=0-step=3"),
        "last minibatch": (dict(every_n_train_steps=1), "epoch=1-step=7"),
    }[kind]
    unbroken = run(tmp_path, method(), callbacks=[checkpointing(tmp_path / "a", **every)], **settings)
    path = tmp_path / "a" / f"{name}.ckpt"
    continued = method()
    trainer = toy_trainer(tmp_path, callbacks=[checkpointing(tmp_path / "b", **every)], **settings)
    trainer.fit(continued, ToyData(), ckpt_path=str(path))
    assert torch.equal(weights(unbroken), weights(continued))
    assert unbroken.tracker is not None and continued.tracker is not None
    assert unbroken.tracker.state_dict() == continued.tracker.state_dict()
    saved = [torch.load(tmp_path / d / "epoch=3-step=15.ckpt", weights_only=True) for d in "ab"]
    for a, b in zip(*(s["optimizer_states"][0]["state"].values() for s in saved)):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert ("rollout" in torch.load(path, weights_only=True)) == (kind == "inside an iteration")


@pytest.mark.parametrize("scheduler", [None, lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)])
def test_learning_rate_of_the_warm_up_and_after_it(tmp_path: Path, scheduler: Any) -> None:
    """40 warm-up steps: a rise over 2, peak 0.1, half a cosine; then 0.01, halved every second step by the run's own scheduler."""
    rates: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run(tmp_path, toy_method(warmup_steps=40, warmup_lr=0.1, lr_scheduler=scheduler), callbacks=[Rates()], max_epochs=5)
    assert rates[0] == pytest.approx(0.05) and rates[20] == pytest.approx(0.05) and max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates[39] < 0.001
    assert rates[40:] == pytest.approx([0.01, 0.01, 0.005, 0.005] if scheduler else [0.01] * 4)


def test_moments_of_the_warm_up_are_forgotten(tmp_path: Path) -> None:
    steps: list[float] = []

    class Steps(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
            state = next(iter(optimizer.state.values()), {"step": torch.tensor(0.0)})
            steps.append(float(state["step"]))

    run(tmp_path, toy_method(warmup_steps=3), callbacks=[Steps()], max_epochs=3)
    assert steps == [0, 1, 2, 0, 1]


def test_geometry_that_does_not_divide_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    method = toy_method(updates_per_iteration=49)
    with pytest.raises(ConfigError, match="49 optimizer steps of a pass that has 48 .* lower it to at most 48"):
        run(tmp_path, method)
    assert not hasattr(method.policy, "network")


def test_more_minibatches_than_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs on a process \(48\); lower it to at most 48"):
        run(tmp_path, toy_method(), accumulate_grad_batches=49)


def test_two_16_bit_formats_are_refused(tmp_path: Path) -> None:
    method = toy_method()
    method.policy.dtype = torch.float16
    with pytest.raises(ConfigError, match=r"precision=bf16-mixed and model\.policy\.dtype=float16"):
        run(tmp_path, method, precision="bf16-mixed")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_training_in_16_bits_is_refused(tmp_path: Path, precision: Any) -> None:
    with pytest.raises(ConfigError, match=rf"precision={precision} keeps what is trained in 16 bits, .* set it to b?f?16-mixed"):
        run(tmp_path, toy_method(), precision=precision)


def test_max_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set trainer.max_epochs"):
        run(tmp_path, toy_method(), max_steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(clip_low=0.0), "surrogate.low=0.0 must be in"),
        (dict(dynamics="ode"), "nothing to learn from"),
        (dict(dynamics="cps", noise_level=1.2), "at most 1 for cps"),
        (dict(timestep_fraction=0.0), "timestep_fraction=0.0 must be in"),
        (dict(schedule_kind="shifted", schedule_shift=0.0), "shift=0.0 must be above 0"),
        (dict(group_size=0), "group_size=0 must be at least 1"),
        (dict(group_size=1), "gives every sample advantage 0"),
        (dict(train_micro_batch=0), "train_micro_batch=0 must be at least 1"),
        (dict(kl_coef=0.1, advantage=Advantage(drop_zero=True)), "the divergence still trains"),
    ],
)
def test_out_of_range_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_method(**settings)


def test_a_plateau_of_the_reward_lowers_the_learning_rate(tmp_path: Path) -> None:
    """A reward that stays the same: halved after every iteration but the first."""
    from lightning.pytorch.cli import ReduceLROnPlateau

    class Constant(Brightness):
        def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
            return {"brightness": torch.arange(len(media)).double() % 2}

    def plateau(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, monitor="reward_mean", mode="max", patience=0, factor=0.5)

    trainer = toy_trainer(tmp_path, rewards={"brightness": Constant()}, max_epochs=4)
    trainer.fit(toy_method(lr_scheduler=plateau), ToyData())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 / 2**3)
    for scheduler, warmup in ((torch.optim.lr_scheduler.ReduceLROnPlateau, 0), (plateau, 2)):
        with pytest.raises(ConfigError, match="model.lr_scheduler: ReduceLROnPlateau waits for a metric"):
            run(tmp_path, toy_method(lr_scheduler=scheduler, warmup_steps=warmup))
