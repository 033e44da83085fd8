"""The tokens that are learned in a conversation, and the end of an answer, with the templates of thirteen families.

The ids must be those that transformers' `apply_chat_template` gives.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import FAMILIES, model_of, tokenizer_of

from lit_rl.errors import ConfigError
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.chat import answer_ids, completion_ids, conversation_ids, many_prompt_ids, prompt_ids
from lit_rl.policies.chat_template import _turn_ends, turn_ends
from lit_rl.policies.chat_turns import warn_of_opening, warn_of_what_is_left_out
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.base import Request, RolloutEngine, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.native import NativeEngine

CALL = [{"id": "abcdefghi", "type": "function", "function": {"name": "w", "arguments": {"city": "P"}}}]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def parts(tokenizer: Any, ids: list[int], mask: list[bool]) -> list[str]:
    """The learned stretches of a row as texts."""
    assert len(ids) == len(mask)
    found: list[list[int]] = [[]]
    for token, learned in zip(ids, mask):
        if learned:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(stretch) for stretch in found if stretch]


def learned(name: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    tokenizer = tokenizer_of(name)
    ids, mask = conversation_ids(tokenizer, messages, **options)
    template = {key: value for key, value in options.items() if key not in ("stop_ids", "first", "prefill")}
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False, **template)
    return parts(tokenizer, ids, mask)


# ---------------------------------------------------------------------- where an answer ends


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2.5"])
def test_a_text_that_a_template_drops_beside_calls_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_what_is_left_out.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lit_rl"):
        spoken = learned(name, [user("a"), assistant("Let me see.", tool_calls=CALL)])
        learned(name, [user("a"), assistant("", tool_calls=CALL)])
    dropped = "Let me see." not in spoken[0]
    assert dropped == (name != "qwen2.5")
    assert [m for m in caplog.messages if "leaves out content of messages that have tool_calls" in m] == caplog.messages[:1] * dropped


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_that_a_text_already_holds_is_not_written_twice(name: str) -> None:
    """As data have it that were rendered once: in what is learned, and in a prompt's earlier turns."""
    tokenizer, end = tokenizer_of(name), FAMILIES[name].end
    plain, ended = ([user("a"), assistant(f"B{tail}"), user("c"), assistant(f"D{tail}")] for tail in ("", f"{end}\n"))
    stops = {tokenizer.convert_tokens_to_ids(end)}
    assert conversation_ids(tokenizer, ended, stop_ids=stops) == conversation_ids(tokenizer, plain, stop_ids=stops)
    assert prompt_ids(tokenizer, ended[:3]) == prompt_ids(tokenizer, plain[:3])
    inside = [user("a"), assistant(f"B{end}C")]
    assert conversation_ids(tokenizer, inside)[0] == tokenizer.apply_chat_template(inside, return_dict=False), "no end of the text"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_stops_where_its_template_ends_a_turn_and_says_so_in_its_export(name: str, tmp_path: Path) -> None:
    """As a base model stands on the disk: generation_config and config know the end of text alone."""
    policy = CausalLM(str(model_of(name, tmp_path / "m")))
    end = policy.tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    assert policy.stop_ids[0] == policy.tokenizer.eos_token_id and end in policy.stop_ids
    policy.load()
    policy.save(tmp_path / "out", {n: p for n, p in policy.named_parameters()})
    for file in ("generation_config.json", "config.json"):
        stored = json.loads((tmp_path / "out" / file).read_text())["eos_token_id"]
        assert stored == (policy.stop_ids if len(policy.stop_ids) > 1 else end), file
    assert CausalLM(str(tmp_path / "out")).stop_ids == policy.stop_ids
    assert policy.decode([*policy.tokenizer("4").input_ids[-1:], end]) == "4"


def test_an_adapter_says_beside_its_base_where_its_answers_end(tmp_path: Path) -> None:
    policy = CausalLM(str(model_of("qwen2.5", tmp_path / "m")), lora=LoraSettings(rank=2))
    policy.load()
    (tmp_path / "out").mkdir()
    policy.save(tmp_path / "out", dict(policy.trainable()))
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == policy.stop_ids
    assert len(policy.stop_ids) == 2


