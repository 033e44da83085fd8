"""One Flow-GRPO iteration of ours beside the plain loop of the public trainers, on the same weights, draws and reward latency.

    python benchmarks/flow_grpo_iteration.py [--size mini|sd35m|flux] [--repeats 3] [--plain-batch 8 1] [--pairs 8]

The plain loops are Flow-GRPO as its public trainers write it: every copy of every prompt is encoded, and a forward and backward takes one
micro-batch of images at one timestep. With several images at once (Flow-GRPO's own trainer) each batch is handed to a thread that scores
it while the next one is sampled, and metrics are stacked and read once per iteration; with one image (DanceGRPO, MixGRPO) scoring starts
when the rollout is over, and metrics are read off the device each time. Ours is `FlowGRPO` under Lightning's Trainer with
`RewardScoring`. Both compute the same update, which is checked: after all iterations the weights must agree. Arms take turns within one
process, on new prompts every iteration; the first iteration is skipped. Prints median seconds per phase, images/s, and the ratio of the
medians, by the clock and `undisturbed` (see `Stopwatch`).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.base import Method, RLCallback
from callbacks.reward_scoring import RewardScoring
from datamodules.base import PromptDataModule
from lit_rl.credit.groups import group_advantages
from lit_rl.losses.policy_gradient import clipped_surrogate, policy_metrics
from lit_rl.losses.step_surrogates import Clip
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.rewards.base import Reward
from lit_rl.samplers.flow import Step, sde_step
from lit_rl.seeding import Key
from lit_rl.types import Cond, Info, Prompts


@dataclass(frozen=True)
class Size:
    """A workload: the rollout, and how many images or pairs each arm takes at once."""

    prompts: int
    group: int
    num_steps: int
    plain_batches: tuple[int, ...]  # images per forward of the plain loop, as the published recipes have it; one arm each
    rollout_batch: int  # images per forward of our rollout
    pairs: int  # (image, step) pairs per training forward of ours
    precision: str
    tolerance: float  # of the distance between the arms' weights, relative to the distance that they moved
    lr: float
    model: Mapping[str, Any] = field(default_factory=dict)  # of `tiny.build_sd3`


SIZES = {
    "mini": Size(
        prompts=4, group=8, num_steps=10, plain_batches=(8, 1), rollout_batch=8, pairs=32, precision="32-true", tolerance=1e-2, lr=1e-2
    ),
    "sd35m": Size(
        prompts=6, group=24, num_steps=10, plain_batches=(9,), rollout_batch=18, pairs=18, precision="bf16-mixed", tolerance=0.1, lr=1.0
    ),
    "flux": Size(
        prompts=2, group=24, num_steps=6, plain_batches=(3, 1), rollout_batch=12, pairs=6, precision="bf16-mixed", tolerance=0.1, lr=1.0
    ),
}


def build_policy(name: str, size: Size, folder: Path) -> DiffusersFlowPolicy:
    """A from-config pipeline with random weights: the demo's size trained whole, or a published size with the published recipe's LoRA."""
    from lit_rl.miniatures.full_size import build_flux_dev, build_sd35_medium
    from lit_rl.miniatures.images import build_sd3
    from lit_rl.policies.flux import FluxPolicy
    from lit_rl.policies.sd3 import SD3Policy
    from lit_rl.policies.weights.lora import LoraSettings

    if name == "mini":
        return SD3Policy(str(build_sd3(folder, **size.model)), resolution=(16, 32), max_sequence_length=24)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large: dict[str, Any] = {"dtype": "bfloat16", "vae_dtype": "bfloat16", "offload_text_encoders": False, "gradient_checkpointing": True}
    if name == "sd35m":
        pretrained = str(build_sd35_medium(folder, device=device))
        return SD3Policy(pretrained, guidance_scale=4.5, max_sequence_length=128, lora=LoraSettings(rank=32, alpha=64), **large)
    return FluxPolicy(str(build_flux_dev(folder, device=device)), lora=LoraSettings(rank=64, alpha=128), **large)


class Brightness(Reward):
    """Mean pixel, after `seconds` per image: a server that scores one image at a time."""

    outputs = ("brightness",)

    def __init__(self) -> None:
        self.seconds = 0.0

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        time.sleep(self.seconds * len(media))
        return {"brightness": media.flatten(1).float().mean(1).double()}


class Stopwatch:
    """Seconds by phase, counted when the device is done.

    `undisturbed` has CPU seconds of this process in place of computing on a CPU, which other load on the machine does not lengthen;
    waiting for scores, and everything on a GPU, counts by the clock.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.undisturbed: dict[str, float] = {}
        self.last = _now()

    def lap(self, phase: str) -> None:
        now = _now()
        clock, cpu = (after - before for after, before in zip(now, self.last))
        self.seconds[phase], self.last = clock, now
        self.undisturbed[phase] = clock if phase == "score" or torch.cuda.is_available() else cpu


