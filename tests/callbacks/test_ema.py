"""The average is the recursion it says, is seen by evaluation only, and survives everything exactly."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from copies import OneFrozen, equal, keep_all, weights
from golden_numbers import assert_close, load
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor
from toy import Brightness, ToyData, ToyPolicy, toy_method, toy_trainer

from callbacks.ema import EMA
from callbacks.old_policy import EMAOldPolicy, OldPolicySync
from callbacks.reward_scoring import RewardScoring
from lit_rl.errors import ConfigError
from lit_rl.methods.diffusion_nft import DiffusionNFT


class Watch(L.Callback):
    """The weights after every optimizer step, and those that evaluation sees."""

    def __init__(self) -> None:
        self.live: list[dict[str, Tensor]] = []
        self.warming_up: list[bool] = []
        self.evaluated: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.initial, self.step = weights(module), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.live.append(weights(module))
            self.warming_up.append(module.warming_up)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append(weights(module))

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        self.after.append(weights(module))

    on_predict_batch_start = on_test_batch_start = on_validation_batch_start


def hand_rolled(watch: Watch, *, decay: float, warmup_steps: int = 10, interval: int = 1) -> dict[str, Tensor]:
    """The published recursion, one tensor after another, in float64."""
    average = {name: w.double() for name, w in watch.initial.items()}
    s = 0
    for live, warming_up in zip(watch.live, watch.warming_up, strict=True):
        d = 0.0 if warming_up else min((1 + s) / (warmup_steps + s), decay)
        if warming_up or (s + 1) % interval == 0:
            average = {name: d * a + (1 - d) * live[name].double() for name, a in average.items()}
        s += not warming_up
    return average


@pytest.mark.parametrize(
    "ema, method",
    [
        (dict(decay=0.9), dict(updates_per_iteration=6)),
        (dict(decay=0.9, warmup_steps=1), dict(updates_per_iteration=3)),
        (dict(decay=0.5, update_interval=3), dict(updates_per_iteration=6)),
        (dict(decay=0.9), dict(updates_per_iteration=6, warmup_steps=4)),
    ],
)
def test_equals_the_recursion(tmp_path: Path, ema: dict, method: dict) -> None:
    average, watch = EMA(**ema), Watch()
    trainer, module = toy_trainer(tmp_path, callbacks=[average, watch]), toy_method(**method)
    trainer.fit(module, ToyData())
    expected = hand_rolled(watch, decay=ema["decay"], warmup_steps=ema.get("warmup_steps", 10), interval=ema.get("update_interval", 1))
    held = average.averaged_weights(trainer, module)
    assert held.keys() == expected.keys() and not equal(held, weights(module))
    for name, tensor in held.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)


def test_one_step_per_optimizer_step(tmp_path: Path) -> None:
    """Micro-batches of a third of the size leave the average as it is: it steps when the optimizer does."""
    held = []
    for accumulate in (1, 3):
        average = EMA(decay=0.9)
        trainer = toy_trainer(tmp_path, callbacks=[average], accumulate_grad_batches=accumulate)
        module = toy_method(updates_per_iteration=2)
        trainer.fit(module, ToyData())
        assert average.steps == trainer.global_step
        held.append(average.averaged_weights(trainer, module))
    for name in held[0]:
        torch.testing.assert_close(held[0][name], held[1][name], rtol=0, atol=1e-6)


@pytest.mark.golden
def test_reproduces_the_published_wrapper(golden_dir: Path) -> None:
    """Flow-GRPO's EMAModuleWrapper: fed with the same weights, the callback holds the same averages after every step."""
    data = load(golden_dir / "diffusion", "ema")
    for interval in data["intervals"].tolist():
        for tag in ("f32", "f64"):
            indices = [i for i in range(99) if f"{tag}_init_{i}" in data]
            trained = [
                i for i in indices if not torch.equal(data[f"{tag}_interval{interval}_ema_step0_{i}"], data[f"{tag}_param_step0_{i}"])
            ]
            parameters = {i: torch.nn.Parameter(data[f"{tag}_init_{i}"].clone()) for i in trained[:-1]}
            module, trainer = policy_of(parameters), SimpleNamespace(global_step=0, is_global_zero=True)
            average = EMA(float(data["decay"]), update_interval=interval)
            average.on_train_start(trainer, module)
            for s in range(int(data["n_steps"])):
                for i, parameter in parameters.items():
                    parameter.data.copy_(data[f"{tag}_param_step{s}_{i}"])
                trainer.global_step += 1
                average.on_train_batch_end(trainer, module, None, None, s)
                held = average.averaged_weights(trainer, module)
                for i in parameters:
                    expected = data[f"{tag}_interval{interval}_ema_step{s}_{i}"]
                    assert_close(held[str(i)], expected.float(), f32=2e-5, what=f"{tag} interval {interval} step {s} tensor {i}")


