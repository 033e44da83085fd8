"""Memory of a run on each of its GPUs, estimated from its options and the configs of its models: nothing is read but a few kilobytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from jsonargparse import Namespace
from torch import nn

from callbacks.ema import EMA
from callbacks.old_policy import OldPolicySync
from callbacks.reward_scoring import RewardScoring
from lit_rl.doctor.ledger import Ledger
from lit_rl.doctor.phases import Lengths, of_pictures, of_tokens
from lit_rl.doctor.placement import GIB, Line, Placement, trained_numbers
from lit_rl.doctor.report import Finding, ok, problem, warning
from lit_rl.errors import ConfigError
from lit_rl.modules.base import LitRL
from lit_rl.modules.flow import LitFlow
from lit_rl.modules.optimization import use_fused
from lit_rl.modules.tokens import LitTokens
from lit_rl.policies.critic import Critic
from lit_rl.policies.deepgen import DeepGenPolicy
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.trained import TrainedPolicy
from lit_rl.policies.unread import frozen_of, without_weights
from lit_rl.types import Rollout

CARDS = (80.0, 24.0)
"""GiB of the cards that a run is compared with where there is none."""
TIGHT = 0.92
"""The share of a card above which fragments of the allocator may be what is missing."""
KNOBS = {
    "training": "fewer rows at once (more trainer.accumulate_grad_batches; less model.train_micro_batch or model.micro_batch_tokens), "
    "or policy.gradient_checkpointing: true",
    "rollout": "a lower model.rollout_micro_batch, or model.answers.engine.batch",
    "decoding": "policy.vae_slice: 1, or vae_dtype: bfloat16",
    "encoding": "policy.dtype: bfloat16 for the encoders, or more GPUs by configs/base/fsdp.yaml",
    "update": "optimizer.fused: true, or more GPUs by configs/base/fsdp.yaml",
}
"""Options to change, by the phase that holds the most."""


@dataclass(frozen=True)
class Estimate:
    """Lines of bytes, some of them there always and the others during one phase."""

    lines: Sequence[Line]

    def of(self, phase: str) -> float:
        """Bytes that are there in a phase."""
        return sum(line.bytes for line in self.lines if line.phase in ("", phase))

    @property
    def fullest(self) -> str:
        """The phase that holds the most."""
        return max(dict.fromkeys(line.phase for line in self.lines), key=self.of)

    @property
    def total(self) -> float:
        """Bytes at the fullest moment."""
        return self.of(self.fullest)

    def table(self) -> str:
        """A row for each line, and the sums of the phases."""
        rows = [(line.phase or "always", line.what, line.bytes) for line in sorted(self.lines, key=lambda line: line.phase) if line.bytes]
        rows += [(phase, "all together", self.of(phase)) for phase in dict.fromkeys(line.phase for line in self.lines) if phase]
        return "\n".join(f"  {size / GIB:8.2f} GiB  {phase:<9} {what}" for phase, what, size in rows)


def estimate(method: LitRL[Rollout], placement: Placement, *, data: Namespace | None, callbacks: Sequence[L.Callback] = ()) -> Estimate:
    """The memory of a process. Builds the method's models without weights, which leaves it of no other use.

    Raises ConfigError for models whose configs are not there, and for methods and policies that are not of this project's kinds.
    """
    networks, policy = built(method), method.policy
    blocks = {network: owner.blocks(network) for owner in method.models() for network in owner.networks()}
    lines = [
        *placement.of_weights(networks),
        *copies(method, placement, callbacks),
        *reward_models(callbacks),
        *of_optimizer(method, placement),
    ]
    lines += [*placement.of_gradients(list(networks.values())), *placement.of_gathering(blocks), *placement.of_libraries()]
    if isinstance(method, LitFlow) and isinstance(policy, DiffusersFlowPolicy):
        lines += of_pictures(method, policy, blocks, placement)
    elif isinstance(method, LitTokens):
        critic = getattr(method, "critic", None)
        lines += of_tokens(method, critic if isinstance(critic, Critic) else None, blocks, placement, lengths(method, data))
    return Estimate(lines)


def built(method: LitRL[Rollout]) -> Mapping[str, nn.Module]:
    """The method's networks by name, on the meta device."""
    with torch.device("meta"), without_weights():
        method.policy.load()
        critic = getattr(method, "critic", None)
        if isinstance(critic, Critic):
            critic.load(beside=method.policy)
    policy = method.policy
    if not isinstance(policy, TrainedPolicy):
        raise ConfigError(f"{type(policy).__name__} is no policy of this project, whose memory can be told from configs")
    found = {"policy": policy.network}
    if policy.reference_network is not None:
        found["reference"] = policy.reference_network
    if isinstance(policy, DeepGenPolicy) and policy.trains_condition:
        found["conditioner"] = policy.conditioner
    return found | ({"critic": critic.network} if isinstance(critic, Critic) else {})


