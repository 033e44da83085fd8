"""Multi-turn GRPO on a world of texts: it learns, continues exactly, counts each trajectory once, and says what it cannot do."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from copies import every_step
from digit_world import DigitWorld, DigitWorlds, agent, digit_tasks
from toy_text import model_folder, trainer, weights

from callbacks.base import RLCallback
from callbacks.rng_state import RngState
from lit_rl.credit.trajectories import trajectory_numbers
from lit_rl.credit.turns import GiGPO, TurnReturns
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import KL
from lit_rl.losses.surrogates import Clip
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("agent") / "lm")


class Told(RLCallback):
    """Counts the episodes that it is told of, in training and in evaluation."""

    def __init__(self) -> None:
        self.training: list[int] = []
        self.evaluation: list[int] = []

    def on_trajectories(self, trainer: Any, module: Any, trajectories: Any) -> None:
        (self.training if trainer.training else self.evaluation).append(len(trajectories))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_model_learns_to_act(model: Path, tmp_path: Path, seed: int) -> None:
    learner, tasks = agent(model, seed=seed), digit_tasks(tmp_path)
    before = trainer(callbacks=[]).validate(learner, datamodule=tasks, verbose=False)[0]
    run = trainer(max_epochs=25, check_val_every_n_epoch=25, callbacks=[])
    run.fit(learner, datamodule=tasks)
    assert before["val/accuracy"] <= 0.5 and run.callback_metrics["val/accuracy"] >= 0.85
    assert run.callback_metrics["val/turns"] < before["val/turns"] and run.callback_metrics["success"] >= 0.7


@pytest.mark.parametrize(
    "settings",
    [{"kl": KL(coef=0.1)}, {"credit": GiGPO(), "aggregation": "token-mean"}, {"credit": TurnReturns(), "prompts_per_update": 4}],
    ids=["kl", "gigpo", "turn returns"],
)
def test_trajectories_weigh_and_vote_once(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    told = Told()
    made = agent(model, keep_reference="kl" in settings, **settings)
    run = trainer(max_epochs=1, callbacks=[told], accumulate_grad_batches=2, check_val_every_n_epoch=1)
    run.fit(made, datamodule=digit_tasks(tmp_path))
    rollout = made.rollout
    number = trajectory_numbers(rollout.group, rollout.columns["trajectory"])
    assert int(number.max()) == 63 and told.training == [64] and told.evaluation == [8]
    assert made.rollout_metrics["group_size_mean"] == 8.0 and made.rollout_metrics["samples"] == len(rollout) > 64
    weighed = torch.zeros(64).index_add(0, number, rollout.weights.sum(1))
    if settings.get("aggregation") != "token-mean":
        torch.testing.assert_close(weighed, torch.full((64,), 1 / 64 * made.updates))
    assert 0 <= made.rollout_metrics["success"] <= 1 and made.rollout_metrics["episodes/lost"] == 0
    assert run.callback_metrics["val/accuracy"] <= 1 and rollout.advantages.isfinite().all()


class Compared(Clip):
    """The largest difference between the policy's log-probabilities in the loss and the old ones."""

    gap = 0.0

    def __call__(self, new: Any, old: Any, *args: Any, **kwargs: Any) -> Any:
        self.gap = max(self.gap, float((new - old).abs().max()))
        return super().__call__(new, old, *args, **kwargs)


