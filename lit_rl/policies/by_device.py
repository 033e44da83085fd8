"""Choices that a run leaves to the device: blocks that are compiled, and the attention of sequences that lie side by side in a row."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from lit_rl.policies.base import Policy
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.trained import TrainedPolicy

TENSOR_CORES = (8, 0)
"""Compute capability from which on a GPU has TF32, bfloat16 and flash attention."""


def has_tensor_cores(device: torch.device) -> bool:
    """True on an NVIDIA GPU of compute capability 8.0 (Ampere) or later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= TENSOR_CORES


@dataclass(frozen=True)
class Place:
    """The device that a policy is trained on.

    half: Autocast computes in 16 bits. fetches: The strategy (ZeRO-3) fetches weights inside of the forward pass.
    """

    device: torch.device
    half: bool = False
    fetches: bool = False

    def compiles(self) -> bool:
        """Compiled blocks pay and can be made: tensor cores, Triton, a C compiler, and no weights that come and go inside of a block."""
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        return has_tensor_cores(self.device) and not self.fetches and find_spec("triton") is not None and compiler is not None

    def varlen(self) -> bool:
        """`flash_attention_2` can run: tensor cores, 16 bits, and the package flash-attn."""
        return has_tensor_cores(self.device) and self.half and find_spec("flash_attn") is not None


def settle(policy: Policy, place: Place) -> list[str]:
    """Choose what a run leaves open (`compile`, `attention`), after the weights were read. Returns a sentence for each choice."""
    chosen = []
    if isinstance(policy, TrainedPolicy) and policy.compile_blocks is None and place.compiles():
        policy.compile_each(dynamic=False)
        chosen.append("Each block is compiled at its first forward, which takes a minute; model.policy.compile: false leaves that out")
    if isinstance(policy, CausalLM) and policy.padding_free and policy.attention is None and place.varlen():
        models = [network.get_submodule("lm") for network in policy.networks()]
        if all(getattr(lm, "_supports_flash_attn", False) for lm in models):
            for lm in models:
                lm.set_attn_implementation("flash_attention_2")  # type: ignore[operator]
            chosen.append("Sequences side by side go through flash_attention_2; model.policy.attention: sdpa chooses the other way")
    return chosen
