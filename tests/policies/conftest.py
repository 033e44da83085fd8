"""Miniature pipelines on disk, built once, and a policy per family."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.flux import FluxPolicy
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.policies.tiny import build_flux, build_sd3
from lit_rl.types import Cond, take_rows

HEIGHT, WIDTH, TOKENS = 16, 24, 8
SMALL: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "hidden": 32, "heads": 2, "layers": 2, "text_hidden": 16, "text_length": 16}
POLICIES: dict[str, type[DiffusersFlowPolicy]] = {"sd3": SD3Policy, "flux": FluxPolicy}
GUIDANCE = {"sd3": 4.5, "flux": 3.5}

MakePolicy = Callable[..., DiffusersFlowPolicy]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines by name: each family with the pixel autoencoder and with a real one, SD3 without T5, FLUX without guidance input."""
    root = tmp_path_factory.mktemp("pipelines")
    kl: dict[str, Any] = {"vae": "kl", "scaling_factor": 1.5, "shift_factor": 0.1}
    sd3, flux = SMALL | {"t5_hidden": 32}, SMALL | {"single_layers": 1, "t5_hidden": 24}
    return {
        "sd3": build_sd3(root / "sd3", **sd3),
        "sd3-kl": build_sd3(root / "sd3-kl", **sd3, **kl, dual_attention_layers=(0,)),
        "sd3-no-t5": build_sd3(root / "sd3-no-t5", **SMALL | {"t5_hidden": None}),
        "flux": build_flux(root / "flux", **flux),
        "flux-kl": build_flux(root / "flux-kl", **flux, **kl),
        "flux-schnell": build_flux(root / "flux-schnell", **flux, guidance_embeds=False),
    }


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
