"""Vocabularies and lengths that do not fit are one sentence, before any weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from any_lm import ALPHABET, save_lm
from toy_text import policy, trainer

from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from lit_rl.errors import ConfigError
from lit_rl.methods.dpo import DPO
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.sft import SFT
from lit_rl.miniatures.lm import char_tokenizer
from lit_rl.policies import causal_lm
from lit_rl.policies.critic import Critic
from lit_rl.policies.sizes import positions
from lit_rl.rewards.text.model import ModelReward
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling

T = transformers
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32}


def short(tokens: int) -> Answers:
    return Answers(sampling=Sampling(max_new_tokens=tokens))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Prompts of 6 tokens, answers of 13 and 8 with their end, 19 and 14 tokens together."""
    row = {"prompt": "12=34=", "response": "123456789012", "answer": "", "chosen": "123456789012", "rejected": "1234567"}
    (file := tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return str(file)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights are read")

    monkeypatch.setattr(causal_lm, "read_lm", read)
    monkeypatch.setattr("lit_rl.policies.critic.read_lm", read)


def fit(method: Any, data: Any) -> int:
    """The number of optimizer steps of one iteration."""
    run = trainer(max_epochs=1, check_val_every_n_epoch=100)
    run.fit(method, datamodule=data)
    return run.global_step


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_longer_rows_than_the_model_has_positions_for(family: str, rows: str, tmp_path: Path, unread: None) -> None:
    causal = "GPT2LMHeadModel" if family == "GPT2" else None
    folder = save_lm(tmp_path / "lm", family, causal, max_position_embeddings=16)
    with pytest.raises(ConfigError, match=r"longest sequence of the data has 19 tokens.*has 16 positions.*data.max_length"):
        fit(DPO(policy(folder, keep_reference=True), prompts_per_iteration=4), PreferencePairs(train=rows))
    with pytest.raises(ConfigError, match=r"longest sequence of the data has 19 tokens.*has 16 positions"):
        fit(SFT(policy(folder), prompts_per_iteration=4), SupervisedText(train=rows))
    answers = Sampling(max_new_tokens=11)
    with pytest.raises(
        ConfigError, match=r"longest prompt \(6 tokens\) with its answer has 17 tokens.*16 positions.*max_new_tokens \(now 11\)"
    ):
        fit(GRPO(policy(folder), prompts_per_iteration=4, group_size=2, answers=Answers(sampling=answers)), TextPrompts(train=rows))


def test_rows_that_just_fit_are_trained_on(rows: str, tmp_path: Path) -> None:
    folder = save_lm(tmp_path / "lm", "GPT2", "GPT2LMHeadModel", max_position_embeddings=19)
    assert fit(DPO(policy(folder, keep_reference=True), prompts_per_iteration=4), PreferencePairs(train=rows)) == 1
    assert fit(GRPO(policy(folder), prompts_per_iteration=4, group_size=2, answers=short(13)), TextPrompts(train=rows)) == 1


def test_a_tokenizer_larger_than_the_embedding_or_an_end_outside_of_it(rows: str, tmp_path: Path, unread: None) -> None:
    few = save_lm(tmp_path / "few", "Llama", vocab_size=10)
    with pytest.raises(ConfigError, match=r"tokenizer of 16 tokens \(the last one is .*\) and an embedding \(vocab_size\) of 10"):
        fit(SFT(policy(few), prompts_per_iteration=4), SupervisedText(train=rows))
    end = save_lm(tmp_path / "end", "Llama")
    (end / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 99]}))
    with pytest.raises(ConfigError, match=r"ends answers at token 99, and its embedding \(vocab_size\) has 20 rows"):
        fit(SFT(policy(end), prompts_per_iteration=4), SupervisedText(train=rows))


def test_a_special_token_that_no_text_has_may_lie_outside(rows: str, tmp_path: Path) -> None:
    """Gemma 3 1B: its tokenizer knows an image's token, its embedding does not."""
    folder = save_lm(tmp_path / "lm", "Llama", vocab_size=16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == 17
    assert fit(SFT(policy(folder), prompts_per_iteration=4), SupervisedText(train=rows)) == 1


def test_a_critic_of_another_vocabulary_or_shorter_sequences(rows: str, tmp_path: Path, unread: None) -> None:
    folder = save_lm(tmp_path / "lm", "Llama")

    def run(critic: Path) -> None:
        method = PPO(policy(folder), critic=Critic(str(critic)), prompts_per_iteration=4, answers=short(8))
        fit(method, TextPrompts(train=rows))

    small = save_lm(tmp_path / "small", "Llama", vocab_size=10)
    for file in small.glob("tok*"):
        file.unlink()
    with pytest.raises(
        ConfigError, match=r"critic.pretrained: .* embedding \(vocab_size\) of 10 tokens, and the policy's tokenizer has 16"
    ):
        run(small)
    other = save_lm(tmp_path / "other", "Llama")
    char_tokenizer(ALPHABET[::-1], chat=False, max_length=64).save_pretrained(other)
    with pytest.raises(
        ConfigError, match=r"critic.pretrained: .* reads other tokens than the policy \(token '0' is 2 to the policy; it has"
    ):
        run(other)
    with pytest.raises(ConfigError, match=r"critic: sequences have up to 14 tokens.*has 8 positions"):
        run(save_lm(tmp_path / "short", "Llama", max_position_embeddings=8))


def test_a_reward_model_reads_no_more_than_it_has_positions_for(tmp_path: Path) -> None:
    folder = save_lm(tmp_path / "rm", "GPT2", "GPT2ForSequenceClassification", max_position_embeddings=16, num_labels=1)
    reward = ModelReward(str(folder))
    scores = reward.score(["1234567890123456"], [{"prompt": "1234"}])["reward_model"]
    assert scores.isfinite().all() and reward.counters() == {"cut": 1.0}
    with pytest.raises(ConfigError, match="max_length=20: .* has 16 positions"):
        ModelReward(str(folder), max_length=20).setup(rank=0, world_size=1, device="cpu")
    few = save_lm(tmp_path / "few", "GPT2", "GPT2ForSequenceClassification", vocab_size=10, num_labels=1)
    with pytest.raises(ConfigError, match=r"tokenizer of 16 tokens and an embedding \(vocab_size\) of 10"):
        ModelReward(str(few)).setup(rank=0, world_size=1, device="cpu")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (T.LlamaConfig(max_position_embeddings=16), 16),
        (T.GPT2Config(n_positions=16), 16),
        (T.Qwen2Config(max_position_embeddings=32, rope_parameters=YARN), 128),
        (T.LlamaConfig(max_position_embeddings=128, rope_parameters=YARN), 128),
        (T.LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), 256),
        (T.BloomConfig(), None),
        (T.MambaConfig(), None),
        (T.FalconConfig(alibi=True), None),
        (T.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
    ],
)
def test_how_far_positions_go(config: Any, expected: int | None) -> None:
    assert positions(config) == expected
