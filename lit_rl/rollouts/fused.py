"""Linear layers of the same input as one, and norms, as tensors without modules: the parts that `Decoder` computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rl.policies.weights.shards import readable


@dataclass
class Fused:
    """One or several linear layers of the same input as one: x W + b (+ x A B, LoRA where it would be rounded away in W)."""

    weight: Tensor  # Float "in out"
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None  # Float "in r", "r out"

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        if self.low_rank is not None:
            down, up = self.low_rank
            y = y + (x.to(down.dtype) @ down @ up).to(y.dtype)
        return y

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x)."""
        if self.bias is None and self.low_rank is None and residual.dtype == self.weight.dtype:
            return torch.addmm(residual, x, self.weight)
        return residual + self(x)


def fuse(parts: Sequence[Any], dtype: torch.dtype, *, paired: int | None = None) -> Fused:
    """The layers' outputs side by side, computed in `dtype`. Collective where weights are sharded.

    paired: The outputs are heads of this size, whose first and second halves rotary positions turn together; they come out interleaved,
    (0, D/2, 1, D/2 + 1, ...), as complex numbers lie in memory. The product of queries and keys does not change.
    """
    bases = [getattr(part, "base_layer", part) for part in parts]
    weights = [readable(base.weight, dtype) for base in bases]
    sizes, biases, downs, ups = [len(weight) for weight in weights], [], [], []
    for i, (part, base) in enumerate(zip(parts, bases)):
        order = interleaved(sizes[i], paired).to(weights[i].device) if paired and i < 2 else slice(None)
        weights[i] = weights[i][order]
        biases.append(None if base.bias is None else readable(base.bias, dtype)[order])
        for down, up in _adapters(part, dtype):
            up = up[order]
            if dtype == torch.float32:
                weights[i] = weights[i] + up @ down
            else:
                downs.append(down)
                ups.append(F.pad(up, (0, 0, sum(sizes[:i]), sum(sizes[i + 1 :]))))
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)
    # A CPU multiplies a few rows by a float32 matrix up to twice as fast when its rows are the inputs.
    columns = whole.t().contiguous() if whole.device.type == "cpu" and dtype == torch.float32 else whole.t()
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([whole.new_zeros(size) if b is None else b for b, size in zip(biases, sizes)])
    return Fused(columns, bias, (torch.cat(downs).t(), torch.cat(ups, 1).t()) if downs else None)


def interleaved(size: int, head: int) -> Tensor:
    """Rows in the order (0, D/2, 1, D/2 + 1, ...) within each head."""
    return torch.arange(size).view(-1, 2, head // 2).transpose(1, 2).flatten()


def _adapters(part: Any, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(A, scale * B) of the active LoRA adapters, in `dtype` under autocast, else as peft computes: in their own."""
    if not hasattr(part, "base_layer") or part.disable_adapters:
        return []
    found = []
    for name in part.active_adapters:
        if name in part.lora_A:
            a, b = part.lora_A[name].weight, part.lora_B[name].weight
            own = dtype if torch.is_autocast_enabled(a.device.type) else a.dtype
            found.append((readable(a, own), readable(b, own) * part.scaling[name]))
    return found


class Norm:
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self.scaled, self.floor = weight * len(weight) ** 0.5, weight.new_full((1,), (len(weight) * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # `F.rms_norm` is a dozen operations on a CPU, and of a few rows the number of operations is the time.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, self.floor)).mul_(self.scaled)
