"""Methods on vision-language models: a visual task is learned, steps do not depend on how they are cut, pictures survive a stop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from copies import every_step
from squares import Corner, write_ragged, write_squares
from toy_text import trainer, weights

from callbacks.reward_scoring import RewardScoring
from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import KL
from lit_rl.methods.dpo import DPO
from lit_rl.methods.grpo import DAPO, GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.sft import SFT
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.modules.media import checked
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, RolloutEngine, Sample, Sampling

SHORT = Sampling(max_new_tokens=2)
SGD = partial(torch.optim.SGD, lr=0.1)
ROWS: dict[str, Any] = dict(prompts_per_iteration=8, prompts_per_update=4, optimizer=SGD)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("squares")


@pytest.fixture(scope="module")
def files(root: Path) -> tuple[str, str]:
    return str(write_squares(root, 400)), str(write_squares(root, 100, seed=1, name="held_out"))


@pytest.fixture(scope="module")
def ragged(root: Path) -> str:
    return str(write_ragged(root, 24))


@pytest.fixture(scope="module")
def model(root: Path) -> str:
    return str(build_vlm(root / "model", family="qwen3_vl", characters="1234?"))


@pytest.fixture(scope="module")
def models(root: Path, model: str) -> dict[str, str]:
    return {"qwen3_vl": model, "qwen25_vl": str(build_vlm(root / "windows", family="qwen25_vl", characters="1234?"))}


@pytest.fixture(scope="module")
def shown(root: Path, model: str, files: tuple[str, str]) -> str:
    """The model after a few demonstrations: at most half of its answers are right."""
    torch.manual_seed(0)
    adam = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0)
    method = SFT(VisionLanguageModel(model), prompts_per_iteration=32, optimizer=adam)
    run = trainer(max_epochs=7, limit_val_batches=0, callbacks=[], gradient_clip_val=1.0)
    run.fit(method, datamodule=SupervisedText(train=files[0]))
    (root / "shown").mkdir()
    method.policy.save(root / "shown", {name: p.detach() for name, p in method.policy.trainable()})
    return str(root / "shown")


# ---------------------------------------------------------------------- learning
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_where_the_square_is_is_learned_from_rewards_alone(shown: str, files: tuple[str, str], seed: int) -> None:
    torch.manual_seed(seed)
    adam = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    answers = Answers(sampling=SHORT, eval_sampling=SHORT, chunk=128)
    method = GRPO(VisionLanguageModel(shown), prompts_per_iteration=16, group_size=8, answers=answers, optimizer=adam, seed=seed)
    data = TextPrompts(train=files[0], val=files[1], eval_batch_size=50)
    run = trainer(max_epochs=36, check_val_every_n_epoch=36, callbacks=[RewardScoring({"corner": Corner()})], gradient_clip_val=1.0)
    before = run.validate(method, datamodule=data, verbose=False)[0]["val/exact"]
    run.fit(method, datamodule=data)
    assert before <= 0.5 and run.callback_metrics["val/exact"] >= 0.85


@pytest.mark.slow
def test_answers_come_from_the_picture(shown: str, files: tuple[str, str]) -> None:
    """Demonstrations go on until nearly all are right; then other pictures before the same words make the answers wrong."""
    adam = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0)
    method = SFT(VisionLanguageModel(shown), prompts_per_iteration=32, optimizer=adam, answers=Answers(sampling=SHORT))
    run = trainer(max_epochs=12, check_val_every_n_epoch=12, callbacks=[RewardScoring({"corner": Corner()})], gradient_clip_val=1.0)
    data = SupervisedText(train=files[0], val=files[1], eval_batch_size=50)
    run.fit(method, datamodule=data)
    assert run.callback_metrics["val/exact"] > 0.9
    pictures = [data.media(row) for row in data.held_out]
    data.media = lambda info: pictures[0]  # type: ignore[method-assign]
    assert run.validate(method, datamodule=data, verbose=False)[0]["val/exact"] < 0.5


# ---------------------------------------------------------------------- steps
def made(name: str, model: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    policy = VisionLanguageModel(model, keep_reference=True, **settings)
    if name == "sft":
        return SFT(policy, **ROWS)
    if name == "dpo":
        return DPO(policy, **ROWS)
    common = ROWS | {"group_size": 2, "answers": Answers(sampling=SHORT, chunk=5)}
    return {"grpo": partial(GRPO, kl=KL(coef=0.1)), "dapo": partial(DAPO, dynamic_sampling=None), "ppo": PPO}[name](policy, **common)


def data_for(name: str, ragged: str, root: Path) -> Any:
    if name == "dpo":
        rows = [json.loads(line) for line in Path(ragged).read_text().splitlines()]
        pairs = [{"prompt": r["prompt"], "images": r["images"], "chosen": r["answer"], "rejected": "?"} for r in rows]
        (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        return PreferencePairs(train=str(root / "pairs.jsonl"))
    return (SupervisedText if name == "sft" else TextPrompts)(train=ragged)


def trained(name: str, model: str, ragged: str, root: Path, *, parts: int = 1, settings: Mapping[str, Any] = {}, **more: Any) -> Any:
    method = made(name, model, **settings)
    scored = [] if name in ("sft", "dpo") else [RewardScoring({"corner": Corner()})]
    callbacks = [*scored, *more.pop("callbacks", [])]
    ckpt_path = more.pop("ckpt_path", None)
    run = trainer(limit_val_batches=0, accumulate_grad_batches=parts, callbacks=callbacks, **{"max_epochs": 1} | more)
    run.fit(method, datamodule=data_for(name, ragged, root), ckpt_path=ckpt_path)
    return method


@pytest.mark.parametrize(
    ("name", "family"), [("sft", "qwen25_vl"), ("dpo", "qwen3_vl"), ("grpo", "qwen25_vl"), ("dapo", "qwen3_vl"), ("ppo", "qwen25_vl")]
)
def test_a_step_does_not_depend_on_how_rows_of_0_to_3_pictures_are_cut_up(
    name: str, family: str, models: dict[str, str], ragged: str, root: Path
) -> None:
    model = models[family]
    whole = trained(name, model, ragged, root)
    cut = trained(name, model, ragged, root, parts=4)
    packed = trained(name, model, ragged, root, parts=2, settings={"padding_free": True})
    before = made(name, model)
    before.policy.load()
    assert (weights(whole) - weights(before)).abs().max() > 1e-4
    for other in (cut, packed):
        torch.testing.assert_close(weights(whole), weights(other), atol=3e-6, rtol=0)


@pytest.mark.parametrize("stop", ["epoch=1-step=3", "epoch=0-step=2"])
def test_pictures_of_a_rollout_survive_a_stop(model: str, ragged: str, root: Path, tmp_path: Path, stop: str) -> None:
    lora = {"lora": LoraSettings(rank=4, alpha=8)}
    whole = trained("grpo", model, ragged, root, settings=lora, max_epochs=2, callbacks=[every_step(tmp_path)], enable_checkpointing=True)
    again = trained("grpo", model, ragged, root, settings=lora, max_epochs=2, ckpt_path=str(tmp_path / f"{stop}.ckpt"))
    assert torch.equal(weights(whole), weights(again))


def test_an_answer_that_holds_a_place_for_a_picture_has_no_part_in_the_loss(model: str, ragged: str, root: Path) -> None:
    class Careless(RolloutEngine):
        """Puts a picture's token into every second answer, as a server may that does not ban them."""

        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
            return [Sample([5 if i % 2 else self.policy.banned_ids[0]], [-1.0], "length") for i in range(len(requests))]

    method = made("grpo", model)
    method.answers.engine = Careless()
    run = trainer(max_epochs=1, limit_val_batches=0, callbacks=[RewardScoring({"corner": Corner()})])
    run.fit(method, datamodule=TextPrompts(train=ragged))
    rollout = method.collect(method.ask(0))
    assert rollout.mask.any(1).tolist() == [bool(i % 5 % 2) for i in range(16)]  # five at once
    sampled = torch.arange(rollout.mask.shape[1]) == rollout.lengths[:, None] - 2
    turns = replace(rollout.with_columns(turn=torch.arange(16)), mask=sampled)
    assert torch.equal(checked(turns, method.policy).mask, rollout.mask)
    shown = next(i for i, pictures in enumerate(rollout.media) if pictures)
    less = [pictures if i != shown else pictures[:-1] for i, pictures in enumerate(rollout.media)]
    with pytest.raises(ConfigError, match=rf"row ragged-\d+, turn {shown}: its tokens hold \d+ places for \d+ pieces of its \d images$"):
        checked(replace(turns, media=less), method.policy)


def test_an_image_that_changes_after_the_start_is_told_with_its_row(model: str, ragged: str, root: Path) -> None:
    method = made("sft", model)
    grown = SupervisedText(train=ragged)
    grown.media = lambda info: [torch.zeros(3, 128, 128, dtype=torch.uint8) for _ in info.get("images", ())]  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"row ragged-\d+: its tokens hold \d+ places for \d+ pieces of its \d images: has an image file"):
        trainer(max_epochs=1, limit_val_batches=0, callbacks=[]).fit(method, datamodule=grown)
