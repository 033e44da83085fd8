"""Images per second of the reward server's batched route beside its single route.

    python benchmarks/reward_server.py [--rounds 5] [--size 512]

Both arms send the same images to the same server process, whose scorer is free, in turns; medians over the rounds and their ratio are
printed. `single`: JSON with base64 PNG, 32 requests at a time. `batched`: safetensors, 8 images per request, 4 requests at a time. Bodies
are encoded beforehand, so the client's own encoding (a PNG of 512 x 512 takes 20-60 ms, a safetensors body 0.1 ms per image) is left out.
On 2 cores shared with other work: 28 and 339 images/s, 14.3 and 0.88 ms of server CPU per image.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lit_rl.rewards.base import Reward  # noqa: E402
from lit_rl.rewards.service.wire import encode_batch  # noqa: E402
from lit_rl.types import Info  # noqa: E402

PER_BODY, BATCHED_IN_FLIGHT, SINGLE_IN_FLIGHT = 8, 4, 32


class FreeReward(Reward):
    """`free` = 0, at once."""

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"free": torch.zeros(len(media))}


def pictures(count: int, size: int) -> np.ndarray:
    """Smooth colours with a little noise: about 470 kB of PNG at 512 x 512, as generated photographs have. uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    phase = rng.uniform(1, 6, (count, 1, 1, 3))
    waves = 127 + 100 * np.sin(phase * (x + 2 * y)[None, ..., None] * 3)
    return np.clip(waves + rng.normal(0, 3, waves.shape), 0, 255).astype(np.uint8)


def single_body(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return json.dumps({"image": base64.b64encode(file.getvalue()).decode(), "prompt": "a picture"}).encode()


async def send(session: aiohttp.ClientSession, path: str, kind: str, bodies: Sequence[bytes], *, count: int, in_flight: int) -> None:
    """`count` requests, `in_flight` at a time; anything but 200 ends the benchmark."""
    todo = iter(range(count))

    async def worker() -> None:
        for i in todo:
            async with session.post(path, data=bodies[i % len(bodies)], headers={"Content-Type": kind}) as response:
                if response.status != 200:
                    raise RuntimeError(f"{path} answered {response.status}: {(await response.text())[:200]}")
                await response.read()

    await asyncio.gather(*(worker() for _ in range(in_flight)))


async def compare(url: str, server: psutil.Process, *, rounds: int, images: int, size: int) -> dict[str, list[tuple[float, float]]]:
    """Per arm and round: images per second, and milliseconds of server CPU per image."""
    media = pictures(PER_BODY, size)
    json_bodies = [single_body(image) for image in media]
    raw_bodies = [encode_batch(media, ["a picture"] * PER_BODY, request_id="")]
    sizes = len(json_bodies[0]) / 1024, len(raw_bodies[0]) / 1024 / PER_BODY
    print(f"{size} x {size}: {sizes[0]:.0f} KiB per image as JSON, {sizes[1]:.0f} KiB as safetensors")
    arms = {
        "single": ("/score", "application/json", json_bodies, 1, SINGLE_IN_FLIGHT, images),
        "batched": ("/v1/score_batch", "application/octet-stream", raw_bodies, PER_BODY, BATCHED_IN_FLIGHT, 4 * images),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=SINGLE_IN_FLIGHT)) as session:
        for turn in range(rounds + 1):
            for name, (path, kind, bodies, per_body, in_flight, total) in arms.items():
                cpu, start = sum(server.cpu_times()[:2]), time.perf_counter()
                await send(session, path, kind, bodies, count=total // per_body, in_flight=in_flight)
                seconds = time.perf_counter() - start
                if turn:  # the first one warms up
                    results[name].append((total / seconds, (sum(server.cpu_times()[:2]) - cpu) / total * 1e3))
    return results


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--images", type=int, default=128, help="images per round of the single route; the batched one gets four times as many")
    p.add_argument("--size", type=int, default=512)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        command = [
            sys.executable,
            "-m",
            "lit_rl.rewards.server",
            "--port",
            "0",
            "--scorers",
            "reward_server.FreeReward",
            "--ready-file",
            str(ready),
        ]
        server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
        try:
            while not ready.exists():
                if server.poll() is not None:
                    raise SystemExit("the server did not start")
                time.sleep(0.1)
            url = ready.read_text()
            results = asyncio.run(compare(url, psutil.Process(server.pid), rounds=args.rounds, images=args.images, size=args.size))
        finally:
            server.terminate()
            server.wait()
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in results.items()}
    memory = psutil.virtual_memory().total / 2**30
    print(f"{os.cpu_count()} cores, {memory:.0f} GiB; client and server share them; medians of {args.rounds} interleaved rounds")
    for name, (rate, cpu) in medians.items():
        spread = f"{min(r for r, _ in results[name]):.0f}-{max(r for r, _ in results[name]):.0f}"
        print(f"{name:8} {rate:7.0f} images/s ({spread})   {cpu:6.2f} ms server CPU per image")
    (single, single_cpu), (batched, batched_cpu) = medians["single"], medians["batched"]
    print(f"ratio    {batched / single:7.1f} x the rate, {single_cpu / batched_cpu:.1f} x less CPU")


if __name__ == "__main__":
    main()
