"""Samples that are not finite: no score, no part in statistics, loss and gradient; counted and named."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import pytest
import torch
import toy_text
from modules.test_updates import nft
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import Metrics, ToyData, ToyPolicy, toy_method, toy_trainer, weights

from callbacks.old_policy import OldPolicySync
from callbacks.reward_scoring import RewardScoring
from lit_rl.losses.kl import KL, RewardKL
from lit_rl.losses.masked import harmless, weighted_means, weighted_sum
from lit_rl.methods.dpo import DPO
from lit_rl.methods.flow_grpo import GRPOGuard
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.miniatures.images import build_sd3
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.rewards.base import RewardError, TextReward
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.types import Cond, Info


class Overflowing(ToyPolicy):
    """The condition of prompt "1" is not finite; the pixels of prompt "2" are not, where `pixels` says so."""

    bad, pixels = ("1",), False

    def encode(self, prompts: Sequence[str]) -> Cond:
        embeds = super().encode(prompts)["embeds"]
        return {"embeds": torch.where(torch.tensor([p in self.bad for p in prompts])[:, None], torch.inf, embeds)}

    def decode(self, x: Tensor) -> Tensor:
        if self.pixels:
            self.finite_pixels = torch.arange(len(x)) % 3 != 0
        return super().decode(x.nan_to_num())


def overflowing(method: Any, **attributes: Any) -> Any:
    method.policy.__class__ = Overflowing
    for name, value in attributes.items():
        setattr(method.policy, name, value)
    return method


def run(folder: Path, method: Any, **kwargs: Any) -> tuple[list[dict[str, float]], list[str]]:
    metrics = Metrics()
    callbacks: list[L.Callback] = [metrics, *([OldPolicySync("slow")] if hasattr(method, "old_policy") else [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toy_trainer(folder, callbacks=callbacks, **{"max_failed_fraction": 0.5, "max_epochs": 2} | kwargs).fit(method, ToyData())
    return metrics.rows, [str(w.message) for w in caught if "not finite" in str(w.message)]


METHODS = {
    "grpo": partial(toy_method, kl_coef=0.1),
    "guard": partial(toy_method, GRPOGuard, clip_low=1e-3, clip_high=1e-3),
    "nft": partial(nft, kl_coef=0.1),
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("size", [None, 1])
def test_a_prompt_whose_condition_is_not_finite_leaves_the_loss(tmp_path: Path, kind: str, size: int | None) -> None:
    """6 prompts x 4: the other 20 samples train as ever, whatever the micro-batches."""
    method = overflowing(METHODS[kind](prompts_per_iteration=6, train_micro_batch=size, updates_per_iteration=5))
    rows, said = run(tmp_path, method)
    assert all(row["non_finite"] == 4 and row["nan_ratio"] == pytest.approx(1 / 6) and row["trained_share"] < 1 for row in rows)
    assert not any("skipped_steps" in row for row in rows) and all(row["loss"] == row["loss"] for row in rows)
    assert weights(method).isfinite().all()
    assert [text[:52] for text in said] == [f"iteration {i}: 4 of 24 samples are not finite (latents,"[:52] for i in (1, 2)]
    assert all("'1' (4 times)" in text for text in said)


def test_they_train_as_if_they_had_failed_to_be_scored(tmp_path: Path) -> None:
    """The same weights, to the last bit, as where the reward says NaN for that prompt."""
    from toy import Broken

    found = []
    for broken in (True, False):
        method = toy_method(prompts_per_iteration=6, kl_coef=0.1)
        rewards = {"brightness": Broken()} if broken else None
        run(tmp_path, method if broken else overflowing(method), rewards=rewards)
        found.append(weights(method))
    assert torch.equal(found[0], found[1])


def test_pixels_before_they_are_uint8(tmp_path: Path) -> None:
    rows, said = run(tmp_path, overflowing(toy_method(rollout_micro_batch=6), bad=(), pixels=True), max_epochs=1)
    assert rows[0]["non_finite"] == 2 + 2 + 2 and rows[0]["nan_ratio"] == pytest.approx(6 / 16) and len(said) == 1


@pytest.mark.parametrize("bad", [("1",), tuple("012345")])
def test_too_many_end_the_run_with_a_sentence(tmp_path: Path, bad: tuple[str, ...]) -> None:
    method = overflowing(toy_method(prompts_per_iteration=6), bad=bad)
    with pytest.raises(RewardError, match=r"iteration 1: \d+ of 24 samples are not finite .*'1'.* max_failed_fraction=0.05 .*vae_dtype"):
        run(tmp_path, method, max_failed_fraction=0.05)


def test_evaluation_and_prediction_name_them(tmp_path: Path) -> None:
    """Held-out prompts are 6 ... 10; the fifth one's batch is filled up with an example that does not count."""
    method = overflowing(toy_method(), bad=("7", "10"))
    trainer = toy_trainer(tmp_path, max_failed_fraction=0.5, limit_val_batches=1.0)
    with pytest.warns(UserWarning, match=r"evaluation: 2 of \d+ samples are not finite .*'7', '10'"):
        (metrics,) = trainer.validate(method, ToyData(), verbose=False)
    assert metrics["val/brightness"] == metrics["val/brightness"] and metrics["val/non_finite"] == 2
    with pytest.warns(UserWarning, match=r"predict: pictures are not finite and show nothing .*'7'"):
        trainer.predict(method, ToyData())


