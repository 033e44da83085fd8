"""The policy that samples and that the new one is compared with: a copy of the trainable weights that follows them slowly."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, runtime_checkable

import lightning as L
from torch import Tensor

from callbacks.base import Method, RLCallback, check_alone, method_of
from lit_rl.checkpoints.contents import Checkpoint
from lit_rl.errors import ConfigError
from lit_rl.policies.weights.copies import WeightCopy
from lit_rl.policies.weights.decay import DECAY_TYPES, OLD_POLICY_DECAYS, OldPolicyDecay, ramp_decay
from lit_rl.strategies.checks import check_swaps_reach


@runtime_checkable
class HasOldPolicy(Protocol):
    """A method that samples with an old policy."""

    old_policy: OldPolicySync | None


class OldPolicySync(RLCallback):
    """old <- d old + (1 - d) weights before every rollout, d = decay(s) after s optimizer steps of reinforcement learning.

    It copies the trainable weights only (LoRA, adapters or all); `lit_rl.policies.weights.copies.WeightCopy` tells the cost. It starts as
    the weights of the first rollout, after a supervised warm-up. The checkpoint holds whole tensors and continues exactly, under another
    strategy or world size too; a run that continues from a checkpoint without an old policy starts one from its weights.

    Args:
        decay: A name of `lit_rl.policies.weights.decay.OLD_POLICY_DECAYS`: copy (d = 0, on-policy), slow (0.001 s, at most 0.5), late (0
            for 75 steps, then rising to 0.999), frozen (d = 1, never changes), fast, moderate, steep; 0, 1, 2 mean frozen, slow, late; or
            `{start, value, slope, end}`: `value` before step `start`, then min(value + slope (s - start), end).
        every: Update before every rollout (DiffusionNFT), or after every optimizer step.
    """

    def __init__(
        self, decay: OldPolicyDecay | Literal[0, 1, 2] | dict[str, float] = "copy", *, every: Literal["rollout", "step"] = "rollout"
    ) -> None:
        self.ramp = decay if isinstance(decay, dict) else OLD_POLICY_DECAYS[DECAY_TYPES[decay] if isinstance(decay, int) else decay]
        unknown = self.ramp.keys() - {"start", "value", "slope", "end"}
        if unknown:
            raise ConfigError(f"OldPolicySync decay={self.ramp} has {', '.join(sorted(unknown))}; it takes start, value, slope and end")
        for name in ("value", "end"):
            if not 0 <= self.ramp.get(name, 0.0) <= 1:
                raise ConfigError(f"OldPolicySync decay.{name}={self.ramp[name]} must be in [0, 1]: 0 copies the weights, 1 never moves")
        self.every = every
        self._global_step = 0
        self._synced_at = -1
        self._copy: WeightCopy | None = None
        self._restored: dict[str, Tensor] | None = None

    # ------------------------------------------------------------------ what the method asks
    @property
    def is_current(self) -> bool:
        """True while no optimizer step has come after the weights were copied."""
        return self._synced_at == self._trainer.global_step

    def acting(self) -> AbstractContextManager[None]:
        """Inside it the old policy answers; see `WeightCopy.applied`."""
        if self.is_current:
            return nullcontext()
        assert self._copy is not None, "the old policy exists from the first rollout on"
        return self._copy.applied(self._module.policy)

    # ------------------------------------------------------------------ life of the copy
    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Give the method its old policy. Raises ConfigError for a method without one."""
        if not isinstance(module, HasOldPolicy):
            raise ConfigError(f"OldPolicySync has no part in {type(module).__name__}: remove it from trainer.callbacks")
        check_alone(trainer, OldPolicySync, "the method samples with one old policy; set decay where the YAML has it")
        check_swaps_reach(trainer.strategy, who="OldPolicySync")
        module.old_policy = self
        self._trainer, self._module = trainer, method_of(module)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The first moment at which weights are in their final place and restored, under every strategy."""
        self._global_step = trainer.global_step
        saved, self._restored = self._restored, None
        if saved is not None:
            self._copy = WeightCopy.restored(method_of(module).policy, saved, what="old policy")

    def on_phase_start(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """Update before a rollout."""
        if name != "rollout":
            return
        if self._copy is None:
            self._copy, self._synced_at = WeightCopy(module.policy), trainer.global_step
        elif self.every == "rollout":
            self._follow(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int) -> None:
        """Update after an optimizer step, where `every` says so."""
        stepped, self._global_step = trainer.global_step != self._global_step, trainer.global_step
        if stepped and self.every == "step" and self._copy is not None:
            self._follow(trainer, method_of(module))

    def _follow(self, trainer: L.Trainer, module: Method) -> None:
        assert self._copy is not None
        decay = ramp_decay(trainer.global_step - module.warmup_steps, **self.ramp)
        self._copy.follow(module.policy, decay=decay)
        if decay == 0:
            self._synced_at = trainer.global_step

    # ------------------------------------------------------------------ checkpoints
    def old_weights(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
        """Whole tensors by name in `policy.named_parameters()`, on the CPU of the first process, empty elsewhere. Collective."""
        assert self._copy is not None, "the old policy exists from the first rollout on"
        return self._copy.whole(method_of(module).policy, keep=trainer.is_global_zero)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        """In the first process's state, which is the one that strategies write (ZeRO-3 writes all of them)."""
        if self._copy is not None:
            checkpoint["old_policy"] = {"synced_at": self._synced_at, "weights": self.old_weights(trainer, module)}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        """Keep the stored old policy until the weights are in their place."""
        if "old_policy" in checkpoint:
            self._synced_at, self._restored = checkpoint["old_policy"]["synced_at"], checkpoint["old_policy"]["weights"]


class EMAOldPolicy(OldPolicySync):
    """The old policy as a moving average: updated after every optimizer step, d = min(0.001 s, 0.5) (Flow-Factory's off-policy NFT)."""

    def __init__(self, decay: OldPolicyDecay | Literal[0, 1, 2] | dict[str, float] = "slow") -> None:
        super().__init__(decay, every="step")
