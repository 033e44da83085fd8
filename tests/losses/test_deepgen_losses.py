"""The losses, steps and advantages of DeepGen-RL's trainer out of the formulas of the house.

Its deviations are arguments here: GRPO-Guard with cps takes sqrt(-dt) noise_std for the step's noise; in its paper form it averages
the squared difference of means over rows and divides the loss by -dt. DiffusionNFT takes the next latent for the clean one, and 0.1 for
the noise of its divergence, which in its x-based form compares the velocity with the mean of the reference's step. Statistics are those of
one process. Where the trainer cannot draw its steps, all that there are are trained here.
"""

from __future__ import annotations

import json
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_numbers import assert_close, load
from torch import Tensor

from lit_rl.credit.advantage import Advantage
from lit_rl.credit.groups import total_reward
from lit_rl.losses.flow import KLKind, gaussian_kl
from lit_rl.losses.nft import nft_loss, optimality
from lit_rl.losses.policy_gradient import clipped_ratio_loss, guard_logratio
from lit_rl.samplers.flow import Dynamics, Step, sde_path, sde_step
from lit_rl.samplers.schedules import shift_sigmas
from lit_rl.samplers.windows import random_steps

pytestmark = pytest.mark.golden

HERE = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent.parent / "golden")) / "deepgen"
DYNAMICS: dict[str, Dynamics] = {"cps_sde": "cps", "flowgrpo_sde": "flow_sde", "dance_sde": "dance_sde"}
KINDS: dict[tuple[str, str], KLKind] = {
    ("v-based", "cps_sde"): "v_noise_std",
    ("x-based", "cps_sde"): "x_noise_std",
    ("v-based", "flowgrpo_sde"): "v_diffusion",
    ("x-based", "flowgrpo_sde"): "x_diffusion",
}


NUMBERS = cache(load)


def read(name: str) -> list[dict[str, Any]]:
    return json.loads((HERE / f"{name}.json").read_text())["cases"]


def sigmas(steps: int, shift: float) -> Tensor:
    """diffusers' schedule: N points from 1 to 1 / 1000, shifted twice (when it is made, and when its end is shifted), then 0."""
    end = shift_sigmas(torch.tensor([1.0, 1 / 1000], dtype=torch.float64), shift=shift)
    points = torch.linspace(float(end[0]), float(end[1]), steps, dtype=torch.float64)
    return torch.cat([shift_sigmas(points, shift=shift), torch.zeros(1, dtype=torch.float64)]).float()


def stepped(case: dict[str, Any], v: Tensor, x: Tensor, after: Tensor) -> Step:
    schedule, i = sigmas(case["steps"], case["shift"]), case["idx"]
    return sde_step(
        x, v, sigma=schedule[i].expand(len(x)), sigma_next=schedule[i + 1].expand(len(x)), dynamics=DYNAMICS[case["sampler"]],
        noise_level=case["eta"], sigma_max=float(schedule[1]), sample=after,
    )  # fmt: skip


@pytest.mark.parametrize("case", read("timestep_select"), ids=lambda case: "-".join(map(str, case["inputs"].values())))
def test_steps_are_drawn_as_the_authors_do(case: dict[str, Any]) -> None:
    given = case["inputs"]
    steps, last = given["num_steps"], given["include_last"] == "1"
    found = random_steps(steps, fraction=given["timestep_fraction"], rng=random.Random(given["py_seed"]), last=last)
    assert found == case["outputs"].get("indices", list(range(steps - 1)))


def test_steps_are_the_authors() -> None:
    """They add 1e-8 to what they divide by, which shows in steps to sigma 0. Their noise of flow_sde lacks sqrt(-dt)."""
    data = NUMBERS(HERE, "sde_step")
    for case in read("sde_step"):
        what = f"{case['sampler']}, eta {case['eta']}, step {case['idx']} of {case['steps']}"
        last = case["idx"] == case["steps"] - 1 and case["sampler"] != "cps_sde"
        v, x, after = (data[f"{case['k']}_{name}"] for name in ("v", "x", "nx"))
        step = stepped(case, v, x, after)
        assert_close(sigmas(case["steps"], case["shift"]), data[f"sigmas_{case['steps']}_{case['shift']}"], f32=1e-5, what=what)
        assert_close(step.mean, data[f"{case['k']}_mean"], f32=2e-2 if last else 1e-4, what=f"{what}: mean")
        std = step.diffusion if case["sampler"] == "flowgrpo_sde" else step.noise_std
        assert_close(std, data[f"{case['k']}_std"].flatten().expand(len(x)), f32=1e-4, what=f"{what}: noise")
        logprob = data[f"{case['k']}_logp"] if case["eta"] else torch.zeros(len(x))  # no noise, no action
        assert_close(step.logprob, logprob, f32=0.2 if last else 1e-4, what=f"{what}: log-prob")


@pytest.mark.parametrize("case", read("loss"), ids=lambda case: f"{case['k']}-{case['algo']}-{case['kl_type']}-{case['sampler']}")
def test_losses_and_their_gradients_are_the_authors(case: dict[str, Any]) -> None:
    data = NUMBERS(HERE, "loss")

    def given(name: str) -> Tensor:
        return data[f"{case['k']}_{name}"]

    v = given("v").clone().requires_grad_(True)
    new, ref = (stepped(case, velocity, given("x"), given("nx")) for velocity in (v, given("vref")))
    policy = nft(case, v, given) if case["algo"] == "diffusionnft" else surrogate(case, new, given)
    kl = divergence(case, v, new, ref, given("vref"))
    assert_close(kl, given("kl"), f32=1e-3, what="kl")
    assert_close(policy.mean(), given("policy_loss"), f32=2e-4, what="policy loss")
    loss = policy.mean() + case["beta"] * kl.mean()
    loss.backward()
    assert v.grad is not None
    assert_close(loss, given("loss"), f32=1e-3, what="loss")
    assert_close(v.grad, given("grad_v"), f32=1e-3, what="gradient")