@pytest.mark.parametrize("engine", [NativeEngine(), HFEngine()])
def test_engines_stop_at_the_end_of_a_turn(tmp_path: Path, engine: RolloutEngine) -> None:
    """Every token is as likely as any other, so that answers of 400 tokens meet both ends."""
    policy = CausalLM(str(model_of("gemma", tmp_path)))
    policy.load()
    policy.eval()
    with torch.no_grad():
        policy.network.lm.get_output_embeddings().weight.zero_()  # type: ignore[operator, union-attr]
    engine.setup(policy, rank=0, world_size=1)
    requests = [Request(policy.encode([user("a")]), (i,)) for i in range(8)]
    samples = engine.generate(requests, Sampling(max_new_tokens=400, temperature=1.0))
    end = policy.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end in {sample.ids[-1] for sample in samples}
    for sample in samples:
        assert sample.ids.index(end) == len(sample.ids) - 1 if end in sample.ids else True
        assert sample.finish == ("stop" if sample.ids[-1] in policy.stop_ids else "length")


def test_ends_of_calls_and_of_turns_inside_a_conversation() -> None:
    assert turn_ends(tokenizer_of("llama3")).stops == ("<|eot_id|>", "<|eom_id|>")
    ends = turn_ends(tokenizer_of("harmony"))
    assert ends.stops == ("<|return|>", "<|call|>") and ends.inside == ("<|end|>",), "<|end|> ends thoughts, behind which an answer goes on"


@pytest.mark.parametrize(("generation", "config"), [(None, [1, 3]), (1, [1, 3]), ([1, 3], 1), ([3], None)])
def test_all_files_that_name_ends_are_heard(tmp_path: Path, generation: Any, config: Any) -> None:
    folder = model_of("zephyr", tmp_path)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    text = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config}
    (folder / "config.json").write_text(json.dumps(text))
    assert {1, 3} - set(CausalLM(str(folder)).stop_ids) == ({1} if config is None else set())


def test_a_template_without_an_end_has_the_end_of_text_appended_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    talk = [user("a"), assistant("B"), user("c"), assistant("D")]
    for name, expected in [("glm4", ["\nB", "\nD<|endoftext|>"]), ("alpaca", ["B\n###", "D\n###<|endoftext|>"])]:
        policy = CausalLM(str(model_of(name, tmp_path / name)))
        caplog.clear()
        _turn_ends.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert policy.stop_ids == [policy.tokenizer.eos_token_id]
        assert "ends an answer by no token" in caplog.text and "<|endoftext|> is appended" in caplog.text
        ids, mask = conversation_ids(policy.tokenizer, talk)
        assert parts(policy.tokenizer, ids, mask) == expected
        answer = policy.tokenizer(expected[0], add_special_tokens=False).input_ids
        assert policy.decode([*answer, policy.stop_ids[0]]) == expected[0].removesuffix("\n###"), "a reward sees no end"
    tokenizer = tokenizer_of("glm4")
    ids, mask = conversation_ids(tokenizer, talk, stop_ids=[tokenizer.convert_tokens_to_ids("<|user|>")])
    assert parts(tokenizer, ids, mask)[0] == "\nB<|user|>", "where the model's own files name the next turn's token as an end"


# ---------------------------------------------------------------------- what is learned


