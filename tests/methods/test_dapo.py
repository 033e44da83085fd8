"""DAPO: batches of groups that teach, drawn as often as it takes and no oftener, and nothing skipped or repeated after a restart."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zlib import crc32

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toy_text import Digits, model_folder, policy, trainer, weights

from callbacks.reward_scoring import RewardScoring
from callbacks.sample_texts import SampleTexts
from lit_rl.credit.length_penalty import LengthPenalty
from lit_rl.errors import ConfigError
from lit_rl.losses.surrogates import Clip
from lit_rl.methods.grpo import DAPO
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.replay.partition import fair_owners
from lit_rl.rewards.base import TextReward
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.types import Info

SHORT = Sampling(max_new_tokens=5)
DRAWING = ("prompts_per_generation", "filter_metric", "max_generations", "on_limit")


class Odd(TextReward):
    """Answers to prompts that end in an odd digit differ; all answers to the others earn the same."""

    outputs = ("odd", "always")

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        noise = torch.tensor([10.0 * crc32(text.encode()) / 2**32 for text in media])
        return {"odd": noise * torch.tensor([int(row["answer"]) % 2 for row in info]), "always": noise}


class Known(Digits):
    """Prompts "0=", "1=", ..., in this order; the odd ones teach."""

    def __init__(self, numbers: Sequence[int] = range(64)) -> None:
        super().__init__(shuffle=False)
        self.train_prompts = [MappingProxyType({"prompt": f"{n}=", "answer": str(n % 10)}) for n in numbers]
        self.asked: list[str] = []

    def prompts(self, iteration: int, count: int) -> list[Info]:
        rows = super().prompts(iteration, count)
        self.asked += [row["prompt"] for row in rows]
        return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("lm"))


def dapo(folder: Path, **settings: Any) -> DAPO:
    drawing = {"prompts_per_generation": 3} | {name: settings.pop(name) for name in DRAWING if name in settings}
    defaults: dict[str, Any] = dict(
        prompts_per_iteration=4, prompts_per_update=2, group_size=2, answers=Answers(sampling=SHORT),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    )  # fmt: skip
    return DAPO(policy(folder), dynamic_sampling=DynamicSampling(**drawing), **defaults | settings)  # type: ignore[arg-type]


def fit(method: DAPO, data: Known | None = None, *, callbacks: Sequence[L.Callback] = (), ckpt_path: str | None = None, **kw: Any) -> Known:
    data, rewards = data or Known(), RewardScoring({"odd": Odd()}, weights={"odd": 1.0})
    run = trainer(**dict(max_epochs=1, check_val_every_n_epoch=100, callbacks=[rewards, *callbacks]) | kw)
    run.fit(method, datamodule=data, ckpt_path=ckpt_path)
    return data


def drawn(method: DAPO) -> int:
    assert method.dynamic_sampling is not None
    return method.dynamic_sampling.generations


def trained_on(method: DAPO) -> list[str]:
    assert method.rollout is not None
    return method.rollout.text


def test_generates_until_the_batch_is_full_of_groups_that_teach(folder: Path) -> None:
    """Prompts 0 ... 8 in three generations of three; 1, 3, 5, 7 teach. The next iteration begins at 9: 9, 11, 13, 15 of 9 ... 17."""
    method = dapo(folder)
    data = fit(method, max_epochs=2)
    assert data.asked == [f"{n}=" for n in range(18)]
    assert trained_on(method) == [f"{n}=" for n in (9, 11, 13, 15) for _ in range(2)]
    rollout, metrics = method.rollout, method.rollout_metrics
    assert rollout is not None and rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.advantages is not None and (rollout.advantages != 0).any(1).all()
    assert metrics["dapo/generations"] == 3 and metrics["dapo/kept_share"] == pytest.approx(5 / 9) and metrics["dapo/groups"] == 4
    assert drawn(method) == 6


def test_defaults_are_the_papers(folder: Path) -> None:
    method = dapo(folder, answers=Answers(sampling=Sampling(max_new_tokens=20)))
    assert (method.surrogate, method.aggregation, method.kl.coef) == (Clip(low=0.2, high=0.28), "token-mean", 0)
    assert method.length_penalty == LengthPenalty(buffer=4)
    lengths = torch.tensor([15, 18, 20])
    assert (
        method.length_penalty(lengths, limit=20).tolist()
        == LengthPenalty(buffer=4, factor=1.0)(lengths, limit=20).tolist()
        == [0, -0.5, -1]
    )


def test_the_samples_shown_are_those_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = dapo(folder)
    fit(method, callbacks=[SampleTexts(8)])
    shown = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert method.rollout is not None and len(shown) == 8
    for line, prompt, score in zip(shown, trained_on(method), method.rollout.rewards["odd"].tolist()):
        asked, text = line.split("  ")[1].split(" -> ")
        assert asked == repr(prompt) and line.endswith(f"  odd {score:.3g}  always {score:.3g}")
        assert 10.0 * crc32(text.strip("'").encode()) / 2**32 == pytest.approx(score)


def test_another_score_may_decide_what_teaches(folder: Path) -> None:
    method = dapo(folder, filter_metric="always")
    assert fit(method).asked == [f"{n}=" for n in range(6)]
    assert trained_on(method)[::2] == ["0=", "1=", "2=", "3="]
    with pytest.raises(ConfigError, match="filter_metric=even is no score; there are always, odd"):
        fit(dapo(folder, filter_metric="even"))


def test_too_few_groups_stop_the_run(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Only 3 of 6 groups in model.dynamic_sampling.max_generations=2"):
        fit(dapo(folder, max_generations=2))


def test_too_few_groups_train_as_if_they_were_the_batch(folder: Path) -> None:
    """1, 3 and 5 of 0 ... 5: as a batch of these three alone, where there is one step."""
    partial_, alone = (
        dapo(folder, max_generations=2, on_limit="train_partial", prompts_per_update=4),
        dapo(folder, prompts_per_iteration=3, prompts_per_update=3),
    )
    fit(partial_)
    assert partial_.rollout_metrics["dapo/groups"] == 3 and trained_on(partial_)[:6:2] == ["1=", "3=", "5="]
    start = weights(partial_)
    assert partial_.rollout is not None
    fit(alone)
    assert alone.rollout is not None and torch.equal(alone.rollout.tokens, partial_.rollout.tokens[:6, : alone.rollout.tokens.shape[1]])
    torch.testing.assert_close(weights(alone), start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on_limit", ["skip_step", "train_partial"])
def test_a_skipped_step_changes_nothing(folder: Path, on_limit: Any) -> None:
    """No gradient, no weight decay, no moments: the first iteration has no odd prompt, the second has."""
    seen: list[Tensor] = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            seen.append(weights(module).clone())

    method = dapo(folder, max_generations=2, on_limit=on_limit)
    fit(method, Known([2, 4, 6, 8, 0, 2, 1, 3, 5, 7, 9, 1]), callbacks=[Look()], max_epochs=2)
    start = dapo(folder).policy
    start.load()
    assert torch.equal(seen[0], torch.cat([p.detach().flatten() for _, p in start.trainable()]))
    assert not torch.equal(seen[1], seen[0])


def test_micro_batches_do_not_change_a_step(folder: Path) -> None:
    sgd = partial(torch.optim.SGD, lr=0.1)
    whole = dapo(folder, optimizer=sgd)
    fit(whole)
    cut = dapo(folder, optimizer=sgd, answers=Answers(sampling=SHORT, chunk=3))
    fit(cut, accumulate_grad_batches=3)
    assert trained_on(cut) == trained_on(whole)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["epoch=0-step=1", "epoch=0-step=2", "epoch=1-step=3"])
def test_resume_equals_the_unbroken_run_bit_for_bit(folder: Path, tmp_path: Path, name: str) -> None:
    """Two steps an iteration, inside one and at its end: the prompts go on where they were."""

    def run(at: Path, ckpt_path: str | None = None) -> tuple[DAPO, Known]:
        every = ModelCheckpoint(dirpath=at, save_top_k=-1, every_n_train_steps=1, filename="{epoch}-{step}")
        method = dapo(folder)
        return method, fit(method, callbacks=[every], ckpt_path=ckpt_path, max_epochs=3, enable_checkpointing=True)

    unbroken, everything = run(tmp_path / "a")
    continued, rest = run(tmp_path / "b", str(tmp_path / "a" / f"{name}.ckpt"))
    assert torch.equal(weights(unbroken), weights(continued)) and drawn(unbroken) == drawn(continued)
    assert (
        rest.asked
        and everything.asked[-len(rest.asked) :] == rest.asked == [f"{n}=" for n in range(len(everything.asked))][-len(rest.asked) :]
    )


def test_groups_are_dealt_evenly_and_few_move() -> None:
    """Rank 0 has six of eight groups; parts are the even and the odd ones: 0, 2 | 4, 6 and 1, 3 | 5, 7."""
    assert fair_owners([0, 0, 0, 0, 0, 0, 1, 1], parts=2, world=2) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert fair_owners([1, 1, 0, 0], parts=1, world=2) == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="3 things do not divide among 2"):
        fair_owners([0, 0, 0], parts=1, world=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_generations=1), "raise max_generations to at least 2"),
        (dict(max_generations=0), "max_generations=0"),
        (dict(length_penalty=LengthPenalty(buffer=6)), r"length_penalty.buffer=6 must be in 0\.\.5"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        dapo(folder, **settings)


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_factor_without_a_buffer_is_refused(factor: float) -> None:
    """It did nothing, in silence: also where an earlier release's `overlong_factor` alone was renamed."""
    with pytest.raises(ConfigError, match=rf"length_penalty.factor={factor} does nothing, as model.length_penalty.buffer is 0: set it"):
        LengthPenalty(factor=factor)
