"""One iteration of a miniature DeepGen beside the loop of its own trainer, on the same weights, draws and latency of the judge.

    python -m benchmarks.deepgen_iteration [--repeats 4] [--latency SECONDS_PER_IMAGE] [--one-backward]

The plain loop is that of DeepGen-RL (deepgenteam/deepgen_rl): every copy of every prompt goes through the language model, once in the
rollout and once more before training; all images of a process are trained at one timestep after the other, each with a forward of the
reference, a backward pass for the policy's loss and one for the divergence (its `--log_component_grad_norm`, which cannot be turned off,
wants the norm of either; `--one-backward` takes one for both); the judge is asked when the rollout is over, and all its answers take half
as long as the rollout. Ours is `RandomStepGRPO` under Lightning's Trainer with the settings of configs/deepgen/flow_grpo.yaml, but for 10
steps of 16 x 16 pixels in place of 50 of 512 x 512. Both compute the same update, which is checked. Prints seconds as
`benchmarks/flow_grpo_iteration.py` does, and the share of our iteration's CPU seconds in the models, backward passes included.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from benchmarks.flow_grpo_iteration import Brightness, PlainLoop, Stopwatch, Trajectories, Turns, copy_weights, median_total, read
from callbacks.reward_scoring import RewardScoring
from datamodules.base import PromptDataModule
from lit_rl.credit.advantage import Advantage
from lit_rl.credit.groups import gdpo_advantages
from lit_rl.losses.flow import FlowKL, gaussian_kl
from lit_rl.losses.policy_gradient import clipped_surrogate, policy_metrics
from lit_rl.losses.step_surrogates import Clip
from lit_rl.methods.flow_grpo import FlowGRPO, RandomStepGRPO
from lit_rl.policies.deepgen import DeepGenPolicy
from lit_rl.samplers.flow import Step, sde_step
from lit_rl.types import Cond, Prompts

PROMPTS, GROUP, STEPS = 4, 8, 10
"""32 images of a process, as in the guide's 256 on 8 GPUs; 6 of the 10 steps are trained."""
CHUNK = 8
"""Images of ours that are decoded and handed to the judge together."""
PAIRS = 32
"""(image, step) pairs of a training forward, those of one timestep in their loop."""
TOLERANCE = 1e-2
"""Of the distance between the arms' weights, relative to the way that they moved."""


def build_policy(folder: Path, **sizes: Any) -> DeepGenPolicy:
    """The demo's transformer, which is trained, behind a language model of about its size, as Qwen2.5-VL-3B is about SD3.5-Medium's."""
    from lit_rl.miniatures.deepgen import build_deepgen

    demo = {"factor": 4, "patch_size": 1, "hidden": 96, "heads": 3, "layers": 4, "language_hidden": 128, "connector_hidden": 96}
    build_deepgen(folder, height=16, width=16, adapter_rank=None, **{**demo, **sizes})
    return DeepGenPolicy(
        str(folder / "sd3"), language_model=str(folder / "language"), checkpoint=str(folder / "checkpoint.pth"), connector_heads=2,
        guidance_scale=1.0, resolution=(16, 16), keep_reference=True,
    )  # fmt: skip


