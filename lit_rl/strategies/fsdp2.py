"""FSDP2 with checkpoints that hold the weights a module names, and appear whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rl.checkpoints.contents import Checkpoint, check_contents
from lit_rl.checkpoints.files import refuse_damaged, what_is_wrong
from lit_rl.checkpoints.layout import check_layout, checkpoint_keys, checkpoint_shapes, checkpointed
from lit_rl.checkpoints.restricted import load_file, load_shards, stored_shapes
from lit_rl.errors import ConfigError
from lit_rl.policies.weights.shards import reshard, whole
from lit_rl.strategies.folders import check_intact, check_moments, refuse_nan, replaced

META = "meta.pt"
"""File beside the shards of a checkpoint, with everything in it that is no shard."""


K, V = TypeVar("K"), TypeVar("V")


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2: weights, gradients and optimizer states in shards over all processes of all nodes.

    Lightning's own class means something else by its defaults (tensor parallelism within a node, which no policy here has).

    Args:
        save_distributed_checkpoint: A folder into which every process writes its shards; False gathers one file on the first process.
            Either continues on another number of processes.
        gather_dtype: Precision in which the weights of a block travel and are computed with; None is that of the weights themselves. With
            trainer.precision=bf16-mixed, "bfloat16" halves the traffic of a full fine-tune. Gradients are summed in float32.
        kwargs: See `lightning.pytorch.strategies.ModelParallelStrategy` (process_group_backend, timeout).
    """

    def __init__(
        self,
        *,
        save_distributed_checkpoint: bool = True,
        gather_dtype: Literal["bfloat16", "float16"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)
        self.saves_shards = save_distributed_checkpoint
        self.gather_dtype: torch.dtype | None = getattr(torch, gather_dtype) if gather_dtype else None

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1

    def shard(self, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Cut each block, then what is left of the network. Once."""
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if isinstance(network, FSDPModule):
            return
        # Inputs keep their precision: a timestep of 999 is 1000 in bfloat16.
        reduce_dtype = torch.float32 if self.gather_dtype else None
        precision = MixedPrecisionPolicy(param_dtype=self.gather_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        for module in (*blocks, network):
            fully_shard(module, mesh=self.device_mesh["data_parallel"], mp_policy=precision)

    # ------------------------------------------------------------------ saving
    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Shards; or the whole tensors, on the first process only. Nothing but what goes into the file is gathered."""
        weights = self._kept_weights()
        if self.saves_shards:
            return weights
        gathered_here: dict[str, Tensor] = {}
        for name, weight in weights.items():
            tensor = whole(weight)
            if self.is_global_zero:
                gathered_here[name] = tensor
        return gathered_here

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Shards by name; or the whole state as `torch.optim` numbers it, so that the file is one of an unsharded run."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        assert self.model is not None
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        options = StateDictOptions(full_state_dict=not self.saves_shards, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, plain, options=options)
        if self.saves_shards or not self.is_global_zero:
            return state
        return _renamed(state, {name: i for i, name in enumerate(_names(self.model, plain))})

    def save_checkpoint(self, checkpoint: Checkpoint, filepath: str | Path, storage_options: object | None = None) -> None:
        """Write a folder of shards that appears whole, or one file."""
        if not self.saves_shards:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)  # the parent would remove a folder of shards first
            return
        with replaced(self, filepath) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)

    # ------------------------------------------------------------------ loading
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> Checkpoint:
        """Read a folder of shards, or a file of an unsharded run."""
        path = Path(self.broadcast(checkpoint_path))
        trusted = weights_only is False
        if (path / META).is_file():
            check_intact(self, path)
            return self._load_shards(path, trusted)
        if path.is_dir():
            raise ConfigError(f"--ckpt_path {path} is a folder of DeepSpeed's shards: continue with configs/base/deepspeed_*.yaml")
        return self._load_file(path, trusted)

    def _load_shards(self, path: Path, trusted: bool) -> Checkpoint:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        check_layout(stored_shapes(path), checkpoint_shapes(checkpointed(self.lightning_module)))
        checkpoint = load_file(path / META, trusted=trusted)
        if not isinstance(checkpoint, dict):
            raise ConfigError(f"--ckpt_path {path}: its {META} holds no dict; it is damaged, use an earlier one")
        check_moments(self, checkpoint.get("optimizer", {}))
        assert self.model is not None
        weights = self._kept_weights()
        load_shards({"state_dict": weights}, path, trusted=trusted)
        refuse_nan(self, path, weights)
        self.model.load_state_dict(weights, strict=False)
        for i, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
            load_shards(state, path, trusted=trusted)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[f"optimizer_{i}"])
        return checkpoint

    def _load_file(self, path: Path, trusted: bool) -> Checkpoint:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

        refuse_damaged(path, what_is_wrong(path))
        checkpoint = check_contents(load_file(path, trusted=trusted, mmap=True), path)
        check_layout(
            {name: weight.shape for name, weight in checkpoint["state_dict"].items()},
            checkpoint_shapes(checkpointed(self.lightning_module)),
        )
        check_moments(self, checkpoint.get("optimizer", {}))
        assert self.model is not None
        reshard(self.model)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", [])):
            named = _renamed(state, dict(enumerate(_names(self.model, optimizer))))
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=options)
        return checkpoint

    def _kept_weights(self) -> dict[str, Tensor]:
        assert self.model is not None
        reshard(self.model)
        keys = checkpoint_keys(checkpointed(self.lightning_module))
        return {name: weight for name, weight in self.model.state_dict().items() if name in keys}


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the parameters in the order in which `torch.optim` numbers them."""
    name = {parameter: name for name, parameter in model.named_parameters()}
    return [name[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: Mapping[str, Any], names: Mapping[K, V]) -> dict[str, Any]:
    """An optimizer's state with its parameters under other names or numbers."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}
