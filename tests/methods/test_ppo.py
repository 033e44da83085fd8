"""PPO: the critic learns beside the policy, alone at first if asked, and everything it needs survives a restart."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toy_text import Digits, Sorted, model_folder, policy, trainer

from callbacks.ema import EMA
from callbacks.export import Export
from callbacks.reward_scoring import RewardScoring
from lit_rl.credit.rules import GAE
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import RewardKL
from lit_rl.methods.ppo import PPO, CriticTraining
from lit_rl.methods.sft import SFT
from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.critic import Critic
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.types import TokenRollout

SHORT = Sampling(max_new_tokens=5)
SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
KL: dict[str, Any] = dict(kl_in_reward=RewardKL(coef=0.05, target=0.01, horizon=50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature that has seen the task: about half of its answers are right."""
    root = tmp_path_factory.mktemp("lm")
    adam = partial(torch.optim.AdamW, lr=2e-3)
    random = policy(model_folder(root / "random", hidden=64, layers=2))
    method = SFT(random, prompts_per_iteration=128, prompts_per_update=32, optimizer=adam, answers=Answers(sampling=SHORT))
    trainer(max_epochs=8, check_val_every_n_epoch=100).fit(method, datamodule=Digits(prompts=128))
    (root / "sft").mkdir()
    method.policy.save(root / "sft", {name: p.detach() for name, p in method.policy.trainable()})
    return root / "sft"


def ppo(folder: Path, *, keep_reference: bool = True, **settings: Any) -> PPO:
    training = {"lr": 0.1} | settings.pop("critic_training", {})
    defaults: dict[str, Any] = dict(
        prompts_per_iteration=8, prompts_per_update=4, group_size=2, optimizer=SGD, critic_training=CriticTraining(**training),
        answers=Answers(sampling=SHORT), credit=GAE(lam=0.95),
    )  # fmt: skip
    return PPO(policy(folder, keep_reference=keep_reference), **defaults | settings)


def fit(method: PPO, *, ckpt_path: str | None = None, **settings: Any) -> L.Trainer:
    torch.manual_seed(0)
    run = trainer(**dict(max_epochs=1, check_val_every_n_epoch=100) | settings)
    run.fit(method, datamodule=Digits(), ckpt_path=ckpt_path)
    return run


def weights(part: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in part.parameters() if p.requires_grad])


# ---------------------------------------------------------------------- the critic
def test_an_untrained_critic_expects_nothing_and_reads_no_future(tmp_path: Path) -> None:
    """Its value head is zero; trained or not, a value depends on the tokens up to its place alone, and holes have none."""
    one = policy(model_folder(tmp_path / "lm"))
    critic = Critic()
    critic.load(beside=one)
    tokens, lengths = torch.randint(4, 10, (2, 7)), torch.tensor([7, 5])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    assert not critic.values(tokens, lengths, mask).any()
    torch.nn.init.normal_(critic.network.head.weight)
    values = critic.values(tokens, lengths, mask)
    assert values.ne(0).equal(mask)
    changed = tokens.clone()
    changed[0, 5:], changed[1, 5:] = 3, 99999  # padding may be no token at all
    again = critic.values(changed, lengths, mask)
    torch.testing.assert_close(again[:, :5], values[:, :5])
    assert again[0, 5] != values[0, 5]