HEAD = {"llama2": " ", "mistral": " ", "harmony": "<|channel|>final<|message|>"}
FOOT = {"llama2": " "}
INSIDE = {"harmony": "<|end|>"}


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_their_ends_are_learned(name: str) -> None:
    """From behind the generation prompt to the token that ends the turn: nothing else can be said there by the policy."""
    head, foot, end = HEAD.get(name, ""), FOOT.get(name, ""), FAMILIES[name].end
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    first, last = f"{head}BC{foot}{INSIDE.get(name, end)}", f"{head}{thought}EF{foot}{end}"
    assert learned(name, [user("a"), assistant("BC"), user("d"), assistant("EF")]) == [first, last]
    assert learned(name, [user("a"), assistant("BC"), user("d")]) == [first], "a question that nobody answers"
    assert learned(name, [user("BC"), assistant("BC"), user("BC"), assistant("EF")]) == [first, last], "the user's words are not"
    assert learned(name, [user("a"), assistant("BC", weight=0), user("d"), assistant("EF")]) == [last]
    assert learned(name, [user("a"), assistant("BC"), user("d"), assistant("EF", train=False)]) == [first]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "smollm3", "llama3", "phi3", "zephyr", "deepseek", "harmony"])
def test_a_conversation_that_the_assistant_opens(name: str) -> None:
    opened, answered = learned(name, [assistant("Hi"), user("a"), assistant("BC")])
    assert opened.removeprefix(HEAD.get(name, "")) == f"Hi{INSIDE.get(name, FAMILIES[name].end)}"
    assert answered.endswith(f"BC{FAMILIES[name].end}")


def test_thoughts_are_learned_where_the_template_writes_them() -> None:
    talk = [user("a"), assistant("<think>\nx\n</think>\n\nB"), user("c"), assistant("<think>\ny\n</think>\n\nD")]
    assert learned("qwen3", talk) == ["B<|im_end|>", "<think>\ny\n</think>\n\nD<|im_end|>"]
    fields = [user("a"), assistant("B", reasoning_content="x"), user("c"), assistant("D", reasoning_content="y")]
    assert learned("qwen3", fields) == learned("qwen3", talk)
    assert learned("qwen3", [user("a"), assistant("B")], enable_thinking=False) == ["B<|im_end|>"], "the prompt holds the empty thoughts"
    assert learned("qwen3", [*fields[:2], user("c"), assistant("D")], enable_thinking=False) == ["B<|im_end|>", "D<|im_end|>"]
    spoken = "<|channel|>analysis<|message|>y<|end|><|start|>assistant<|channel|>final<|message|>D<|return|>"
    assert learned("harmony", [user("a"), assistant("D", thinking="y")]) == [spoken]


def test_a_prompt_that_begins_thoughts_which_the_answer_has_not_is_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_opening.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert learned("deepseek", [user("a"), assistant("<think>x</think>B")]) == ["B<｜end▁of▁sentence｜>"]
    assert "asks for an answer by '<｜Assistant｜><think>\\n' but writes one behind '<｜Assistant｜>'" in caplog.text