def _now() -> tuple[float, float]:
    """By the clock, and of this process's CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def median_total(watches: Sequence[Stopwatch], kind: str) -> float:
    """The median over whole iterations, without the first. kind: seconds or undisturbed."""
    return statistics.median(sum(getattr(watch, kind).values()) for watch in watches[1:])


@dataclass
class Trajectories:
    """The tensors that the plain loop keeps of one micro-batch."""

    cond: Cond
    path: list[Tensor]  # N + 1 latents
    logprobs: list[Tensor]  # N
    images: Tensor


class PlainLoop:
    """Flow-GRPO as its public trainers write it, `batch` images at a time; several are scored beside the sampling of the next."""

    def __init__(self, method: FlowGRPO, reward: Brightness, batch: int) -> None:
        self.method, self.policy, self.reward, self.batch = method, method.policy, reward, batch
        self.watches: list[Stopwatch] = []
        self.weights: list[Tensor] = []

    def iteration(self) -> None:
        prompts = self.method.ask(self.method.iteration)
        self.sigmas = self.policy.sigmas(self.method.num_steps).float().to(self.method.device)
        watch = Stopwatch()
        chunks = torch.arange(len(prompts)).split(self.batch)
        with torch.no_grad(), ThreadPoolExecutor(1) as scoring:
            rollout: list[Trajectories] = []
            scores: list[Callable[[], Mapping[str, Tensor]]] = []
            for chunk in chunks:
                rollout.append(self.sample(prompts, chunk))
                score = partial(self.reward.score, rollout[-1].images, [prompts.info[i] for i in chunk])
                scores.append(scoring.submit(score).result if self.batch > 1 else score)
            watch.lap("rollout")
            brightness = torch.cat([score()["brightness"] for score in scores])
        watch.lap("score")
        advantages = group_advantages(brightness, prompts.group).clamp(-5, 5).float().to(self.method.device)
        self.train(rollout, advantages.split(self.batch))
        watch.lap("train")
        self.watches.append(watch)

    def sample(self, prompts: Prompts, chunk: Tensor) -> Trajectories:
        cond = self.encode([prompts.text[i] for i in chunk])
        numbered = self.method.row_keys(prompts)
        keys = [numbered[i] for i in chunk.tolist()]
        return self.sampled(self.method.noise([(*key, "start") for key in keys]), cond, keys)

    def sampled(self, start: Tensor, cond: Cond, keys: Sequence[tuple[Key, ...]]) -> Trajectories:
        """All steps from the noise `start`, with the noise of each step by the keys of the samples."""
        path, logprobs = [start], []
        for i in range(self.method.num_steps):
            step = self.step(path[-1], i, cond, noise=self.method.noise([(*key, i) for key in keys]))
            path.append(step.sample)
            logprobs.append(step.logprob)
        return Trajectories(cond, path, logprobs, self.policy.decode(path[-1]).cpu())

    def encode(self, texts: Sequence[str]) -> Cond:
        """Every copy anew; only the empty prompt is encoded once."""
        assert isinstance(self.policy, DiffusersFlowPolicy)
        negative = {key: value for key, value in self.policy.encode([""]).items() if key.startswith("negative_")}
        return self.policy.encode_one(texts) | negative  # type: ignore[arg-type]  # diffusers encodes a list of prompts together

    def step(self, x: Tensor, i: int, cond: Cond, **given: Tensor) -> Step:
        sigma, sigma_next = self.sigmas[i].expand(len(x)), self.sigmas[i + 1].expand(len(x))
        with self.method.trainer.precision_plugin.forward_context():
            v = self.policy.velocity(x, sigma, cond)
        return sde_step(
            x, v, sigma=sigma, sigma_next=sigma_next, sigma_max=float(self.sigmas[1]),
            dynamics=self.method.sde.dynamics, noise_level=self.method.sde.noise_level, **given,
        )  # fmt: skip

    def train(self, rollout: Sequence[Trajectories], advantages: Sequence[Tensor]) -> None:
        """One update on all pairs, one micro-batch and timestep after the other."""
        optimizer = self.method.optimizer([p for _, p in self.policy.trainable()])
        optimizer.zero_grad()
        assert isinstance(self.method.surrogate, Clip)
        clip = {"clip_low": self.method.surrogate.low, "clip_high": self.method.surrogate.high}
        window = self.method.window(self.method.iteration)
        pairs = sum(len(advantage) for advantage in advantages) * len(window)
        metrics: list[dict[str, Tensor]] = []
        for part, advantage in zip(rollout, advantages):
            for i in window:
                step = self.step(part.path[i], i, part.cond, sample=part.path[i + 1])
                loss = clipped_surrogate(step.logprob, part.logprobs[i], advantage, **clip).sum() / pairs
                loss.backward()
                metrics.append({"loss": loss.detach()} | policy_metrics(step.logprob, part.logprobs[i], **clip))
                if self.batch == 1:
                    read(metrics)
        optimizer.step()
        optimizer.zero_grad()
        read(metrics)


def read(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means by name, off the device; `metrics` starts anew."""
    means = {name: torch.stack([row[name] for row in metrics]).mean().item() for name in (metrics[0] if metrics else ())}
    metrics.clear()
    return means


