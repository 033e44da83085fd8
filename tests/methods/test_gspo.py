"""GSPO on the guide's mixed rows: each kind counts as if it were alone, in proportion to its rows, however a step is cut up."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toy_text import model_folder, policy, trainer, weights, weights_of

from callbacks.reward_scoring import RewardScoring
from datamodules.mixed import PromptsAndPairs
from datamodules.pairs import PreferencePairs
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import KL
from lit_rl.losses.preference import Preference
from lit_rl.methods.dpo import DPO
from lit_rl.methods.grpo import GSPO
from lit_rl.methods.gspo_mixed import MixedGSPO
from lit_rl.rewards.base import TextReward
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.types import Info

SGD = partial(torch.optim.SGD, lr=0.5)
WARM = Sampling(max_new_tokens=5, temperature=0.8)
COLD = Sampling(max_new_tokens=5)


class Noise(TextReward):
    """Nearly every answer earns something else."""

    outputs = ("noise",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        assert not any("chosen" in row for row in info)  # pairs are not scored
        return {"noise": torch.tensor([crc32(text.encode()) / 2**32 for text in media])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("lm"))


def rows_of(kinds: str) -> list[dict[str, Any]]:
    """s: a self-play row, p: a pair; the guide's forms."""
    rows: list[dict[str, Any]] = []
    for i, kind in enumerate(kinds):
        prompt = f"{(i * 37) % 100:02d}="
        alone = {"prompt": prompt, "self_play": True} if i % 2 else {"prompt": prompt, "chosen": None, "rejected": None}
        rows.append(alone if kind == "s" else {"prompt": prompt, "chosen": prompt[:2], "rejected": f"{prompt[1]}{i % 10}9"})
    return rows


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def fit(method: Any, data: Any, *, callbacks: Sequence[L.Callback] = (), ckpt_path: str | None = None, **settings: Any) -> Tensor:
    run = trainer(**dict(max_epochs=1, limit_val_batches=0, callbacks=[RewardScoring({"noise": Noise()}), *callbacks]) | settings)
    run.fit(method, datamodule=data, ckpt_path=ckpt_path)
    method.seen = dict(run.callback_metrics)
    return weights(method)


def mixed(folder: Path, rows: int, **settings: Any) -> MixedGSPO:
    defaults: dict[str, Any] = dict(prompts_per_iteration=rows, group_size=3, answers=Answers(sampling=WARM), optimizer=SGD)
    return MixedGSPO(policy(folder, keep_reference=True), **defaults | settings)


def step(folder: Path, tmp_path: Path, kinds: str, *, parts: int = 1, **settings: Any) -> Tensor:
    """How the weights change in an iteration over rows of these kinds."""
    data = PromptsAndPairs(train=write(tmp_path / "rows.jsonl", rows_of(kinds)), shuffle=False)
    method = mixed(folder, len(kinds), **settings)
    return fit(method, data, accumulate_grad_batches=parts) - weights_of(folder)


close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)


def test_self_play_rows_alone_are_gspo(folder: Path, tmp_path: Path) -> None:
    data = PromptsAndPairs(train=write(tmp_path / "prompts.jsonl", rows_of("ssss")), shuffle=False)
    gspo = GSPO(policy(folder), prompts_per_iteration=4, group_size=3, answers=Answers(sampling=WARM), optimizer=SGD)
    expected = fit(gspo, data) - weights_of(folder)
    assert expected.abs().max() > 1e-3
    close(step(folder, tmp_path, "ssss"), expected)


def test_pairs_alone_are_dpo(folder: Path, tmp_path: Path) -> None:
    data = PreferencePairs(train=write(tmp_path / "pairs.jsonl", rows_of("pppp")), shuffle=False)
    dpo = DPO(policy(folder, keep_reference=True), prompts_per_iteration=4, beta=0.5, optimizer=SGD)
    expected = fit(dpo, data) - weights_of(folder)
    assert expected.abs().max() > 1e-3
    close(step(folder, tmp_path, "pppp", answers=Answers(sampling=COLD), preference=Preference(beta=0.5)), expected)


def test_a_mixed_step_weighs_rows_alike(folder: Path, tmp_path: Path) -> None:
    """4 self-play rows and 2 pairs: 4/6 of the step of the former and 2/6 of preference.coef times that of the latter."""
    of_both = step(folder, tmp_path, "sssspp", preference=Preference(coef=3.0))
    alone = (
        step(folder, tmp_path, "ssss"),
        step(folder, tmp_path, "sssspp", preference=Preference(coef=3.0))
        - step(folder, tmp_path, "sssspp", preference=Preference(coef=0.0)),
    )
    close(of_both, 4 / 6 * alone[0] + alone[1])
    close(alone[1], 3 * (step(folder, tmp_path, "sssspp") - 4 / 6 * alone[0]))
    assert alone[1].abs().max() > 1e-4


