"""Exponential moving average of the trainable weights, used for evaluation and export."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import lightning as L
from torch import Tensor

from callbacks.base import RLCallback, check_alone, method_of
from lit_rl.checkpoints.contents import Checkpoint
from lit_rl.errors import ConfigError
from lit_rl.policies.weights.copies import WeightCopy
from lit_rl.policies.weights.decay import ema_decay, ema_is_due
from lit_rl.strategies.checks import check_swaps_reach


class EMA(RLCallback):
    """average <- d average + (1 - d) weights after every optimizer step, d = min((1 + s) / (warmup_steps + s), decay) at step s = 0, 1, ...

    Of the trainable weights only, see `lit_rl.policies.weights.copies.WeightCopy` for what it costs. The checkpoint holds whole tensors and
    continues exactly, under another strategy or world size too; a run that continues from a checkpoint without an average starts one from
    its weights.

    During a supervised warm-up the average just follows the weights, and s counts from the end of the warm-up: pictures of the first
    rollouts then show the policy that is trained, not what it was before it could draw.

    Under DeepSpeed ZeRO-3 small weights must not stay gathered (`stage3_param_persistence_threshold: 0`): the forward would miss the swap.

    Args:
        decay: Largest d. Published: 0.9 with update_interval 8 (Flow-GRPO, DiffusionNFT), 0.9999 for long runs.
        warmup_steps: Length of the decay's own warm-up; 1 = `decay` from the first step on.
        update_interval: Optimizer steps between two updates.
        evaluate: Whether validation, test and predict use the average.
    """

    def __init__(self, decay: float = 0.9999, *, warmup_steps: int = 10, update_interval: int = 1, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"EMA decay={decay} must be in [0, 1): 0 follows the weights, 1 would never move")
        if warmup_steps < 1 or update_interval < 1:
            raise ConfigError(f"EMA warmup_steps={warmup_steps} and update_interval={update_interval} must be at least 1")
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.update_interval = update_interval
        self.evaluate = evaluate
        self.steps = 0
        self._global_step = 0
        self._average: WeightCopy | None = None
        self._restored: dict[str, Tensor] | None = None

    # ------------------------------------------------------------------ life of the average
    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Refuse a second average, and strategies whose forward misses a swap."""
        remedy = "two averages would take each other's weights for those that train; set decay and the rest where the YAML has it"
        check_alone(trainer, EMA, remedy)
        check_swaps_reach(trainer.strategy, who="EMA")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The first moment at which weights are in their final place and restored, under every strategy."""
        self._global_step = trainer.global_step
        self._restore(module)
        if self._average is None:
            self._average = WeightCopy(method_of(module).policy)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int) -> None:
        """Follow the weights after an optimizer step."""
        if trainer.global_step == self._global_step:
            return  # gradients are still being accumulated
        self._global_step = trainer.global_step
        assert self._average is not None
        if getattr(module, "warming_up", False):
            self._average.follow(method_of(module).policy, decay=0.0)
            return
        if ema_is_due(self.steps, interval=self.update_interval):
            decay = ema_decay(self.steps, decay=self.decay, warmup_steps=self.warmup_steps)
            self._average.follow(method_of(module).policy, decay=decay)
        self.steps += 1

    def averaged_weights(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
        """Whole averages by name in `policy.named_parameters()`, on the CPU of the first process, empty elsewhere. Collective."""
        assert self._average is not None, "the average exists from on_train_start on"
        return self._average.whole(method_of(module).policy, keep=trainer.is_global_zero)

    # ------------------------------------------------------------------ swapped in for evaluation
    def swap_in(self, module: L.LightningModule) -> None:
        """The average takes the place of the weights, until `swap_out`; nothing while neither trained nor restored."""
        self._restore(module)
        if self._average is not None:
            self._average.swap_in(method_of(module).policy)

    def swap_out(self, module: L.LightningModule) -> None:
        """The live weights are back, bit for bit."""
        if self._average is not None:
            self._average.swap_out(method_of(module).policy)

    def live(self, module: L.LightningModule) -> AbstractContextManager[None]:
        """Inside it the weights that are trained are in place, in the middle of an evaluation too."""
        return nullcontext() if self._average is None else self._average.aside(method_of(module).policy)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Evaluate the average, where `evaluate` says so."""
        if self.evaluate:
            self.swap_in(module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Continue with the live weights."""
        self.swap_out(module)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Leave the live weights in place."""
        self.swap_out(module)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Do the same as in validation."""
        self.on_validation_start(trainer, module)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Do the same as in validation."""
        self.swap_out(module)

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Do the same as in validation."""
        self.on_validation_start(trainer, module)

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Do the same as in validation."""
        self.swap_out(module)

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        """In the first process's state, which is the one that strategies write (ZeRO-3 writes all of them)."""
        if self._average is not None:
            checkpoint["ema"] = {"steps": self.steps, "weights": self.averaged_weights(trainer, module)}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        """Keep the stored average until the weights are in their place."""
        if "ema" in checkpoint:
            self.steps, self._restored = checkpoint["ema"]["steps"], checkpoint["ema"]["weights"]

    def _restore(self, module: L.LightningModule) -> None:
        saved, self._restored = self._restored, None
        if saved is not None:
            self._average = WeightCopy.restored(method_of(module).policy, saved, what="average")
