"""The form of an answer, where a part of it stands in the prompt and where its tags are special tokens."""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_text import model_folder, policy

from lit_rl.methods.grpo import GRPO
from lit_rl.miniatures.lm import PRINTABLE, char_tokenizer
from lit_rl.policies.chat import prompt_ids
from lit_rl.policies.reply import reply
from lit_rl.rewards.text.style import FormatReward
from lit_rl.rollouts.base import Sample
from lit_rl.types import Answer, Prompts

ROLE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
HEADERS = {
    "plain": "<|assistant|>",
    "qwen": "<|assistant|>\n",
    "thinking": "<|assistant|>\n<think>\n",
    "r1": "<|assistant|><think>\n",
    "off": "<|assistant|>\n<think>\n\n</think>\n\n",
    "magistral": "[/INST][THINK]",
    "two": "<|assistant|><reply> <reasoning>",
}
REASON = r"<(think|reasoning)>.+?</\1>"


@cache
def tokenizer(*special: str) -> Any:
    made = char_tokenizer(PRINTABLE, chat=True, max_length=512)
    if special:
        made.add_tokens(list(special), special_tokens=True)
    return made


def answer(text: str, *, header: str = "plain", special: tuple[str, ...] = (), prompt: Any = None) -> Answer:
    """As a policy gives it that has said `text` and ended."""
    tok = tokenizer(*special)
    tok.chat_template = ROLE + "{% if add_generation_prompt %}" + HEADERS[header] + "{% endif %}"
    prompt = prompt or [{"role": "user", "content": "Think in <think>."}]
    asked = prompt_ids(tok, prompt)
    ids = [*tok(text, add_special_tokens=False).input_ids, tok.eos_token_id]
    return reply(tok, ids, prompt_ids=asked, info={"prompt": prompt}, stop_ids=[tok.eos_token_id])


def score(text: str, pattern: str | None = None) -> float:
    reward = FormatReward() if pattern is None else FormatReward(pattern)
    return float(reward.score([text], [{"prompt": "p"}])["format"])


@pytest.mark.parametrize(
    ("header", "text", "pattern", "right"),
    [
        ("plain", "<think>a</think>b", None, 1),
        ("qwen", "<think>a</think>b", None, 1),
        ("thinking", "a</think>b", None, 1),
        ("thinking", "a", None, 0),
        ("thinking", "<think>a</think>b", None, 0),
        ("r1", "a\n\n</think>b", None, 1),
        ("r1", "a</think>b", REASON, 1),
        ("off", "b", None, 0),
        ("off", "<think>a</think>b", None, 1),
        ("magistral", "a[/THINK]b", r"\[THINK\].*?\[/THINK\]", 1),
        ("magistral", "a[/THINK]b", None, 0),
        ("two", "a</reasoning>b</reply>", r"\s*<reply>\s*<reasoning>.*</reasoning>.*</reply>$", 1),
        ("two", "a</reasoning>b", REASON, 1),
        ("thinking", "A. yes", r"[A-Z]\.", 1),
        ("thinking", "is 4", r".{4}$", 1),
    ],
)
def test_tags_that_the_template_opens(header: str, text: str, pattern: str | None, right: int) -> None:
    said = answer(text, header=header)
    assert said == text and score(said, pattern) == right


@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|reason|>", "<|/reason|>"), ("◁think▷", "◁/think▷")])
@pytest.mark.parametrize("end", ["", "$"])
def test_tags_that_are_special_tokens(tags: tuple[str, str], end: str) -> None:
    first, last = tags
    pattern = "".join(f"\\{c}" if c in "[]|" else c for c in f"{first}X{last}").replace("X", "[^a-z]*?") + f"[a-z]+{end}"
    said = answer(f"{first}1{last}b", special=tags)
    assert said == "1b" and score(said, pattern) == 1
    assert score(answer(f"{first}1b", special=tags), pattern) == 0
    assert score(answer(f"{first}1{last}b<|user|>", special=tags), pattern) == 1, "other special tokens do not count"
    assert score(said, r"\db$") == 1, "nor these, for a pattern that does not name them"


def test_a_special_tag_that_the_template_opens() -> None:
    assert score(answer("a</think>b", header="r1", special=("<think>", "</think>"))) == 1
    assert score(answer("ab", header="r1", special=("<think>", "</think>"))) == 0


@pytest.mark.parametrize(
    ("prompt", "said", "right"),
    [
        ("Solve it. <think>\n", "a</think>b", 1),
        ("Write <think> and </think>", "a</think>b", 0),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>First, "}], "a</think>b", 1),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "Hm. "}], "<think>a</think>b", 0),
    ],
)
def test_prompts_that_begin_the_answer(prompt: Any, said: str, right: int) -> None:
    tok = tokenizer()
    text = prompt if isinstance(prompt, str) else f"<|user|>?<|assistant|>{prompt[-1]['content']}"
    ids = [tok(part, add_special_tokens=False).input_ids for part in (text, said)]
    assert score(reply(tok, ids[1], prompt_ids=ids[0], info={"prompt": prompt}, stop_ids=[tok.eos_token_id])) == right


def test_an_answer_is_a_text_and_travels_to_other_processes() -> None:
    said = answer("<think>a</think>b", special=("<think>",))
    again = pickle.loads(pickle.dumps(said))
    assert again == said == "a</think>b" and vars(again) == vars(said) and score(again) == 1


def test_methods_hand_rewards_what_the_prompt_opened(tmp_path: Path) -> None:
    model = policy(model_folder(tmp_path / "lm", characters=PRINTABLE))
    method, submitted = GRPO(model, group_size=2, prompts_per_iteration=1), []
    method.reward_queue = SimpleNamespace(submit=lambda media, info, groups, place: submitted.extend(media))  # type: ignore[assignment]
    ids = [model.encode(text) for text in ("2+2? <think>", "a</think>4")]
    samples = [Sample(ids[1], [0.0] * len(ids[1]), "stop")]
    method.notify = lambda *told: None  # type: ignore[method-assign]
    method.answers.submit(method, samples, [ids[0]], Prompts(torch.tensor([0]), [{"prompt": "2+2? <think>"}]))
    assert submitted == ["a</think>4"] and FormatReward().score(submitted, [{}])["format"].tolist() == [1]
