"""Lightning's sharding strategies with checkpoints that hold what `LitRL.checkpoint_keys` names, and appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.fabric.strategies.model_parallel import _is_sharded_checkpoint
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rl.checkpoints.contents import check_contents, with_nan
from lit_rl.checkpoints.files import is_whole, note_age, refuse_damaged, what_is_wrong
from lit_rl.checkpoints.layout import check_layout
from lit_rl.checkpoints.manifest import entries, write_manifest
from lit_rl.checkpoints.replacing import beside, naming, put_in_place, remove, swept
from lit_rl.checkpoints.restricted import deepspeed_reads_plain_files, load_file, load_shards, stored_shapes
from lit_rl.errors import ConfigError, listed
from lit_rl.policies.lora import adapted_parameters
from lit_rl.policies.shards import gathered, part, reshard, whole

if TYPE_CHECKING:
    import lightning as L

    from lit_rl.module import LitRL

LAYOUT_FILE = "weights.json"
"""In a DeepSpeed checkpoint: shape of every weight by name."""

OPTIMIZER_FILE = "optimizer.json"
"""In a DeepSpeed checkpoint: `checkpoint["optimizer"]`, which DeepSpeed itself gives back only after it has restored the moments."""


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
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Shards; or the whole tensors, on the first process only. Nothing but what goes into the file is gathered."""
        weights = self._kept_weights()
        if self._save_distributed_checkpoint:
            return weights
        gathered_here: dict[str, Any] = {}
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
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, plain, options=options)
        if self._save_distributed_checkpoint or not self.is_global_zero:
            return state  # type: ignore[return-value]
        return _renamed(state, {name: i for i, name in enumerate(_names(self.model, plain))})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if not self._save_distributed_checkpoint:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)  # the parent would remove a folder of shards first
            return
        with replaced(self, filepath) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)

    # ------------------------------------------------------------------ loading
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        trusted = weights_only is False
        if _is_sharded_checkpoint(path):
            check_intact(self, path)
            return self._load_shards(path, trusted)
        if path.is_dir():
            raise ConfigError(f"--ckpt_path {path} is a folder of DeepSpeed's shards: continue with configs/base/deepspeed_*.yaml")
        return self._load_file(path, trusted)

    def _load_shards(self, path: Path, trusted: bool) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        check_layout(stored_shapes(path), _litrl(self).checkpoint_shapes())
        checkpoint = load_file(path / _METADATA_FILENAME, trusted=trusted)
        _check_moments(self, checkpoint.get("optimizer", {}))
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

    def _load_file(self, path: Path, trusted: bool) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

        refuse_damaged(path, what_is_wrong(path))
        checkpoint = check_contents(load_file(path, trusted=trusted, mmap=True), path)
        check_layout({name: weight.shape for name, weight in checkpoint["state_dict"].items()}, _litrl(self).checkpoint_shapes())
        _check_moments(self, checkpoint.get("optimizer", {}))
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
        keys = _litrl(self).checkpoint_keys()
        return {name: weight for name, weight in self.model.state_dict().items() if name in keys}


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO. Stage 1 shards optimizer states, stage 2 gradients too, stage 3 weights too.

    Two defaults differ from DeepSpeed's: in stage 3 small parameters do not stay gathered between forwards, because edits of the shards
    (weight averages, references) would not reach them; and an offloaded optimizer may be any, not only `DeepSpeedCPUAdam`, which is
    faster there but compiles itself at first use. Frozen weights that the policy reads from its pretrained folder are not saved.

    Args:
        stage: 1, 2 or 3.
        config: DeepSpeed's own JSON, as a file or a mapping; replaces all other arguments.
        kwargs: See `lightning.pytorch.strategies.DeepSpeedStrategy` (offload_optimizer, offload_parameters, overlap_comm, ...).
    """

    def __init__(self, *, stage: Literal[1, 2, 3] = 2, config: str | dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(stage=stage, config=config, logging_batch_size_per_gpu=1, **kwargs)
        assert isinstance(self.config, dict)
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        zero = self.config.setdefault("zero_optimization", {})
        if zero.get("stage") == 3:
            zero.setdefault("stage3_param_persistence_threshold", 0)

    def setup(self, trainer: L.Trainer) -> None:
        """Give `lit_rl.policies.shards.reshard` its way in: in stage 3 weights that are used again soon stay gathered between forwards."""
        self._init_config_if_needed()
        cast(dict[str, Any], self.config)["gradient_accumulation_steps"] = trainer.accumulate_grad_batches  # the method may have set it
        super().setup(trainer)
        if self.zero_stage_3:
            optimizer = self.deepspeed_engine.optimizer
            offload = getattr(optimizer, "parameter_offload", optimizer)  # without an optimizer to train with it is that itself
            for network in _litrl(self).policy.networks():  # type: ignore[union-attr, operator]
                network.reshard = offload.partition_all_parameters

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by `accumulate_grad_batches`; DeepSpeed would again, and clip at a multiple of what was asked."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        module = _litrl(self)
        keys = module.checkpoint_keys()
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        self.exclude_frozen_parameters = not frozen <= keys  # DeepSpeed saves all frozen ones or none
        if self.exclude_frozen_parameters:
            checkpoint["frozen"] = {name: w if self.is_global_zero else None for name, w in gathered(module, frozen & keys)}
        with replaced(self, filepath) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)
            if self.is_global_zero:
                (folder / LAYOUT_FILE).write_text(json.dumps(module.checkpoint_shapes()))
                (folder / OPTIMIZER_FILE).write_text(json.dumps(checkpoint.get("optimizer", {}), default=str))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        if not (path / LAYOUT_FILE).is_file():
            kind = "a single file" if path.is_file() else "no folder of DeepSpeed's shards"
            raise ConfigError(
                f"--ckpt_path {path} is {kind}, and DeepSpeed continues from its own folders only: continue with the configs/base/*.yaml "
                "it was written under"
            )
        check_intact(self, path)
        check_layout(json.loads((path / LAYOUT_FILE).read_text()), _litrl(self).checkpoint_shapes())
        if (path / OPTIMIZER_FILE).is_file():
            _check_moments(self, json.loads((path / OPTIMIZER_FILE).read_text()))
        with nullcontext() if weights_only is False else deepspeed_reads_plain_files():
            checkpoint = super().load_checkpoint(path, weights_only)
        self._load_frozen(checkpoint.pop("frozen", {}))
        keys = _litrl(self).checkpoint_keys()
        refuse_nan(self, path, {name: weight for name, weight in _litrl(self).named_parameters() if name in keys})
        return checkpoint

    @torch.no_grad()
    def _load_frozen(self, weights: dict[str, Tensor | None]) -> None:
        """In stage 3 each process has read what it wrote itself, and the first one's weights are cut for all."""
        import deepspeed

        parameters = dict(_litrl(self).named_parameters())
        for name, weight in weights.items():
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                if weight is not None:
                    parameters[name].copy_(weight)


