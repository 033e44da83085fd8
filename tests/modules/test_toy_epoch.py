"""A whole Flow-GRPO epoch of a linear model: rollout, advantages, two optimizer steps; every parameter as with the authors' code."""

import ast

import pytest
import torch
from golden_numbers import LOGPROB_F32, assert_close, cases, load
from torch import Tensor

from lit_rl.credit.groups import group_advantages
from lit_rl.losses.flow import gaussian_kl
from lit_rl.losses.policy_gradient import clipped_surrogate
from lit_rl.samplers.flow import sde_step
from lit_rl.samplers.windows import full_window

pytestmark = pytest.mark.golden

DYNAMICS = {"sde": "flow_sde", "cps": "cps"}


def velocity(theta: Tensor, x: Tensor, sigma: Tensor, prompt: Tensor, prompts: int) -> Tensor:
    """W x + sigma u + C[prompt] + b; theta holds W (D x D), u, C (prompts x D), b."""
    d = x[0].numel()
    w, u, c, b = theta.split([d * d, d, prompts * d, d])
    return (x.flatten(1) @ w.view(d, d).T + sigma[:, None] * u + c.view(prompts, d)[prompt] + b).view_as(x)


class Epoch:
    """The file's draws and configuration, walked through with our functions."""

    def __init__(self, case: dict, config: dict, prompt: Tensor, rewards: Tensor) -> None:
        self.case, self.config, self.prompt, self.rewards = case, config, prompt, rewards
        self.sigmas = case["sigmas"]
        self.window = full_window(config["N"], fraction=config["timestep_fraction"])

    def step(self, theta: Tensor, x: Tensor, i: Tensor, prompt: Tensor, **how: Tensor):
        """Row r takes step i[r]."""
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        v = velocity(theta, x, sigma, prompt, self.config["P"])
        options = {"dynamics": DYNAMICS[self.config["sde"]], "noise_level": self.config["a"], "sigma_max": float(self.sigmas[1])}
        return sde_step(x, v, sigma=sigma, sigma_next=sigma_next, **options, **how)

    def rollout(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Latents "B N+1 *D" and log-probabilities "B N"."""
        path, logprobs = [self.case["x_T"]], []
        for i in range(self.config["N"]):
            step = self.step(theta, path[-1], torch.full_like(self.prompt, i), self.prompt, noise=self.case["z"][i])
            path.append(step.sample)
            logprobs.append(step.logprob)
        return torch.stack(path, 1), torch.stack(logprobs, 1)

    def advantages(self) -> Tensor:
        std = "batch" if self.config["global_std"] else "group"
        return group_advantages(self.rewards, self.prompt, std=std).to(self.sigmas.dtype)

    def losses(
        self, theta: Tensor, latents: Tensor, logprobs: Tensor, advantages: Tensor, rows: Tensor, i: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, KL, ratio) of the (row, step) pairs given by `rows` and `i`, one number per pair."""
        prompt, x, sample = self.prompt[rows], latents[rows, i], latents[rows, i + 1]
        step = self.step(theta, x, i, prompt, sample=sample)
        with torch.no_grad():
            reference = self.step(self.case["theta_ref"], x, i, prompt, sample=sample)
        clip = self.config["clip"]
        policy = clipped_surrogate(step.logprob, logprobs[rows, i], advantages[rows], clip_low=clip, clip_high=clip, adv_clip=5.0)
        # Upstream's KL divides by what its step returns: the diffusion of an SDE, the whole noise of CPS.
        scale = step.noise_std if self.config["sde"] == "cps" else step.diffusion
        kl = gaussian_kl(step.mean, reference.mean, kind="x_diffusion", diffusion=scale)
        return policy + self.config["beta"] * kl, kl, (step.logprob - logprobs[rows, i]).exp()

    def updates(self):
        """Per optimizer step: its micro-batches of rows."""
        batches = torch.arange(len(self.prompt)).chunk(self.config["num_batches"])
        accumulate = self.config["grad_accum_batches"]
        return [batches[k : k + accumulate] for k in range(0, len(batches), accumulate)] * self.config["inner_epochs"]


def epochs(golden_dir):
    data = load(golden_dir / "diffusion", "toy_grpo_epoch")
    config = ast.literal_eval(data["config"])
    for match, case in cases(data, "f32|f64"):
        yield match[0], Epoch(case, config, data["prompt_id"], data["rewards"])


def optimizer(theta: Tensor, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([theta], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)


def test_rollout_and_advantages(golden_dir):
    for tag, epoch in epochs(golden_dir):
        latents, logprobs = epoch.rollout(epoch.case["theta0"])
        assert_close(latents, epoch.case["traj"], what=f"{tag} latents")
        assert_close(logprobs, epoch.case["old_log_probs"], f32=LOGPROB_F32, what=f"{tag} log-probs")
        assert_close(epoch.advantages()[:, None].expand_as(logprobs), epoch.case["advantages"], what=f"{tag} advantages")


def test_updates_in_the_authors_order(golden_dir):
    """One micro-batch and step at a time, means accumulated."""
    for tag, epoch in epochs(golden_dir):
        case, config = epoch.case, epoch.config
        latents, logprobs = epoch.rollout(case["theta0"])
        theta, seen = case["theta0"].clone().requires_grad_(), 0
        adamw = optimizer(theta, config["lr"])
        for update, batches in enumerate(epoch.updates()):
            for rows in batches:
                for j in epoch.window:
                    loss, kl, ratio = epoch.losses(theta, latents, logprobs, epoch.advantages(), rows, torch.full_like(rows, j))
                    (loss.mean() / (len(batches) * len(epoch.window))).backward()
                    for name, value in (("loss", loss.mean()), ("kl_loss", kl.mean()), ("ratio", ratio)):
                        assert_close(value, case[name][seen], f32=LOGPROB_F32, what=f"{tag} {name} {seen}")
                    seen += 1
            assert_close(theta.grad, case["grad_pre_clip"][update], f32=LOGPROB_F32, what=f"{tag} gradient {update}")
            norm = torch.nn.utils.clip_grad_norm_([theta], config["max_grad_norm"])
            assert_close(norm, case["grad_norm"][update], f32=LOGPROB_F32, what=f"{tag} norm {update}")
            adamw.step()
            adamw.zero_grad()
            assert_close(theta, case["theta_after"][update], f32=LOGPROB_F32, what=f"{tag} parameters {update}")
        assert seen == len(case["loss"]) and len(case["theta_after"]) == update + 1


@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_updates_with_weights_and_any_split(golden_dir, pieces):
    """All (row, step) pairs of an update flattened, weighted once, cut anywhere: the same parameters."""
    for tag, epoch in epochs(golden_dir):
        case, config = epoch.case, epoch.config
        latents, logprobs = epoch.rollout(case["theta0"])
        theta = case["theta0"].clone().requires_grad_()
        adamw = optimizer(theta, config["lr"])
        for update, batches in enumerate(epoch.updates()):
            pairs = torch.cartesian_prod(torch.cat(batches), torch.tensor(epoch.window))
            shuffled = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(update))]
            for rows, steps in (piece.unbind(1) for piece in shuffled.chunk(pieces)):
                loss, _, _ = epoch.losses(theta, latents, logprobs, epoch.advantages(), rows, steps)
                (loss / len(pairs)).sum().backward()
            torch.nn.utils.clip_grad_norm_([theta], config["max_grad_norm"])
            adamw.step()
            adamw.zero_grad()
            assert_close(theta, case["theta_after"][update], f32=LOGPROB_F32, what=f"{tag} parameters {update}")
