"""A policy per family of miniature pipelines."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.flux import FluxPolicy
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.types import Cond, take_rows

HEIGHT, WIDTH, TOKENS = 16, 24, 8
POLICIES: dict[str, type[DiffusersFlowPolicy]] = {"sd3": SD3Policy, "flux": FluxPolicy}
GUIDANCE = {"sd3": 4.5, "flux": 3.5}

MakePolicy = Callable[..., DiffusersFlowPolicy]


@pytest.fixture
def make_policy(folders: dict[str, Path]) -> MakePolicy:
    """make_policy("sd3-kl", lora=..., ...) -> a loaded policy, guided as usual in its family."""

    def make(name: str, **settings: Any) -> DiffusersFlowPolicy:
        family = name.split("-")[0]
        defaults = {"resolution": (HEIGHT, WIDTH), "guidance_scale": GUIDANCE[family], "max_sequence_length": TOKENS}
        policy = POLICIES[family](str(folders[name]), **defaults | settings)
        policy.load()
        return policy

    return make


@pytest.fixture
def make_inputs() -> Callable[..., SimpleNamespace]:
    """make_inputs(policy) -> x, t, cond for a batch of 3 rows of 2 prompts, always the same."""

    def make(policy: DiffusersFlowPolicy) -> SimpleNamespace:
        cond: Cond = policy.encode(['say "42"', 'say "07"'])
        x = torch.randn(3, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
        return SimpleNamespace(x=x, t=torch.tensor([1.0, 0.7, 0.2]), cond=take_rows(cond, torch.tensor([0, 1, 0])))

    return make