@pytest.mark.parametrize("family", ["qwen2", "llama", "deepseek"])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
def test_a_critic_of_its_own_trains_and_is_kept_without_its_base(tmp_path: Path, family: Any, lora: LoraSettings | None) -> None:
    own = build_lm(tmp_path / "critic", family=family, characters="0123456789=#? ", chat=False, hidden=16, layers=1, heads=2)
    critic = Critic(str(own), lora=lora, gradient_checkpointing=True)
    critic.load(beside=None)
    mask = torch.ones(2, 5, dtype=torch.bool)
    critic.values(torch.randint(4, 10, (2, 6)), torch.tensor([6, 6]), mask).sum().backward()
    missing = [name for name, p in critic.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert trained == critic.checkpoint_keys() and any(".head." in name for name in trained)


def test_a_critic_may_start_from_a_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    own = model_folder(tmp_path / "lm")
    judge = AutoModelForSequenceClassification.from_pretrained(own, num_labels=1)
    torch.nn.init.normal_(judge.model.layers[0].mlp.up_proj.weight)
    judge.save_pretrained(tmp_path / "judge")
    critic = Critic(str(tmp_path / "judge"))
    critic.load(beside=None)
    body = critic.network.lm.base_model.state_dict()
    assert all(torch.equal(body[name], weight) for name, weight in judge.model.state_dict().items())


# ---------------------------------------------------------------------- credit
def test_returns_are_worked_by_hand(folder: Path) -> None:
    """gamma = 1, lambda = 0.5, values 1, 2, (hole), 3 and reward 4 at the end: deltas 1, 1, 1, so that

    A = 1 + 0.5 (1 + 0.5 1), 1 + 0.5 1, 1 = 1.75, 1.5, 1; returns = A + V = 2.75, 3.5, 4. explained variance: the errors are A, variance
    (0.3333^2 + 0.0833^2 + 0.4167^2) = 0.2917, that of the returns 0.6667^2 + 0.0833^2 + 0.5833^2 = 0.7917: 1 - 0.2917 / 0.7917 = 0.6316.
    """
    method = ppo(folder, credit=GAE(lam=0.5, whiten=False))
    trainer(max_epochs=0).fit(method, datamodule=Digits())
    mask = torch.tensor([[True, True, False, True]])
    values = torch.tensor([[1.0, 2.0, 9.0, 3.0]])
    rollout = TokenRollout(group=torch.zeros(1), info=[{}], logprobs=torch.zeros(1, 4), mask=mask, streams={"values": values})
    found = method.with_advantages(rollout, torch.tensor([4.0], dtype=torch.float64))
    assert found.advantages is not None
    torch.testing.assert_close(found.advantages, torch.tensor([[1.75, 1.5, 0, 1.0]]))
    torch.testing.assert_close(found.streams["returns"], torch.tensor([[2.75, 3.5, 0, 4.0]]))
    assert method.rollout_metrics["explained_variance"] == pytest.approx(0.6316, abs=1e-4)
    assert method.rollout_metrics["return_mean"] == pytest.approx(10.25 / 3)


def test_the_divergence_is_paid_for_and_its_weight_adapts(folder: Path) -> None:
    """At first the reference is the policy: kl is 0, so the weight falls by 0.2 * 16 answers / 50; then kl / 0.01 decides."""
    method = ppo(folder, **KL)
    fit(method, max_epochs=2)
    used, kl = method.rollout_metrics["kl_in_reward_coef"], method.rollout_metrics["kl_in_reward"]
    assert used == pytest.approx(0.05 * (1 - 0.2 * 16 / 50))
    assert method.kl_in_reward.coef == pytest.approx(used * (1 + max(-0.2, min(0.2, kl / 0.01 - 1)) * 16 / 50))
    rollout = method.rollout
    assert rollout is not None
    method.kl_in_reward.coef = 2.0
    rewards = method.token_rewards(rollout, torch.zeros(16, dtype=torch.float64))
    torch.testing.assert_close(rewards, (2.0 * (rollout.streams["reference"] - rollout.logprobs)).where(rollout.mask, 0.0).double())
    assert rewards.abs().max() > 1e-3


# ---------------------------------------------------------------------- optimizer steps
def test_micro_batches_do_not_change_a_step(folder: Path) -> None:
    whole = ppo(folder, **KL)
    fit(whole)
    before = policy(folder)
    before.load()
    assert (weights(whole.policy) - weights(before)).abs().max() > 1e-4 and weights(whole.critic.network.head).abs().max() > 1e-4
    for parts in (2, 4):
        cut = ppo(folder, **KL)
        fit(cut, accumulate_grad_batches=parts)
        torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-6, atol=1e-6)


