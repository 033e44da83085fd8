"""The schedules of diffusers' pipelines as formulas, which policies are held against."""

import math

import torch
from torch import Tensor

from lit_rl.samplers.schedules import flux_mu, shift_sigmas

TRAINING_STEPS = 1000
"""Sigmas a diffusers scheduler is born with; only the smallest of them matters here."""


def sd3_sigmas(num_steps: int, *, shift: float) -> Tensor:
    """shift(linspace(1, shift(1/1000), N)), then 0: diffusers' static shift (SD3: 3), which shifts its own smallest sigma once more.

    What `StableDiffusion3Pipeline` samples with, and Flow-GRPO and DiffusionNFT train with.
    """
    smallest = shift_sigmas(torch.tensor([1 / TRAINING_STEPS], dtype=torch.float64), shift=shift).item()
    return _ending_in_zero(shift_sigmas(torch.linspace(1, smallest, num_steps, dtype=torch.float64), shift=shift))


def flux_sigmas(
    num_steps: int, *, image_tokens: int, base_shift: float = 0.5, max_shift: float = 1.15, base_len: int = 256, max_len: int = 4096
) -> Tensor:
    """shift_{e^mu}(linspace(1, 1/N, N)), then 0: diffusers' dynamic shift (FLUX, Qwen-Image). image_tokens = (height / 16) (width / 16)."""
    mu = flux_mu(image_tokens, base_shift=base_shift, max_shift=max_shift, base_len=base_len, max_len=max_len)
    return _ending_in_zero(shift_sigmas(torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64), shift=math.exp(mu)))


def _ending_in_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])