def test_siblings_train_at_the_temperatures_that_they_were_sampled_at(model: Path, tmp_path: Path) -> None:
    """1, 1.5, 2, 2.5: the engine's log-probabilities are the trainer's and the loss's at each, the reference's and evaluation's too."""
    sampling, surrogate = Sampling(max_new_tokens=2), Compared()
    answers = Answers(sampling=sampling, eval_sampling=sampling, old_logprobs="recompute")
    settings: dict[str, Any] = {"answers": answers, "surrogate": surrogate, "kl": KL(coef=0.1), "keep_reference": True}
    made = agent(model, group_size=4, temperature_increment=0.5, **settings)
    run = trainer(max_epochs=1, callbacks=[], check_val_every_n_epoch=1)
    run.fit(made, datamodule=digit_tasks(tmp_path))
    rollout, behaviour = made.rollout, made.rollout.streams["behaviour"]
    assert torch.equal(rollout.columns["temperature"], 1 + 0.5 * rollout.columns["trajectory"])
    assert rollout.columns["temperature"].unique().tolist() == [1.0, 1.5, 2.0, 2.5]
    for mine in (rollout.logprobs, rollout.streams["reference"]):  # before a weight has moved
        assert (mine - behaviour)[rollout.mask].abs().max() < 1e-4
    assert surrogate.gap < 1e-4 and (made.all_logprobs(replace(rollout, columns={})) - behaviour)[rollout.mask].abs().max() > 0.05
    assert {t.temperature for t in made.evaluated_episodes} == {None}


def test_a_continued_run_is_the_unbroken_one(model: Path, tmp_path: Path) -> None:
    """Inside an iteration, whose turns and temperatures are in the checkpoint, and between two."""

    def run(out: str, ckpt: str | None = None) -> torch.Tensor:
        learner = agent(model, prompts_per_update=4, inner_epochs=2, temperature_increment=0.1)
        fit = trainer(max_epochs=3, limit_val_batches=0, enable_checkpointing=True, callbacks=[RngState(), every_step(tmp_path / out)])
        fit.fit(learner, datamodule=digit_tasks(tmp_path), ckpt_path=ckpt)
        return weights(learner)

    unbroken = run("unbroken")
    saved = sorted((tmp_path / "unbroken").glob("*.ckpt"))
    inside, between = (next(p for p in saved if p.stem.endswith(f"step={step}")) for step in (6, 8))
    for name, checkpoint in {"inside": inside, "between": between}.items():
        assert torch.equal(run(name, str(checkpoint)), unbroken), name


def test_a_group_of_one_warns_and_finishes(model: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="every trajectory has advantage 0, so nothing is learned"):
        made = agent(model, group_size=1, prompts_per_iteration=1)
    run = trainer(max_epochs=2, callbacks=[], limit_val_batches=0)
    run.fit(made, datamodule=digit_tasks(tmp_path))
    assert run.global_step == 2


class Noted(DigitWorlds):
    """Notes what happens to it; a world takes a while to close."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    async def start(self) -> None:
        self.noted.append("start")

    async def stop(self) -> None:
        self.noted.append("stop")

    async def on_open(self) -> DigitWorld:
        world = await super().on_open()

        async def on_close() -> None:
            await asyncio.sleep(0.3)
            self.noted.append("close")

        world.on_close = on_close  # type: ignore[method-assign]
        return world


def test_worlds_start_before_the_model_is_loaded_and_end_with_a_run_that_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no answer")

    worlds, made = Noted(), agent(model, prompts_per_iteration=2, group_size=2)
    load = made.policy.load
    monkeypatch.setattr(made.policy, "load", lambda: worlds.noted.append("load") or load())
    made.episodes.worlds, made.answers.engine.generate = worlds, broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no answer"):
        trainer(max_epochs=1, callbacks=[], limit_val_batches=0).fit(made, datamodule=digit_tasks(tmp_path))
    assert worlds.noted == ["start", "load", *["close"] * 4, "stop"]
    assert not [thread for thread in threading.enumerate() if thread.name == "worlds"]


def test_what_cannot_be_had_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.dynamic_sampling and model.answers.asynchronous are not for agents"):
        agent(model, dynamic_sampling=DynamicSampling())
    with pytest.raises(ConfigError, match="model.temperature_increment=-0.1 must not be negative"):
        agent(model, temperature_increment=-0.1)
    with pytest.raises(ConfigError, match="set model.episodes.manner.max_prompt_tokens"):
        agent(model).longest_sequence()
    made = agent(model)
    made.policy.parameters = lambda: iter([SimpleNamespace(ds_id=1)])  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ConfigError, match="NativeEngine answers from weights that are cut over processes.*HTTPEngine, or train with DDP"):
        made._check_engine()
