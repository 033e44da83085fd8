"""Texts go to a reward server as images do: the same scores as in process, the same limits, the same errors, and never a silent 0."""

from __future__ import annotations

import asyncio
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_app import Gate, aio, error_of, picture, png, served, single, until
from torch import Tensor

from datamodules.text_images import sources
from lit_rl.rewards.base import Reward, RewardError, TextReward
from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.jpeg import JPEGSizeReward
from lit_rl.rewards.pseudo import PseudoReward
from lit_rl.rewards.service.scorers import build, check, media_of, score_samples
from lit_rl.rewards.service.texts import MAX_TEXT, decode_text, decode_texts, encode_text, encode_texts
from lit_rl.rewards.service.wire import WireError, encode_batch
from lit_rl.rewards.text.rules import RuleReward
from lit_rl.rewards.text.style import FormatReward
from lit_rl.types import Answer, Info

ROOT = Path(__file__).parents[3]
JSON = {"Content-Type": "application/json"}


def row(truth: Any, **columns: Any) -> Info:
    return {"prompt": "2 + 2 = ?", "data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": truth}, **columns}


ROWS = [row("4"), row("5"), row("1,234"), row("7", prompt=[{"role": "user", "content": "x"}])]
ANSWERS = ["#### 4", "#### 4", "so #### 1234", Answer("y</think> #### 7", opened="<think>", special=frozenset({"<think>"}))]


class Length(TextReward):
    """Characters; NaN for the empty text."""

    outputs = ("length",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"length": torch.tensor([float(len(text)) or math.nan for text in media])}


class Picky(TextReward):
    """Cannot score "bad", nor a chunk that holds it."""

    outputs = ("picky",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        if "bad" in media:
            raise ValueError("secret")
        if "unruly" in media:
            raise RewardError("row 7 has no rule")
        return {"picky": torch.ones(len(media))}


def body(texts: Sequence[Any], **fields: Any) -> bytes:
    return json.dumps({"texts": list(texts), "prompts": ["p"] * len(texts), **fields}).encode()


class TextGate(Gate):
    """Scores once it is opened."""

    def __call__(self, samples: Any, infos: Any) -> Any:
        self.batches.append(len(samples))
        self.entered.set()
        assert self.open.wait(60)
        return score_samples([Length()], samples, infos)


# ---------------------------------------------------------------------- format
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.text(), st.text(), st.dictionaries(st.text().filter(lambda key: key != "prompt"), plain)), min_size=1))
def test_what_is_encoded_is_decoded(samples: list[tuple[str, str, dict]]) -> None:
    texts, infos = [text for text, _, _ in samples], [MappingProxyType({**columns, "prompt": prompt}) for _, prompt, columns in samples]
    batch = decode_texts(encode_texts(texts, infos, request_id="r-1"))
    assert batch.texts == texts and batch.infos == [dict(info) for info in infos] and batch.request_id == "r-1"
    assert decode_text(json.loads(encode_text(texts[0], infos[0]))) == (texts[0], dict(infos[0]))


def test_rows_with_images_arrive(tmp_path: Path) -> None:
    """A path as text, what is in a file as a `data:` URL, which datamodules read again."""
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    sent = row("4", prompt=prompt, images=[tmp_path / "a.png", b"\x89PNG"])
    (info,) = decode_texts(encode_texts(["a"], [sent], request_id="")).infos
    assert info["prompt"] == prompt and info["images"][0] == str(tmp_path / "a.png")
    assert sources(info["images"], key="images", folder=tmp_path) == sent["images"]


def test_an_answer_arrives_with_what_rewards_look_at() -> None:
    given = Answer("b", opened="<think>", written="<x>b", special=frozenset({"<x>", "<y>"}))
    (found,) = decode_texts(encode_texts([given], [row("4")], request_id="")).texts
    assert (found, vars(found)) == (given, vars(given))


