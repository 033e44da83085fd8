"""What scoring costs beside a rollout: python benchmarks/overlap.py [--chunks 8] [--images 4] [--chunk-ms 250] [--side 512]

A rollout of `chunks` pieces of matrix multiplication submits `images` images after each; a server in another process scores them one
request at a time, like one GPU. For scoring that takes 0.5, 1 and 2 times as long as the rollout it prints the seconds of both alone, one
after the other, and overlapped by RewardScoring, and the ratio overlapped / max(rollout, scoring). Aim at 0.5: at most 1.15; the score of
the last chunk, which nothing hides, is 1/16 of it. Needs two idle cores: one computes the rollout, one moves the images.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing as mp
import socket
import statistics
import time

import torch

from callbacks.reward_scoring import RewardScoring
from lit_rl.rewards.client import HTTPReward


def serve(port: int, ready: mp.synchronize.Event) -> None:
    """Scores one request at a time, `milliseconds` (in the path) per image."""
    from aiohttp import web

    from lit_rl.rewards.wire import decode_batch

    async def run() -> None:
        one = asyncio.Lock()

        async def score(request: web.Request) -> web.Response:
            images = decode_batch(await request.read()).images
            async with one:
                await asyncio.sleep(float(request.match_info["milliseconds"]) / 1000 * len(images))
            return web.json_response({"scores": [{"mean": float(image[0].mean())} for image in images], "errors": {}})

        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/{milliseconds}/v1/score_batch", score)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        ready.set()
        await asyncio.Event().wait()

    asyncio.run(run())


class Work:
    """A fixed amount of computation that took `milliseconds` when nothing else ran."""

    def __init__(self, milliseconds: float) -> None:
        self.x = torch.randn(512, 512)
        rates = [self._timed(20) for _ in range(5)]
        self.repeats = max(round(20 * milliseconds / 1000 / statistics.median(rates)), 1)

    def _timed(self, repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            self.x @ self.x
        return time.perf_counter() - started

    def __call__(self) -> None:
        self._timed(self.repeats)


def rollout(work: Work, media: torch.Tensor, chunks: int, scorer: RewardScoring | None, *, overlap: bool) -> float:
    info = [{"prompt": ""}] * len(media)
    started = time.perf_counter()
    for _ in range(chunks):
        work()
        if scorer is not None and overlap:
            scorer.submit(media, info)
    if scorer is not None:
        if not overlap:
            for _ in range(chunks):
                scorer.submit(media, info)
        scorer.gather()
    return time.perf_counter() - started


def measure(url: str, work: Work, args: argparse.Namespace, share: float) -> tuple[float, float, float, float]:
    """Median seconds of rollout alone, scoring alone, one after the other, overlapped."""
    media = torch.randint(0, 256, (args.images, 3, args.side, args.side), dtype=torch.uint8)
    milliseconds = share * args.chunk_ms / args.images
    scorer = RewardScoring([HTTPReward(f"{url}/{milliseconds}", ["mean"])])
    scorer.submit(media, [{"prompt": ""}] * args.images)  # starts the thread and connects
    scorer.gather()
    rows = []
    for _ in range(args.rounds):  # interleaved, so that a noisy neighbour disturbs all alike
        alone = rollout(work, media, args.chunks, None, overlap=False)
        after = rollout(work, media, args.chunks, scorer, overlap=False)
        beside = rollout(work, media, args.chunks, scorer, overlap=True)
        rows.append((alone, share * args.chunk_ms / 1000 * args.chunks, after, beside))
    scorer.close()
    return tuple(map(statistics.median, zip(*rows)))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--images", type=int, default=4, help="per chunk")
    parser.add_argument("--chunk-ms", type=float, default=250.0, help="of rollout")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ready = mp.get_context("spawn").Event()
    server = mp.get_context("spawn").Process(target=serve, args=(port, ready), daemon=True)
    server.start()
    try:
        if not ready.wait(60):
            raise SystemExit("the scoring server did not start")
        work = Work(args.chunk_ms)
        print(f"{'scoring/rollout':>15} {'rollout s':>10} {'scoring s':>10} {'in turn s':>10} {'overlapped s':>13} {'/ larger':>9}")
        for share in (0.5, 1.0, 2.0):
            alone, scoring, after, beside = measure(f"http://127.0.0.1:{port}", work, args, share)
            print(f"{share:15.1f} {alone:10.2f} {scoring:10.2f} {after:10.2f} {beside:13.2f} {beside / max(alone, scoring):9.2f}")
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
