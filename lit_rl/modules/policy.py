"""What methods on any kind of model share: the policy's life, and evaluation by the same rewards as training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_rl.checkpoints.options import options_of
from lit_rl.errors import ConfigError
from lit_rl.modules.base import LitRL
from lit_rl.policies.base import Policy
from lit_rl.policies.trained import TrainedPolicy
from lit_rl.ranks import gather_objects
from lit_rl.rewards.base import RewardError
from lit_rl.strategies.checks import check_experts_reached
from lit_rl.strategies.fsdp2 import FSDP2Strategy
from lit_rl.types import Info, Prompts, Rollout

R = TypeVar("R", bound=Rollout)

NAMED = 5
"""Prompts that a warning names."""


def named(everyone: Sequence[tuple[list[str], int, int]]) -> str:
    """Prompts and how often each of them occurs, the first few."""
    counts = Counter(name for names, _, _ in everyone for name in names)
    listed = [f"{name!r}" + (f" ({n} times)" if n > 1 else "") for name, n in list(counts.items())[:NAMED]]
    return ", ".join(listed) + (f" and {len(counts) - NAMED} more prompts" if len(counts) > NAMED else "")


class Shardable(Protocol):
    """A model whose networks are cut into shards, block by block."""

    def networks(self) -> Sequence[nn.Module]: ...

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]: ...


class LitPolicy(LitRL[R]):
    """Base of the methods on one model. Prompts with a `data_source` are also evaluated source by source."""

    policy: Policy
    drops = False
    """Whether dropout, that of the model's settings and that of adapters, is active while the policy trains."""

    def __init__(self, policy: Policy, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.policy = policy
        self.evaluated: list[Prompts] = []
        self.non_finite = 0  # samples of the last rollout, over all processes

    def stored_options(self) -> dict[str, Any]:
        return super().stored_options() | options_of(self.policy, "model.policy")

    # ------------------------------------------------------------------ the policy's life
    def models(self) -> Sequence[Shardable]:
        """Everything with trained weights: the policy, and what a method has beside it."""
        return [self.policy]

    def networks(self) -> Sequence[nn.Module]:
        """Every network with trained weights, each cut into shards as a whole."""
        return [network for model in self.models() for network in model.networks()]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.policy.load()
        if isinstance(self.policy, TrainedPolicy):
            self.policy.drops = self.drops
            if self.policy.lora and self.policy.lora.dropout and not self.drops and stage == "fit":
                rank_zero_info(
                    f"model.policy.lora.dropout={self.policy.lora.dropout:g} is not active in {type(self).__name__}, as no dropout is: the "
                    "policy that trains must be the one that its reference and its old log-probabilities are of"
                )
        self.policy.train()  # from_pretrained leaves it in evaluation mode
        if stage == "fit":
            trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
            rank_zero_info(f"Trained: {trained:,} of {sum(p.numel() for p in self.policy.parameters()):,} parameters of the policy")

    def configure_model(self) -> None:
        """FSDP2: shard each block, then the network. Other strategies need nothing here."""
        strategy = self.trainer.strategy
        for network in self.networks():
            check_experts_reached(strategy, network)
        if isinstance(strategy, FSDP2Strategy):
            for model in self.models():
                for network in model.networks():
                    strategy.shard(network, model.blocks(network))

    def finish_warmup(self) -> None:
        super().finish_warmup()
        self.policy.refresh_reference()

    def check_geometry(self) -> None:
        super().check_geometry()
        precision = str(self.trainer.precision)
        if precision in ("16-true", "bf16-true") or precision.startswith("transformer-engine"):
            half = "float16" if precision == "16-true" else "bfloat16"
            raise ConfigError(
                f"trainer.precision={precision} keeps what is trained in 16 bits, where an optimizer's small steps round to nothing: set "
                f"it to {'bf16' if half == 'bfloat16' else '16'}-mixed, which computes in 16 bits, and model.policy.dtype to {half} for "
                "frozen weights in 16 bits"
            )
        half, dtype = str(self.trainer.precision).removesuffix("-mixed"), getattr(self.policy, "dtype", torch.float32)
        if {"16": torch.bfloat16, "bf16": torch.float16}.get(half) == dtype:
            raise ConfigError(
                f"trainer.precision={self.trainer.precision} and model.policy.dtype={str(dtype).removeprefix('torch.')} are different "
                "16-bit formats, between which every layer would convert: set both to float16 (16-mixed) or to bfloat16 (bf16-mixed)"
            )

    # ------------------------------------------------------------------ evaluation
    def on_validation_epoch_end(self) -> None:
        rewards, batches = self.scores().gather(), self.evaluated
        self.evaluated = []
        rewards = self.judged(rewards, batches)
        prompts = Prompts(group=torch.cat([b.group.cpu() for b in batches]), info=[row for b in batches for row in b.info])
        real = prompts.group >= 0  # the rest fills up the last batch
        here = [(row.get("data_source"), i) for i, row in enumerate(prompts.info) if real[i]]
        sources = sorted({str(source) for rank in gather_objects([s for s, _ in here]) for source in rank if source is not None})
        for name, values in rewards.items():
            highest = self.scores().highest.get(name)
            self._log_scores(f"val/{name}", values[real].double(), highest=highest, bar=True)
            for source in sources:
                rows = torch.tensor([i for s, i in here if str(s) == source], dtype=torch.long)
                self._log_scores(f"val/{name}/{source}", values[rows].double(), highest=highest, bar=False)
        self.notify("on_evaluation_end", prompts, rewards)

    on_test_epoch_end = on_validation_epoch_end

    def judged(self, rewards: dict[str, Tensor], batches: Sequence[Prompts]) -> dict[str, Tensor]:
        """Rewards of the evaluated samples, NaN where there is nothing to score."""
        return rewards

    # ------------------------------------------------------------------ samples that are not finite
    def leave_out(self, finite: Tensor, rewards: Mapping[str, Tensor], info: Sequence[Info], *, where: str, what: str) -> int:
        """Count the samples here that are not finite over all processes, and name their prompts in a warning. Collective.

        finite: Bool "B". Raises RewardError on all processes if they and those without a score are more than the run can do without.
        """
        lost, weights = ~finite.cpu(), self.scorer.weights if self.scorer is not None else {}
        scored = [values.isfinite() for name, values in rewards.items() if weights.get(name)]
        failed = torch.stack([lost, *(~known.cpu() for known in scored)]).any(0)
        told = [str(info[i]["prompt"]) for i in lost.nonzero()[:, 0].tolist()]
        everyone = gather_objects((told, int(failed.sum()), len(finite)))
        count, total = sum(len(names) for names, _, _ in everyone), sum(size for _, _, size in everyone)
        if not count:
            return 0
        sentence = f"{where}: {count} of {total} samples are not finite ({what}): {named(everyone)}"
        allowed = total - 1 if self.scorer is None else self.scorer.max_failed_fraction * total
        if sum(lacking for _, lacking, _ in everyone) > allowed:
            raise RewardError(
                f"{sentence}. They have no score, and more samples have none than "
                + (f"max_failed_fraction={self.scorer.max_failed_fraction} allows" if self.scorer else "can be left out")
                + ". Look at the precision first: a VAE or text encoder may overflow in float16 (model.policy.vae_dtype, dtype, "
                "trainer.precision); continue with --ckpt_path last"
            )
        rank_zero_warn(f"{sentence}. They have no score and no part in the loss")
        return count

    def _log_scores(self, name: str, values: torch.Tensor, *, highest: float | None, bar: bool) -> None:
        """The mean over all processes and, of a score that has a highest value, the share of samples that reach it."""
        everywhere = torch.cat(gather_objects(values))
        scored = everywhere[~everywhere.isnan()]
        full = {} if highest is None else {f"{name}_perfect": float((scored >= highest - 1e-6).double().mean())}
        self.report({name: float(scored.mean())} | full, bar=(name,) if bar else ())