class TheirLoop(PlainLoop):
    """DeepGen-RL's loop. one_backward: the norms of the two parts of the gradient are not asked for."""

    one_backward = False

    def iteration(self) -> None:
        prompts = self.method.ask(self.method.iteration)
        self.sigmas = self.policy.sigmas(self.method.num_steps).float().to(self.method.device)
        watch = Stopwatch()
        with torch.no_grad():
            rollout = self.sample(prompts, torch.arange(len(prompts)))
            watch.lap("rollout")
            scores = self.reward.score(rollout.images, prompts.info)
        watch.lap("score")
        found = gdpo_advantages(scores, prompts.group, weights={"brightness": 1.0}, ddof=1, eps=1e-4).clamp(-5, 5)
        with torch.no_grad():
            rollout.cond = self.encode(prompts.text)  # again, as their loop does
        self.train([rollout], [found.float()])
        watch.lap("train")
        self.watches.append(watch)

    def sample(self, prompts: Prompts, chunk: Tensor) -> Trajectories:
        cond, keys = self.encode(prompts.text), self.method.row_keys(prompts)
        start = self.method.noise([(self.method.seed, "start", self.method.iteration, group) for group in prompts.group.tolist()])
        return self.sampled(start, cond, keys)

    def encode(self, texts: Sequence[str]) -> Cond:
        """Every copy anew, all in one forward."""
        assert isinstance(self.policy, DeepGenPolicy)
        found = self.policy.read(texts, self.policy._pipe.conditioner)
        return {name: found[name] for name in ("prompt_embeds", "pooled")}  # prompts of one length, so nothing fills up

    def train(self, rollout: Sequence[Trajectories], advantages: Sequence[Tensor]) -> None:
        """One update: all images at one timestep after the other."""
        (part,), (advantage,) = rollout, advantages
        assert isinstance(self.method.surrogate, Clip)
        clip = {"clip_low": self.method.surrogate.low, "clip_high": self.method.surrogate.high}
        window, coef = self.method.window(self.method.iteration), self.method.kl.coef
        optimizer, metrics = self.method.optimizer([p for _, p in self.policy.trainable()]), []
        for i in window:
            step, v = self.replayed(part, i)
            losses = clipped_surrogate(step.logprob, part.logprobs[i], advantage, **clip)
            with torch.no_grad(), self.policy.reference():
                reference = self.replayed(part, i)[1]
            divergence = coef * gaussian_kl(v, reference, kind="v_noise_std", noise_std=step.noise_std)
            parts = [losses + divergence] if self.one_backward else [losses, divergence]
            for part_of_it in parts:
                (part_of_it.sum() / (len(advantage) * len(window))).backward(retain_graph=part_of_it is not parts[-1])
            metrics.append({"loss": losses.detach().mean()} | policy_metrics(step.logprob, part.logprobs[i], **clip))
        optimizer.step()
        optimizer.zero_grad()
        read(metrics)

    def replayed(self, part: Trajectories, i: int) -> tuple[Step, Tensor]:
        """The stored step i under the weights that answer now, and its velocity."""
        sigma, sigma_next = (self.sigmas[at].expand(len(part.images)) for at in (i, i + 1))
        v = self.policy.velocity(part.path[i], sigma, part.cond)
        step = sde_step(
            part.path[i], v, sigma=sigma, sigma_next=sigma_next, sigma_max=float(self.sigmas[1]),
            dynamics=self.method.sde.dynamics, noise_level=self.method.sde.noise_level, sample=part.path[i + 1],
        )  # fmt: skip
        return step, v


