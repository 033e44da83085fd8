"""Hostile requests to a reward server, and hostile replies to its client, are bounded and reported in one sentence."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from PIL import Image
from test_app import BINARY, Gate, aio, error_of, picture, png, served, single, until

from lit_rl.errors import ConfigError
from lit_rl.net.addresses import check_health
from lit_rl.net.bodies import retry_after
from lit_rl.rewards.client import HTTPReward
from lit_rl.rewards.service.app import _decode_single
from lit_rl.rewards.service.images import MAX_ASPECT, decode_image, pixel_error
from lit_rl.rewards.service.samples import SampleError
from lit_rl.rewards.service.wire import decode_answer, encode_batch

PIXELS = 2048**2


def jpeg(scans: int, side: int = 256) -> bytes:
    """A progressive JPEG whose last scan stands there `scans` times more."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (7, 9, 200)).save(file, "JPEG", progressive=True, quality=50)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3000, 1), (1, 4_194_304), (8, 8 * MAX_ASPECT + 1)])
def test_thin_pictures_are_refused(height: int, width: int) -> None:
    error = pixel_error(height, width, max_pixels=PIXELS)
    assert error is not None and error.code == "too_thin"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8 * MAX_ASPECT), (64, 1024), (2048, 2048)])
def test_pictures_of_usual_shapes_are_not(height: int, width: int) -> None:
    assert pixel_error(height, width, max_pixels=PIXELS) is None


