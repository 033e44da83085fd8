"""Supervised examples in a run of reinforcement learning: a warm-up before the first rollout, and a share of every optimizer step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
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
from lit_rl.replay.sources import ExampleSource, source_of
from lit_rl.seeding import Key, generator
from lit_rl.types import Examples, take_rows


class Imitating(Protocol):
    """A flow method as the examples' loss needs it."""

    policy: FlowPolicy
    seed: int

    @property
    def device(self) -> torch.device: ...
    def noise(self, keys: Sequence[tuple[Key, ...]]) -> Tensor: ...


@dataclass(kw_only=True)
class Supervised:
    """Examples to imitate, from the datamodule's `examples`.

    Args:
        warmup_steps: Optimizer steps on examples alone before the first rollout; they are epoch 0. 0 = no warm-up.
        batch_size: Examples per optimizer step, over all processes. Micro-batches and processes share them as evenly as they go.
        warmup_lr: Peak learning rate of the warm-up, see `warmup_factor`; None = the optimizer's own.
        timesteps: Distribution of t in flow matching: uniform, or SD3's logit-normal (arXiv 2403.03206, eq. 19).
        coef: Weight of the supervised loss beside the policy's, in every optimizer step after the warm-up; 0 = none.
    """

    warmup_steps: int = 0
    batch_size: int = 32
    warmup_lr: float | None = None
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    coef: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.coef < 0:
            raise ConfigError(f"model.supervised: warmup_steps={self.warmup_steps} and coef={self.coef} must not be negative")
        if self.batch_size < 1:
            raise ConfigError(f"model.supervised.batch_size={self.batch_size} must be at least 1")
        if not self.warmup_steps and not self.coef:
            raise ConfigError("model.supervised does nothing: set warmup_steps for a warm-up, or coef for a share of every optimizer step")
        self._told = set[str]()

    def source(self, data: object) -> ExampleSource:
        """A datamodule that has examples. Raises ConfigError for any other."""
        return source_of(data, ExampleSource, who="model.supervised", use="datamodules.rendered_text.RenderedText or Inpainting")

    def micro_batch(self, data: ExampleSource, step: int, part: int, parts: int) -> Examples:
        """Micro-batch `part` of the `parts` of an optimizer step; one example of weight 0 where there are more parts than examples.

        step: Optimizer step, which decides what is drawn, whatever the number of parts.
        """
        rows = torch.arange(self.batch_size).tensor_split(parts)[part]
        first = int(rows[0]) if len(rows) else 0
        info, images = data.examples(step, self.batch_size, slice(first, first + max(1, len(rows))))
        weights = torch.full((max(1, len(rows)),), 1 / self.batch_size if len(rows) else 0.0)
        return Examples(info=info, images=images, step=step, first=first, weights=weights)

    def losses(self, method: Imitating, batch: Examples) -> Tensor:
        """Flow matching |v - (eps - x0)|^2 on the examples (arXiv 2210.02747), Float "B"; 0 for an example that is not finite."""
        x0 = method.policy.encode_images(batch.images, batch.info)
        keys = [(method.seed, "warmup", batch.step, batch.first + i) for i in range(len(x0))]
        draws = torch.stack([torch.randn(2, generator=generator(*key, "t")) for key in keys]).to(method.device)
        t = torch.special.ndtr(draws[:, 0]) if self.timesteps == "uniform" else draws[:, 0].sigmoid()
        noise = method.noise(keys)
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


def warmup_factor(step: int, *, steps: int) -> float:
    """Share of the peak learning rate at a step of a supervised warm-up: a straight rise over its first 5 %, times half a cosine to 0."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * (1 + math.cos(math.pi * step / steps)) / 2