def test_the_policy_waits_for_the_critic(folder: Path) -> None:
    """No gradient, no weight decay, no moments; then it moves, and the critic's learning rate is its own."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            seen.append((weights(module.policy).clone(), weights(module.critic).clone()))
            assert bool(set(trainer.optimizers[0].state) & set(module.policy.parameters())) == (module.iteration >= 2)

    method = ppo(folder, keep_reference=False, critic_training={"warmup": 2, "lr": 3e-3}, optimizer=ADAM)
    run = fit(method, max_epochs=3, callbacks=[RewardScoring({"sorted": Sorted()}), Look()])
    start = policy(folder)
    start.load()
    assert torch.equal(seen[0][0], weights(start)) and torch.equal(seen[1][0], weights(start))
    assert not torch.equal(seen[2][0], weights(start))
    assert not torch.equal(seen[0][1], seen[1][1])
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [1e-3, 3e-3]


def test_the_critic_answers_in_float32_under_mixed_precision(folder: Path) -> None:
    """A bias of 1 / 256 on top of 256 is lost in bfloat16."""
    method = ppo(folder, keep_reference=False)
    fit(method, precision="bf16-mixed")
    assert weights(method).isfinite().all()
    head = method.critic.network.head
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        head.weight.fill_(256 / head.in_features)
        head.bias.fill_(1 / 256)
        assert head(torch.ones(1, head.in_features, dtype=torch.bfloat16)).item() == 256 + 1 / 256


def test_policy_and_critic_are_clipped_apart(folder: Path) -> None:
    norms: list[tuple[float, float]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            grads = [[p.grad for p in part.parameters() if p.grad is not None] for part in (module.policy, module.critic)]
            if all(grads):
                norms.append(tuple(float(torch.nn.utils.get_total_norm(g)) for g in grads))  # type: ignore[arg-type]

    settings: dict[str, Any] = dict(gradient_clip_val=1e-3, callbacks=[RewardScoring({"sorted": Sorted()}), Look()])
    fit(ppo(folder, critic_training={"gradient_clip_val": 1e-4}), max_epochs=2, **settings)
    assert len(norms) == 4
    for of_policy, of_critic in norms:
        assert of_policy == pytest.approx(1e-3, rel=1e-3) and of_critic == pytest.approx(1e-4, rel=1e-3)


def test_the_average_and_the_export_are_of_the_policy_alone(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    average, export = EMA(0.5), Export(str(tmp_path / "export"))
    method = ppo(folder)
    run = fit(method, max_epochs=2, callbacks=[RewardScoring({"sorted": Sorted()}), average, export])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "iteration-2").state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in method.policy.network.lm.state_dict().items())
    assert average.averaged_weights(run, method).keys() == dict(method.policy.trainable()).keys()


# ---------------------------------------------------------------------- restarts
@pytest.mark.parametrize(
    ("name", "lora"),
    [("epoch=0-step=1", False), ("epoch=0-step=2", False), ("epoch=1-step=3", False), ("epoch=2-step=5", False), ("epoch=1-step=3", True)],
)
def test_resume_equals_the_unbroken_run_bit_for_bit(folder: Path, tmp_path: Path, name: str, lora: bool) -> None:
    """Two steps an iteration, the first one of the critic alone; the checkpoint falls inside iterations and on their ends."""

    def method() -> PPO:
        adapter = LoraSettings(rank=4) if lora else None
        torch.manual_seed(0)
        own = PPO(
            policy(folder, lora=adapter, keep_reference=not lora),
            critic=Critic(lora=adapter),
            prompts_per_iteration=8, prompts_per_update=4, answers=Answers(sampling=SHORT), optimizer=ADAM,
            critic_training=CriticTraining(lr=1e-3, warmup=1), **KL,
        )  # fmt: skip
        return own

    def run(method: PPO, at: Path, ckpt_path: str | None = None) -> None:
        every = ModelCheckpoint(dirpath=at, save_top_k=-1, every_n_train_steps=1, filename="{epoch}-{step}")
        callbacks = [RewardScoring({"sorted": Sorted()}), every]
        fit(method, max_epochs=3, callbacks=callbacks, enable_checkpointing=True, ckpt_path=ckpt_path)

    unbroken, continued = method(), method()
    run(unbroken, tmp_path / "a")
    run(continued, tmp_path / "b", ckpt_path=str(tmp_path / "a" / f"{name}.ckpt"))
    assert torch.equal(weights(unbroken), weights(continued))
    assert unbroken.kl_in_reward.coef == continued.kl_in_reward.coef != KL["kl_in_reward"].coef
    saved = [torch.load(tmp_path / d / "epoch=2-step=6.ckpt", weights_only=True) for d in "ab"]
    assert saved[0]["state_dict"].keys() == saved[1]["state_dict"].keys()
    for a, b in zip(*(s["optimizer_states"][0]["state"].values() for s in saved), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------- learning
@pytest.mark.slow
def test_rewards_rise_on_held_out_prompts(folder: Path) -> None:
    learner = ppo(
        folder, keep_reference=False, prompts_per_iteration=128, prompts_per_update=128, group_size=1,
        answers=Answers(sampling=SHORT, eval_sampling=SHORT, chunk=256), optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
        critic_training={"lr": 2e-3, "warmup": 2},
    )  # fmt: skip
    data = Digits(prompts=600, held_out=200)
    before = trainer().validate(learner, datamodule=data, verbose=False)[0]["val/exact"]
    known: list[float] = []

    class Explained(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            known.append(float(trainer.callback_metrics["explained_variance"]))

    run = trainer(max_epochs=40, check_val_every_n_epoch=40, callbacks=[RewardScoring({"sorted": Sorted()}), Explained()])
    run.fit(learner, datamodule=data)
    print(before, {k: round(float(v), 3) for k, v in run.callback_metrics.items()}, known)
    assert run.callback_metrics["val/exact"] > before + 0.15
    assert sum(known[-10:]) / 10 > 0.05 > sum(known[:5]) / 5  # a single iteration of 128 answers scatters by 0.05


# ---------------------------------------------------------------------- what cannot work is refused
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: dict(kl_in_reward=RewardKL(coef=0.1)), "keep_reference"),
        (lambda: dict(kl_in_reward=RewardKL(target=0.1)), "coef=0.0"),
        (lambda: dict(credit=GAE(gamma=1.1)), r"gamma=1.1 must be in \[0, 1\]"),
        (lambda: dict(critic_training={"lr": 0.0}), "critic_training.lr=0.0 must be above 0"),
        (lambda: dict(critic_training={"warmup": -1}), "counts iterations without the policy"),
    ],
)
def test_what_cannot_work_is_refused(settings: Callable[[], dict[str, Any]], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ppo(folder, keep_reference=False, **settings())
