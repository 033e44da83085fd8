"""Methods on language models learn, weigh every token as the formula says, and do not depend on how a step is cut up."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from learners import rewards_rise
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toy_text import Digits, policy, trainer, weights, weights_of

from datamodules.supervised import SupervisedText
from lit_rl.credit.length_penalty import LengthPenalty
from lit_rl.credit.rules import LengthWeighted, PassAtK, ReturnsBaseline
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import KL, RewardKL
from lit_rl.losses.off_policy import Correction
from lit_rl.losses.surrogates import Clip, GeoMean, Reinforce, Sapo, Vespo
from lit_rl.methods.dpo import DPO
from lit_rl.methods.grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePP
from lit_rl.methods.sft import SFT
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import EvalSampling, Sampling
from lit_rl.types import Prompts

SHORT = Sampling(max_new_tokens=5)
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def folder(sorting_lm: Path) -> Path:
    return sorting_lm


def after_one_iteration(make: Callable[[], Any], **settings: Any) -> Tensor:
    method = make()
    trainer(max_epochs=1, check_val_every_n_epoch=100, **settings).fit(method, datamodule=Digits())
    return weights(method)


# ---------------------------------------------------------------------- learning
def test_sft_teaches_the_answer_and_where_it_ends(folder: Path) -> None:
    method = SFT(policy(folder), prompts_per_iteration=32, answers=Answers(sampling=SHORT))
    run = trainer()
    accuracy = run.validate(method, datamodule=Digits(prompts=128), verbose=False)[0]
    assert accuracy["val/exact"] > 0.3  # greedy answers that stop by themselves: three digits out of ten, 1 in 200 by chance
    assert accuracy["val/loss"] < 1.0  # ln 14 = 2.6 at random


@pytest.mark.slow
@pytest.mark.parametrize("method", [GRPO, DrGRPO, GSPO, RLOO, ReinforcePP, CISPO, DAPO])
def test_rewards_rise_on_held_out_prompts(method: type[GRPO], folder: Path) -> None:
    given: dict[type[GRPO], dict[str, Any]] = {
        GSPO: {"prompts_per_update": 16},  # its ratio is 1 in the first step
        DAPO: {"dynamic_sampling": DynamicSampling(on_limit="train_partial"), "length_penalty": LengthPenalty()},
    }
    rewards_rise(folder, method, **given.get(method, {}))


PARTS: list[dict[str, Any]] = [
    {"surrogate": Sapo(), "prompts_per_update": 16},
    {"surrogate": GeoMean(), "aggregation": "seq-mean-token-mean", "prompts_per_update": 16},
    {"surrogate": Vespo(), "prompts_per_update": 16},
    {"surrogate": Reinforce()},
    {"credit": LengthWeighted()},
    {"credit": PassAtK(), "by": 0.05},  # it is the best answer of a group that it improves
    {"credit": ReturnsBaseline()},
]


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: type(next(iter(parts.values()))).__name__)
def test_rewards_rise_with_each_part_of_grpo(parts: dict[str, Any], folder: Path) -> None:
    rewards_rise(folder, GRPO, **parts)


@pytest.mark.parametrize("options", [{}, {"f_divergence": "js_divergence"}], ids=["reverse_kl", "js"])
def test_dpo_prefers_the_chosen_answer_on_held_out_prompts(folder: Path, options: dict[str, Any]) -> None:
    learner = DPO(
        policy(folder, keep_reference=True),
        prompts_per_iteration=64,
        prompts_per_update=16,
        optimizer=partial(torch.optim.AdamW, lr=5e-4),
        **options,
    )
    run = trainer(max_epochs=3, check_val_every_n_epoch=3)
    run.fit(learner, datamodule=Digits())
    assert run.callback_metrics["val/accuracy"] > 0.9 and run.callback_metrics["val/margin"] > 0.2


def test_held_out_pairs_that_only_fill_up_count_for_nothing_but_cost_their_forwards(folder: Path) -> None:
    """The second of two processes has 1 of 9 pairs (batches of 4), filled up to two batches: the first one waits for both."""
    method, run, forwards = DPO(policy(folder, keep_reference=True), prompts_per_iteration=4), trainer(), []
    run.validate(method, datamodule=Digits(), verbose=False)
    for network in method.policy.networks():
        network.register_forward_hook(lambda *_: forwards.append(1))
    batch = next(iter(run.datamodule.val_dataloader()))  # type: ignore[attr-defined]
    for group in (batch.group, torch.full_like(batch.group, -1)):
        method.validation_step(Prompts(group=group, info=batch.info), 0)
    assert len(forwards) == 4
    assert [float(row["pairs"]) for row in method._held_out] == [len(batch.group), 0]


def test_dpo_says_who_answers_prompts(folder: Path) -> None:
    with pytest.raises(ConfigError, match="predict with the run of a method that has one"):
        trainer().predict(DPO(policy(folder, keep_reference=True), prompts_per_iteration=4), datamodule=Digits())


# ---------------------------------------------------------------------- how a step is cut up does not matter
MAKE = {
    "sft": lambda f: SFT(policy(f), prompts_per_iteration=12, prompts_per_update=6, optimizer=SGD, answers=Answers(sampling=SHORT)),
    "dpo": lambda f: DPO(policy(f, keep_reference=True), prompts_per_iteration=12, prompts_per_update=6, optimizer=SGD),
    **{
        name: lambda f, m=m, kw=kw: m(
            policy(f, keep_reference=True),
            prompts_per_iteration=6,
            prompts_per_update=3,
            group_size=4,
            optimizer=SGD,
            answers=Answers(sampling=SHORT),
            **kw,
        )
        for name, m, kw in [
            ("grpo", GRPO, {"kl": KL(coef=0.1), "entropy_coef": 0.01}),
            ("grpo_paper", GRPO, {"aggregation": "seq-mean-token-mean"}),
            ("dr_grpo", DrGRPO, {}),
            ("gspo", GSPO, {}),
            ("gmpo", GRPO, {"surrogate": GeoMean(), "aggregation": "seq-mean-token-mean"}),
            ("rloo", RLOO, {"kl_in_reward": RewardKL(coef=0.05)}),
            ("reinforce_pp", ReinforcePP, {"kl_in_reward": RewardKL(coef=0.05)}),
            ("cispo", CISPO, {}),
            ("corrected", GRPO, {"correction": Correction(level="sequence")}),
        ]
    },
}


@pytest.mark.parametrize("name", MAKE)
def test_micro_batches_do_not_change_a_step(name: str, folder: Path) -> None:
    whole = after_one_iteration(lambda: MAKE[name](folder))
    assert (whole - weights_of(folder)).abs().max() > 1e-4
    for parts in (2, 3):
        torch.testing.assert_close(
            after_one_iteration(lambda: MAKE[name](folder), accumulate_grad_batches=parts), whole, rtol=1e-6, atol=1e-6
        )


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(folder: Path) -> None:
    """The second of three steps is poisoned: the mean norm of the other two is logged."""
    after: list[Tensor] = []

    class Poisoned(SFT):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 1:
                next(p for _, p in self.policy.trainable()).grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]

        def on_train_batch_end(self, *_: Any) -> None:
            after.append(weights(self))

    method = Poisoned(policy(folder), prompts_per_iteration=12, prompts_per_update=4, optimizer=SGD, answers=Answers(sampling=SHORT))
    run = trainer(max_epochs=1, check_val_every_n_epoch=100)
    with pytest.warns(UserWarning, match="Optimizer step 2 is left out"):
        run.fit(method, datamodule=Digits())
    first, second, third = after
    assert torch.equal(first, second) and not torch.equal(second, third) and third.isfinite().all()
    assert run.callback_metrics["skipped_steps"] == 1
    mean = ((first - weights_of(folder)).norm() + (third - second).norm()) / 2 / 0.1
    assert abs(float(run.callback_metrics["grad_norm"] - mean)) < 1e-3 * float(mean)


@pytest.mark.parametrize(("name", "tokens", "parts"), [("grpo", 40, 3), ("grpo", 36, 3), ("grpo", 35, 4), ("dpo", 16, 6), ("sft", 24, 2)])
def test_a_token_budget_is_kept_and_does_not_change_a_step(name: str, tokens: int, parts: int, folder: Path) -> None:
    """The longest answer to 4 tokens of prompt has 5: 4 of 9 go into 36 tokens, so 12 make 3 parts. The longest row and pair has 8."""
    whole = after_one_iteration(lambda: MAKE[name](folder))
    method, widest = MAKE[name](folder), 0
    method.micro_batch_tokens = tokens
    forward = method.policy.logprobs

    def counted(batch: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal widest
        widest = max(widest, batch.numel())
        return forward(batch, *args, **kwargs)

    method.policy.logprobs = counted
    run = trainer(max_epochs=1, check_val_every_n_epoch=100)
    run.fit(method, datamodule=Digits())
    assert run.accumulate_grad_batches == parts and 0 < widest <= tokens
    torch.testing.assert_close(weights(method), whole, rtol=1e-6, atol=1e-6)


def test_a_token_budget_of_demonstrations_asks_for_no_pairs(folder: Path, tmp_path: Path) -> None:
    """Rows of at most 8 tokens, two in 16: four rows are two micro-batches."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}=", "response": "{n % 10}"}}\n' for n in range(10, 18)))
    method = SFT(policy(folder), prompts_per_iteration=4, micro_batch_tokens=16, optimizer=SGD)
    run = trainer(max_epochs=1, limit_val_batches=0, callbacks=[])
    run.fit(method, datamodule=SupervisedText(train=str(tmp_path / "rows.jsonl"), max_length=8))
    assert run.accumulate_grad_batches == 2


