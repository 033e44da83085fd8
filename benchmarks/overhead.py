"""What an iteration costs beside its model: Flow-GRPO on a policy that computes next to nothing, beside a bare loop of torch.

    python -m benchmarks.overhead [--iterations 60] [--minibatches 2 18] [--profile FILE]

Ours is `FlowGRPO` under Lightning's Trainer with `RewardScoring` and a TensorBoard logger. The bare loop does the same arithmetic without
any of that: it draws unkeyed noise, keeps the path, scores in place, normalizes rewards in each group, takes one optimizer step per
minibatch, and stacks the three metrics of Flow-GRPO's own trainer, which it reads once per iteration. The third arm is the bare loop
under Lightning's Trainer, which logs the same three numbers once per iteration: the least that a LightningModule can cost, and so the bound
of the first ratio. Ours and the bare loop take turns within one process, one thread, and the third arm has a turn after every few
iterations. Prints medians of CPU milliseconds for an iteration of each number of minibatches, the cost of one more minibatch (the slope
between the two numbers), and the ratios.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from callbacks.reward_scoring import RewardScoring
from datamodules.base import PromptDataModule
from lit_rl.losses.step_surrogates import Clip
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.policies.base import FlowPolicy
from lit_rl.rewards.base import Reward
from lit_rl.samplers.schedules import shifted_sigmas
from lit_rl.types import Cond, Info

CLIP, NOISE_LEVEL, LR = 1e-2, 0.7, 1e-3
SHAPE = (1, 2, 2)
SKIPPED = 5  # first iterations of each turn
TURNS = 3  # turns that ours, beside the bare loop, and the bare loop under Lightning take

Minibatch = tuple[list[Tensor], Tensor, Tensor, Cond]
"""Points and times, log-probabilities, advantages, conditioning."""


@dataclass(frozen=True)
class Work:
    """An iteration: different prompts, samples of each, denoising steps, minibatches."""

    minibatches: int
    prompts: int = 4
    group: int = 4
    steps: int = 6


class FreePolicy(FlowPolicy):
    """v = W x + b on 2 x 2 "images"."""

    def load(self) -> None:
        self.network = nn.Linear(4, 4)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return [network]

    def reference(self) -> nullcontext[None]:
        raise NotImplementedError("no divergence is measured here")

    def encode(self, prompts: Sequence[str]) -> Cond:
        return {"embeds": torch.zeros(len(prompts), 1)}

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.network(x.flatten(1)).view(x.shape)

    def decode(self, x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)

    def encode_images(self, images: Tensor, info: Sequence[Info] = ()) -> Tensor:
        raise NotImplementedError("no examples are imitated here")

    def latent_shape(self) -> tuple[int, ...]:
        return SHAPE

    def sigmas(self, num_steps: int) -> Tensor:
        return shifted_sigmas(num_steps, shift=1.0)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        raise NotImplementedError("nothing is exported here")


class Brightness(Reward):
    """Mean pixel."""

    outputs = ("brightness",)

    def score(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"brightness": media.flatten(1).float().mean(1).double()}


class BareLoop:
    """Flow-GRPO in plain torch."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.policy = FreePolicy()
        self.policy.load()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LR, fused=True)
        self.reward = Brightness()
        self.sigmas = self.policy.sigmas(work.steps).float()
        self.metrics: list[list[Tensor]] = []

    def iteration(self) -> None:
        for minibatch in self.rollout():
            self.loss(*minibatch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.read_metrics()

    def read_metrics(self) -> dict[str, float]:
        """Means over the minibatches since the last call."""
        means = torch.stack([torch.stack(values) for values in self.metrics]).mean(0).tolist()
        self.metrics.clear()
        return dict(zip(("approx_kl", "clip_fraction", "loss"), means, strict=True))

    def rollout(self) -> Iterator[Minibatch]:
        """The minibatches of a new rollout."""
        work = self.work
        cond = self.policy.encode(["prompt"] * work.prompts)
        with torch.no_grad():
            x, points, logprobs = torch.randn(work.prompts * work.group, *SHAPE), [], []
            for i in range(work.steps - 1):
                mean, std = self.step(x, self.sigmas[i], self.sigmas[i + 1], cond)
                following = mean + std * torch.randn_like(x)
                points.append((x, following, self.sigmas[i].expand(len(x)), self.sigmas[i + 1].expand(len(x))))
                logprobs.append(self.logprob(following, mean, std))
                x = following
            x = x + self.policy.velocity(x, self.sigmas[-2].expand(len(x)), cond) * (self.sigmas[-1] - self.sigmas[-2])
            rewards = self.reward.score(self.policy.decode(x), [])["brightness"].view(work.prompts, work.group)
            advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)).flatten().float()
        inputs = [torch.cat(parts) for parts in zip(*points, strict=True)]
        old, advantages = torch.cat(logprobs), advantages.repeat(work.steps - 1)
        for rows in torch.randperm(len(old)).chunk(work.minibatches):
            yield [part[rows] for part in inputs], old[rows], advantages[rows], cond

    def step(self, x: Tensor, sigma: Tensor, sigma_next: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of Flow-GRPO's stochastic step (arXiv 2505.05470, equation 9)."""
        sigma, sigma_next = (s.expand(len(x)).view(-1, 1, 1, 1) for s in (sigma, sigma_next))
        g = NOISE_LEVEL * (sigma / (1 - torch.where(sigma == 1, self.sigmas[1], sigma))).sqrt()
        dt, v = sigma_next - sigma, self.policy.velocity(x, sigma.flatten(), cond)
        return x + v * dt + g**2 * dt / (2 * sigma) * (x + (1 - sigma) * v), g * (-dt).sqrt()

    def logprob(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (-((x - mean) ** 2) / (2 * std**2) - std.log()).flatten(1).mean(1)

    def loss(self, inputs: Sequence[Tensor], old: Tensor, advantages: Tensor, cond: Cond) -> Tensor:
        x, following, sigma, sigma_next = inputs
        new = self.logprob(following, *self.step(x, sigma, sigma_next, cond))
        ratio = (new - old).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        clipped = ((ratio - 1).abs() > CLIP).float().mean()
        self.metrics.append([0.5 * ((new - old).detach() ** 2).mean(), clipped, loss.detach()])
        return loss


class Replayed:
    """The bare loop's minibatches as a loader: one rollout per epoch."""

    def __init__(self, loop: BareLoop) -> None:
        self.loop = loop

    def __len__(self) -> int:
        return self.loop.work.minibatches

    def __iter__(self) -> Iterator[Minibatch]:
        return self.loop.rollout()


class UnderLightning(L.LightningModule):
    """The bare loop under Lightning's Trainer."""

    def __init__(self, loop: BareLoop) -> None:
        super().__init__()
        self.loop, self.policy = loop, loop.policy
        self.seconds: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.loop.optimizer

    def training_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        loss = self.loop.loss(*batch)
        if batch_idx == self.loop.work.minibatches - 1:
            for name, value in self.loop.read_metrics().items():
                self.log(name, value, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def on_train_epoch_start(self) -> None:
        self.seconds.append(time.process_time())


class Turns(L.Callback):
    """Takes the CPU seconds of our iterations, and runs one of the bare loop after each."""

    def __init__(self, work: Work, profiler: cProfile.Profile | None) -> None:
        self.bare = BareLoop(work)
        self.profiler = profiler
        self.seconds: dict[str, list[float]] = {"ours": [], "bare": []}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.profiler:
            self.profiler.disable()
        middle = time.process_time()
        self.bare.iteration()
        end = time.process_time()
        self.seconds["ours"].append(middle - self.start)
        self.seconds["bare"].append(end - middle)
        if self.profiler and len(self.seconds["bare"]) >= SKIPPED:
            self.profiler.enable()
        self.start = time.process_time()


def beside_bare(work: Work, iterations: int, logs: Path, profiler: cProfile.Profile | None = None) -> dict[str, list[float]]:
    """CPU seconds of each iteration of ours and of the bare loop, which take turns."""
    data = PromptDataModule([{"prompt": str(i)} for i in range(work.prompts)])
    method = FlowGRPO(
        FreePolicy(), prompts_per_iteration=work.prompts, group_size=work.group, num_steps=work.steps,
        rollout_micro_batch=work.prompts * work.group, updates_per_iteration=work.minibatches, surrogate=Clip(low=CLIP, high=CLIP),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR, fused=True),
    )  # fmt: skip
    turns = Turns(work, profiler)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=SKIPPED + iterations, logger=TensorBoardLogger(logs),
        callbacks=[RewardScoring({"brightness": Brightness()}), turns], limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, data)
    if profiler:
        profiler.disable()
    return turns.seconds


def measure(minibatches: int, iterations: int, logs: Path, profiler: cProfile.Profile | None = None) -> dict[str, float]:
    """Median CPU milliseconds of an iteration by arm."""
    work, each = Work(minibatches), -(-iterations // TURNS)
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "lightning": []}
    for _ in range(TURNS):
        for arm, taken in (beside_bare(work, each, logs, profiler) | {"lightning": under_lightning(work, each, logs)}).items():
            seconds[arm] += taken[SKIPPED:]
    return {arm: 1000 * statistics.median(taken) for arm, taken in seconds.items()}


def under_lightning(work: Work, iterations: int, logs: Path) -> list[float]:
    """CPU seconds of each iteration of the bare loop under Lightning's Trainer."""
    least = UnderLightning(BareLoop(work))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=SKIPPED + iterations + 1, logger=TensorBoardLogger(logs),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(least, Replayed(least.loop))
    return [after - before for before, after in zip(least.seconds, least.seconds[1:])]


def report(found: Mapping[int, Mapping[str, float]]) -> str:
    """A line per number of minibatches, and one for a further minibatch."""
    few, many = min(found), max(found)
    rows = {f"iteration of {n} minibatches": times for n, times in found.items()}
    rows["one more minibatch"] = {arm: (found[many][arm] - found[few][arm]) / (many - few) for arm in found[few]}
    pairs = (("ours", "bare"), ("lightning", "bare"), ("ours", "lightning"))
    lines = [f"{'CPU milliseconds':28}{'ours':>8}{'bare':>8}{'lightning':>11}" + "".join(f"{f'{a} / {b}':>18}" for a, b in pairs)]
    for name, t in rows.items():
        ratios = "".join(f"{t[a] / t[b]:18.2f}" for a, b in pairs)
        lines.append(f"{name:28}{t['ours']:8.2f}{t['bare']:8.2f}{t['lightning']:11.2f}{ratios}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60, help="timed iterations of each loop")
    parser.add_argument("--minibatches", type=int, nargs=2, default=(2, 18), help="two numbers of minibatches of an iteration")
    parser.add_argument("--profile", type=Path, help="write the profile of our iterations (pstats) here")
    args = parser.parse_args(arguments)
    if args.minibatches[0] == args.minibatches[1]:
        parser.error("--minibatches takes two different numbers: their difference gives the cost of one more")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    profiler = cProfile.Profile() if args.profile else None
    with tempfile.TemporaryDirectory() as folder:
        found = {n: measure(n, args.iterations, Path(folder), profiler) for n in sorted(args.minibatches)}
    if profiler:
        profiler.dump_stats(args.profile)
    print(table := report(found))
    return table


if __name__ == "__main__":
    main()
