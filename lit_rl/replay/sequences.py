"""Token ids and answers as one padded rollout, and rollouts that are cut and joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rl.policies.chat import AnswerIds
from lit_rl.rollouts.base import Sample
from lit_rl.types import Prompts, TokenRollout


def assemble(prompts: Prompts, asked: Sequence[Sequence[int]], answers: Sequence[Sample]) -> TokenRollout:
    """Prompts and answers as one rollout on the CPU."""
    ids = [[*prompt, *answer.ids] for prompt, answer in zip(asked, answers, strict=True)]
    chosen = [[False] * len(prompt) + [True] * len(answer.ids) for prompt, answer in zip(asked, answers)]
    rollout = sequences(prompts, ids, chosen)
    rollout.logprobs[rollout.mask] = torch.tensor([value for answer in answers for value in answer.logprobs])
    return replace(rollout, stopped=torch.tensor([answer.finish == "stop" for answer in answers]))


def sequences(prompts: Prompts, ids: Sequence[Sequence[int]], chosen: Sequence[Sequence[bool]]) -> TokenRollout:
    """Token ids as they are and which of them the policy answers for: a rollout on the CPU, padded on the right with 0."""
    lengths = torch.tensor([len(row) for row in ids])
    width = max(int(lengths.max()), 2)
    tokens, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.bool)
    for i, (row, which) in enumerate(zip(ids, chosen, strict=True)):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(which)
    zeros = torch.zeros(len(ids), width - 1)
    return TokenRollout(group=prompts.group, info=prompts.info, logprobs=zeros, mask=mask[:, 1:], tokens=tokens, lengths=lengths)


def pair_sequences(prompts: Prompts, pair_ids: Callable[[Any], tuple[Sequence[int], Sequence[int], Sequence[int]]]) -> TokenRollout:
    """Chosen, rejected, chosen, rejected, ...: each row of the data stands twice in `prompts`. Of an `AnswerIds` its learned tokens count,
    of any other all."""
    ids, chosen = [], []
    for i, row in enumerate(prompts.info):
        prompt, *answers = pair_ids(row)
        ids.append([*prompt, *answers[i % 2]])
        answer = answers[i % 2]
        chosen.append([False] * len(prompt) + (answer.learned if isinstance(answer, AnswerIds) else [True] * len(answer)))
    return sequences(prompts, ids, chosen)


def select(rollout: TokenRollout, rows: Tensor) -> TokenRollout:
    """These sequences of a rollout, in this order."""
    taken = {f.name: _each(getattr(rollout, f.name), lambda x: x[rows.to(x.device)]) for f in fields(rollout) if f.name != "info"}
    return replace(rollout, info=[rollout.info[i] for i in rows.tolist()], **taken)


def concatenated(parts: Sequence[TokenRollout]) -> TokenRollout:
    """The sequences of several rollouts as one, as wide as the widest. All must have the same fields and rewards."""
    width = max(part.tokens.shape[1] for part in parts)
    padded = [
        replace(p, **{f.name: _each(getattr(p, f.name), lambda x, by=width - p.tokens.shape[1]: _widened(x, by)) for f in fields(p)})
        for p in parts
    ]
    fields_of_all: dict[str, Any] = {"info": [row for p in parts for row in p.info]}
    fields_of_all["rewards"] = {name: torch.cat([p.rewards[name] for p in parts]) for name in parts[0].rewards}
    for name in {f.name for f in fields(parts[0])} - fields_of_all.keys():
        values = [getattr(p, name) for p in padded]
        fields_of_all[name] = None if all(v is None for v in values) else torch.cat(values)
    return replace(parts[0], **fields_of_all)


def _each(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: of(tensor) for name, tensor in value.items()}
    return of(value) if isinstance(value, Tensor) else value


def _widened(tensor: Tensor, by: int) -> Tensor:
    return pad(tensor, (0, by)) if tensor.ndim == 2 else tensor
