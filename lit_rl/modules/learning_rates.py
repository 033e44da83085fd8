"""Learning rate schedules that torch has no class for."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class ConstantWithWarmup(LambdaLR):
    """A straight rise of the learning rate over the first optimizer steps, then the optimizer's own: `constant_with_warmup`.

    transformers' schedule of that name begins at 0, so that its first step trains nothing; this one begins at 1 / warmup_steps.

    Args:
        optimizer: Its learning rates are what is reached.
        warmup_steps: Optimizer steps of the rise; 0 = none.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 20) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must not be negative; 0 begins at the full rate")
        super().__init__(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))
