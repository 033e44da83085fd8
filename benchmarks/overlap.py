"""The time that scoring adds to a rollout.

    python benchmarks/overlap.py [--repeats 5] [--prompts 4] [--group 8] [--chunk 4] [--side 512]

Iterations of FlowGRPO on the demo's model under Lightning's Trainer, its images enlarged to `side` pixels, with rewards that take half as
long as the rollout, and as long: one that sleeps in this process, and `HTTPReward` asking a server in another process over its batched
route. Both score one image at a time. Prints median seconds of the rollout alone, of scoring alone, and of both overlapped by
RewardScoring, and the median of overlapped / the larger of both: at most 1.15 for half the rollout. What cannot be hidden is the last
chunk: at the defaults 1/8 of the scoring. One fit per reward, in which half the rollout and as long as the rollout take turns, each scored
iteration right after one without scoring. Needs a core for the rollout and a bit of another to move the images.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing as mp
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.base import Method, RLCallback
from callbacks.reward_scoring import RewardScoring
from datamodules.base import PromptDataModule
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.miniatures.images import build_sd3
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.rewards.base import Reward, RewardQueue
from lit_rl.rewards.client import HTTPReward
from lit_rl.types import Info


class Enlarged(SD3Policy):
    """Images of `side` x `side` pixels, so that moving them costs what it costs in earnest."""

    side = 512

    def decode(self, x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(super().decode(x), (self.side, self.side))


class Sleeping(Reward):
    """One pixel, after `latency.value` seconds per image."""

    outputs = ("pixel",)

    def __init__(self, latency: Any) -> None:
        self.latency = latency

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        time.sleep(self.latency.value * len(media))
        return {"pixel": media[:, 0, 0, 0].double()}


def serve(port: int, latency: Any, ready: Any) -> None:
    """The same behind `POST /v1/score_batch`: one request at a time."""
    from aiohttp import web

    from lit_rl.rewards.service.wire import decode_batch

    async def run() -> None:
        one = asyncio.Lock()

        async def score(request: web.Request) -> web.Response:
            images = decode_batch(await request.read()).images
            async with one:
                await asyncio.sleep(latency.value * len(images))
            return web.json_response({"scores": [{"pixel": float(image[0, 0, 0])} for image in images], "errors": {}})

        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/score_batch", score)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        ready.set()
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def server(latency: Any) -> Iterator[str]:
    """The address of a running `serve`, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=serve, args=(port, latency, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(120):
            raise SystemExit("the scoring server did not start")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join()


class NoRewards(RewardQueue):
    """Takes everything and knows nothing: the rollout alone."""

    weights: Mapping[str, float] = {"pixel": 1.0}

    def __init__(self) -> None:
        self.count = 0

    submitted = 0

    def submit(self, media: Tensor, info: Sequence[Info], *, groups: Sequence[int] | None = None, place: int | None = None) -> None:
        self.count += len(info)

    def gather(self) -> dict[str, Tensor]:
        count, self.count = self.count, 0
        return {"pixel": torch.zeros(count, dtype=torch.float64)}


@dataclass
class Arm:
    """A reward queue, how long its scoring takes as a share of the rollout, and the seconds that were measured, one entry per round."""

    name: str
    reward_queue: RewardQueue
    share: float
    rollout: list[float] = field(default_factory=list)  # alone, in the iteration before
    scoring: list[float] = field(default_factory=list)  # alone, of the same images
    both: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # of both, after the rollout


class Rounds(RLCallback):
    """Scores every second iteration, for each arm in turn, and times them. The first iteration warms up and counts for nothing."""

    def __init__(self, arms: Sequence[Arm], latency: Any) -> None:
        self.arms, self.latency = arms, latency
        self.no_rewards = NoRewards()
        self.rollouts: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        assert isinstance(method, FlowGRPO)
        number, scored = divmod(trainer.current_epoch - 2, 2)
        self.arm = self.arms[number % len(self.arms)] if scored and number >= 0 else None
        self.chunks: list[tuple[Tensor, Sequence[Info]]] = []
        method.reward_queue = self.no_rewards
        if self.arm:
            method.reward_queue = self.arm.reward_queue
            images = method.prompts_per_iteration * method.group_size
            self.latency.value = self.arm.share * statistics.median(self.rollouts) / images

    def on_phase_start(self, trainer: L.Trainer, method: Method, name: str) -> None:
        if name == "rollout":
            self.began = time.perf_counter()

    def on_rollout_chunk(self, trainer: L.Trainer, method: Method, media: Tensor, info: Sequence[Info], total: int) -> None:
        self.chunks.append((media, info))

    def on_phase_end(self, trainer: L.Trainer, method: Method, name: str) -> None:
        if name == "rollout":
            self.sampled = time.perf_counter()
        elif self.arm:
            self.arm.both.append(time.perf_counter() - self.began)
            self.arm.waited.append(time.perf_counter() - self.sampled)
        elif trainer.current_epoch:
            self.rollouts.append(time.perf_counter() - self.began)

    def on_train_epoch_end(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        """The same chunks once more, with nothing beside them."""
        if self.arm:
            began = time.perf_counter()
            for media, info in self.chunks:
                self.arm.reward_queue.submit(media, info)
            self.arm.reward_queue.gather()
            self.arm.scoring.append(time.perf_counter() - began)
            self.arm.rollout.append(self.rollouts[-1])


def measure(args: argparse.Namespace, folder: Path) -> list[Arm]:
    """All arms, `args.repeats` rounds of those of a reward in one fit."""
    latency = mp.get_context("spawn").Value("d", 0.0)
    pipeline = str(build_sd3(folder / "pipeline"))
    with server(latency) as url:
        rewards = {"sleeping": Sleeping(latency), "HTTP": HTTPReward(url, ["pixel"])}
        return [arm for name, reward in rewards.items() for arm in overlapped(name, reward, latency, pipeline, args)]


def overlapped(name: str, reward: Reward, latency: Any, pipeline: str, args: argparse.Namespace) -> list[Arm]:
    """The arms of one reward, measured."""
    scoring = RewardScoring([reward])
    arms = [Arm(name, scoring, share) for share in (0.5, 1.0)]
    policy = Enlarged(pipeline, resolution=(16, 32), max_sequence_length=24)
    policy.side = args.side
    method = FlowGRPO(
        policy, prompts_per_iteration=args.prompts, group_size=args.group, rollout_micro_batch=args.chunk, timestep_fraction=0.1
    )  # one trained step of ten: training is not what is measured
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_epochs=2 + 2 * args.repeats * len(arms), limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=Path(pipeline).parent,
        callbacks=[scoring, Rounds(arms, latency)],
    )  # fmt: skip
    trainer.fit(method, PromptDataModule([{"prompt": f'the number "{i}"'} for i in range(64)]))
    return arms


def report(arms: Sequence[Arm], args: argparse.Namespace) -> str:
    """A line per reward."""
    images = args.prompts * args.group
    lines = [
        f"{images} images of {args.side} x {args.side} in chunks of {args.chunk}; median seconds of {args.repeats} rounds",
        f"{'reward':24} {'rollout alone':>14} {'scoring alone':>14} {'overlapped':>11} {'of that waiting':>16} {'/ the larger':>13}",
    ]
    for arm in arms:
        factor = statistics.median(both / max(pair) for both, *pair in zip(arm.both, arm.rollout, arm.scoring, strict=True))
        columns = "{:14.2f} {:14.2f} {:11.2f} {:16.2f}".format(*map(statistics.median, (arm.rollout, arm.scoring, arm.both, arm.waited)))
        lines.append(f"{f'{arm.name}, {arm.share} x rollout':24} {columns} {factor:13.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all rewards")
    parser.add_argument("--prompts", type=int, default=4, help="per iteration")
    parser.add_argument("--group", type=int, default=8, help="images per prompt")
    parser.add_argument("--chunk", type=int, default=4, help="images sampled, and submitted, together")
    parser.add_argument("--side", type=int, default=512, help="of an image in pixels")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = report(measure(args, Path(folder)), args)
    print(table)
    return table


if __name__ == "__main__":
    main()
