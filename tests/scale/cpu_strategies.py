"""DeepSpeed on CPU and gloo, for tests only: Lightning refuses anything but CUDA in three places, each overridden here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_rl.strategies.zero import ZeroStrategy


class CPUZeroStrategy(ZeroStrategy):
    """`ZeroStrategy` without a GPU. The environment must say DS_ACCELERATOR=cpu before DeepSpeed is imported.

    reuse: Stage 3 lets go of weights that are not used again within so many numbers, as it does in large models. With the usual 1e9 a
    miniature would keep them all.
    """

    def __init__(self, *, reuse: int = 20_000, **settings: Any) -> None:
        super().__init__(**settings)
        if (zero := self.config["zero_optimization"])["stage"] == 3:
            zero |= {"stage3_max_reuse_distance": reuse, "stage3_max_live_parameters": reuse}

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)  # the index is all that Lightning asks of it

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        # Otherwise DeepSpeed compiles a shared-memory communicator for a minute, and fails where there is no compiler.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        self._init_deepspeed_distributed()

    def barrier(self, *_: Any, **__: Any) -> None:
        torch.distributed.barrier()

    def determine_ddp_device_ids(self) -> None:
        return None