def policy_of(parameters: dict[int, torch.nn.Parameter]) -> Any:
    """A module whose policy has these trainable weights."""
    network = torch.nn.Module()
    for i, parameter in parameters.items():
        network.register_parameter(str(i), parameter)
    network.trainable = lambda: network.named_parameters()
    return SimpleNamespace(policy=network, warming_up=False)


# ---------------------------------------------------------------------- swapping
class Precise(ToyPolicy):
    """Weights of another precision than the latents."""

    dtype = torch.float32

    def load(self) -> None:
        super().load()
        self.network.to(self.dtype)
        self.network.register_forward_pre_hook(lambda network, inputs: (inputs[0].to(self.dtype),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_sees_the_average_and_training_never(tmp_path: Path, dtype: torch.dtype) -> None:
    """Averages are float32; weights of more precision would not survive a way through them. They return bit for bit."""
    average, watch = EMA(decay=0.9), Watch()
    trainer = toy_trainer(tmp_path, callbacks=[average, watch], max_epochs=3, limit_val_batches=1.0)
    module = toy_method(updates_per_iteration=3)
    module.policy = Precise()
    module.policy.dtype = dtype
    trainer.fit(module, ToyData())
    per_epoch = len(watch.live) // 3
    for epoch in (1, 2):
        assert equal(watch.after[epoch], watch.live[epoch * per_epoch - 1])
    assert not equal(watch.evaluated[-1], watch.live[-1])
    held = average.averaged_weights(trainer, module)
    assert equal(watch.evaluated[-1], {name: tensor.to(watch.live[-1][name].dtype) for name, tensor in held.items()})
    assert equal(weights(module), watch.live[-1])


def test_an_average_that_is_not_evaluated_is_not_swapped_in(tmp_path: Path) -> None:
    watch = Watch()
    trainer = toy_trainer(tmp_path, callbacks=[EMA(decay=0.9, evaluate=False), watch], limit_val_batches=1.0)
    trainer.fit(toy_method(), ToyData())
    assert equal(watch.evaluated[-1], watch.live[-1])


def test_an_error_in_evaluation_gives_the_weights_back(tmp_path: Path) -> None:
    class Broken(L.Callback):
        def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("broken evaluation")

    watch = Watch()
    trainer = toy_trainer(tmp_path, callbacks=[EMA(decay=0.9), watch, Broken()], limit_val_batches=1.0)
    module = toy_method()
    with pytest.raises(RuntimeError, match="broken evaluation"):
        trainer.fit(module, ToyData())
    assert not equal(watch.evaluated[-1], watch.live[-1])
    assert equal(weights(module), watch.live[-1])


# ---------------------------------------------------------------------- checkpoints
@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A finished run of 3 epochs: (folder, average, weights)."""
    average = EMA(decay=0.9)
    trainer = toy_trainer(tmp_path, callbacks=[average, keep_all(tmp_path)], max_epochs=3, enable_checkpointing=True)
    module = toy_method(updates_per_iteration=6)
    trainer.fit(module, ToyData())
    return SimpleNamespace(folder=tmp_path, average=average.averaged_weights(trainer, module), weights=weights(module), steps=average.steps)


def test_a_continued_run_ends_with_the_same_average(run: Any) -> None:
    average = EMA(decay=0.9)
    trainer, module = toy_trainer(run.folder / "again", callbacks=[average], max_epochs=3), toy_method(updates_per_iteration=6)
    trainer.fit(module, ToyData(), ckpt_path=run.folder / "epoch=0.ckpt")
    assert average.steps == run.steps
    assert equal(weights(module), run.weights)
    assert equal(average.averaged_weights(trainer, module), run.average)


def test_the_file_is_plain_and_holds_the_average_once(run: Any) -> None:
    saved = torch.load(run.folder / "epoch=2.ckpt", weights_only=True)["ema"]
    assert equal(saved["weights"], run.average)
    assert saved["steps"] == run.steps


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_use_the_average_of_their_checkpoint(run: Any, command: str) -> None:
    watch = Watch()
    trainer = toy_trainer(run.folder / "again", callbacks=[EMA(), watch], limit_val_batches=1.0)
    module = toy_method()
    getattr(trainer, command)(module, ToyData(), ckpt_path=run.folder / "epoch=2.ckpt")
    assert watch.evaluated and equal(watch.evaluated[0], run.average)
    assert equal(weights(module), run.weights)


def test_a_checkpoint_without_an_average_starts_one(tmp_path: Path) -> None:
    first = toy_trainer(tmp_path, callbacks=[keep_all(tmp_path)], max_epochs=1, enable_checkpointing=True)
    first.fit(toy_method(), ToyData())
    average, watch = EMA(decay=0.9), Watch()
    trainer, module = toy_trainer(tmp_path, callbacks=[average, watch]), toy_method()
    trainer.fit(module, ToyData(), ckpt_path=tmp_path / "epoch=0.ckpt")
    expected = hand_rolled(watch, decay=0.9)
    for name, tensor in average.averaged_weights(trainer, module).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)


def test_the_average_of_another_model_is_refused(run: Any) -> None:
    module = toy_method()
    module.policy = OneFrozen()
    with pytest.raises(ConfigError, match=r"average is of other weights.*network\.0\.0\.weight"):
        trainer = toy_trainer(run.folder / "again", callbacks=[EMA()], limit_val_batches=1.0)
        trainer.validate(module, ToyData(), ckpt_path=run.folder / "epoch=2.ckpt")


@pytest.mark.parametrize("wrong", [dict(decay=1.0), dict(decay=-0.1), dict(warmup_steps=0), dict(update_interval=0)])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EMA(**wrong)


# ---------------------------------------------------------------------- of which a run can have one
class Another(EMA):
    pass


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([EMA(), EMA(0.5)], "trainer.callbacks has EMA and EMA, of which a run can have one"),
        ([EMA(evaluate=False), Another()], "has EMA and Another"),
        ([EMAWeightAveraging()], "EMAWeightAveraging knows neither rollouts nor .* use callbacks.ema.EMA in its place"),
        ([StochasticWeightAveraging(1e-2)], "StochasticWeightAveraging knows neither"),
        ([RewardScoring({"b": Brightness()})], "RewardScoring and RewardScoring, of which a run can have one: .* under `rewards` of one"),
    ],
)
def test_two_that_would_swap_the_same_weights_are_refused_before_the_model_is_loaded(tmp_path: Path, callbacks: Any, message: str) -> None:
    method = toy_method()
    with pytest.raises(ConfigError, match=message):
        toy_trainer(tmp_path, callbacks=callbacks).fit(method, ToyData())
    assert not hasattr(method.policy, "network")


def test_two_old_policies_are_refused(tmp_path: Path) -> None:
    adam = partial(torch.optim.AdamW, lr=1e-2)
    method = DiffusionNFT(ToyPolicy(), prompts_per_iteration=4, group_size=4, num_steps=4, optimizer=adam)
    with pytest.raises(ConfigError, match="OldPolicySync and EMAOldPolicy, of which a run can have one"):
        toy_trainer(tmp_path, callbacks=[OldPolicySync(), EMAOldPolicy()]).fit(method, ToyData())