class Beside(Turns):
    """Ours and their loop in turns; `shares` has the part of each of our iterations' CPU seconds that is spent in the models."""

    def __init__(self, reward: Brightness, latency: float | None, policy: DeepGenPolicy, *, one_backward: bool) -> None:
        super().__init__(reward, [], latency)
        self.one_backward = one_backward
        self.shares: list[float] = []
        self.inside = self.began = 0.0
        self.running = False
        for name in ("velocity", "condition", "picture"):
            setattr(policy, name, partial(self.timed, getattr(policy, name)))

    def timed(self, function: Callable[..., Any], *args: Any) -> Any:
        """The policy's method, whose CPU seconds count in our iterations."""
        started = time.process_time()
        found = function(*args)
        self.inside += (time.process_time() - started) * self.running
        return found

    def on_train_start(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        super().on_train_start(trainer, method)
        assert isinstance(method, FlowGRPO)
        loop = TheirLoop(method, self.reward, PROMPTS * GROUP)
        loop.one_backward, loop.weights = self.one_backward, copy_weights(method)
        self.plain = [loop]
        self.start()

    def start(self) -> None:
        """An iteration of ours begins."""
        self.running, self.inside, self.began = True, 0.0, time.process_time()

    def on_before_backward(self, trainer: L.Trainer, method: L.LightningModule, loss: Tensor) -> None:
        self.backward = time.process_time()

    def on_after_backward(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        self.inside += time.process_time() - self.backward

    def on_train_epoch_end(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        self.shares.append(self.inside / (time.process_time() - self.began))
        self.running = False
        super().on_train_epoch_end(trainer, method)
        self.start()


def measure(policy: DeepGenPolicy, *, repeats: int, latency: float | None, one_backward: bool, logs: Path) -> tuple[Beside, float]:
    """One fit of 1 + `repeats` iterations of both arms, and how far their weights are apart at the end."""
    reward = Brightness()
    data = PromptDataModule([{"prompt": f'the number "{i:04d}"'} for i in range(PROMPTS * (1 + repeats))], shuffle=False)
    method = RandomStepGRPO(
        policy, prompts_per_iteration=PROMPTS, group_size=GROUP, num_steps=STEPS, rollout_micro_batch=CHUNK, train_micro_batch=PAIRS,
        surrogate=Clip(low=1e-2, high=1e-2),  # far enough from 1 that rounding decides nothing
        kl=FlowKL(coef=5e-7, kind="v_noise_std"), advantage=Advantage(kind="gdpo", ddof=1),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    )  # fmt: skip
    turns = Beside(reward, latency, policy, one_backward=one_backward)
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_epochs=1 + repeats, callbacks=[RewardScoring({"brightness": reward}), turns],
        logger=TensorBoardLogger(logs), limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, data)
    return turns, turns.disagreement(method)[0]


def report(turns: Beside, apart: float) -> str:
    """A line per arm, their ratio, and where our time goes."""
    lines = [
        f"{PROMPTS} prompts x {GROUP} images of {STEPS} steps; the judge takes {turns.reward.seconds * 1000:.0f} ms per image",
        f"{'':8} {'encode+rollout':>14} {'wait for scores':>15} {'train':>8} {'total':>8} {'undisturbed':>11}",
    ]
    theirs = turns.plain[0].watches
    for arm, watches in {"ours": turns.watches, "theirs": theirs}.items():
        phases = [statistics.median(watch.seconds[phase] for watch in watches[1:]) for phase in ("rollout", "score", "train")]
        totals = (median_total(watches, "seconds"), median_total(watches, "undisturbed"))
        lines.append(f"{arm:8} " + "{:14.2f} {:15.2f} {:8.2f} {:8.2f} {:11.2f}".format(*phases, *totals))
    clock, undisturbed = (median_total(turns.watches, kind) / median_total(theirs, kind) for kind in ("seconds", "undisturbed"))
    lines.append(f"ratio {clock:.2f}, undisturbed {undisturbed:.2f} (ours / theirs); weights differ by {apart:.1e} of the way moved")
    lines.append(f"{statistics.median(turns.shares[1:]):.0%} of our iteration's CPU seconds are in the models")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, **sizes: Any) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4, help="timed iterations of each arm")
    parser.add_argument("--latency", type=float, help="seconds per image of the judge; default: all images take half of their rollout")
    parser.add_argument("--one-backward", action="store_true", help="their loop does not split its backward pass")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        policy = build_policy(Path(folder) / "model", **sizes)
        given: dict[str, Any] = {"repeats": args.repeats, "latency": args.latency, "one_backward": args.one_backward}
        turns, apart = measure(policy, **given, logs=Path(folder) / "logs")
    table = report(turns, apart)
    print(table)
    if apart > TOLERANCE:
        raise SystemExit(f"the arms did not compute the same update: their weights must agree to {TOLERANCE:g} of the way moved")
    return table


if __name__ == "__main__":
    main()
