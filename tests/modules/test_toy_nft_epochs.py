"""Two whole DiffusionNFT epochs of a linear model: old policy's rollouts, advantages, updates, averages; all parameters as the authors'."""

import ast

import pytest
import torch
from golden_numbers import LOGPROB_F32, assert_close, cases, load
from torch import Tensor

from lit_rl.credit.groups import group_advantages
from lit_rl.losses.flow import gaussian_kl
from lit_rl.losses.nft import nft_loss, optimality
from lit_rl.policies.weights.decay import OLD_POLICY_DECAYS, ema_decay, ema_update, ramp_decay
from lit_rl.samplers.solvers import solve

pytestmark = pytest.mark.golden

CLIP = 5.0


def velocity(theta: Tensor, x: Tensor, sigma: Tensor, prompt: Tensor, prompts: int) -> Tensor:
    """W x + sigma u + C[prompt] + b; theta holds W (D x D), u, C (prompts x D), b."""
    d = x[0].numel()
    w, u, c, b = theta.split([d * d, d, prompts * d, d])
    return (x.flatten(1) @ w.view(d, d).T + sigma[:, None] * u + c.view(prompts, d)[prompt] + b).view_as(x)


class Run:
    """The file's draws and configuration, walked through with our functions."""

    def __init__(self, start: dict, epochs: list[dict], config: dict, prompt: Tensor) -> None:
        self.epochs, self.config, self.prompt, self.sigmas = epochs, config, prompt, start["sigmas"]
        self.theta = start["theta0"].clone().requires_grad_()
        self.old, self.average, self.reference = start["theta0"].clone(), start["theta0"].clone(), start["theta_ref"]
        self.optimizer = torch.optim.AdamW([self.theta], lr=config["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
        self.step = config["start_step"]
        self.points = int(config["N"] * config["timestep_fraction"])

    def rollout(self, start: Tensor) -> Tensor:
        def v(x: Tensor, sigma: float) -> Tensor:
            return velocity(self.old, x, torch.full((len(x),), sigma, dtype=x.dtype), self.prompt, self.config["P"])

        return list(solve(v, start, sigmas=self.sigmas, solver="dpm2"))[-1]

    def losses(self, epoch: dict, x0: Tensor, advantages: Tensor, rows: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """One number per pair: row of the rollout, sigma, noise."""
        at, prompt = sigma.view(-1, *[1] * (x0.ndim - 1)), self.prompt[rows]
        x = (1 - at) * x0[rows] + at * noise
        new, old, ref = (velocity(theta, x, sigma, prompt, self.config["P"]) for theta in (self.theta, self.old, self.reference))
        r = optimality(advantages[rows], clip=CLIP)
        loss = nft_loss(new, old, x=x, x0=x0[rows], sigma=sigma, r=r, beta=self.config["nft_beta"], scale=CLIP)
        return loss.policy + self.config["nft_kl"] * gaussian_kl(new, ref, kind="v")

    def updates(self, epoch: dict):
        """Per optimizer step and micro-batch: rows, sigmas "b S" and noises "b S *D"."""
        order = epoch["sample_perm"]
        timesteps = (1000 * self.sigmas).float().to(self.sigmas)  # which the authors keep in float32
        sigmas = timesteps[epoch["time_perm"][:, : self.points]] / 1000
        batches = torch.arange(len(order)).chunk(self.config["num_batches"])
        pieces = [(order[rows], sigmas[rows], noise.movedim(0, 1)) for rows, noise in zip(batches, epoch["noise"])]
        accumulate = self.config["grad_accum_batches"]
        return [pieces[k : k + accumulate] for k in range(0, len(pieces), accumulate)]

    def after_step(self, epoch: dict, update: int, what: str) -> None:
        """Gradient, clipping, parameters, average."""
        assert self.theta.grad is not None
        assert_close(self.theta.grad, epoch["grad_pre_clip"][update], f32=LOGPROB_F32, what=f"{what} gradient")
        norm = torch.nn.utils.clip_grad_norm_([self.theta], self.config["max_grad_norm"])
        assert_close(norm, epoch["grad_norm"][update], f32=LOGPROB_F32, what=f"{what} norm")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = ema_decay(self.step, decay=self.config["ema_decay"])
        self.average = ema_update(self.average, self.theta.detach(), decay=decay)
        assert_close(self.theta, epoch["theta_after"][update], f32=LOGPROB_F32, what=f"{what} parameters")

    def after_epoch(self, epoch: dict, what: str) -> None:
        self.old = ema_update(self.old, self.theta.detach(), decay=ramp_decay(self.step, **OLD_POLICY_DECAYS["slow"]))
        assert self.step == int(epoch["global_step_after"])
        assert_close(self.old, epoch["theta_old_after"], f32=LOGPROB_F32, what=f"{what} old policy")
        assert_close(self.average, epoch["ema_after"], f32=LOGPROB_F32, what=f"{what} average")


def runs(golden_dir):
    data = load(golden_dir / "diffusion", "toy_nft_epochs")
    config = ast.literal_eval(data["config"])
    for match, start in cases(data, "f32|f64"):
        epochs = [epoch for _, epoch in sorted(cases(data, rf"{match[0]}__ep(\d+)"), key=lambda found: int(found[0][1]))]
        assert len(epochs) == config["epochs"]
        yield match[0], Run(start, epochs, config, data["prompt_id"])


def rolled_out(run: Run, epoch: dict, what: str) -> tuple[Tensor, Tensor]:
    x0 = run.rollout(epoch["x_T"])
    assert_close(x0, epoch["x0"], what=f"{what} samples")
    std = "batch" if run.config["global_std"] else "group"
    advantages = group_advantages(epoch["rewards"], run.prompt, std=std).to(x0.dtype)
    assert_close(advantages, epoch["advantages"], what=f"{what} advantages")
    return x0, advantages


def test_epochs_in_the_authors_order(golden_dir):
    """One micro-batch and point at a time, means accumulated."""
    for tag, run in runs(golden_dir):
        for e, epoch in enumerate(run.epochs):
            x0, advantages = rolled_out(run, epoch, f"{tag} epoch {e}")
            seen = 0
            for update, batches in enumerate(run.updates(epoch)):
                for rows, sigmas, noises in batches:
                    for j in range(run.points):
                        loss = run.losses(epoch, x0, advantages, rows, sigmas[:, j], noises[:, j]).mean()
                        (loss / (len(batches) * run.points)).backward()
                        assert_close(loss, epoch["loss"][seen], f32=LOGPROB_F32, what=f"{tag} epoch {e} loss {seen}")
                        seen += 1
                run.after_step(epoch, update, f"{tag} epoch {e} update {update}")
            assert seen == len(epoch["loss"]) and len(epoch["theta_after"]) == update + 1
            run.after_epoch(epoch, f"{tag} epoch {e}")


@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_epochs_with_weights_and_any_split(golden_dir, pieces):
    """All (sample, point) pairs of an update flattened, weighted once, cut anywhere: the same parameters."""
    for tag, run in runs(golden_dir):
        for e, epoch in enumerate(run.epochs):
            x0, advantages = rolled_out(run, epoch, f"{tag} epoch {e}")
            for update, batches in enumerate(run.updates(epoch)):
                rows, sigmas, noises = (torch.cat(parts) for parts in zip(*batches))
                rows, sigmas, noises = rows.repeat_interleave(run.points), sigmas.flatten(), noises.flatten(0, 1)
                for piece in torch.randperm(len(rows), generator=torch.Generator().manual_seed(update)).chunk(pieces):
                    losses = run.losses(epoch, x0, advantages, rows[piece], sigmas[piece], noises[piece])
                    (losses / len(rows)).sum().backward()
                run.after_step(epoch, update, f"{tag} epoch {e} update {update}")
            run.after_epoch(epoch, f"{tag} epoch {e}")
