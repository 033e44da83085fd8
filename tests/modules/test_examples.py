"""Examples beside rollouts: which of them a micro-batch gets, and the gradient that their share of an optimizer step has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import Metrics, ToyData, ToyPolicy, toy_method, toy_trainer, weights

from callbacks.old_policy import OldPolicySync
from lit_rl.errors import ConfigError
from lit_rl.methods.diffusion_nft import AWM, DiffusionNFT
from lit_rl.methods.flow_grpo import DanceGRPO, FlowGRPO, FlowGRPOFast, GRPOGuard, MixGRPO, RandomStepGRPO
from lit_rl.modules.supervised import Supervised
from lit_rl.replay.plan import rollout_plan, warmup_plan
from lit_rl.types import ALL, Info


@pytest.mark.parametrize("parts", [1, 3, 5, 9])
def test_micro_batches_share_the_examples_of_a_step(parts: int) -> None:
    """Each of 7 examples once, with weights that sum to 1; a part without any has one of weight 0."""
    batches = [Supervised(coef=1.0, batch_size=7).micro_batch(ToyData(), 3, part, parts) for part in range(parts)]
    seen = [batch.first + i for batch in batches for i in range(len(batch.info)) if batch.weights[i]]
    assert sorted(seen) == list(range(7)) and all(batch.step == 3 for batch in batches)
    torch.testing.assert_close(torch.cat([batch.weights for batch in batches]).sum(), torch.tensor(1.0))


def test_a_plan_ends_each_optimizer_step_with_its_examples() -> None:
    rows = [torch.tensor([i]) for i in range(6)]
    plan = rollout_plan(rows, updates=3, examples=1, first=10)
    assert [(part.source[0], part.rows.tolist()) for part in plan] == [
        ("r", [0]), ("r", [1]), ("e", [10, 0]), ("r", [2]), ("r", [3]), ("e", [11, 0]), ("r", [4]), ("r", [5]), ("e", [12, 0]),
    ]  # fmt: skip
    assert [part.rows.tolist() for part in warmup_plan(steps=2, micro_batches=2)] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def gradients(folder: Path, cls: type[Any] = FlowGRPO, **settings: Any) -> Tensor:
    """The first gradient of a run with plain gradient descent of rate 1: what it moves the weights by."""
    method = toy_method(cls, optimizer=torch.optim.SGD, updates_per_iteration=1, **settings)
    method.optimizer = lambda params: torch.optim.SGD(params, lr=1.0)
    method.policy.load()
    before = weights(method).clone()
    callbacks = [OldPolicySync("copy")] if issubclass(cls, DiffusionNFT) else []
    toy_trainer(folder, max_epochs=1, callbacks=callbacks).fit(method, ToyData())
    return before - weights(method)


@pytest.mark.parametrize("size", [None, 5])
def test_the_gradient_is_that_of_the_policy_and_coef_times_that_of_the_examples(tmp_path: Path, size: int | None) -> None:
    """Linear in the coefficient, in whatever micro-batches; what one unit of it adds is the gradient of a warm-up step on the examples."""

    def of(coef: float) -> Tensor:
        supervised = Supervised(coef=coef, batch_size=7) if coef else None
        return gradients(tmp_path, supervised=supervised, train_micro_batch=size)

    none, one, three = of(0.0), of(1.0), of(3.0)
    torch.testing.assert_close(three - none, 3 * (one - none), rtol=1e-4, atol=1e-6)
    alone = gradients(tmp_path, supervised=Supervised(warmup_steps=1, batch_size=7), train_micro_batch=size)
    torch.testing.assert_close(one - none, alone, rtol=1e-4, atol=1e-6)
    assert alone.abs().max() > 1e-3


@pytest.mark.parametrize("cls", [GRPOGuard, DanceGRPO, FlowGRPOFast, MixGRPO, RandomStepGRPO, DiffusionNFT, AWM])
def test_every_method_on_flow_models_mixes_in_the_same_examples(tmp_path: Path, cls: type[Any]) -> None:
    """(1 - c) RL + c SFT, SFT being the gradient of a warm-up step on them, whatever the method."""

    def of(**given: Any) -> Tensor:
        own = {"window_size": 2} if cls in (FlowGRPOFast, MixGRPO) else {}
        return gradients(tmp_path, cls, supervised=Supervised(batch_size=7, **given) if given else None, **own)

    policy, both, examples = of(), of(coef=0.25, convex=True), of(warmup_steps=1)
    torch.testing.assert_close(both, 0.75 * policy + 0.25 * examples, rtol=1e-4, atol=1e-6)
    assert examples.abs().max() > 1e-3 and policy.abs().max() > 1e-5


@pytest.mark.parametrize("size", [None, 5])
def test_a_convex_sum_takes_from_the_policy_what_it_gives_to_the_examples(tmp_path: Path, size: int | None) -> None:
    """(1 - c) RL + c SFT, in whatever micro-batches, with the divergence in RL, and with pictures of various sizes."""

    def of(settings: dict[str, Any] | None) -> Tensor:
        supervised = Supervised(batch_size=7, data=Various(), **settings) if settings else None
        return gradients(tmp_path, supervised=supervised, train_micro_batch=size, kl_coef=0.1)

    policy, both, added = of(None), of({"coef": 0.25, "convex": True}), of({"coef": 0.25})
    examples = (added - policy) / 0.25
    torch.testing.assert_close(both, 0.75 * policy + 0.25 * examples, rtol=1e-4, atol=1e-6)
    assert examples.abs().max() > 1e-3 and policy.abs().max() > 1e-3


def test_examples_take_part_in_every_so_manieth_iteration(tmp_path: Path) -> None:
    data = Various()
    supervised = Supervised(coef=0.5, convex=True, every=2, batch_size=7, data=data)
    method = toy_method(supervised=supervised, train_micro_batch=16)
    trainer = toy_trainer(tmp_path, max_epochs=4)
    trainer.fit(method, ToyData())
    assert data.asked == [0, 2] and trainer.global_step == 4
    assert method.rollout is not None and method.rollout.weights is not None
    assert float(method.rollout.weights.sum()) == pytest.approx(1.0)  # of the fourth iteration, without examples


class Various:
    """Black pictures one by one, as those of various sizes come."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Sequence[Tensor]]:
        self.asked.append(step)
        rows = range(count)[part]
        return [{"prompt": str(i % 6)} for i in rows], [torch.zeros(3, 2, 2, dtype=torch.uint8) for _ in rows]