def surrogate(case: dict[str, Any], new: Step, given: Any) -> Tensor:
    old, schedule, i = stepped(case, given("vold"), given("x"), given("nx")), sigmas(case["steps"], case["shift"]), case["idx"]
    assert_close(new.logprob, given("logp"), f32=2e-4, what="log-prob")
    root = (schedule[i] - schedule[i + 1]).sqrt()
    noise = new.noise_std * root if case["sampler"] == "cps_sde" else new.noise_std
    ratio = new.logprob - old.logprob
    if case["algo"] != "flowgrpo":
        mean, old_mean = new.mean, old.mean
        if case["algo"] == "grpoguard_paper":
            mean = (mean - old_mean).pow(2).mean().sqrt().expand(len(mean), 1)
            old_mean = torch.zeros_like(mean)
        ratio = guard_logratio(new.logprob, old.logprob, mean, old_mean, noise_std=noise)
    assert_close(ratio.exp(), given("ratio"), f32=1e-5, what="ratio")
    losses = clipped_ratio_loss(ratio, given("adv"), clip_low=case["clip_range"], clip_high=case["clip_range"])
    return losses / root**2 if case["algo"] == "grpoguard_paper" else losses


def nft(case: dict[str, Any], v: Tensor, given: Any) -> Tensor:
    sigma = sigmas(case["steps"], case["shift"])[case["idx"]].expand(len(v))
    r = optimality(given("adv"), clip=case["nft_adv_clip"])
    return nft_loss(v, v.detach(), x=given("x"), x0=given("nx"), sigma=sigma, r=r, beta=case["nft_beta"], scale=case["nft_adv_clip"]).policy


def divergence(case: dict[str, Any], v: Tensor, new: Step, ref: Step, v_ref: Tensor) -> Tensor:
    kind, noise, diffusion = KINDS[case["kl_type"], case["sampler"]], new.noise_std, new.diffusion
    if case["algo"] == "diffusionnft":
        noise = diffusion = torch.full_like(noise, 0.1)
        if kind.startswith("x"):
            return gaussian_kl(v, ref.mean, kind="v_noise_std", noise_std=noise)
    pair = (v, v_ref) if kind.startswith("v") else (new.mean, ref.mean)
    return gaussian_kl(*pair, kind=kind, diffusion=diffusion, noise_std=noise)


@pytest.mark.parametrize("case", read("rollout_cps"), ids=lambda case: f"{case['c']}-{case['dtype']}")
def test_a_path_of_cps_steps_is_the_authors(case: dict[str, Any]) -> None:
    data, c = NUMBERS(HERE, "rollout_cps"), case["c"]
    noise, taken = data[f"{c}_noise"], iter(range(case["steps"]))
    low = case["dtype"] == "torch.bfloat16"

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return data[f"{c}_v"][next(taken)]

    path = sde_path(
        velocity, data[f"{c}_init"], sigmas=data[f"{c}_sigmas"], levels=[case["eta"]] * case["steps"], steps=range(case["steps"]),
        dynamics="cps", sigma_max=float(data[f"{c}_sigmas"][1]), noise=lambda i: noise[i], dtype=torch.float32,
    )  # fmt: skip
    for i, step in enumerate(path):
        assert_close(step.sample, data[f"{c}_nx"][i], f32=3e-2 if low else 2e-5, what=f"step {i}")


@pytest.mark.parametrize(
    "case", read("advantages"), ids=lambda c: "-".join(str(c["inputs"][k]) for k in ("adv_type", "per_sample", "kind"))
)
def test_advantages_are_the_authors(case: dict[str, Any]) -> None:
    given = case["inputs"]
    table, count = torch.tensor(given["rewards_per_func"], dtype=torch.float64), given["rollout_n"]
    names, group = given["func_names"], torch.arange(len(table)) // count
    rewards = {name: table[:, i] for i, name in enumerate(names)}
    weights: dict[str, Any] = dict.fromkeys(names, 1.0)
    if given["per_sample"]:
        weights = {name: torch.tensor([given["reward_configs"][g].get(name, 0.0) for g in group.tolist()]).double() for name in names}
    options: dict[str, Any] = {"ddof": 1, "eps": 1e-4}
    total = torch.tensor(given["total"], dtype=torch.float64)
    if given["per_sample"]:
        assert_close(total_reward(rewards, weights).float(), total.float(), what="total")
    rules = {
        "gdpo": Advantage(kind="gdpo", **options),
        "grpo": Advantage(kind="sum", std="group", **options),
        "grpo_global_std": Advantage(kind="sum", std="batch", **options),
        "reinforcepp": Advantage(kind="reinforce", **options),
    }
    found = rules[given["adv_type"]](rewards, total, group, weights=weights, prompts=[], tracker=None)
    assert_close(found, torch.tensor(case["outputs"]["advantages"]), f32=1e-4, what=given["adv_type"])
