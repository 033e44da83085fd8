"""A policy trains as it samples: no dropout, no layers left out, no noise, except in supervised fine-tuning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from any_lm import save_lm
from toy_text import Digits, policy, trainer

from lit_rl.losses.kl import KL
from lit_rl.methods.dpo import DPO
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.sft import SFT
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.critic import Critic
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling

RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "of tokens, attention and residuals": ("GPT2", dict(causal="GPT2LMHeadModel", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
    "of layers": ("OPT", dict(ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.5)),
    "in the block's own forward": ("Bloom", dict(hidden_dropout=0.5, attention_dropout=0.5)),
    "of attention alone": ("Llama", dict(attention_dropout=0.5)),
    "noise of a router": ("Mixtral", dict(num_local_experts=4, router_jitter_noise=0.5)),
}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 16, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 4, 7])
    return tokens, lengths, torch.arange(8) < (lengths - 1)[:, None]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", RANDOM)
def test_training_computes_what_evaluation_does(name: str, recomputed: bool, tmp_path: Path) -> None:
    family, settings = RANDOM[name]
    dropout = 0.0 if family in ("GPT2", "Mixtral") else 0.5  # fused experts take none
    lora = None if family == "GPT2" else LoraSettings(rank=2, dropout=dropout)
    made = policy(save_lm(tmp_path, family, **settings), lora=lora, gradient_checkpointing=recomputed)
    made.load()
    with torch.no_grad():
        for key, parameter in made.trainable():
            parameter += 0.3 * (".lora_B." in key)
    made.eval()
    expected = made.logprobs(*batch())[0]
    made.train()
    state = torch.get_rng_state()
    found = made.logprobs(*batch())[0]
    torch.testing.assert_close(found, expected)
    assert torch.equal(state, torch.get_rng_state())
    made.drops = True
    assert (made.train().logprobs(*batch())[0] - expected).abs().max() > 1e-3


def test_blocks_are_computed_again_in_backward_in_either_mode(tmp_path: Path) -> None:
    calls = []
    made = policy(save_lm(tmp_path, "Llama"), gradient_checkpointing=True)
    made.load()
    for block in made.blocks(made.network):
        block.self_attn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    for mode in (False, True):
        made.train(mode)
        calls.clear()
        made.logprobs(*batch())[0].sum().backward()
        assert len(calls) == 4
    with torch.no_grad():
        made.logprobs(*batch())
    assert len(calls) == 6


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, settings = RANDOM["in the block's own forward"]
    return save_lm(tmp_path_factory.mktemp("dropping"), family, **settings)


def first_step(method: Any) -> dict[str, float]:
    run = trainer(max_epochs=1, check_val_every_n_epoch=100)
    run.fit(method, datamodule=Digits(prompts=8))
    assert not any(module.training for module in method.policy.network.modules())
    return {name: float(value) for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, dropout=0.5)])
def test_dpo_begins_at_ln_2(lora: LoraSettings | None, dropping: Path) -> None:
    assert first_step(DPO(policy(dropping, lora=lora, keep_reference=True), prompts_per_iteration=8))["loss"] == pytest.approx(math.log(2))


def test_ratios_begin_at_1_and_a_critic_values_an_answer_alike_twice(dropping: Path) -> None:
    common: dict[str, Any] = dict(
        prompts_per_iteration=8, kl=KL(coef=0.1), answers=Answers(sampling=Sampling(max_new_tokens=5), old_logprobs="recompute")
    )
    kept = policy(dropping, keep_reference=True)
    found = first_step(GRPO(kept, group_size=2, **common))
    assert found["ppo_kl"] == pytest.approx(0, abs=1e-6) and found["kl_divergence"] == pytest.approx(0, abs=1e-6)
    critic = Critic(str(dropping), lora=LoraSettings(rank=2, dropout=0.5))
    first_step(PPO(policy(dropping, keep_reference=True), critic=critic, **common))
    with torch.no_grad():
        critic.network.head.weight += 0.1
    critic.train()
    assert torch.equal(critic.values(*batch()), critic.values(*batch()))


def test_sft_trains_with_the_dropout_that_is_configured(dropping: Path) -> None:
    method = SFT(policy(dropping), prompts_per_iteration=8)
    trainer(max_epochs=1, check_val_every_n_epoch=100).fit(method, datamodule=Digits(prompts=8))
    assert isinstance(method.policy, CausalLM) and method.policy.network.lm.training
