"""Token ids and answers as one padded rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lit_rl.policies.chat import AnswerIds
from lit_rl.replay.preferences import preferences
from lit_rl.rollouts.base import Sample
from lit_rl.types import Info, Prompts, TokenRollout


def assemble(prompts: Prompts, asked: Sequence[Sequence[int]], answers: Sequence[Sample]) -> TokenRollout:
    """Prompts and answers as one rollout on the CPU."""
    ids = [[*prompt, *answer.ids] for prompt, answer in zip(asked, answers, strict=True)]
    chosen = [[False] * len(prompt) + [True] * len(answer.ids) for prompt, answer in zip(asked, answers)]
    rollout = sequences(prompts, ids, chosen)
    rollout.logprobs[rollout.mask] = torch.tensor([value for answer in answers for value in answer.logprobs])
    return replace(rollout, stopped=torch.tensor([answer.finish == "stop" for answer in answers]))


def sequences(prompts: Prompts, ids: Sequence[Sequence[int]], chosen: Sequence[Sequence[bool]]) -> TokenRollout:
    """Token ids as they are and which of them the policy answers for: a rollout on the CPU, padded on the right with 0."""
    width = max([2, *map(len, ids)])
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.long)
    tokens, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.bool)
    for i, (row, which) in enumerate(zip(ids, chosen, strict=True)):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(which)
    zeros, whole = torch.zeros(len(ids), width - 1), torch.ones(len(ids), dtype=torch.bool)
    return TokenRollout(
        group=prompts.group, info=prompts.info, logprobs=zeros, mask=mask[:, 1:], tokens=tokens, lengths=lengths, stopped=whole
    )


def pair_sequences(prompts: Prompts, pair_ids: Callable[[Info], tuple[Sequence[int], Sequence[int], Sequence[int]]]) -> TokenRollout:
    """The chosen and then the rejected answer of each row of the data, which stands twice in `prompts`, with the column `preference`.

    Of an `AnswerIds` its learned tokens count, of any other all.
    """
    ids, learned = [], []
    preference = preferences(prompts.group)
    for row, preferred in zip(prompts.info, preference.tolist(), strict=True):
        prompt, chosen, rejected = pair_ids(row)
        answer = chosen if preferred > 0 else rejected
        ids.append([*prompt, *answer])
        learned.append([False] * len(prompt) + (answer.learned if isinstance(answer, AnswerIds) else [True] * len(answer)))
    return sequences(prompts, ids, learned).with_columns(preference=preference)