def test_a_token_budget_that_cannot_be_kept_is_refused(folder: Path) -> None:
    for settings, message in (
        ({"micro_batch_tokens": 8}, "at least 9"),
        ({"micro_batch_tokens": 36}, "both set the number of micro-batches"),
    ):
        method = GRPO(policy(folder), prompts_per_iteration=6, group_size=4, answers=Answers(sampling=SHORT), **settings)
        with pytest.raises(ConfigError, match=message):
            trainer(max_epochs=1, accumulate_grad_batches=2).fit(method, datamodule=Digits())


def test_an_on_policy_step_is_reinforce(folder: Path) -> None:
    """At ratio 1 the clipped surrogate's gradient is that of -A log p, whatever the clip range."""
    make = partial(GRPO, prompts_per_iteration=4, group_size=4, optimizer=SGD, answers=Answers(sampling=SHORT))
    clipped = after_one_iteration(lambda: make(policy(folder), surrogate=Clip(low=1e-6, high=1e-6)))
    plain = after_one_iteration(lambda: make(policy(folder), surrogate=Reinforce()))
    torch.testing.assert_close(clipped, plain, rtol=0, atol=1e-6)


def test_the_first_step_of_recomputed_logprobs_is_the_on_policy_one(folder: Path) -> None:
    make = partial(GRPO, prompts_per_iteration=4, group_size=4, optimizer=SGD)
    auto = after_one_iteration(lambda: make(policy(folder), answers=Answers(sampling=SHORT)))
    for kind in ("recompute", "rollout"):
        again = Answers(sampling=SHORT, old_logprobs=kind)
        torch.testing.assert_close(after_one_iteration(lambda: make(policy(folder), answers=again)), auto, rtol=0, atol=1e-5)  # noqa: B023