class Turns(RLCallback):
    """Times our iterations, and runs those of the plain loops in between, each on weights of its own."""

    def __init__(self, reward: Brightness, plain_batches: Sequence[int], latency: float | None) -> None:
        self.reward, self.plain_batches, self.latency = reward, plain_batches, latency
        self.phases: dict[str, float] = {}
        self.watches: list[Stopwatch] = []
        self.plain: list[PlainLoop] = []

    def on_train_start(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        assert isinstance(method, FlowGRPO)
        self.initial = copy_weights(method)
        self.plain = [PlainLoop(method, self.reward, batch) for batch in self.plain_batches]
        for loop in self.plain:
            loop.weights = copy_weights(method)
        self.watch = Stopwatch()

    def on_phase_end(self, trainer: L.Trainer, method: Method, name: str) -> None:
        self.watch.lap(name)

    def on_train_epoch_end(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        assert isinstance(method, FlowGRPO)
        self.watch.lap("train")
        self.watches.append(self.watch)
        for loop in self.plain:
            with swapped_in(method, loop.weights):
                loop.iteration()
        rollout = statistics.median(watch.undisturbed["rollout"] for watch in self.plain[0].watches)
        half = rollout / 2 / (method.prompts_per_iteration * method.group_size)
        self.reward.seconds = half if self.latency is None else self.latency  # of the next iteration, for all arms
        self.watch = Stopwatch()

    def disagreement(self, method: FlowGRPO) -> list[float]:
        """|ours - plain| / |ours - initial| over all trained weights, for each plain loop."""
        ours = torch.cat([w.flatten() for w in copy_weights(method)])
        moved = (ours - torch.cat([w.flatten() for w in self.initial])).norm()
        return [float((ours - torch.cat([w.flatten() for w in loop.weights])).norm() / moved) for loop in self.plain]


def copy_weights(method: FlowGRPO) -> list[Tensor]:
    return [p.detach().clone() for _, p in method.policy.trainable()]


@contextmanager
def swapped_in(method: FlowGRPO, weights: list[Tensor]) -> Iterator[None]:
    """Inside it the policy has `weights`, which then become what they were trained to; afterwards its own again."""
    own = copy_weights(method)
    _assign(method, weights)
    yield
    weights[:] = copy_weights(method)
    _assign(method, own)


@torch.no_grad()
def _assign(method: FlowGRPO, weights: Sequence[Tensor]) -> None:
    for (_, parameter), value in zip(method.policy.trainable(), weights):
        parameter.copy_(value)
        parameter.grad = None


def measure(policy: DiffusersFlowPolicy, size: Size, *, repeats: int, latency: float | None, logs: Path) -> tuple[Turns, list[float]]:
    """One fit of 1 + `repeats` iterations of all arms, and how far the arms' weights are apart at the end."""
    reward = Brightness()
    count = size.prompts * (1 + repeats)
    data = PromptDataModule([{"prompt": f'the number "{i:04d}"'} for i in range(count)], shuffle=False)
    method = FlowGRPO(
        policy, prompts_per_iteration=size.prompts, group_size=size.group, num_steps=size.num_steps, rollout_micro_batch=size.rollout_batch,
        surrogate=Clip(low=1e-2, high=1e-2),  # far enough from 1 that rounding decides nothing
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=size.lr),
    )  # fmt: skip
    turns = Turns(reward, size.plain_batches, latency)
    pairs = size.prompts * size.group * method.window(0).stop
    trainer = L.Trainer(
        accelerator="auto", devices=1, precision=size.precision, max_epochs=1 + repeats,  # type: ignore[arg-type]
        accumulate_grad_batches=-(-pairs // size.pairs), callbacks=[RewardScoring({"brightness": reward}), turns],
        logger=TensorBoardLogger(logs), limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, data)
    return turns, turns.disagreement(method)


def report(turns: Turns, apart: Sequence[float], name: str, size: Size) -> str:
    """A line per arm, and per plain loop the ratio and the agreement of the weights."""
    images, repeats = size.prompts * size.group, len(turns.watches) - 1
    arms = {f"ours ({size.rollout_batch} images, {size.pairs} pairs)": turns.watches}
    arms |= {f"plain ({loop.batch} images)": loop.watches for loop in turns.plain}
    lines = [
        f"{name}: {size.prompts} prompts x {size.group} = {images} images of {size.num_steps} steps; reward about "
        f"{turns.reward.seconds * 1000:.0f} ms per image, one at a time; median seconds of {repeats} iterations",
        f"{'':28} {'encode+rollout':>14} {'wait for scores':>15} {'train':>8} {'total':>8} {'undisturbed':>11} {'images/s':>9}",
    ]
    for arm, watches in arms.items():
        phases = [statistics.median(watch.seconds[phase] for watch in watches[1:]) for phase in ("rollout", "score", "train")]
        total, undisturbed = median_total(watches, "seconds"), median_total(watches, "undisturbed")
        columns = "{:14.2f} {:15.2f} {:8.2f} {:8.2f} {:11.2f} {:9.2f}".format(*phases, total, undisturbed, images / total)
        lines.append(f"{arm:28} {columns}")
    for loop, distance in zip(turns.plain, apart):
        ratio, undisturbed = (median_total(turns.watches, kind) / median_total(loop.watches, kind) for kind in ("seconds", "undisturbed"))
        lines.append(f"ratio {ratio:.2f}, undisturbed {undisturbed:.2f} (ours / plain, {loop.batch} images)")
        lines.append(f"  their weights differ by {distance:.1e} of the way moved")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, sizes: Mapping[str, Size] = SIZES) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes, default="mini")
    parser.add_argument("--repeats", type=int, default=3, help="timed iterations of each arm")
    parser.add_argument("--latency", type=float, help="seconds per image of the reward; default: all images take half of the plain rollout")
    parser.add_argument("--plain-batch", type=int, nargs="+", help="images per forward of the plain loop, one arm each")
    parser.add_argument("--pairs", type=int, help="(image, step) pairs per training forward of ours")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    size = sizes[args.size]
    if args.plain_batch:
        size = replace(size, plain_batches=tuple(args.plain_batch))
    if args.pairs:
        size = replace(size, pairs=args.pairs)
    with tempfile.TemporaryDirectory() as folder:
        policy = build_policy(args.size, size, Path(folder) / "pipeline")
        turns, apart = measure(policy, size, repeats=args.repeats, latency=args.latency, logs=Path(folder) / "logs")
    table = report(turns, apart, args.size, size)
    print(table)
    if max(apart) > size.tolerance:
        raise SystemExit(f"the arms did not compute the same update: their weights must agree to {size.tolerance:g} of the way moved")
    return table


if __name__ == "__main__":
    main()