CALLED = {
    "qwen2.5": '<tool_call>\n{"name": "w", "arguments": {"city": "P"}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "w", "arguments": {"city": "P"}}\n</tool_call><|im_end|>',
    "llama3": '{"name": "w", "parameters": {"city": "P"}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "w", "arguments": {"city": "P"}}]</s>',
    "harmony": ' to=functions.w<|channel|>commentary json<|message|>{"city": "P"}<|call|>',
    "deepseek": '<｜tool▁call▁begin｜>w\n```json\n{"city": "P"}\n```<｜tool▁call▁end｜><｜end▁of▁sentence｜>',
}


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("empty", [{}, {"content": ""}, {"content": None}])
def test_calls_of_tools_are_learned_and_what_the_tools_say_is_not(name: str, empty: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(name)
    asked = [user("a"), {"role": "assistant", "tool_calls": CALL, **empty}]
    talk = [*asked, {"role": "tool", "content": "sun"}, assistant("EF"), user("g"), assistant("H")]
    called, answered, _ = parts(tokenizer, *conversation_ids(tokenizer, talk))
    assert called == CALLED[name] and answered.endswith(f"EF{INSIDE.get(name, FAMILIES[name].end)}")
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert parts(tokenizer, *conversation_ids(tokenizer, asked)) == [thought + called]


def test_tools_that_a_template_does_not_write_are_refused() -> None:
    for talk, tools in [([user("a"), assistant("", tool_calls=CALL)], {}), ([user("a"), assistant("b")], {"tools": CALL})]:
        with pytest.raises(ConfigError, match=r"tool(s|_calls): the chat template does not write them"):
            conversation_ids(tokenizer_of("zephyr"), talk, **tools)
    with pytest.raises(ConfigError, match="tools: the chat template does not write them"):
        prompt_ids(tokenizer_of("gemma"), [user("a")], tools=CALL)


@pytest.mark.parametrize("name", ["llama2", "gemma"])
def test_a_template_that_refuses_says_why(name: str) -> None:
    for talk in ([user("a"), user("b"), assistant("c")], [assistant("a"), user("b"), assistant("c")]):
        with pytest.raises(ConfigError, match=r"the chat template refuses the conversation with roles \[.*roles must alternate"):
            conversation_ids(tokenizer_of(name), talk)


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_transformers(name: str) -> None:
    tokenizer = tokenizer_of(name)
    talk = [user("a"), assistant("B"), user("c")]
    assert prompt_ids(tokenizer, talk) == tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    begun = [user("a"), assistant("The answer")]
    assert prompt_ids(tokenizer, begun) == tokenizer.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    prompt, answer = answer_ids(tokenizer, begun, [assistant(" is 4")])
    assert prompt == prompt_ids(tokenizer, begun) and tokenizer.decode(answer).startswith(" is 4") and all(answer.learned)
    with pytest.raises(ConfigError, match="without a text that could be continued"):
        prompt_ids(tokenizer, [user("a"), assistant("")])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("special", ["", "{bos} $A", "{bos} $A {eos}", "$A {eos}"])
def test_many_prompts_are_tokenized_as_each_alone(name: str, special: str) -> None:
    """Strings and conversations together, whatever the tokenizer adds to strings."""
    from tokenizers import processors

    tokenizer = tokenizer_of(name)
    eos = tokenizer.eos_token
    bos = tokenizer.bos_token or eos
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys((bos, eos))]
    if special:
        single = special.format(bos=bos, eos=eos)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    talks = [[user("a"), assistant("B"), user("c")], [user("a"), assistant("The answer")]]
    prompts = ["", "hi", talks[0], f"{bos}hi", f"Q{eos}", talks[1], f"{bos}Q{eos}", "Größe 😀 ", " hi", bos, eos]
    assert many_prompt_ids(tokenizer, prompts, [{}] * len(prompts)) == [prompt_ids(tokenizer, prompt) for prompt in prompts]
    assert many_prompt_ids(tokenizer, talks, [{}, {}]) == [prompt_ids(tokenizer, talk) for talk in talks]
    assert many_prompt_ids(tokenizer, [], []) == []


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.bos])
@pytest.mark.parametrize("ends", [False, True])
def test_a_text_gets_one_begin_and_keeps_its_own_end(name: str, ends: bool) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of(name)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if ends else f"{bos} $A", special_tokens=special
    )
    rendered = tokenizer.apply_chat_template([user("hi")], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([user("hi")], add_generation_prompt=True, return_dict=False)
    assert not rendered.startswith(bos) or prompt_ids(tokenizer, rendered) == whole
    begun = f"{bos}hi"
    for text, expected in [("hi", begun), (begun, begun), (f"Q: 1{eos}", f"{bos}Q: 1{eos}"), (f"{bos}Q{eos}", f"{bos}Q{eos}")]:
        assert tokenizer.decode(prompt_ids(tokenizer, text)) == expected
        for answer in ("yes", f"yes{eos}"):
            ids, mask = completion_ids(tokenizer, text, answer)
            assert tokenizer.decode(ids) == f"{expected}yes{eos}" and parts(tokenizer, ids, mask) == [f"yes{eos}"]
    ids, mask = completion_ids(tokenizer, f"Q{eos}", "")
    assert parts(tokenizer, ids, mask) == [eos], "an empty answer has an end of its own"
