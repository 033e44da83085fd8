"""Rows after a policy's tokenizer: lengths, loss masks, pairs. A miniature's tokenizer has one token per character."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from golden_numbers import load_llm
from hypothesis import given
from hypothesis import strategies as st
from text_rows import attached, jsonl, parquet

from datamodules.mixed import PromptsAndPairs
from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from datamodules.text_answers import truncated
from lit_rl.errors import ConfigError
from lit_rl.miniatures.lm import END, build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.replay.sequences import pair_sequences
from lit_rl.types import Prompts

QWEN = (  # as Qwen2.5 writes turns: no generation marks, a new line behind the token that ends them
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (  # as Qwen3 drops earlier thoughts: what the assistant said before depends on what follows
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_lm(tmp_path_factory.mktemp("lm"), hidden=32)


@pytest.fixture(scope="module")
def policy(folder: Path) -> CausalLM:
    return CausalLM(str(folder))


def text(policy: CausalLM, ids: Sequence[int]) -> str:
    return policy.tokenizer.decode(list(ids))


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


# ---------------------------------------------------------------------- lengths


@pytest.mark.golden
def test_truncation_is_verls(golden_dir: Path) -> None:
    data, _ = load_llm(golden_dir, "verl_misc")
    (ids,) = data["trunc.ids"].tolist()
    for how in ("left", "right", "middle"):
        (expected,) = data[f"trunc.{how}"].tolist()
        assert truncated(ids, limit=len(expected), how=how) == expected


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["left", "right", "middle"]))
def test_truncation_keeps_the_limit_and_the_order(length: int, limit: int, how: str) -> None:
    ids = truncated(list(range(length)), limit=limit, how=how)  # type: ignore[arg-type]
    assert len(ids) == min(length, limit) and ids == sorted(set(ids))
    assert how == "left" or limit == 1 or ids[0] == 0, "the first token stays"
    assert how == "right" or ids[-1] == length - 1, "the last token stays"


def test_long_prompts_stop_the_run_or_are_cut(policy: CausalLM, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "abcd"}, {"prompt": user("efghij")})  # 4 tokens; 6 and two marks
    with pytest.raises(ConfigError, match=r"x.jsonl:2: prompt: has 8 tokens, more than data.max_prompt_length=6: .*filter_overlong"):
        attached(TextPrompts(train=path, max_prompt_length=6), policy)
    for how, expected in [("left", "fghij<|assistant|>"), ("right", "<|user|>efghi"), ("middle", "<|user|>efij<|assistant|>")]:
        data = attached(TextPrompts(train=path, max_prompt_length=6, truncation=how), policy)  # type: ignore[arg-type]
        assert [text(policy, data.prompt_ids(row)) for row in data.train_prompts] == ["abcd", expected]


def test_long_prompts_and_those_that_have_no_tokens_are_left_out(
    policy: CausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "ab"}, {"prompt": "abcdefg"}, {"prompt": "refused"}, {"prompt": "cd"})
    encode = policy.encode

    def picky(prompt: str) -> list[int]:
        if prompt == "refused":
            raise TypeError("no such role")
        return encode(prompt)

    monkeypatch.setattr(policy, "encode", picky)
    with caplog.at_level(logging.INFO):
        data = attached(TextPrompts(train=path, max_prompt_length=6, filter_overlong_prompts=True), policy)
    assert [row["prompt"] for row in data.train_prompts] == ["ab", "cd"]
    assert [row["id"] for row in data.train_prompts] == ["x-0", "x-3"], "a row keeps its place in the file"
    assert "1 of 4 rows left out: longer than data.max_prompt_length=6 tokens" in caplog.text
    assert "1 of 4 rows left out: cannot be tokenized" in caplog.text
    with pytest.raises(ConfigError, match=r"x.jsonl:3: prompt: cannot be tokenized \(no such role\)"):
        attached(TextPrompts(train=path), policy)
    with pytest.raises(ConfigError, match="all 4 rows are left out"):
        attached(TextPrompts(train=path, max_prompt_length=1, filter_overlong_prompts=True), policy)


def test_chat_sends_strings_through_the_template(policy: CausalLM, tmp_path: Path) -> None:
    data = attached(TextPrompts(train=jsonl(tmp_path / "x.jsonl", {"prompt": "hi"}), chat=True), policy)
    assert text(policy, data.prompt_ids(data.train_prompts[0])) == "<|user|>hi<|assistant|>"


# ---------------------------------------------------------------------- supervised


def supervised(policy: CausalLM, path: Path, row: dict, **options: object) -> tuple[str, str]:
    """The whole text, and the supervised part of it."""
    data = attached(SupervisedText(train=jsonl(path / "x.jsonl", row), **options), policy)  # type: ignore[arg-type]
    ids, mask = data.supervised_ids(data.train_prompts[0])
    assert len(ids) == len(mask)
    return text(policy, ids), text(policy, [i for i, m in zip(ids, mask) if m])


@pytest.mark.parametrize("template", [None, QWEN])
def test_answers_and_their_ends_are_supervised(folder: Path, tmp_path: Path, template: str | None) -> None:
    policy = CausalLM(str(folder), chat_template=template)
    talk = [{"role": "system", "content": "s"}, *user("a"), *assistant("B"), *user("c"), *assistant("DE")]
    whole, part = supervised(policy, tmp_path, {"messages": talk})
    assert part == f"B{END}DE{END}" and whole.startswith(f"<|system|>s{'' if template is None else END}")
    assert supervised(policy, tmp_path, {"prompt": user("a"), "response": "B"})[1] == f"B{END}"
    assert supervised(policy, tmp_path, {"prompt": "a", "response": "B"}, chat=True)[1] == f"B{END}"
    assert supervised(policy, tmp_path, {"question": "a", "answer": "B"}) == (f"aB{END}", f"B{END}")


def test_what_nobody_learns_from_is_dropped_and_counted(policy: CausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "abcde", "response": "x"}, {"prompt": "abc", "response": "xyz"})
    with caplog.at_level(logging.INFO):
        data = attached(SupervisedText(train=path, max_length=5), policy)
    (row,) = data.train_prompts
    ids, mask = data.supervised_ids(row)
    assert (text(policy, ids), mask) == ("abcxy", [False] * 3 + [True] * 2), "the end is cut"
    assert "1 of 2 rows left out: no supervised token within data.max_length=5" in caplog.text


def test_of_a_template_that_drops_earlier_turns_the_last_is_learned(folder: Path, tmp_path: Path) -> None:
    policy = CausalLM(str(folder), chat_template=FORGETFUL)
    row = {"messages": [*user("a"), *assistant("b"), *user("c"), *assistant("d")]}
    assert supervised(policy, tmp_path, row)[1] == f"d{END}"
    assert supervised(policy, tmp_path, {"messages": row["messages"][:2]})[1] == f"b{END}"


def test_a_template_that_refuses_a_row_is_told_with_its_place(folder: Path, tmp_path: Path) -> None:
    polite = "{% if messages[0].role != 'system' %}{{ raise_exception('No system prompt!') }}{% endif %}" + QWEN
    policy = CausalLM(str(folder), chat_template=polite)
    pairs = {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}
    for make, row in [(SupervisedText, {"messages": [*user("a"), *assistant("b")]}), (TextPrompts, pairs), (PreferencePairs, pairs)]:
        with pytest.raises(ConfigError, match=r"x.jsonl:1: .*the chat template refuses .*: No system prompt!"):
            attached(make(train=jsonl(tmp_path / "x.jsonl", row)), policy)
    with pytest.raises(ConfigError, match="the chat template is not one, line 1"):
        CausalLM(str(folder), chat_template="{% for m in messages %}").tokenizer  # noqa: B018


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"train_on_turn": False}, {"training": False}, {"loss": 0.0}])
def test_messages_that_are_not_to_be_learned(policy: CausalLM, tmp_path: Path, switch: dict, caplog: pytest.LogCaptureFixture) -> None:
    (name,) = switch
    first, last = {**assistant("B")[0], **switch}, {**assistant("D")[0], name: 1}
    assert supervised(policy, tmp_path, {"messages": [*user("a"), first, *user("c"), last]})[1] == f"D{END}"
    assert supervised(policy, tmp_path, {"prompt": user("a"), "response": [first, *user("c"), last]})[1] == f"D{END}"
    assert supervised(policy, tmp_path, {"messages": [*user("a"), {**first, name: None}]})[1] == f"B{END}"
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match="all 1 rows are left out: no message of the assistant is learned"):
        supervised(policy, tmp_path, {"messages": [*user("a"), first]})
    with pytest.raises(ConfigError, match=rf"messages\[1\].{name}: expected 0 or 1, true or false, found 0.5"):
        supervised(policy, tmp_path, {"messages": [*user("a"), {**first, name: 0.5}]})


TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' }}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_their_calls_reach_the_template(folder: Path, tmp_path: Path, write: Callable[..., str], as_text: bool) -> None:
    """As objects or as JSON text; in a table that holds every key that any row has."""
    policy = CausalLM(str(folder), chat_template=TOOLS)
    tools = [[{"type": "function", "function": {"name": name, "parameters": {name: 1}}}] for name in ("w", "t")]
    arguments: list[dict] = [{"city": "P"}, {"zone": {"h": 2}}]
    rows = []
    for i in range(2):
        call = {"name": "wt"[i], "arguments": json.dumps(arguments[i]) if as_text else arguments[i]}
        said = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
        talk = [*user("a"), said, {"role": "tool", "content": "sun"}, *assistant("ok")]
        rows.append({"messages": talk, "prompt": user("a"), "tools": json.dumps(tools[i]) if as_text else tools[i]})
    data = attached(SupervisedText(train=write(tmp_path / "x.parquet" if write is parquet else tmp_path / "x.jsonl", *rows)), policy)
    prompts = attached(TextPrompts(train=str(tmp_path / ("x.parquet" if write is parquet else "x.jsonl"))), policy)
    for i, row in enumerate(data.train_prompts):
        ids, mask = data.supervised_ids(row)
        called = json.dumps({"name": "wt"[i], "arguments": arguments[i]})
        assert text(policy, [t for t, m in zip(ids, mask) if m]) == f"{called}{END}ok{END}"
        asked = f"<|system|>{json.dumps(tools[i])}<|user|>a{END}"
        assert text(policy, ids).startswith(asked)
        assert text(policy, prompts.prompt_ids(prompts.train_prompts[i])) == asked + "<|assistant|>"


def test_a_prompt_that_the_assistant_has_begun_is_continued(folder: Path, tmp_path: Path) -> None:
    policy = CausalLM(str(folder), chat_template=QWEN)
    begun = [*user("2+2?"), *assistant("<think>")]
    data = attached(TextPrompts(train=jsonl(tmp_path / "p.jsonl", {"prompt": begun})), policy)
    asked = f"<|user|>2+2?{END}\n<|assistant|><think>"
    assert text(policy, data.prompt_ids(data.train_prompts[0])) == asked
    assert supervised(policy, tmp_path, {"prompt": begun, "response": "4"}) == (f"{asked}4{END}", f"4{END}")
    row = {"prompt": begun, "chosen": "4", "rejected": [*user("2+2?"), *assistant("<think>5")]}
    assert pair(policy, tmp_path, row) == (asked, f"4{END}", f"5{END}")


# ---------------------------------------------------------------------- pairs


def pair(policy: CausalLM, path: Path, row: dict, **options: object) -> tuple[str, str, str]:
    data = attached(PreferencePairs(train=jsonl(path / "x.jsonl", row), **options), policy)  # type: ignore[arg-type]
    prompt, chosen, rejected = data.pair_ids(data.train_prompts[0])
    return text(policy, prompt), text(policy, chosen), text(policy, rejected)


@pytest.mark.parametrize("template", [None, QWEN])
def test_pairs_share_their_prompt_and_end(folder: Path, tmp_path: Path, template: str | None) -> None:
    policy = CausalLM(str(folder), chat_template=template)
    assert pair(policy, tmp_path, {"prompt": "ab", "chosen": "cd", "rejected": "cef"}) == ("ab", f"cd{END}", f"cef{END}")
    row = {"chosen": [*user("a"), *assistant("good")], "rejected": [*user("a"), *assistant("bad")]}
    prompt, chosen, rejected = pair(policy, tmp_path, row)
    end = "" if template is None else f"{END}\n"
    assert (prompt, chosen, rejected) == (f"<|user|>a{end}<|assistant|>", f"good{END}", f"bad{END}")


def test_tokens_that_reach_over_the_border_belong_to_the_answers(folder: Path, tmp_path: Path) -> None:
    """Vocabulary a, b, c, d and "bc". ab + cd -> a bc d, ab + d -> a b d: the prompt that both share is a. b + c -> bc and
    b + d -> b d share nothing."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {END: 0, "a": 1, "b": 2, "c": 3, "d": 4, "bc": 5}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges=[("b", "c")])), eos_token=END)
    policy = CausalLM(str(folder))
    policy.tokenizer = tokenizer  # type: ignore[assignment]
    data = attached(PreferencePairs(train=jsonl(tmp_path / "x.jsonl", {"prompt": "ab", "chosen": "cd", "rejected": "d"})), policy)
    assert data.pair_ids(data.train_prompts[0]) == ([1], [5, 4, 0], [2, 4, 0])
    with pytest.raises(ConfigError, match="share no beginning"):
        attached(PreferencePairs(train=jsonl(tmp_path / "y.jsonl", {"prompt": "b", "chosen": "c", "rejected": "d"})), policy)


