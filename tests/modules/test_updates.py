"""How many optimizer steps an iteration has, and what each of them sees: options of memory and the number of processes change neither."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor
from toy import ToyData, toy_method, toy_trainer

from callbacks.old_policy import OldPolicySync
from lit_rl.errors import ConfigError
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.flow_grpo import DanceGRPO, FlowGRPO, FlowGRPOFast, MixGRPO
from lit_rl.types import FlowRollout

Method = FlowGRPO | DiffusionNFT


class Gradients(L.Callback):
    """The gradient of every optimizer step, and the number of rows of every minibatch."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(len(batch.weights))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in module.parameters() if p.grad is not None]))


def train(folder: Path, method: Method, **kwargs: Any) -> Gradients:
    gradients = Gradients()
    callbacks = [gradients] + ([OldPolicySync("slow")] if isinstance(method, DiffusionNFT) else [])
    toy_trainer(folder, callbacks=callbacks, **kwargs).fit(method, ToyData())
    return gradients


def nft(**kwargs: Any) -> DiffusionNFT:
    method = toy_method(**{name: kwargs.pop(name) for name in list(kwargs)})
    same = ("prompts_per_iteration", "group_size", "num_steps", "inner_epochs", "updates_per_iteration", "train_micro_batch")
    same = (*same, "supervised")
    return DiffusionNFT(method.policy, **{name: getattr(method, name) for name in same}, rollout_micro_batch=6, optimizer=method.optimizer)


KINDS: dict[str, Any] = {
    "grpo": toy_method,
    "dance": lambda **kwargs: toy_method(DanceGRPO, **kwargs),
    "fast": lambda **kwargs: toy_method(FlowGRPOFast, window_size=2, window_range=(0, 3), **kwargs),
    "nft": nft,
}


# ---------------------------------------------------------------------- the number, and the gradients
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 5, 16])
def test_micro_batches_change_no_gradient(tmp_path: Path, kind: str, size: int) -> None:
    """A warm-up of two steps of 7 examples, then two iterations of 2 passes x 5 steps."""

    def run(**memory: Any) -> Gradients:
        settings: dict[str, Any] = dict(warmup_steps=2, warmup_batch_size=7, inner_epochs=2, updates_per_iteration=10)
        return train(tmp_path, KINDS[kind](**settings, **memory), max_epochs=3)

    whole, cut = run(), run(train_micro_batch=size)
    assert len(whole.seen) == len(cut.seen) == 2 + 2 * 10
    assert min(cut.sizes) >= 1 and max(cut.sizes) <= size
    for a, b in zip(whole.seen, cut.seen):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("updates", [5, 13, 40])
def test_more_optimizer_steps_than_a_group_has_pairs(tmp_path: Path, updates: int) -> None:
    """12 pairs in a group, 48 in all: every step has its share of them, and none is empty."""
    seen = train(tmp_path, toy_method(updates_per_iteration=updates), max_epochs=1)
    assert len(seen.seen) == updates and sum(seen.sizes) == 48 and max(seen.sizes) - min(seen.sizes) <= 1


def test_one_pair_at_a_time_in_the_demos_geometry(tmp_path: Path) -> None:
    seen = train(tmp_path, toy_method(FlowGRPOFast, window_size=2, group_size=8, train_micro_batch=1), max_epochs=1)
    assert len(seen.seen) == 1 and seen.sizes == [1] * 64


# ---------------------------------------------------------------------- the plan, on any number of processes
def plans(case: dict[str, Any], world: int, size: int) -> list[list[list[int]]]:
    """By rank and optimizer step the pairs that have weight, numbered over all processes, with every minibatch looked at."""
    found = []
    for rank in range(world):
        method = toy_method(prompts_per_iteration=case["prompts"], group_size=case["group"], inner_epochs=case["inner"],
                            num_steps=case["steps"] + 1, updates_per_iteration=case["updates"], train_micro_batch=size)  # fmt: skip
        place = SimpleNamespace(world_size=world, accumulate_grad_batches=1, current_epoch=0, strategy=None, global_rank=rank)
        method._trainer = place  # type: ignore[assignment]
        method.set_micro_batches(size)
        each = case["prompts"] // world * case["group"]
        mine = slice(rank * each, (rank + 1) * each)
        group = torch.arange(case["prompts"]).repeat_interleave(case["group"])[mine]
        rollout = FlowRollout(
            group=group, info=[MappingProxyType({"prompt": "0"})] * each, logprobs=torch.zeros(each, case["steps"]),
            mask=case["mask"][mine], weights=case["mask"][mine].float(),
        )  # fmt: skip
        steps: list[list[int]] = []
        for inner in range(case["inner"]):
            plan = method.split(rollout, inner)
            assert len(plan) == method.updates * method.micro_batches_per_update and all(1 <= len(rows) <= size for rows in plan)
            for i in range(0, len(plan), method.micro_batches_per_update):
                rows = torch.cat(plan[i : i + method.micro_batches_per_update])
                kept = rows[rows >= 0]
                assert rollout.weights is not None and (rollout.weights.flatten()[kept] != 0).all()
                steps.append(sorted((kept + rank * each * case["steps"]).tolist()))
        found.append(steps)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_step_sees_the_same_pairs_on_any_number_of_processes(seed: int) -> None:
    draw = random.Random(seed)
    prompts, group, steps, inner = 6 * draw.randint(1, 2), draw.randint(2, 5), draw.randint(1, 4), draw.randint(1, 2)
    updates = draw.randint(1, min(30, prompts * group * steps))
    share = draw.choice([0.0, 0.3, 0.9, 1.0])
    mask = torch.rand(prompts * group, steps, generator=torch.Generator().manual_seed(seed)) < share
    case = dict(prompts=prompts, group=group, steps=steps, inner=inner, updates=updates * inner, mask=mask)
    whole = plans(case, 1, 10**6)[0]
    assert len(whole) == updates * inner
    for inner_epoch in range(inner):
        seen = [pair for step in whole[inner_epoch * updates : (inner_epoch + 1) * updates] for pair in step]
        assert sorted(seen) == mask.flatten().nonzero()[:, 0].tolist()
    for world in (1, 2, 3, 6):
        ranks = plans(case, world, draw.choice([1, 2, 3, 7, 100]))
        assert [sorted(chain(*parts)) for parts in zip(*ranks)] == whole


