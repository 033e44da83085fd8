"""Trajectories as the rows of a rollout: one row is one turn, as the policy was asked and as it answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch

from lit_rl.agents.episodes import Manner, Trajectory
from lit_rl.credit.turns import state_numbers
from lit_rl.envs.tasks import Task
from lit_rl.policies.base import TokenPolicy
from lit_rl.replay.sequences import assemble
from lit_rl.rollouts.base import Sample
from lit_rl.types import Info, Prompts, TokenRollout

TASK_KEYS = tuple(f.name for f in fields(Task))


def task_of(info: Info) -> Task:
    """The task of a row of the data."""
    return Task(**{key: info[key] for key in TASK_KEYS if key in info})


def rollout_of(trajectories: Sequence[Trajectory], info: Mapping[int, Info], policy: TokenPolicy, manner: Manner) -> TokenRollout:
    """The turns of all trajectories that count, on the CPU, with the columns `trajectory`, `turn`, `state` and, where siblings have
    different ones, `temperature`, and the pictures of each.

    info: Row of the data by group. A trajectory that the infrastructure lost has no row. Where none is left there is one row without a
    chosen token, for the forwards that other processes wait for.
    """
    played = [(t, number, turn) for t in trajectories if t.status.counts for number, turn in enumerate(t.turns)]
    if not played:
        return _with_temperatures(_nothing(info, policy, manner), trajectories[:1])
    group = [t.group for t, _, _ in played]
    prompts = Prompts(group=torch.tensor(group), info=[info[g] for g in group])
    rollout = assemble(prompts, [turn.shown.ids for _, _, turn in played], [turn.sample for _, _, turn in played])
    rewards = {"task": torch.tensor([t.reward for t, _, _ in played], dtype=torch.float64)}
    if manner.parse_penalty:
        rewards["format"] = torch.tensor([-manner.parse_penalty * t.parse_errors for t, _, _ in played], dtype=torch.float64)
    media = [turn.shown.media for _, _, turn in played]
    return replace(
        _with_temperatures(rollout, [t for t, _, _ in played]).with_columns(
            trajectory=torch.tensor([t.number for t, _, _ in played]),
            turn=torch.tensor([number for _, number, _ in played]),
            state=torch.tensor(state_numbers([turn.state for _, _, turn in played], group)),
        ),
        rewards=rewards,
        media=media if any(media) else (),
    )


def _with_temperatures(rollout: TokenRollout, trajectories: Sequence[Trajectory]) -> TokenRollout:
    """Add the column `temperature` Float32 "B" where siblings have different ones. trajectories: The trajectory of each row."""
    values = [t.temperature for t in trajectories if t.temperature is not None]
    return rollout.with_columns(temperature=torch.tensor(values)) if values else rollout


def _nothing(info: Mapping[int, Info], policy: TokenPolicy, manner: Manner) -> TokenRollout:
    group = next(iter(info))
    ids, media = policy.trial(list(policy.stop_ids[:1]) * 2)
    prompts = Prompts(group=torch.tensor([group]), info=[info[group]])
    rollout = assemble(prompts, [ids], [Sample([policy.stop_ids[0]], [0.0], "stop")])
    missing = torch.full((1,), torch.nan, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.long)
    return replace(
        rollout.with_columns(trajectory=zero, turn=zero, state=zero),
        rewards={name: missing for name in ("task", *(["format"] if manner.parse_penalty else []))},
        media=[media] if media else (),
        mask=torch.zeros_like(rollout.mask),
    )