def test_columns_arrive_as_json_has_them() -> None:
    columns = {
        "n": np.int64(3),
        "x": np.array([1.5, math.nan]),
        "t": torch.tensor([[1, 2]]),
        "day": datetime.date(2024, 2, 29),
        "z": math.inf,
    }
    (info,) = decode_texts(encode_texts(["a"], [row("4", **columns, pair=(1, "b"))], request_id="")).infos
    assert {key: info[key] for key in [*columns, "pair"]} == {
        "n": 3,
        "x": [1.5, None],
        "t": [[1, 2]],
        "day": "2024-02-29",
        "z": None,
        "pair": [1, "b"],
    }
    with pytest.raises(RewardError, match="column 'image' of prompt 'seven' is bytes, which cannot go .*leave the column out"):
        encode_texts(["a"], [row("4", image=b"x", id="seven")], request_id="")


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"[]", "the body is no JSON object"),
        (b'{"texts": []}', "`texts` is no list of at least one text"),
        (body(["a", "b"], prompts=["p"]), "`prompts` has 1 entries; expected 2"),
        (body(["a"], rows={}), "`rows` has no list; expected 1"),
        (body(["a"], rows=[3]), "row 0 is int; expected an object"),
        (body([3]), "text 0 is int; expected a text"),
        (body(["a", {"text": None}]), "text 1 is dict; expected a text"),
        (body([{"text": "a", "special": [1]}]), "text 0 must hold valid Unicode"),
        (body(["\ud800"]), "text 0 must hold valid Unicode"),
        (body([{"text": "a", "opened": 1}]), "text 0 must hold valid Unicode"),
        (body([{"text": "a", "written": ["a"]}]), "text 0 must hold valid Unicode"),
        (body(["a" * (MAX_TEXT + 1)]), f"at most {MAX_TEXT} characters"),
        (body(["a"], prompts=[[]]), "prompt 0 is neither a text"),
        (body(["a"], prompts=[[{"content": "x"}]]), "prompt 0 is neither a text"),
        (body(["a"], request_id=7), "`request_id` is no text"),
        (b'{"texts": ["a"], "texts": ["b"]}', "a key appears twice"),
        (b'{"texts": ' + b"[" * 100_000, "the body is not JSON"),
    ],
)
def test_what_is_not_the_format_is_told(sent: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        decode_texts(sent)


# ---------------------------------------------------------------------- routes
def model(*rewards: Reward) -> Any:
    return partial(score_samples, rewards)


@aio
async def test_both_routes_answer_with_the_scores_in_order() -> None:
    async with served(model(Length())) as (_, session):
        async with session.post(
            "/v1/score_batch", data=body(["abc", "", "a"], request_id="r-7"), headers=JSON | {"X-Batch-Size": "3"}
        ) as r:
            assert r.status == 200
            assert await r.json() == {"scores": [{"length": 3.0}, {"length": None}, {"length": 1.0}], "errors": {}, "request_id": "r-7"}
        async with session.post("/score", json={"text": "abcd", "prompt": "p"}) as r:
            assert (r.status, await r.json()) == (200, {"length": 4.0})


@aio
async def test_a_text_that_cannot_be_scored_spoils_no_other_and_says_why() -> None:
    """The text of an error that is written for users goes out; of any other only its kind."""
    sent = body(["a", "bad", "b", "unruly"])
    async with served(model(Picky())) as (_, session), session.post("/v1/score_batch", data=sent, headers=JSON) as r:
        answer = await r.json()
    assert answer["scores"] == [{"picky": 1.0}, None, {"picky": 1.0}, None]
    assert answer["errors"]["1"]["message"] == "scoring failed with ValueError; the server's log has the trace"
    assert answer["errors"]["3"] == {"code": "model_error", "message": "row 7 has no rule"}


@aio
async def test_images_and_texts_in_one_server_go_to_their_own_rewards() -> None:
    rewards = [JPEGSizeReward(), Length(), PseudoReward()]
    async with served(model(*rewards)) as (_, session):
        async with session.post("/score", json={"text": "abcd", "prompt": "p"}) as r:
            assert sorted(await r.json()) == ["length", "pseudo"]
        async with session.post("/score", json=single(png(picture(16, 16)))) as r:
            assert {"jpeg_size", "pseudo"} < set(await r.json()) and "length" not in await r.json()


@pytest.mark.parametrize("rewards", [[Length()], [JPEGSizeReward()], [PseudoReward()]])
def test_a_server_refuses_what_none_of_its_rewards_scores(rewards: list[Reward]) -> None:
    media = media_of(rewards)
    assert media == {"Length": ["texts"], "JPEGSizeReward": ["images"], "PseudoReward": ["images", "texts"]}[type(rewards[0]).__name__]

    async def run() -> None:
        async with served(model(*rewards)) as (app, session):
            app.media = media
            image = encode_batch(picture(16, 16)[None], ["p"], request_id="")
            requests: dict[str, list[Any]] = {
                "texts": [("/score", {"json": {"text": "a", "prompt": "p"}}), ("/v1/score_batch", {"data": body(["a"]), "headers": JSON})],
                "images": [
                    ("/score", {"json": single(png(picture(16, 16)))}),
                    ("/v1/score_batch", {"data": image, "headers": {"Content-Type": "application/octet-stream"}}),
                ],
            }
            for kind, sent in requests.items():
                for route, options in sent:
                    async with session.post(route, **options) as r:
                        assert r.status == 200 if kind in media else (await error_of(r)) == (422, "wrong_medium")

    asyncio.run(run())


@aio
async def test_limits_are_those_of_images() -> None:
    gate = TextGate()
    async with served(gate, max_queue_images=4, max_body_bytes=2000, max_batch=2) as (app, session):
        post = partial(session.post, "/v1/score_batch", headers=JSON)
        async with post(data=body(["a" * 3000])) as r:
            assert await error_of(r) == (413, "too_large")
        async with post(data=body(["a"] * 5)) as r:
            assert await error_of(r) == (413, "too_large")
        async with post(data=body(["a"]), headers=JSON | {"X-Batch-Size": "2"}) as r:
            assert await error_of(r) == (422, "bad_batch")
        async with post(data=b"{") as r:
            assert await error_of(r) == (422, "bad_batch")
        async with session.post("/score", json={"text": 3, "prompt": "p"}) as r:
            assert await error_of(r) == (422, "bad_request")
        waiting = asyncio.create_task(post(data=body(["a"] * 3)))
        await until(gate.entered.is_set)
        async with post(data=body(["a"] * 2)) as r:
            assert await error_of(r) == (429, "queue_full") and r.headers["Retry-After"]
        async with post(data=body(["a"]), headers=JSON | {"X-Deadline-Ms": "20"}) as r:
            assert await error_of(r) == (504, "deadline")
        gate.open.set()
        assert (await (await waiting).json())["scores"] == [{"length": 1.0}] * 3
        assert gate.batches[:2] == [2, 1]
        await until(lambda: app.batcher.images == 0)


@aio
async def test_a_token_is_wanted_for_texts_too() -> None:
    async with (
        served(model(Length()), token="secret") as (_, session),
        session.post("/v1/score_batch", data=body(["a"]), headers=JSON) as r,
    ):
        assert await error_of(r) == (401, "unauthorized")


# ---------------------------------------------------------------------- a server process
@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Rules, a format and a function of a file."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    if extra_info == 'fail': raise ValueError('no')\n    return len(solution_str) + float(ground_truth.replace(',', ''))\n"
    )
    ready, options = folder / "ready", {"function": {"path": str(folder / "mine.py")}, "rules": {"sources": {"mine": "math"}}}
    command = [sys.executable, "-m", "lit_rl.rewards.server", "--port", "0", "--scorers", "rules,format,function"]
    command += ["--scorer-args", json.dumps(options), "--ready-file", str(ready)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not ready.exists():
            assert time.monotonic() < end and process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        yield ready.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("route", ["batch", "single"])
def test_scores_over_http_are_those_in_process(server: str, route: Any) -> None:
    reward = HTTPReward(server, ["score", "acc", "parsed", "format", "function"], route=route, samples_per_request=3)
    reward.setup(rank=0, world_size=1, device="cpu")
    assert reward.medium == "texts" and dict(reward.highest) == {"score": 1.0, "acc": 1.0, "format": 1.0}
    found = reward.score(ANSWERS, ROWS)
    expected = {**RuleReward().score(ANSWERS, ROWS), **FormatReward().score(ANSWERS, ROWS)}
    assert {name: values.tolist() for name, values in found.items() if name != "function"} == {
        name: values.tolist() for name, values in expected.items()
    }
    assert found["score"].tolist() == [1, 0, 1, 1] and found["format"].tolist() == [0, 0, 0, 1]
    assert found["function"].tolist() == [10, 11, 1246, 23] and reward.counters()["failures"] == 0


def test_what_the_server_cannot_score_is_nan_with_its_reason_and_never_0(server: str) -> None:
    """A row without a rule loses its sample; a function that fails loses its own score alone."""
    rows = [ROWS[0], row("4", data_source="unknown"), row("4", extra_info="fail")]
    reward = HTTPReward(server, ["score", "function"])
    found = reward.score(["#### 4"] * 3, rows)
    assert found["score"].isnan().tolist() == [False, True, False] and found["function"].isnan().tolist() == [False, True, True]
    assert reward.counters()["failures"] == 2
    assert "text 1: model_error: data_source 'unknown' has no rule" in reward.last_error


def test_a_server_of_images_is_found_out_before_the_first_answer(server: str) -> None:
    """It says what it scores, so that the run stops with a sentence; one that does not say is told by its answer."""
    from callbacks.reward_scoring import RewardScoring

    reward = HTTPReward(server, ["score"])
    reward.setup(rank=0, world_size=1, device="cpu")
    with pytest.raises(RewardError, match="this method makes images, which reward HTTPReward does not score"):
        RewardScoring([reward]).submit(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [{"prompt": "p"}])
    silent = HTTPReward(server, ["score"])
    assert silent.score(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [{"prompt": "p"}])["score"].isnan().all()
    assert "this server scores texts, not images; start one with --scorers ocr" in silent.last_error


# ---------------------------------------------------------------------- which rewards a server builds
@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("reward_model", {}, r'scorer reward_model needs a model; give --scorer-args \'{"reward_model": {"pretrained": "FOLDER"}}\''),
        ("function", {}, r'scorer function needs a function; give --scorer-args \'{"function": {"path": "FILE.py"}}\''),
        ("function", {"path": "/nowhere/x.py"}, "the path of scorer function does not exist: /nowhere/x.py"),
    ],
)
def test_what_a_text_reward_lacks_is_told_before_anything_loads(name: str, options: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check([name], {name: options})


def test_a_reward_inside_of_a_reward_is_named_as_in_a_yaml() -> None:
    """`model` of the rules scores the rows of style model."""
    options = {"rules": {"model": {"class_path": f"{__name__}.Length"}}}
    (rules,) = build(["rules"], options, device="cpu")
    rows = [{"prompt": "p", "data_source": "x", "reward_model": {"style": "model"}}, row("4")]
    assert rules.score(["abc", "#### 4"], rows)["score"].tolist() == [3.0, 1.0]
