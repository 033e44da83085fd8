"""Memory of a language model that reads prompts for a diffusion transformer: DeepGen's conditioner over imagined tokens."""

from __future__ import annotations

from collections.abc import Mapping
from unittest.mock import patch

import torch
from torch import Tensor

from lit_rl.doctor.ledger import Ledger, imagine, imagined, mixed
from lit_rl.doctor.shallow import Blocks, extrapolated
from lit_rl.policies.conditioner import Conditioner, blocks_of
from lit_rl.policies.deepgen import DeepGenPolicy


def conditions_read(policy: DeepGenPolicy, conditioner: Conditioner, prompts: int) -> dict[str, Tensor]:
    """Conditions "U ..." of U of the longest prompts; one of several is a token shorter, so that all are filled up.

    Of a language model with some of its layers, the last ones stand for states of those that are left out.
    """
    longest, depth = policy.max_sequence_length, len(blocks_of(conditioner.language))
    lengths = [*[longest] * (prompts - 1), longest - (prompts > 1)]
    with patch.object(conditioner, "states", [min(state, depth) for state in conditioner.states]):
        found = conditioner(torch.zeros(prompts, longest, dtype=torch.long), lengths)
    cond = {"prompt_embeds": found.sequence, "pooled": found.pooled}
    return cond | masks_of(cond)


def masks_of(cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of real tokens that prompts of different lengths bring along."""
    ends = {name: rows for name, rows in cond.items() if name.endswith("prompt_embeds")}
    return {name.replace("prompt_embeds", "real"): torch.ones(rows.shape[:2], dtype=torch.bool) for name, rows in ends.items()}


def learned_conditions(policy: DeepGenPolicy, *, prompts: int, rows: int) -> dict[str, Tensor]:
    """Conditions of so many rows of a training step that reads its prompts anew, the empty one too where guidance asks for it."""
    found = conditions_read(policy, policy.conditioner, prompts + policy.guided)
    place = torch.zeros(rows, dtype=torch.long)
    empty = {f"negative_{name}": row[-1:] for name, row in found.items() if policy.guided}
    return {name: row[place] for name, row in found.items()} | empty


def hand_out_states(conditioner: Conditioner) -> None:
    """Have every layer hand out its state: transformers arranges that at the first forward, for the layers that are there."""
    with torch.no_grad():
        conditioner(torch.zeros(1, 1, dtype=torch.long), [1])


def answering(blocks: Blocks) -> Blocks:
    """The blocks without those of a frozen bridge, which answers in place of the trained one and never beside it."""
    kept = {network: network.frozen.connector for network in blocks if isinstance(network, Conditioner) and network.frozen is not None}
    resting = {id(block) for connector in kept.values() for block in blocks_of(connector)}
    return {network: [block for block in own if id(block) not in resting] for network, own in blocks.items()}


def reading(policy: DeepGenPolicy, prompts: int, *, gpu: bool, lower: torch.dtype | None) -> float:
    """Bytes that reading so many prompts at once takes in a rollout, beside the weights."""
    conditioner: Conditioner = policy._pipe.conditioner

    def measured() -> list[float]:
        with torch.no_grad(), Ledger() as ledger, mixed(lower):
            conditions_read(policy, conditioner, prompts)
        return [ledger.peak]

    with imagined(gpu=gpu):
        imagine([conditioner])
        hand_out_states(conditioner)
        (peak,) = extrapolated(answering({conditioner: policy.blocks(conditioner)}), measured)
    return peak