@aio
async def test_a_thin_picture_spoils_no_other_of_its_batch() -> None:
    thin, usual = np.zeros((1, 3000, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    async with served() as (_, session):
        body = encode_batch([thin, usual], ["a", "b"], request_id="r")
        async with session.post("/v1/score_batch", data=body, headers=BINARY) as answer:
            said = await answer.json()
    assert said["scores"][0] is None and said["errors"]["0"]["code"] == "too_thin" and said["scores"][1] is not None


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    assert decode_image(jpeg(0), max_pixels=PIXELS).shape == (256, 256, 3)
    began = time.process_time()
    with pytest.raises(SampleError, match="more than 64 scans"):
        decode_image(jpeg(2000), max_pixels=PIXELS)
    assert time.process_time() - began < 15  # the decoder takes minutes


@aio
async def test_a_deadline_holds_while_a_picture_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.rewards.service.app._decode_single", lambda body, max_pixels: time.sleep(0.5))
    async with served() as (app, session):
        async with session.post("/score", json=single(png(picture())), headers={"X-Deadline-Ms": "50"}) as answer:
            assert await error_of(answer) == (504, "deadline")
        assert app.batcher.images == 0


@pytest.mark.parametrize("given", ["Bearer caf\xe9", "Bearer \xff\xfe", "B\xe4r x", "Bearer", ""])
@aio
async def test_any_authorization_is_answered_with_401(given: str) -> None:
    async with served(token="secret") as (_, session):
        host, port = session._base_url.host, session._base_url.port  # type: ignore[union-attr]
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: {given}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(head.encode("latin-1"))
        assert b" 401 " in await reader.readline()
        writer.close()


@pytest.mark.parametrize("head", ["Transfer-Encoding: chunked", "Content-Length: 60000000"])
@aio
async def test_uploads_that_send_nothing_keep_nobody_out(head: str) -> None:
    async with served(max_queue_images=8) as (app, session):
        host, port = session._base_url.host, session._base_url.port  # type: ignore[union-attr]
        idle = [await asyncio.open_connection(host, port) for _ in range(20)]
        lines = ["POST /v1/score_batch HTTP/1.1", "Host: x", "Content-Type: application/octet-stream", "X-Batch-Size: 8", head, "", ""]
        for _, writer in idle:
            writer.write("\r\n".join(lines).encode())
        await until(lambda: app.batcher._requests == 20)
        async with session.post("/score", json=single(png(picture()))) as answer:
            assert answer.status == 200
        for _, writer in idle:
            writer.close()
        await until(lambda: app.batcher._requests == 0)


@pytest.mark.parametrize(
    "head",
    ["GET http://[::1/ HTTP/1.1\r\nHost: a", "GET / HTTP/9.9", "GET /\xff HTTP/1.1", "GET / HTTP/1.1\r\nX: a\0b"],
)
@aio
async def test_what_is_not_http_is_one_line_of_the_log(head: str, caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (_, session):
        base = session._base_url
        assert base is not None and base.host is not None
        reader, writer = await asyncio.open_connection(base.host, base.port)
        writer.write(f"{head}\r\n\r\n".encode("latin-1"))
        assert b" 400 " in await reader.readline()
        writer.close()
        await until(lambda: bool(caplog.records))
    record, text = caplog.records[-1], caplog.text.strip()
    assert "no HTTP request: " in record.getMessage() and record.exc_info is None and len(text.splitlines()) == 1


@aio
async def test_decoded_pixels_count_as_memory() -> None:
    gate = Gate()
    image = np.zeros((512, 512, 3), np.uint8)  # 768 KiB, of which the PNG needs 1
    async with served(gate, max_held_bytes=2 << 20) as (app, session):
        held = [asyncio.create_task(session.post("/score", json=single(png(image)))) for _ in range(2)]
        await until(lambda: app.batcher._bytes > 2 * image.nbytes)
        async with session.post("/score", json=single(png(image))) as answer:
            assert await error_of(answer) == (429, "queue_full")
        gate.open.set()
        assert [r.status for r in await asyncio.gather(*held)] == [200, 200]
        assert app.batcher._bytes == 0


# ---------------------------------------------------------------------- the client
@asynccontextmanager
async def strange_server(**routes: Any) -> AsyncIterator[str]:
    app = web.Application()
    for name, answer in routes.items():
        app.router.add_route("*", "/v1/score_batch" if name == "score" else f"/{name}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def ask(answer: Any, **options: Any) -> tuple[torch.Tensor, HTTPReward]:
    """One image scored by a server that answers as `answer` does."""
    async with strange_server(score=answer) as url:
        reward = HTTPReward(url, outputs=["a"], **({"deadline_s": 1.0, "timeout_s": 1.0} | options))
        reward.own = reward.urls
        scores = await reward.score_async(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [{"prompt": "x"}])
        await reward.close()
    return scores["a"], reward


@aio
async def test_compressed_and_endless_answers_are_not_read() -> None:
    bomb = gzip.compress(b'{"scores": [{"a": 1}], "errors": {}}' + b" " * (64 << 20))

    async def compressed(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    async def endless(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1 << 10):
            await response.write(b" " * (1 << 16))
        return response

    for answer, reason in ((compressed, "compressed (gzip)"), (endless, "longer than")):
        scores, reward = await ask(answer)
        assert scores.isnan().all() and reason in reward.last_error


@pytest.mark.parametrize(
    ("header", "seconds"), [("nan", 0.0), ("inf", 0.0), ("-5", 0.0), ("1e9", 0.0), ("2.5", 2.5), ("7", 7.0), (None, 0.0), ("9" * 400, 0.0)]
)
def test_retry_after_is_a_finite_wait(header: str | None, seconds: float) -> None:
    assert retry_after(header) == seconds


@aio
async def test_a_wait_that_is_no_number_does_not_outlive_the_deadline() -> None:
    async def busy(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=429, headers={"Retry-After": "nan"})

    began = time.monotonic()
    scores, _ = await asyncio.wait_for(ask(busy, deadline_s=0.5), 60)
    assert scores.isnan().all() and time.monotonic() - began < 50


@pytest.mark.parametrize("number", ["1" * 400, "1" * 5000, "1e999", "-1e999", "Infinity", "NaN"])
def test_a_number_beyond_all_bounds_is_no_score_and_voids_no_other(number: str) -> None:
    rows, reasons = decode_answer(f'{{"scores": [{{"a": {number}}}, {{"a": 3}}], "errors": {{}}}}', 2)
    assert math.isnan(rows[0]["a"]) and rows[1] == {"a": 3.0} and not reasons  # type: ignore[index]


@aio
async def test_a_server_that_is_down_is_told_with_its_cause_once() -> None:
    async def broken(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=503, text="out of memory")

    async with strange_server(score=broken) as url:
        reward = HTTPReward(url, outputs=["a"], deadline_s=0.3, breaker_after=1, probe_s=10.0)
        reward.own = reward.urls
        for _ in range(3):
            await reward.score_async(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [{"prompt": "x"}])
        await reward.close()
    assert reward.last_error.count("is down") <= 1 and reward.last_error.endswith("out of memory")


@aio
async def test_health_is_asked_of_nobody_else() -> None:
    """A redirect would carry the token along."""
    seen: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response({})

    async def redirect(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/stolen"})

    async with strange_server(health=redirect, stolen=elsewhere) as url:
        with pytest.raises(ConfigError, match="status 302"):
            await asyncio.to_thread(check_health, url, headers={"Authorization": "Bearer secret"}, patience_s=1.0)
    assert not seen


@aio
async def test_an_answer_about_health_that_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's time-out begins anew with each byte."""

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    monkeypatch.setattr("lit_rl.net.addresses.HEALTH_SECONDS", 0.3)
    async with strange_server(health=drip) as url:
        with pytest.raises(ConfigError, match="does not finish its answer to GET /health in 0.3 s"):
            await asyncio.wait_for(asyncio.to_thread(check_health, url, headers={}, patience_s=1.0), 45)


@aio
async def test_a_refusal_brings_no_codes_for_the_terminal() -> None:
    async def evil(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=400, text="bad \x1b[2J\x07\nprompt")

    _, reward = await ask(evil)
    assert reward.last_error.endswith("status 400 bad  [2J  prompt")


@pytest.mark.parametrize(
    ("target", "text"), [("NaN", None), ("-Infinity", None), ("1e999", None), ("9" * 4000, "9" * 4000), ("4.5", "4.5")]
)
def test_a_target_that_is_no_number_is_none(target: str, text: str | None) -> None:
    """Tables write NaN into empty cells; it asked for the text `nan`."""
    body = json.dumps(single(png(picture()))).encode()[:-1] + f', "target": {target}}}'.encode()
    assert _decode_single(bytearray(body), max_pixels=PIXELS)[1].get("target") == text