def test_examples_that_are_not_finite_leave_the_warm_up(tmp_path: Path) -> None:
    method = overflowing(toy_method(warmup_steps=3))
    rows, said = run(tmp_path, method, max_epochs=1)
    assert len(said) == 1 and said[0].startswith("warm-up: examples are not finite") and "'1'" in said[0]
    assert weights(method).isfinite().all() and "skipped_steps" not in rows[0]


# ---------------------------------------------------------------------- a real pipeline
@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its VAE overflows in float16: a group norm follows the layer that does, so that float32 shows nothing."""
    folder = build_sd3(tmp_path_factory.mktemp("nf") / "sd3", vae="kl", factor=4, height=32, width=48, hidden=32, heads=2, layers=2,
                       text_hidden=16, t5_hidden=32)  # fmt: skip
    file = next((folder / "vae").glob("*.safetensors"))
    parts = {key: value * 2e5 if key.startswith("decoder.conv_in") else value for key, value in load_file(file).items()}
    save_file(parts, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_vae_that_overflows_decodes_again_in_float32(sd3: Path, dtype: Any) -> None:
    policy = SD3Policy(str(sd3), resolution=(32, 48), max_sequence_length=8, vae_dtype=dtype)
    policy.load()
    x = torch.randn(3, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    images, known = policy.picture(x)
    assert images.dtype == torch.uint8 and known.all()
    if dtype == "float16":  # all of it overflows
        whole = SD3Policy(str(sd3), resolution=(32, 48), max_sequence_length=8)
        whole.load()
        assert not policy._pipe.vae.decode(policy.unpack(x).half(), return_dict=False)[0].isfinite().any()
        assert (images.int() - whole.picture(x)[0].int()).abs().max() <= 1, "the VAE's weights are rounded to float16"
    assert policy._pipe.vae.dtype == getattr(torch, dtype)
    assert policy.picture(x.index_fill(0, torch.tensor([1]), torch.nan))[1].tolist() == [True, False, True]


# ---------------------------------------------------------------------- formulas
def test_sums_ignore_what_has_no_weight() -> None:
    x = torch.tensor([1.0, torch.nan, torch.inf, 3.0], requires_grad=True)
    w = torch.tensor([0.5, 0.0, 0.0, 0.25])
    total = weighted_sum(x, w)
    total.backward()
    assert total == 1.25 and x.grad is not None and torch.equal(x.grad, w)
    assert weighted_means({"x": x}, w)["x"] == pytest.approx(1.25 / 0.75) and weighted_means({"x": x}, 0 * w)["x"] == 0


def test_only_rows_that_are_not_used_are_changed() -> None:
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])
    assert torch.equal(harmless(x, torch.tensor([True, False]))[1], torch.tensor([0.0, 2.0]))
    assert harmless(x, torch.tensor([True, False]))[0, 1].isnan()
    assert harmless(torch.tensor([[torch.nan]]).expand(3, 1), torch.ones(3, dtype=torch.bool)).isfinite().all()


# ---------------------------------------------------------------------- language models
class Odd(TextReward):
    outputs = ("odd",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"odd": torch.tensor([float(sum(map(ord, text)) % 7) for text in media])}


class Nines(toy_text.Digits):
    """Every prompt of an iteration holds a digit 9, or none does: prompts 0 and 3 do."""

    def __init__(self) -> None:
        super().__init__()
        numbers = ["941", "123", "420", "095", "311", "520"]
        self.train_prompts = [MappingProxyType({"prompt": f"{n}=", "answer": "".join(sorted(n))}) for n in numbers]


def break_nines(module: Any) -> None:
    """Make the embedding of a "9" overflow, so that every value computed from it is NaN."""
    token = module.policy.tokenizer("9").input_ids[0]

    def overflow(_: Any, ids: tuple[Tensor], out: Tensor) -> Tensor:
        return torch.where((ids[0] == token)[..., None], torch.inf, out)

    for embedding in [part for part in module.modules() if isinstance(part, torch.nn.Embedding)]:
        embedding.register_forward_hook(overflow)


class Break(L.Callback):
    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        break_nines(module)


SHORT = Answers(sampling=Sampling(max_new_tokens=4))
TEXTS: dict[str, Any] = {
    "grpo": partial(GRPO, group_size=3, kl=KL(coef=0.1), answers=SHORT),
    "grpo, two steps": partial(GRPO, group_size=3, prompts_per_update=3, entropy_coef=0.01, answers=SHORT),
    "ppo": partial(PPO, group_size=2, kl_in_reward=RewardKL(coef=0.1), answers=SHORT),
    "dpo": DPO,
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("parts", [1, 3])
def test_answers_that_are_not_finite_leave_the_loss(tmp_path: Path, kind: str, parts: int) -> None:
    model = toy_text.model_folder(tmp_path / "model")
    method = TEXTS[kind](
        toy_text.policy(model, keep_reference=True), prompts_per_iteration=6, optimizer=partial(torch.optim.SGD, lr=0.1), seed=0
    )  # fmt: skip
    metrics = Metrics()
    scoring = [] if kind == "dpo" else [RewardScoring({"odd": Odd()}, max_failed_fraction=0.9)]
    trainer = toy_text.trainer(callbacks=[*scoring, Break(), metrics], max_epochs=1, accumulate_grad_batches=parts, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"iteration 1: \d+ of \d+ samples are not finite .*'941=' \(\d times\)"):
        trainer.fit(method, Nines())
    (row,) = metrics.rows
    assert row["non_finite"] >= 4 and "skipped_steps" not in row
    assert all(value == value for name, value in row.items() if not name.startswith("reward")), row
    assert all(weight.isfinite().all() for weight in method.parameters())
