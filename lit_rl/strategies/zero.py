"""DeepSpeed ZeRO with checkpoints that hold the weights a module names, and appear whole or not at all."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from lit_rl.checkpoints.contents import Checkpoint
from lit_rl.checkpoints.layout import check_layout, checkpoint_keys, checkpoint_shapes, checkpointed
from lit_rl.checkpoints.restricted import deepspeed_reads_plain_files
from lit_rl.errors import ConfigError
from lit_rl.policies.weights.shards import gathered
from lit_rl.strategies.deepspeed_json import read_json
from lit_rl.strategies.folders import check_intact, check_moments, refuse_nan, replaced

LAYOUT_FILE = "weights.json"
"""In a DeepSpeed checkpoint: shape of every weight by name."""

OPTIMIZER_FILE = "optimizer.json"
"""In a DeepSpeed checkpoint: `checkpoint["optimizer"]`, which DeepSpeed itself gives back only after it has restored the moments."""


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO. Stage 1 shards optimizer states, stage 2 gradients too, stage 3 weights too.

    Three defaults differ from DeepSpeed's: in stage 3 small parameters do not stay gathered between forwards, because edits of the shards
    (weight averages, references) would not reach them; nor are parameters gathered ahead where blocks with frozen ones are recomputed; and
    an offloaded optimizer may be any, not only `DeepSpeedCPUAdam`, which is faster there but compiles itself at first use. Frozen weights
    that the policy reads from its pretrained folder are not saved.

    Args:
        stage: 1, 2 or 3.
        config: DeepSpeed's own JSON, as a file or a mapping; replaces all other arguments. What the run decides (batch sizes, precision,
            clipping, optimizer, schedule) and values "auto" are left out of it, so that it fits any number of processes.
        kwargs: See `lightning.pytorch.strategies.DeepSpeedStrategy` (offload_optimizer, offload_parameters, overlap_comm, ...).
    """

    def __init__(self, *, stage: Literal[1, 2, 3] = 2, config: str | dict[str, object] | None = None, **kwargs: Any) -> None:
        own = None if config is None else {"zero_allow_untested_optimizer": True, **read_json(config)}
        super().__init__(stage=stage, config=own, logging_batch_size_per_gpu=1, **kwargs)
        assert isinstance(self.config, dict)
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        zero = self.config.setdefault("zero_optimization", {})
        if zero.get("stage") == 3:
            zero.setdefault("stage3_param_persistence_threshold", 0)

    def setup(self, trainer: L.Trainer) -> None:
        """Let `lit_rl.policies.weights.shards.reshard` in: in stage 3 weights that are used again soon stay gathered between forwards."""
        self._init_config_if_needed()
        assert isinstance(self.config, dict) and trainer.lightning_module is not None
        if self.zero_stage_3 and _recomputes_frozen(trainer.lightning_module):
            self.config["zero_optimization"].setdefault("stage3_prefetch_bucket_size", 0)
        self.config["gradient_accumulation_steps"] = trainer.accumulate_grad_batches  # the method may have set it
        super().setup(trainer)
        if self.zero_stage_3:
            optimizer = self.deepspeed_engine.optimizer
            offload = getattr(optimizer, "parameter_offload", optimizer)  # without an optimizer to train with it is that itself
            for network in (network for model in checkpointed(self.lightning_module).models() for network in model.networks()):
                network.reshard = offload.partition_all_parameters

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: object, **kwargs: object) -> Tensor:
        """Lightning has divided the loss by `accumulate_grad_batches`; DeepSpeed would again, and clip at a multiple of what was asked."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint: Checkpoint, filepath: str | Path, storage_options: object | None = None) -> None:
        """Write DeepSpeed's shards into a folder that appears whole."""
        module = self._module()
        keys = checkpoint_keys(checkpointed(self.lightning_module))
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        self.exclude_frozen_parameters = not frozen <= keys  # DeepSpeed saves all frozen ones or none
        if self.exclude_frozen_parameters:
            checkpoint["frozen"] = {name: w if self.is_global_zero else None for name, w in gathered(module, frozen & keys)}
        with replaced(self, filepath) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)
            if self.is_global_zero:
                (folder / LAYOUT_FILE).write_text(json.dumps(checkpoint_shapes(checkpointed(self.lightning_module))))
                (folder / OPTIMIZER_FILE).write_text(json.dumps(checkpoint.get("optimizer", {}), default=str))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> Checkpoint:
        """Read DeepSpeed's shards, after a look at their layout and contents."""
        path = Path(checkpoint_path)
        if not (path / LAYOUT_FILE).is_file():
            kind = "a single file" if path.is_file() else "no folder of DeepSpeed's shards"
            raise ConfigError(
                f"--ckpt_path {path} is {kind}, and DeepSpeed continues from its own folders only: continue with the configs/base/*.yaml "
                "it was written under"
            )
        check_intact(self, path)
        check_layout(json.loads((path / LAYOUT_FILE).read_text()), checkpoint_shapes(checkpointed(self.lightning_module)))
        if (path / OPTIMIZER_FILE).is_file():
            check_moments(self, json.loads((path / OPTIMIZER_FILE).read_text()))
        with nullcontext() if weights_only is False else deepspeed_reads_plain_files():
            checkpoint = super().load_checkpoint(path, weights_only)
        self._load_frozen(checkpoint.pop("frozen", {}))
        keys = checkpoint_keys(checkpointed(self.lightning_module))
        refuse_nan(self, path, {name: weight for name, weight in self._module().named_parameters() if name in keys})
        return checkpoint

    @torch.no_grad()
    def _load_frozen(self, weights: dict[str, Tensor | None]) -> None:
        """In stage 3 each process has read what it wrote itself, and the first one's weights are cut for all."""
        import deepspeed

        parameters = dict(self._module().named_parameters())
        for name, weight in weights.items():
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                if weight is not None:
                    parameters[name].copy_(weight)

    def _module(self) -> L.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def _recomputes_frozen(module: L.LightningModule) -> bool:
    """A network with frozen weights computes its blocks again in the backward pass.

    DeepSpeed (0.19.8) then lets go of frozen weights that it has gathered ahead and still counts as on their way: the next use ends with
    "already in registry". It can happen where a network is larger than `stage3_max_reuse_distance`, 1e9 numbers.
    """
    models = checkpointed(module).models()
    recomputed = (network for model in models if getattr(model, "gradient_checkpointing", False) for network in model.networks())
    return any(not parameter.requires_grad for network in recomputed for parameter in network.parameters())