def test_of_several_turns_the_assistants_count(folder: Path, tmp_path: Path) -> None:
    """Also where the two conversations part at a user's message; in a rollout the mask says so."""
    policy = CausalLM(str(folder), chat_template=QWEN)
    shared = [*user("a"), *assistant("B")]
    rows = [
        {
            "prompt": user("a"),
            "chosen": [*assistant("B"), *user("c"), *assistant("D")],
            "rejected": [*assistant("B"), *user("c"), *assistant("E")],
        },
        {"chosen": [*shared, *user("c"), *assistant("D")], "rejected": [*shared, *user("d"), *assistant("E")]},
    ]
    for row, expected in zip(rows, [(f"B{END}D{END}", f"B{END}E{END}"), (f"D{END}", f"E{END}")]):
        data = attached(PreferencePairs(train=jsonl(tmp_path / "x.jsonl", row), max_length=99), policy)
        info = data.train_prompts[0]
        rollout = pair_sequences(Prompts(group=torch.zeros(2, dtype=torch.long), info=[info, info]), data.pair_ids)
        assert tuple(text(policy, rollout.tokens[i, 1:][rollout.mask[i]].tolist()) for i in range(2)) == expected
        for i, key in enumerate(("chosen", "rejected")):
            whole = policy.tokenizer.apply_chat_template([*info["prompt"], *info[key]], tokenize=False).rstrip()
            assert text(policy, rollout.tokens[i, : rollout.lengths[i]].tolist()) == whole