@pytest.mark.parametrize("ld_alpha", [1.0, 0.3])
def test_a_precomputed_reference_is_the_live_one_without_its_copy(ld_alpha: float, folder: Path, tmp_path: Path) -> None:
    def run(resume: str | None = None, epochs: int = 3, **settings: Any) -> Any:
        keep = settings.get("reference") != "precomputed"
        method = DPO(
            policy(folder, keep_reference=keep),
            prompts_per_iteration=12,
            prompts_per_update=6,
            optimizer=SGD,
            ld_alpha=ld_alpha,
            **settings,
        )
        checkpoint = ModelCheckpoint(tmp_path / str(epochs), save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        fit = trainer(max_epochs=epochs, check_val_every_n_epoch=epochs, callbacks=[checkpoint], enable_checkpointing=True)
        fit.fit(method, datamodule=Digits(), ckpt_path=resume)
        return method, fit.callback_metrics

    live, seen = run()
    once, told = run(reference="precomputed")
    assert len(once.policy.networks()) == 1 and len(live.policy.networks()) == 2
    torch.testing.assert_close(weights(once), weights(live), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(told["val/margin"], seen["val/margin"], rtol=1e-4, atol=1e-5)
    run(reference="precomputed", epochs=1)
    continued, _ = run(resume=str(tmp_path / "1" / "epoch=0.ckpt"), reference="precomputed")
    assert torch.equal(weights(continued), weights(once))


# ---------------------------------------------------------------------- what cannot work is refused
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: GRPO(p, prompts_per_iteration=4, group_size=1), "no sibling to compare it with"),
        (lambda p: GRPO(p, prompts_per_iteration=4, group_size=4, kl=KL(coef=0.1)), "keep_reference"),
        (lambda p: Answers(sampling=Sampling(temperature=0)), "nothing to learn from"),
        (lambda p: GRPO(p, prompts_per_iteration=4, prompts_per_update=3, group_size=4), "must divide"),
        (lambda p: GRPO(p, prompts_per_iteration=4, group_size=4, surrogate=Clip(dual=1.0)), "above 1"),
        (lambda p: DPO(p, prompts_per_iteration=4), "no reference weights"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[Any], Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make(policy(folder))


# ---------------------------------------------------------------------- options that are given in part
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Sampling(max_new_tokens=5, temperature=0.0)),
        ({"max_new_tokens": 6}, Sampling(max_new_tokens=6, temperature=0.0)),
        ({"temperature": 0.7}, Sampling(max_new_tokens=5, temperature=0.7)),
        ({"temperature": 1.0, "top_p": 0.7}, Sampling(max_new_tokens=5, top_p=0.7)),
    ],
)
def test_a_part_of_eval_sampling_is_laid_over_the_default_of_evaluation(folder: Path, given: dict[str, Any], wanted: Sampling) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(GRPO, "model", fail_untyped=False, skip={"optimizer", "lr_scheduler"})
    options = {"policy": {"class_path": "lit_rl.policies.causal_lm.CausalLM", "init_args": {"pretrained": str(folder)}}}
    options |= {"answers": {"sampling": {"max_new_tokens": 5, "top_k": 3}, "eval_sampling": given}}
    options |= {"prompts_per_iteration": 4, "group_size": 2}
    method = parser.instantiate_classes(parser.parse_object({"model": options})).model
    assert method.answers.eval_sampling == wanted


def test_eval_sampling_that_chooses_among_tokens_that_are_not_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval_sampling.top_p=0.9 chooses among tokens that are drawn.* set eval_sampling.temperature"):
        EvalSampling(top_p=0.9)
    with pytest.raises(ConfigError, match="eval_sampling.max_new_tokens=0 must be at least 1"):
        EvalSampling(max_new_tokens=0).over(SHORT)