@pytest.mark.parametrize(
    "settings", [{}, {"self_play": "winrate", "kl": KL(coef=0.1), "entropy_coef": 0.01, "prompts_per_update": 4, "inner_epochs": 2}]
)
def test_micro_batches_do_not_change_a_step(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = step(folder, tmp_path, "spspsssp", **settings)
    for parts in (2, 4):
        close(step(folder, tmp_path, "spspsssp", parts=parts, answers=Answers(sampling=WARM, chunk=4), **settings), whole)


def test_what_is_told_of_a_step(folder: Path, tmp_path: Path) -> None:
    """Means over all rows of a kind, whatever micro-batch they are in; on-policy the ratio is 1 and nothing is clipped."""
    seen = []
    for parts in (1, 4):
        method = mixed(folder, 8)
        fit(
            method, PromptsAndPairs(train=write(tmp_path / "rows.jsonl", rows_of("spspsssp")), shuffle=False), accumulate_grad_batches=parts
        )
        seen.append({name: float(value) for name, value in method.seen.items() if name.startswith(("gspo/", "dpo/"))})
        assert method.seen["gspo/self_play_rows"] == 5 and method.seen["gspo/pref_rows"] == 3
    assert seen[0] == pytest.approx(seen[1], abs=1e-6)
    assert seen[0]["gspo/seq_ratio_mean"] == pytest.approx(1, abs=1e-6) and seen[0]["gspo/seq_ratio_max"] == pytest.approx(1)
    assert seen[0]["dpo/loss"] == pytest.approx(0.693147, abs=1e-5) and seen[0]["dpo/margin"] == pytest.approx(0, abs=1e-6)


def test_held_out_rows_of_both_kinds_are_evaluated(folder: Path, tmp_path: Path) -> None:
    """Pairs that are learned by heart: the chosen answers win, by the same margin in batches of another size and in a file of their own."""
    file, pairs = write(tmp_path / "rows.jsonl", rows_of("sspppp")), write(tmp_path / "pairs.jsonl", rows_of("sspppp")[2:])
    told = []
    for size, val in ((3, file), (64, file), (3, pairs)):
        data = PromptsAndPairs(train=file, val=val, eval_batch_size=size)
        adam = partial(torch.optim.AdamW, lr=3e-3)
        method = mixed(folder, 6, optimizer=adam, preference=Preference(beta=0.5))
        fit(method, data, max_epochs=8, limit_val_batches=1.0, check_val_every_n_epoch=8)
        told.append({name: float(value) for name, value in method.seen.items() if name.startswith("val/")})
    assert told[0] == pytest.approx(told[1], abs=1e-5)
    assert told[2] == pytest.approx({name: told[0][name] for name in ("val/dpo_accuracy", "val/dpo_margin")}, abs=1e-5)
    assert told[0]["val/dpo_accuracy"] == 1 and told[0]["val/dpo_margin"] > 0.5 and "val/noise" in told[0]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_first_batches_are_of_both_kinds(folder: Path, tmp_path: Path, stage: str) -> None:
    data = PromptsAndPairs(val=write(tmp_path / "rows.jsonl", rows_of("sspppp")), eval_batch_size=1)
    limits: dict[str, Any] = {"limit_val_batches": 2, "limit_test_batches": 2}
    (seen,) = getattr(trainer(callbacks=[RewardScoring({"noise": Noise()})], **limits), stage)(mixed(folder, 6), datamodule=data)
    assert {"val/noise", "val/dpo_accuracy"} <= seen.keys() and seen["val/dpo_margin"] == 0  # before training


def test_pairs_need_a_reference_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    for kinds in ("ssss", "sssp"):
        method = MixedGSPO(policy(folder), prompts_per_iteration=4, group_size=3, answers=Answers(sampling=COLD), optimizer=SGD)
        data = PromptsAndPairs(train=write(tmp_path / "rows.jsonl", rows_of(kinds)), shuffle=False)
        if kinds == "ssss":
            fit(method, data)
            assert method.rollout is not None and "reference" not in method.rollout.streams
            continue
        with pytest.raises(ConfigError, match="keep_reference"):
            fit(method, data)
        assert "network" not in method.policy._modules
        held_out = PromptsAndPairs(train=write(tmp_path / "prompts.jsonl", rows_of("ssss")), val=data.paths["train"])
        with pytest.raises(ConfigError, match="keep_reference"):
            fit(method, held_out)


@pytest.mark.parametrize("name", ["epoch=0-step=1", "epoch=1-step=4"])
def test_resume_equals_the_unbroken_run_bit_for_bit(folder: Path, tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "rows.jsonl", rows_of("spspsssp"))
    adam = partial(torch.optim.AdamW, lr=1e-3)

    def run(at: Path, ckpt_path: str | None = None) -> Tensor:
        every = ModelCheckpoint(dirpath=at, save_top_k=-1, every_n_train_steps=1, filename="{epoch}-{step}")
        method = mixed(folder, 8, prompts_per_update=4, optimizer=adam)
        return fit(method, PromptsAndPairs(train=file), callbacks=[every], ckpt_path=ckpt_path, max_epochs=3, enable_checkpointing=True)

    unbroken = run(tmp_path / "a")
    assert torch.equal(run(tmp_path / "b", str(tmp_path / "a" / f"{name}.ckpt")), unbroken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: dict(group_size=1), "no sibling to compare it with"),
        (lambda: dict(preference=Preference(coef=-1.0)), "preference.coef=-1.0 must not be negative"),
        (lambda: dict(preference=Preference(beta=0.0)), "beta=0.0 must be above 0"),
    ],
)
def test_what_cannot_work_is_refused(settings: Callable[[], dict[str, Any]], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        mixed(folder, 4, **settings())