@pytest.mark.parametrize("seed", range(20))
def test_steps_have_equally_many_pairs(seed: int) -> None:
    draw = random.Random(seed)
    prompts, group, steps = draw.randint(1, 9), draw.randint(2, 7), draw.randint(1, 5)
    updates = draw.randint(1, prompts * group * steps)
    mask = torch.ones(prompts * group, steps, dtype=torch.bool)
    counts = [
        len(step) for step in plans(dict(prompts=prompts, group=group, steps=steps, inner=1, updates=updates, mask=mask), 1, 10**6)[0]
    ]
    assert len(counts) == updates and max(counts) - min(counts) <= 1


def test_shorter_windows_have_as_many_steps(tmp_path: Path) -> None:
    """MixGRPO's last window has one of two steps: 16 pairs instead of 32."""
    method = toy_method(MixGRPO, num_steps=5, window_size=2, iterations_per_window=1, train_micro_batch=5, updates_per_iteration=3)
    seen = train(tmp_path, method, max_epochs=4)
    assert [len(method.window(i)) for i in range(4)] == [2, 2, 1, 1] and len(seen.seen) == 4 * 3 and max(seen.sizes) <= 5


# ---------------------------------------------------------------------- what the trainer says beside it
@pytest.mark.parametrize(("asked", "found"), [(1, 4), (4, 4), (6, 6)])
def test_the_number_of_micro_batches_follows(tmp_path: Path, asked: int, found: int) -> None:
    """48 pairs in 2 steps, at most 6 at a time."""
    trainer = toy_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=asked)
    trainer.fit(toy_method(updates_per_iteration=2, train_micro_batch=6), ToyData())
    assert trainer.accumulate_grad_batches == found and trainer.global_step == 2


def test_fewer_micro_batches_than_the_cap_needs_are_refused(tmp_path: Path) -> None:
    """How a run of several updates per rollout was written when they followed from the micro-batches."""
    sentence = r"hold 16 of the 48 .* which becomes 6; if more optimizer steps are meant, set model.updates_per_iteration"
    with pytest.raises(ConfigError, match=sentence):
        toy_trainer(tmp_path, accumulate_grad_batches=2).fit(toy_method(train_micro_batch=8), ToyData())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(updates_per_iteration=3, inner_epochs=2), "updates_per_iteration=3 must be a multiple of model.inner_epochs=2"),
        (dict(updates_per_iteration=0), "updates_per_iteration=0 must be at least 1"),
    ],
)
def test_steps_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_method(**settings)


def test_an_accumulation_that_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GradientAccumulationScheduler"):
        toy_trainer(tmp_path, callbacks=[GradientAccumulationScheduler({0: 1, 4: 2})]).fit(toy_method(), ToyData())


# ---------------------------------------------------------------------- between a stop and its resume
@pytest.mark.parametrize("step", [1, 4, 6, 8])
def test_a_run_goes_on_with_other_micro_batches(tmp_path: Path, step: int) -> None:
    """Steps 1 and 2 are the warm-up's, 3 to 6 and 7 to 10 two iterations': from inside each, and from an epoch's end."""

    def run(folder: Path, size: int | None, **kwargs: Any) -> tuple[Tensor, int]:
        every = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", every_n_train_steps=1)
        method = toy_method(warmup_steps=2, warmup_batch_size=8, inner_epochs=2, updates_per_iteration=4, train_micro_batch=size)
        trainer = toy_trainer(folder, callbacks=[every], enable_checkpointing=True, max_epochs=3)
        trainer.fit(method, ToyData(), **kwargs)
        return torch.cat([p.detach().flatten() for p in method.parameters() if p.requires_grad]), trainer.global_step

    unbroken, steps = run(tmp_path / "a", 5)
    for i, size in enumerate((None, 2, 100)):
        continued, end = run(tmp_path / f"b{i}", size, ckpt_path=str(tmp_path / "a" / f"step={step}.ckpt"))
        assert end == steps == 10
        torch.testing.assert_close(continued, unbroken, rtol=1e-4, atol=1e-5)
