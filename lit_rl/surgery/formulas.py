"""One tensor of several, in float32, by PEFT's own functions (`peft.utils.merge_utils`)."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "lora"]
METHODS: Mapping[Method, str] = {
    "linear": "average by weights, which are divided by their sum",
    "slerp": "of two models: on the arc between them, tensor by tensor",
    "task_arithmetic": "the base plus the weighted differences from it (arXiv 2212.04089)",
    "ties": "of each difference the largest share, without those against the majority's sign (arXiv 2306.01708)",
    "dare_linear": "task arithmetic of a random share of each difference, scaled up (arXiv 2311.03099)",
    "dare_ties": "ties of a random share of each difference, scaled up (arXiv 2311.03099)",
    "lora": "the base plus the weighted products of adapters",
}
OF_DIFFERENCES = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
"""Methods that need a base."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i / sum_i w_i. The sum of the weights must not be 0."""
    from peft.utils.merge_utils import task_arithmetic

    return task_arithmetic([tensor.float() for tensor in tensors], torch.tensor(weights) / sum(weights))


def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """(sin((1 - t) o) a + sin(t o) b) / sin(o), t = w_b / (w_a + w_b), where o is the angle between a and b (Shoemake 1985).

    Tensors of almost the same or of opposite directions, and those that are 0, are averaged by `linear`.
    """
    a, b = (tensor.float() for tensor in tensors)
    share = weights[1] / sum(weights)
    lengths = a.norm() * b.norm()
    angle = torch.arccos((torch.dot(a.flatten(), b.flatten()) / lengths.clamp(min=1e-30)).clamp(-1, 1))
    if lengths == 0 or torch.sin(angle) < 1e-4:
        return linear(tensors, weights)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def of_differences(
    method: Method, base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, density: float, seed: int, name: str
) -> Tensor:
    """base + f(x_i - base). Draws are a function of `seed` and `name`."""
    start = base.float()
    return start + combined(method, [tensor.float() - start for tensor in tensors], weights, density=density, seed=seed, name=name)


def combined(method: Method, tasks: Sequence[Tensor], weights: Sequence[float], *, density: float, seed: int, name: str) -> Tensor:
    """One difference of several by a method of `OF_DIFFERENCES`. density: the share in (0, 1] of each one's numbers that stays."""
    from peft.utils import merge_utils

    given, scales = [task.float() for task in tasks], torch.tensor(weights)
    if method == "task_arithmetic":
        return merge_utils.task_arithmetic(given, scales)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density")  # of 1 prunes nothing, as asked
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        chosen = {"ties": merge_utils.ties, "dare_linear": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}[method]
        return chosen(given, scales, density)
