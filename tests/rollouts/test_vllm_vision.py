"""A real vLLM on the CPU answers prompts with images by the trainer's weights: `make test-vllm`."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts.vllm_agent import Seen, cell_tasks, clicker
from rollouts.vllm_server import ServerProcess, vllm
from rollouts.vllm_training import assert_within_noise, level, rewards
from squares import write_squares
from test_asynchronous import Late
from test_http import move
from toy_text import trainer

from callbacks.best_model import BestModel
from lit_rl.miniatures.vlm import Family, build_vlm
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.base import Request, RolloutError, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.http import HTTPEngine
from lit_rl.rollouts.probe import trainer_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

LORA = LoraSettings(rank=8, alpha=16)
SIZES: Sequence[Sequence[tuple[int, int]]] = [
    [(64, 64)], [(96, 64)], [(64, 64), (128, 96)], [(100, 70)], [(20, 300)], [(600, 600)], [(20, 1900)], [(1, 150)], [],
]  # fmt: skip
OPTIONS = ["--max-model-len", "512", "--enable-scale-out", "--logprobs-mode", "raw_logprobs"]
CLOSE = 1e-4
dialects = pytest.mark.parametrize("dialect", ["openai", "vllm"])


def served(root: Path, family: Family, kind: Any, *options: str) -> Iterator[tuple[ServerProcess, Path]]:
    """A server of an export, as a run writes it."""
    policy = VisionLanguageModel(str(build_vlm(root / "built", family=family, characters="1234?", vision_hidden=64)))
    policy.load()
    (model := root / "model").mkdir()
    policy.save(model, {name: weight.detach() for name, weight in policy.trainable()})
    server = vllm(kind, model, root / "log", *OPTIONS, *options)
    server.start()
    try:
        yield server, model
    finally:
        server.stop()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    yield from served(tmp_path_factory.mktemp("adapters"), "qwen25_vl", "adapters")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, adapters: tuple[ServerProcess, Path]) -> Iterator[tuple[ServerProcess, Path]]:
    """The server of adapters is stopped first."""
    adapters[0].stop()
    yield from served(tmp_path_factory.mktemp("whole"), "qwen3_vl", "whole")


def engine_of(server: ServerProcess, folder: Path, dialect: Any = "vllm", tolerance: float = CLOSE) -> HTTPEngine:
    return HTTPEngine(server.url, sync_dir=str(folder / "sync"), dialect=dialect, probe="1234?1", probe_tolerance=tolerance)


def requests(policy: VisionLanguageModel, copies: int = 1) -> list[Request]:
    import numpy as np

    found = []
    for i, sizes in enumerate(SIZES):
        content: list[dict[str, str]] = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "1?"}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        turns = [{"role": "system", "content": content}, {"role": "user", "content": "2"}] if i == 1 else turns
        ids = policy.encode(turns)
        pictures = [torch.from_numpy(np.random.RandomState(n).randint(0, 255, (3, *size), dtype=np.uint8)) for n, size in enumerate(sizes)]
        prompt, _ = policy.with_pictures(ids, [False] * len(ids), sizes)
        found += [Request(prompt, (i, n), policy.media(pictures), {"prompt": turns}) for n in range(copies)]
    return found


def gap(policy: VisionLanguageModel, asked: Sequence[Request], engine: HTTPEngine) -> float:
    sampling = Sampling(max_new_tokens=6)
    samples = engine.generate(asked, sampling)
    assert not {i for sample in samples for i in sample.ids} & set(policy.banned_ids)
    rows = [(request.prompt, sample.ids) for request, sample in zip(asked, samples)]
    mine = trainer_logprobs(policy, rows, temperature=1.0, media=[request.media for request in asked])
    return max(abs(a - b) for row, sample in zip(mine, samples) for a, b in zip(row, sample.logprobs))


def loaded(model: Path, **settings: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    policy = VisionLanguageModel(str(model), **settings)
    policy.load()
    move(policy, 0.05)
    return policy


def holds_after_every_push(server: ServerProcess, model: Path, folder: Path, lora: LoraSettings | None, dialect: str) -> None:
    policy = loaded(model, lora=lora)
    engine = engine_of(server, folder, dialect)
    engine.setup(policy, rank=0, world_size=1)
    try:
        for version in range(3):
            move(policy, 0.02)
            engine.update_weights(version)
            assert gap(policy, requests(policy, 2), engine) < CLOSE
    finally:
        engine.close()


@dialects
def test_answers_to_images_have_the_trainers_log_probabilities_after_every_adapter(
    dialect: str, adapters: tuple[ServerProcess, Path], tmp_path: Path
) -> None:
    holds_after_every_push(*adapters, tmp_path, LORA, dialect)


def refused_by_the_probe(server: ServerProcess, folder: Path, policy: VisionLanguageModel, dialect: str, message: str) -> None:
    engine = engine_of(server, folder, dialect, 0.05)
    engine.setup(policy, rank=0, world_size=1)
    try:
        with pytest.raises(RolloutError, match=message):
            engine.update_weights(0)
    finally:
        engine.close()


@dialects
def test_a_vision_tower_that_the_server_leaves_out_is_found_by_the_first_push(
    dialect: str, adapters: tuple[ServerProcess, Path], tmp_path: Path
) -> None:
    """Without --enable-tower-connector-lora vLLM takes such an adapter and leaves its tower out. It has learned nothing yet."""
    server, model = adapters
    policy = VisionLanguageModel(str(model), lora=LORA, train_vision=True)
    policy.load()
    refused_by_the_probe(server, tmp_path, policy.eval(), dialect, "answers to an image with (stale|other) weights.*enable-tower-connector")


@dialects
def test_an_image_that_the_server_makes_smaller_is_found_by_the_first_push(
    dialect: str, adapters: tuple[ServerProcess, Path], tmp_path: Path
) -> None:
    """It reads 224 x 224 pixels at most, and the trainer is told to read 300 x 300 at least."""
    server, model = adapters
    policy = loaded(model, lora=LORA, min_pixels=300 * 300, max_pixels=400 * 400)
    refused_by_the_probe(
        server, tmp_path, policy, dialect, r"as \d+ tokens, and the trainer as \d+, which differ in the images alone.*min_pixels"
    )


def test_training_on_images_learns_over_http_and_asynchronously_as_in_process(adapters: tuple[ServerProcess, Path], tmp_path: Path) -> None:
    """20 iterations. Noise is the difference of seeds in process; asynchronous runs are compared with answers of an iteration ago."""
    server, model = adapters
    run = partial(rewards, model, LORA, squares=write_squares(tmp_path, 64))
    native = partial(HFEngine, batch=64)
    present = [level(run(native(), seed=seed)) for seed in range(3)]
    late = [level(run(Late(native), seed=seed, late=True)) for seed in range(3)]
    over_http = {dialect: (level(run(engine_of(server, tmp_path / dialect, dialect))), present) for dialect in ("vllm", "openai")}
    ahead = level(run(engine_of(server, tmp_path / "ahead"), asynchronous=True, late=True))
    assert_within_noise({**over_http, "asynchronous": (ahead, late)})


def test_an_agent_trains_on_its_screens_and_its_best_adapter_is_served(adapters: tuple[ServerProcess, Path], tmp_path: Path) -> None:
    """Three iterations of 16 episodes with two screenshots in each prompt; the engine holds the server against the trainer in each."""
    server, model = adapters
    seen, best = Seen(), BestModel(str(tmp_path / "best_model"), monitor="val/turns")
    engine = engine_of(server, tmp_path, "openai")
    run = trainer(max_epochs=3, callbacks=[seen, best], check_val_every_n_epoch=3, enable_checkpointing=False)
    run.fit(clicker(model, engine, LORA), datamodule=cell_tasks(tmp_path))
    assert run.global_step == 3 and len(seen.episodes) == 3 * 16 + 4 and all(episode.status.counts for episode in seen.episodes)
    turns = [turn for episode in seen.episodes for turn in episode.turns]
    assert {len(turn.shown.pictures) for turn in turns} == {1, 2} and max(len(episode.turns) for episode in seen.episodes) == 3
    assert {i for turn in turns for i in turn.sample.versions} == {0, 1, 2}  # an adapter for each iteration
    body = json.dumps({"lora_name": "best", "lora_path": str(tmp_path / "best_model")}).encode()
    request = urllib.request.Request(f"{server.url}/v1/load_lora_adapter", data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200


@dialects
def test_answers_to_images_have_the_trainers_log_probabilities_after_every_exchange_of_all_weights(
    dialect: str, whole: tuple[ServerProcess, Path], tmp_path: Path
) -> None:
    """Last, for it ends the server of adapters."""
    holds_after_every_push(*whole, tmp_path, None, dialect)