@pytest.mark.parametrize(
    ("how", "limit", "expected"),
    [
        ("right", 6, ("abcd", "ef", "g" + END)),
        ("left", 6, ("bcd", "ef" + END, "g" + END)),
        ("left", 3, ("d", "ef", "g" + END)),
        ("right", 7, ("abcd", "ef" + END, "g" + END)),
    ],
)
def test_long_pairs_are_cut_alike(policy: CausalLM, tmp_path: Path, how: str, limit: int, expected: tuple) -> None:
    row = {"prompt": "abcd", "chosen": "ef", "rejected": "g"}
    assert pair(policy, tmp_path, row, truncation=how, max_length=limit) == expected


def test_long_pairs_stop_the_run_or_are_dropped(policy: CausalLM, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "abcd", "chosen": "ef", "rejected": "g"}, {"prompt": "a", "chosen": "e", "rejected": "g"})
    with pytest.raises(ConfigError, match=r"x.jsonl:1: has 7 tokens, more than data.max_length=6"):
        attached(PreferencePairs(train=path, max_length=6, truncation="error"), policy)
    assert [row["id"] for row in attached(PreferencePairs(train=path, max_length=4), policy).train_prompts] == ["x-1"]


def test_mixed_rows_give_ids_of_their_kind(policy: CausalLM, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "chosen": "c", "rejected": "d"}, {"prompt": user("e"), "self_play": True}, {"prompt": "f"}]
    path = jsonl(tmp_path / "x.jsonl", *rows)
    data = attached(PromptsAndPairs(train=path, val=path, shuffle=False), policy)
    first, second, third = data.prompts(0, 3)
    assert [text(policy, ids) for ids in data.pair_ids(first)] == ["ab", f"c{END}", f"d{END}"]
    assert [text(policy, data.prompt_ids(row)) for row in (second, third)] == ["<|user|>e<|assistant|>", "f"]
    assert [row["kind"] for row in data.held_out] == ["self_play"] * 2 and len(data.held_out_pairs) == 1
    assert {row["kind"] for row in data.rows_to_score("fit")} == {"self_play"} and len(list(data.rows_to_score("fit"))) == 4


# ---------------------------------------------------------------------- order


def test_every_prompt_comes_once_before_any_comes_again(tmp_path: Path) -> None:
    data = TextPrompts(train=jsonl(tmp_path / "x.jsonl", *[{"prompt": str(i)} for i in range(7)]), seed=3)
    seen = [int(row["prompt"]) for iteration in range(7) for row in data.prompts(iteration, 4)]
    assert all(sorted(seen[i : i + 7]) == list(range(7)) for i in range(0, 28, 7)) and seen[:7] != seen[7:14]
    assert torch.tensor(seen).view(7, 4)[5].tolist() == [int(row["prompt"]) for row in data.prompts(5, 4)], "a function of the iteration"
