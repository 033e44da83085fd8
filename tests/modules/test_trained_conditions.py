"""A policy whose conditions depend on trained weights learns through them; one that does not keeps those of the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from toy import Metrics, ToyData, ToyPolicy, toy_method, toy_trainer

from callbacks.old_policy import OldPolicySync
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.types import Cond, Info


class Adapted(ToyPolicy):
    """The toy policy behind a linear layer on its prompts' embeddings, which alone is trained."""

    trains_condition = True

    def load(self) -> None:
        if hasattr(self, "network"):
            return
        super().load()
        with isolate_rng():
            torch.manual_seed(1)
            self.network.append(nn.Linear(8, 8))
        self.frozen.append(nn.Linear(8, 8))
        self.refresh_reference()
        self.frozen.requires_grad_(False)
        self.network[:2].requires_grad_(False)

    def condition(self, info: Sequence[Info]) -> Cond:
        cond = super().condition(info)
        return {"embeds": self.network[2](cond["embeds"])}  # type: ignore[index]

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.network[:2](torch.cat([x.flatten(1), t[:, None], cond["embeds"]], 1)).view(x.shape).float()  # type: ignore[index]


class Stored(Adapted):
    trains_condition = False


def nft(policy: ToyPolicy, **settings: object) -> DiffusionNFT:
    defaults = dict(prompts_per_iteration=4, group_size=4, num_steps=4, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    return DiffusionNFT(policy, **defaults | settings)  # type: ignore[arg-type]


def grpo(policy: ToyPolicy, **settings: object) -> FlowGRPO:
    method = toy_method(lr=3e-2, kl_coef=1e-4, **settings)
    method.policy = policy
    return method


def test_flow_grpo_learns_through_the_condition(tmp_path: Path) -> None:
    method, metrics = grpo(Adapted()), Metrics()
    toy_trainer(tmp_path, max_epochs=30, callbacks=[metrics]).fit(method, ToyData())
    rewards = [row["reward/brightness"] for row in metrics.rows]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05
    assert metrics.rows[0]["ratio_first_update_max_dev"] < 1e-5  # the new condition is the rollout's as long as its weights are


def test_the_reference_conditions_with_its_own_weights(tmp_path: Path) -> None:
    method, metrics = grpo(Adapted()), Metrics()
    toy_trainer(tmp_path, max_epochs=3, callbacks=[metrics]).fit(method, ToyData())
    assert metrics.rows[0]["kl_divergence"] == 0 and metrics.rows[-1]["kl_divergence"] > 0


def test_the_old_policy_of_nft_conditions_with_its_own_weights(tmp_path: Path) -> None:
    method, metrics = nft(Adapted()), Metrics()
    toy_trainer(tmp_path, max_epochs=3, callbacks=[metrics, OldPolicySync("frozen")]).fit(method, ToyData())
    assert metrics.rows[0]["old_deviation"] == 0 and metrics.rows[-1]["old_deviation"] > 0


@pytest.mark.parametrize("make", [grpo, nft])
def test_a_stored_condition_has_no_gradient(make: object, tmp_path: Path) -> None:
    method = make(Stored())  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="does not require grad"):
        toy_trainer(tmp_path, max_epochs=1, callbacks=[OldPolicySync()] if make is nft else []).fit(method, ToyData())
