"""Supervised examples in a run of reinforcement learning: a warm-up before the first rollout, and a share of every optimizer step."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.flow import flow_matching_loss
from lit_rl.losses.masked import finite_rows, harmless
from lit_rl.modules.conditions import conditioned
from lit_rl.modules.evaluation import named
from lit_rl.policies.base import FlowPolicy
from lit_rl.replay.sources import ExampleSource, PictureSource, source_of
from lit_rl.samplers.schedules import shift_sigmas
from lit_rl.seeding import generator, normal
from lit_rl.types import Examples, take_rows


class Imitating(Protocol):
    """A flow method as the examples' loss needs it."""

    policy: FlowPolicy
    seed: int

    @property
    def device(self) -> torch.device: ...


@dataclass(kw_only=True)
class Supervised:
    """Examples to imitate. Pictures of one size are a batch; pictures of various sizes take a forward each.

    Args:
        data: Where they are, e.g. `datamodules.picture_sources.PictureSources`; default: the run's datamodule.
        warmup_steps: Optimizer steps on examples alone before the first rollout; they are epoch 0. 0 = no warm-up.
        batch_size: Examples per optimizer step, over all processes. Micro-batches and processes share them as evenly as they go.
        warmup_lr: Peak learning rate of the warm-up, see `warmup_factor`; None = the optimizer's own.
        timesteps: Distribution of t in flow matching: uniform, or SD3's logit-normal (arXiv 2403.03206, eq. 19).
        shift: Of t, s t / (1 + (s - 1) t): above 1 towards noise; 3 is that of SD3's training schedule.
        coef: Weight c of the supervised loss beside the policy's, in every optimizer step after the warm-up; 0 = none.
        convex: The policy's loss, divergence included, weighs 1 - c: (1 - c) RL + c SFT.
        every: The supervised loss takes part in every so-manieth iteration, from the first one on; in the others RL weighs 1.
    """

    data: PictureSource | None = None
    warmup_steps: int = 0
    batch_size: int = 32
    warmup_lr: float | None = None
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    shift: float = 1.0
    coef: float = 0.0
    convex: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.coef < 0:
            raise ConfigError(f"model.supervised: warmup_steps={self.warmup_steps} and coef={self.coef} must not be negative")
        if self.batch_size < 1:
            raise ConfigError(f"model.supervised.batch_size={self.batch_size} must be at least 1")
        if self.convex and self.coef > 1:
            raise ConfigError(f"model.supervised.coef={self.coef} must be in [0, 1] with convex: the policy's loss weighs 1 - coef")
        if self.every < 1 or self.shift <= 0:
            raise ConfigError(f"model.supervised: every={self.every} must be at least 1, shift={self.shift} above 0")
        if not self.warmup_steps and not self.coef:
            raise ConfigError("model.supervised does nothing: set warmup_steps for a warm-up, or coef for a share of every optimizer step")
        self._told = set[str]()

    def takes_part(self, iteration: int) -> bool:
        """The supervised loss is in the optimizer steps of this iteration."""
        return self.coef > 0 and iteration % self.every == 0

    def source(self, data: object) -> PictureSource:
        """`data`, or the datamodule if it has examples. Raises ConfigError for any other."""
        if self.data is not None:
            return self.data
        return source_of(data, ExampleSource, who="model.supervised", use="datamodules.rendered_text.RenderedText or Inpainting")

    def check(self, policy: FlowPolicy) -> None:
        """Raise ConfigError where the pictures have various sizes and the policy's latents have one."""
        if getattr(self.data, "various_sizes", False) and not policy.any_size:
            raise ConfigError(
                f"model.supervised.data gives pictures of various sizes, and {type(policy).__name__} takes those of its resolution alone: "
                "give it the one size of model.policy.resolution"
            )

    def micro_batch(self, data: PictureSource, step: int, part: int, parts: int) -> Examples:
        """Micro-batch `part` of the `parts` of an optimizer step, as long as every other; what is another's here fills up with weight 0.

        step: Optimizer step, which decides what is drawn, whatever the number of parts.
        """
        rows, most = torch.arange(self.batch_size).tensor_split(parts)[part], -(-self.batch_size // parts)
        first = min(int(rows[0]), self.batch_size - most) if len(rows) else 0
        here = torch.arange(first, first + most)
        info, images = data.examples(step, self.batch_size, slice(first, first + most))
        weights = torch.isin(here, rows) / self.batch_size
        return Examples(info=info, images=images, step=step, first=first, weights=weights)

    def losses(self, method: Imitating, batch: Examples) -> Tensor:
        """Flow matching |v - (eps - x0)|^2 on the examples (arXiv 2210.02747), Float "B"; 0 for an example that is not finite."""
        if isinstance(batch.images, Tensor):
            return self._losses(method, batch)
        places = range(len(batch.images))
        return torch.cat([self._losses(method, batch.one(i)) for i in places])  # as many forwards on every process

    def _losses(self, method: Imitating, batch: Examples) -> Tensor:
        assert isinstance(batch.images, Tensor)
        x0 = method.policy.encode_images(batch.images, batch.info)
        keys = [(method.seed, "warmup", batch.step, batch.first + i) for i in range(len(x0))]
        draws = torch.stack([torch.randn(2, generator=generator(*key, "t")) for key in keys]).to(method.device)
        t = torch.special.ndtr(draws[:, 0]) if self.timesteps == "uniform" else draws[:, 0].sigmoid()
        t = shift_sigmas(t, shift=self.shift)
        noise = normal(keys, x0.shape[1:], method.device)
        cond, rows = conditioned(method.policy, batch.info, method.device)
        given = take_rows(cond, rows)
        finite = torch.stack([finite_rows(value) for value in (x0, *given.values()) if value.is_floating_point()]).all(0)
        self._tell(batch, finite)
        x0, given = harmless(x0, finite), {name: harmless(value, finite) for name, value in given.items()}
        at = t.view(-1, *[1] * (x0.ndim - 1))
        v = method.policy.velocity((1 - at) * x0 + at * noise, t, given)
        return torch.where(finite, flow_matching_loss(v, x0, noise), 0.0)

    def _tell(self, batch: Examples, finite: Tensor) -> None:
        """Warn once of each prompt whose example is not finite: nothing is learned from it."""
        lost = {str(batch.info[i]["prompt"]) for i in (~finite).nonzero()[:, 0].tolist()} - self._told
        self._told |= lost
        if lost:
            warnings.warn(
                f"warm-up: examples are not finite (image latents or condition) and are left out: {named(sorted(lost))}",
                stacklevel=3,
            )


def policy_share(supervised: Supervised | None, iteration: int) -> float:
    """Weight of the policy's loss in an iteration: 1 - coef where it is mixed with that of examples, else 1."""
    mixed = supervised is not None and supervised.convex and supervised.takes_part(iteration)
    return 1 - supervised.coef if supervised and mixed else 1.0


def warmup_factor(step: int, *, steps: int) -> float:
    """Share of the peak learning rate at a step of a supervised warm-up: a straight rise over its first 5 %, times half a cosine to 0."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * (1 + math.cos(math.pi * step / steps)) / 2
