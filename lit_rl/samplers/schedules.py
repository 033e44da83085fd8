"""Noise levels of a denoising path: Float64 tensors of N + 1 sigmas, from 1 (noise) down to 0 (data).

Published projects use different schedules for the same model, and "leave out the last step" means something else in each: SD3's ends
..., 0.28, 0.009, 0, the shifted one ..., 0.25, 0 (10 steps, shift 3). A run therefore logs its sigmas. A network's timestep is
1000 sigma, never truncated.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

TRAINING_STEPS = 1000
"""Sigmas a diffusers scheduler is born with; only the smallest of them matters here."""


def shift_sigmas(sigmas: Float[Tensor, "n"], *, shift: float) -> Float[Tensor, "n"]:
    """s u / (1 + (s - 1) u). shift > 1 spends more steps near the noise; 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sd3_sigmas(num_steps: int, *, shift: float) -> Float[Tensor, "n"]:
    """shift(linspace(1, shift(1/1000), N)), then 0: diffusers' static shift (SD3: 3), which shifts its own smallest sigma once more.

    What `StableDiffusion3Pipeline` samples with, and Flow-GRPO and DiffusionNFT train with.
    """
    _check(num_steps)
    smallest = shift_sigmas(torch.tensor([1 / TRAINING_STEPS], dtype=torch.float64), shift=shift).item()
    return _ending_in_zero(shift_sigmas(torch.linspace(1, smallest, num_steps, dtype=torch.float64), shift=shift))


def flux_sigmas(
    num_steps: int, *, image_tokens: int, base_shift: float = 0.5, max_shift: float = 1.15, base_len: int = 256, max_len: int = 4096
) -> Float[Tensor, "n"]:
    """shift_{e^mu}(linspace(1, 1/N, N)), then 0: diffusers' dynamic shift (FLUX, Qwen-Image). image_tokens = (height / 16) (width / 16)."""
    _check(num_steps)
    mu = flux_mu(image_tokens, base_shift=base_shift, max_shift=max_shift, base_len=base_len, max_len=max_len)
    return _ending_in_zero(shift_sigmas(torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64), shift=math.exp(mu)))


def flux_mu(image_tokens: int, *, base_shift: float = 0.5, max_shift: float = 1.15, base_len: int = 256, max_len: int = 4096) -> float:
    """base_shift + (max_shift - base_shift) (L - base_len) / (max_len - base_len), the logarithm of FLUX's shift at L image tokens."""
    return base_shift + (max_shift - base_shift) * (image_tokens - base_len) / (max_len - base_len)


def shifted_sigmas(num_steps: int, *, shift: float) -> Float[Tensor, "n"]:
    """shift(linspace(1, 0, N + 1)): DanceGRPO, MixGRPO, Flow-Factory."""
    return shift_sigmas(linear_sigmas(num_steps), shift=shift)


def linear_sigmas(num_steps: int) -> Float[Tensor, "n"]:
    """linspace(1, 0, N + 1)."""
    _check(num_steps)
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def _ending_in_zero(sigmas: Float[Tensor, "n"]) -> Float[Tensor, "m"]:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"a denoising path needs at least one step, got num_steps={num_steps}")