def copies(method: LitRL[Rollout], placement: Placement, callbacks: Sequence[L.Callback]) -> Iterator[Line]:
    """Averages and old policies of the trained weights, with those that are put aside while one of them acts."""
    count = sum(p.numel() for _, p in method.policy.trainable())
    size = 4 * count * (1 / placement.processes if placement.cuts_weights else 1)
    kept = [name for kind, name in ((EMA, "average"), (OldPolicySync, "old policy")) if any(isinstance(c, kind) for c in callbacks)]
    yield from (Line(f"{name} of the trained weights", size) for name in kept)
    if kept:
        yield Line(f"weights put aside while the {kept[-1]} acts", size, "rollout")


def reward_models(callbacks: Sequence[L.Callback]) -> Iterator[Line]:
    """Models that score in the training process. Raises OSError for one whose config.json is not there."""
    from transformers import AutoConfig, AutoModel

    for reward in (reward for callback in callbacks if isinstance(callback, RewardScoring) for reward in callback.rewards.values()):
        name, dtype = getattr(reward, "model_path", None) or getattr(reward, "pretrained", None), getattr(reward, "dtype", None)
        if isinstance(name, str) and isinstance(dtype, torch.dtype) and getattr(reward, "device", None) is None:
            with torch.device("meta"):
                model = frozen_of(AutoModel.from_config, AutoConfig.from_pretrained(name), dtype=dtype)
            yield Line(f"{type(reward).__name__}", sum(p.nbytes for p in model.parameters()))


def of_optimizer(method: LitRL[Rollout], placement: Placement) -> Iterator[Line]:
    """Moments, and what a step needs beside them, by a step of the optimizer on tensors without memory."""
    share = placement.share("moments")
    optimizer = method.configured_optimizer()
    if placement.gpu:
        use_fused(optimizer, device="meta")
    if not type(optimizer).__module__.startswith("torch.optim"):
        yield Line(f"two moments, as of Adam, of {type(optimizer).__name__}", 8 * trained_numbers([method]) * share)
        return
    for group in optimizer.param_groups:
        fused = group.get("fused")
        if "foreach" in group:
            group["foreach"] = placement.gpu and not fused and group["foreach"] is not False
        group.update({"fused": False} if fused else {})
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    with Ledger() as ledger:
        optimizer.step()
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = None
    yield Line(f"moments of {type(optimizer).__name__}", ledger.now * share)
    yield Line(f"a step of {type(optimizer).__name__}", (ledger.peak - ledger.now) * share, "update")


def lengths(method: LitTokens, data: Namespace | None) -> Lengths:
    """The longest rows that the options of the data and of the sampler allow."""
    options = Namespace() if data is None else data.get("init_args") or Namespace()
    whole, prompt = int(options.get("max_length") or 0), int(options.get("max_prompt_length") or 0)
    answer = method.answers.sampling.max_new_tokens if method.answers is not None and prompt else 0
    row = max(whole, prompt + answer if prompt else 0) or 4096
    return Lengths(prompt=prompt if answer else 0, row=row, trained=row - 1 if whole >= row else answer)


def findings(
    method: LitRL[Rollout],
    placement: Placement,
    *,
    data: Namespace | None,
    callbacks: Sequence[L.Callback],
    cards: Sequence[float] = CARDS,
    there: bool = False,
) -> Iterator[Finding]:
    """The estimate, and whether it fits on cards of so many GiB. there: the run is to use them, so that not fitting is a problem."""
    try:
        found = estimate(method, placement, data=data, callbacks=callbacks)
    except (ConfigError, OSError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        yield warning(
            "memory", f"cannot be estimated: {why}. Give a folder with the config.json files of the model; weights are not needed"
        )
        return
    on = f"each of {placement.processes} GPUs" if placement.processes > 1 else "one GPU" if placement.gpu else "the CPU"
    more = "; --trainer.devices N says for how many" if placement.gpu and placement.processes == 1 and not there else ""
    yield ok("memory", f"{found.total / GIB:.1f} GiB on {on}, most of it in the phase `{found.fullest}`{more}\n{found.table()}")
    if not placement.gpu:
        return
    for card in cards:
        yield from fits(found, card, there=there)


def fits(found: Estimate, card: float, *, there: bool) -> Iterator[Finding]:
    """The share that a run takes of a card of so many GiB, and what to change where that is too much."""
    share, about, knob = (
        found.total / GIB / card,
        f"memory on {card:g} GiB",
        KNOBS.get(found.fullest, "more GPUs by configs/base/fsdp.yaml"),
    )
    if share <= TIGHT:
        yield ok(about, f"fits ({share:.0%})")
    elif share <= 1:
        yield warning(
            about, f"{share:.0%} of it: fragments may be what is missing; set PYTORCH_ALLOC_CONF=expandable_segments:True, or {knob}"
        )
    else:
        yield (problem if there else warning)(about, f"does not fit ({share:.0%}): try {knob}")
