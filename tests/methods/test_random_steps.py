"""Training on steps drawn at random: the pairs that are kept, and who shares them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import Metrics, ToyData, ToyPolicy, toy_method, toy_trainer, weights

from lit_rl.errors import ConfigError
from lit_rl.methods.flow_grpo import RandomStepGRPO
from lit_rl.modules.learning_rates import ConstantWithWarmup
from lit_rl.modules.pictures import Evaluation
from lit_rl.samplers.flow import RenoiseCPS
from lit_rl.types import Cond


def method(**settings: Any) -> RandomStepGRPO:
    found = toy_method(RandomStepGRPO, num_steps=8, timestep_fraction=0.5, sde=RenoiseCPS(noise_level=0.7), **settings)
    assert isinstance(found, RandomStepGRPO)
    return found


def test_the_steps_of_an_iteration_are_those_of_all_its_samples(tmp_path: Path) -> None:
    """Their log-probabilities under the weights that acted are the stored ones, so latents and sigmas are those of the right steps."""
    metrics, trained = Metrics(), method(surrogate=None)
    toy_trainer(tmp_path, callbacks=[metrics], max_epochs=3).fit(trained, ToyData())
    windows = [trained.window(i) for i in range(3)]
    assert all(len(set(steps)) == 4 and sorted(steps) == steps and steps[-1] < 7 for steps in windows) and windows[0] != windows[1]
    assert all(row["ratio_first_update_max_dev"] < 1e-6 for row in metrics.rows)
    rollout, steps = trained.rollout, windows[2]
    assert rollout is not None and rollout.mask.shape == (16, 4) and rollout.mask.all()
    points = sorted({i for step in steps for i in (step, step + 1)})
    assert rollout.latents.shape[1] == len(points) < 9  # none that no trained step begins or ends at
    batch = trained.minibatch(rollout, torch.arange(8))
    sigmas = trained.sigmas(8).float()
    assert torch.equal(batch.sigma, sigmas[steps].repeat(2)) and torch.equal(batch.sigma_next, sigmas[[i + 1 for i in steps]].repeat(2))


def test_a_run_continues_inside_an_iteration(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(folder: str, **more: Any) -> RandomStepGRPO:
        trained = method(updates_per_iteration=2)
        toy_trainer(tmp_path / folder, max_epochs=2, **more.pop("trainer", {})).fit(trained, ToyData(), **more)
        return trained

    every = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1)
    unbroken = fit("a", trainer={"callbacks": [every], "enable_checkpointing": True})
    (third,) = (tmp_path / "saved").glob("*step=3.ckpt")
    assert torch.equal(weights(fit("b", ckpt_path=str(third))), weights(unbroken))


@pytest.mark.parametrize("size", [None, 5])
def test_an_optimizer_step_for_each_timestep_has_the_pairs_of_all_samples_there(tmp_path: Path, size: int | None) -> None:
    trained = method(updates_per_iteration="timestep", train_micro_batch=size)
    trainer = toy_trainer(tmp_path, max_epochs=1)
    trainer.fit(trained, ToyData())
    rollout, parts = trained.rollout, trained.micro_batches_per_update
    assert rollout is not None and rollout.weights is not None and trainer.global_step == 4 and parts == (4 if size else 1)
    plan = trained.split(rollout, 0)
    steps = [torch.cat(plan[i : i + parts]) for i in range(0, len(plan), parts)]
    assert [sorted(pairs.tolist()) for pairs in steps] == [list(range(step, 64, 4)) for step in range(4)]
    assert all(float(rollout.weights.flatten()[pairs].sum()) == pytest.approx(1.0) for pairs in steps)


def test_noise_beyond_the_clip_range_is_told_once_with_its_numbers(tmp_path: Path) -> None:
    class Rounding(ToyPolicy):
        def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            v = super().velocity(x, t, cond)
            return v.bfloat16().float() if self.training else v

    def fit(policy: ToyPolicy) -> list[str]:
        trained = toy_method(clip_low=1e-5, clip_high=1e-5, storage_dtype="bfloat16")
        trained.policy = policy
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            toy_trainer(tmp_path, max_epochs=2).fit(trained, ToyData())
        return [str(warning.message) for warning in caught if "Before any weight has moved" in str(warning.message)]

    assert not fit(ToyPolicy())
    (told,) = fit(Rounding())
    assert "clips at 1.0e-05" in told and "model.storage_dtype to float32 (it is bfloat16)" in told


def test_evaluation_has_guidance_of_its_own(tmp_path: Path) -> None:
    class Guided(ToyPolicy):
        guidance_scale = 1.5

        def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            seen[self.training].add(self.guidance_scale)
            return super().velocity(x, t, cond)

    seen: dict[bool, set[float]] = {True: set(), False: set()}
    trained = toy_method(evaluation=Evaluation(num_steps=2, guidance_scale=4.0))
    trained.policy = Guided()
    trainer = toy_trainer(tmp_path, max_epochs=1, limit_val_batches=1)
    trainer.validate(trained, ToyData(), verbose=False)
    assert seen[False] == {4.0} and trained.policy.guidance_scale == 1.5
    toy_trainer(tmp_path, max_epochs=1).fit(trained, ToyData())
    assert seen[True] == {1.5}
    with pytest.raises(ConfigError, match="guidance_scale=-1"):
        Evaluation(guidance_scale=-1)


def test_constant_with_warmup_is_transformers_a_step_ahead() -> None:
    from transformers import get_constant_schedule_with_warmup

    def rates(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule, found = make(optimizer, 4), []
        for _ in range(7):
            found.append(float(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
        return found

    assert rates(ConstantWithWarmup)[:-1] == rates(get_constant_schedule_with_warmup)[1:]
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        rates(lambda optimizer, steps: ConstantWithWarmup(optimizer, -1))


def test_a_share_of_no_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="timestep_fraction=0"):
        toy_method(RandomStepGRPO, timestep_fraction=0)