def check_strategy(strategy: Strategy) -> None:
    """Raise ConfigError for strategies under which a rollout fails, nothing is sharded, or checkpoints cannot be read again."""
    advice = ""
    if isinstance(strategy, ModelParallelStrategy | FSDPStrategy) and not isinstance(strategy, FSDP2Strategy):
        advice = "lit_rl.strategies.FSDP2Strategy, e.g. by --config configs/base/fsdp.yaml before the run's own"
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeroStrategy):
        advice = "lit_rl.strategies.ZeroStrategy, e.g. by --config configs/base/deepspeed_zero2.yaml before the run's own"
    if advice:
        raise ConfigError(f"trainer.strategy={type(strategy).__name__} is not supported here: use {advice}")


def check_experts_reached(strategy: Strategy, network: nn.Module) -> None:
    """Raise ConfigError if adapters of parameters, which read them outside of the layer's forward, would find them partitioned."""
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3 and (names := adapted_parameters(network)):
        raise ConfigError(
            f"lora.targets: {len(names)} parameters such as {names[0]} are adapted, which ZeRO-3 keeps partitioned while PEFT adds the "
            "adapters to them: train with --config configs/base/fsdp.yaml or deepspeed_zero2.yaml, or name targets without experts"
        )


def check_swaps_reach(strategy: Strategy, *, who: str) -> None:
    """Raise ConfigError if weights that are swapped in place would be missed by the next forward. who: what swaps them."""
    if not isinstance(strategy, DeepSpeedStrategy) or not strategy.zero_stage_3:
        return
    assert isinstance(strategy.config, dict)
    threshold = strategy.config["zero_optimization"].get("stage3_param_persistence_threshold")
    if threshold != 0:
        raise ConfigError(
            f"{who} under ZeRO-3 needs zero_optimization.stage3_param_persistence_threshold: 0 in the DeepSpeed config "
            f"(it is {'not set' if threshold is None else threshold}): weights that stay gathered would not see the swap"
        )


@contextmanager
def replaced(strategy: Strategy, target: Any) -> Iterator[Path]:
    """A folder to write a checkpoint into, which takes the place of `target` when every process has left the block without an exception.

    Each process then reads back the checksums of what it wrote; with all of them in its manifest the folder is whole.
    """
    final = Path(strategy.broadcast(target))
    new = strategy.broadcast(beside(final))
    if strategy.is_global_zero:
        swept(final, is_whole)
    strategy.barrier()
    try:
        with naming(final):
            yield new
    except BaseException:
        if strategy.is_global_zero:
            remove(new)  # the disk may be full
        raise
    strategy.barrier()
    found = gathered_objects(entries(new, strategy.global_rank, strategy.world_size))  # type: ignore[attr-defined]
    if strategy.is_global_zero:
        with naming(final):
            write_manifest(new, found)
            put_in_place(new, final)
    strategy.barrier()


def check_intact(strategy: Strategy, folder: Path) -> None:
    """Raises ConfigError on every process if a process finds its share of a checkpoint folder damaged. Collective."""
    try:
        problem = what_is_wrong(folder, strategy.global_rank, strategy.world_size)  # type: ignore[attr-defined]
    except (ConfigError, OSError) as error:
        problem = f"cannot be read ({error})"
    refuse_damaged(folder, next((found for found in gathered_objects(problem) if found), None))
    note_age(folder)


def refuse_nan(strategy: Strategy, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Raises ConfigError on every process if one holds a NaN in its part of the weights. Collective."""
    mine = with_nan((name, part(weight)) for name, weight in weights.items())
    if bad := sorted({name for found in gathered_objects(mine) for name in found}):
        raise ConfigError(f"checkpoint {folder} holds NaN in {listed(bad)}: training had failed when it was written, use an earlier one")


def gathered_objects(mine: Any) -> list[Any]:
    """What each process gives. Collective."""
    if not torch.distributed.is_initialized():
        return [mine]
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def _litrl(strategy: Strategy) -> LitRL[Any]:
    return cast("LitRL[Any]", strategy.lightning_module)


def _check_moments(strategy: Strategy, stored: Mapping[str, Any]) -> None:
    """Raise ConfigError before moments of another optimizer are restored. A run without training restores none."""
    if strategy.optimizers:
        _litrl(strategy).check_moments(stored)


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the parameters in the order in which `torch.optim` numbers them."""
    name = {parameter: name for name, parameter in model.named_parameters()}
    return [name[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with its parameters under other names or numbers."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}