def test_pictures_of_various_sizes_want_latents_of_various_sizes() -> None:
    data = Various()
    vars(data)["various_sizes"] = True
    with pytest.raises(ConfigError, match="ToyPolicy takes those of its resolution alone"):
        Supervised(coef=1.0, data=data).check(ToyPolicy())


def test_both_losses_are_logged_whatever_the_micro_batches(tmp_path: Path) -> None:
    def logged(size: int) -> dict[str, float]:
        metrics = Metrics()
        method = toy_method(supervised=Supervised(coef=0.5, batch_size=7), train_micro_batch=size, kl_coef=0.1)
        toy_trainer(tmp_path, callbacks=[metrics], max_epochs=1).fit(method, ToyData())
        return metrics.rows[0]

    small, large = logged(5), logged(48)
    for name in ("loss", "policy_loss", "kl_loss", "supervised_loss"):
        assert small[name] == pytest.approx(large[name], rel=1e-4, abs=1e-7), name
    total = small["policy_loss"] + 0.1 * small["kl_loss"] + 0.5 * small["supervised_loss"]
    assert small["loss"] == pytest.approx(total, rel=1e-4) and small["supervised_loss"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set warmup_steps for a warm-up, or coef"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"coef": 1.5, "convex": True}, r"coef=1.5 must be in \[0, 1\]"),
        ({"coef": 0.5, "every": 0}, "every=0 must be at least 1"),
        ({"coef": 1.0, "batch_size": 0}, "model.supervised.batch_size=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Supervised(**settings)
