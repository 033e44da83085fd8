"""Prompts with images over HTTP: each dialect sends them, the server's tokens are compared, the push's probe sees an image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vision import FakeVision
from test_http import assert_same, in_process, move, pushed

from lit_rl.errors import ConfigError
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.base import Request, RolloutError, Sampling
from lit_rl.rollouts.probe import distinct

LORA = LoraSettings(rank=4, alpha=8)
SHORT = Sampling(max_new_tokens=3)
SIZES = [[(64, 64)], [(96, 64), (20, 90)], []]
DIALECTS = ["openai", "vllm", "sglang"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vlm(tmp_path_factory.mktemp("vision") / "model", family="qwen3_vl", characters="1234?!")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[FakeVision]:
    with FakeVision(folder) as running:
        yield running


def policy(folder: Path, **settings: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    found = VisionLanguageModel(str(folder), **settings)
    found.load()
    move(found, 0.05)
    return found.eval()  # type: ignore[return-value]


def requests(asked: VisionLanguageModel) -> list[Request]:
    """Two answers to each prompt: of one image, of two with words between them and words that the answer continues, of none."""
    found = []
    for n, sizes in enumerate(SIZES):
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in sizes]
        turns: list[dict[str, Any]] = [{"role": "user", "content": [*parts[:1], {"type": "text", "text": "1?"}, *parts[1:]]}]
        turns += [{"role": "assistant", "content": "3"}] if len(sizes) == 2 else []
        pictures = [torch.randint(0, 255, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)) for size in sizes]
        ids = asked.encode(turns)
        prompt, _ = asked.with_pictures(ids, [False] * len(ids), sizes)
        found += [Request(prompt, (n, i), asked.media(pictures), {"prompt": turns}) for i in range(2)]
    return found


@pytest.mark.parametrize("dialect", DIALECTS)
def test_answers_to_images_are_those_of_the_engine_in_process(dialect: str, folder: Path, server: FakeVision, tmp_path: Path) -> None:
    server.forget()
    answering = policy(folder, lora=LORA)
    found = pushed(server, tmp_path, answering, dialect=dialect, probe="1234?!").generate(requests(answering), SHORT)
    assert_same(found, in_process(answering, requests(answering), SHORT))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_server_with_another_image_processor_is_found_by_the_first_push(
    dialect: str, folder: Path, server: FakeVision, tmp_path: Path
) -> None:
    """Other shades of the same image, and more or fewer tokens of it."""
    server.forget()
    server.processor.image_mean = [0.1, 0.1, 0.1]
    answering = policy(folder, lora=LORA)
    with pytest.raises(RolloutError, match=r"answers to an image with other weights: .* answers to text are right.*preprocessor_config"):
        pushed(server, tmp_path, answering, dialect=dialect, probe="1234?!")
    server.forget()
    server.processor.size = {"shortest_edge": 256 * 256, "longest_edge": 512 * 512}
    with pytest.raises(RolloutError, match=r"images of \d+ x \d+ pixels as \d+ tokens.* differ in the images alone.*min_pixels"):
        pushed(server, tmp_path, answering, dialect=dialect, probe="1234?!")


def test_a_chat_template_of_the_servers_own_is_told(folder: Path, server: FakeVision, tmp_path: Path) -> None:
    server.forget()
    server.tokenizer.chat_template = "!" + server.tokenizer.chat_template
    with pytest.raises(RolloutError, match=r"differ from token 0 on: serve the trainer's model folder with its chat template"):
        pushed(server, tmp_path, policy(folder, lora=LORA), dialect="openai", probe="1234?!")


@pytest.mark.parametrize("seen", [True, False])
def test_an_adapter_of_the_vision_tower_that_is_left_out_is_found_before_it_has_learned_anything(
    seen: bool, folder: Path, server: FakeVision, tmp_path: Path
) -> None:
    """Adapters begin at 0; a tolerance as wide as for a server in bfloat16."""
    server.forget()
    server.blind, loads = not seen, len(server.loads)
    torch.manual_seed(0)
    answering = VisionLanguageModel(str(folder), lora=LORA, train_vision=True)
    answering.load()
    before = {name: p.detach().clone() for name, p in answering.trainable()}
    try:
        if seen:
            pushed(server, tmp_path, answering.eval(), dialect="vllm", probe="1234?!")  # type: ignore[arg-type]
            assert len(server.loads) == loads + 2
        else:
            with pytest.raises(RolloutError, match=r"to an image with stale weights.*--enable-tower-connector-lora"):
                pushed(server, tmp_path, answering.eval(), dialect="vllm", probe="1234?!", probe_tolerance=0.5)  # type: ignore[arg-type]
    finally:
        server.blind = False
    assert all(torch.equal(before[name], p) for name, p in answering.trainable())


def test_a_prompt_of_images_without_a_conversation_is_refused_by_chat_completions(folder: Path, server: FakeVision, tmp_path: Path) -> None:
    server.forget()
    answering = policy(folder, lora=LORA)
    made = pushed(server, tmp_path, answering, dialect="openai", probe="1234?!")
    bare = [Request(request.prompt, request.key, request.media) for request in requests(answering)]
    with pytest.raises(ConfigError, match="engine.dialect=openai sends images within the conversation"):
        made.generate(bare, SHORT)


def test_a_server_without_room_for_the_probes_image_says_so(folder: Path, server: FakeVision, tmp_path: Path) -> None:
    server.forget()
    server.max_model_len, most = 12, server.max_model_len
    try:
        with pytest.raises(ConfigError, match=r"engine.probe has \d+ tokens with an image .* takes 12 \(--max-model-len\)"):
            pushed(server, tmp_path, policy(folder, lora=LORA), probe="1234?!")
    finally:
        server.max_model_len = most


def test_an_answer_to_an_image_is_looked_at_however_short_its_prompt() -> None:
    picture = torch.zeros(3, 2, 2)
    asked = [Request([n] * (9 - n), (n,), [picture] if n == 6 else []) for n in range(8)]
    assert distinct(asked, 4) == [0, 1, 2, 6]
    assert distinct(asked[:6], 4) == [0, 1, 2, 3]
