"""Rows that generate at once follow from the memory that keys and values take and from the memory that there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lit_rl.rollouts.base import Request

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEVICE_SHARE, HOST_SHARE = 0.7, 0.25
"""Shares of the memory that a GPU has free when generation begins, and of a host's whole memory for all of a run's processes together."""
LOGIT_BYTES = 24
"""Bytes of each word of the vocabulary in each row: logits, probabilities and their sums while a token is drawn."""
WORTH_SHARING = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Numbers of a layer's keys not read twice in a step, from which on that saves more time than the eight further operations cost.

Of a CPU measured on a Qwen2 of width 128 and 4 layers; of a GPU what it reads from its memory in the time of so many launches.
"""
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Need:
    """Bytes of one token's keys and values, and of one row's logits. numbers: of one token's keys in one layer.

    reading: Bytes of each token of a prompt while it is read, where all prompts of a batch are read at once.
    """

    token: int
    logits: int
    numbers: int
    reading: int = 0


def need_of(config: PreTrainedConfig, dtype: torch.dtype) -> Need:
    """The need of any model of transformers that is computed with in `dtype`, as if each layer kept keys and values of all tokens.

    A prompt is read with 16 numbers for each of the hidden size at once: a block's inputs, queries, keys, values and inner layer.
    """
    text = config.get_text_config(decoder=True)
    told = {name: value for name in ("num_key_value_heads", "head_dim") if isinstance(value := getattr(text, name, None), int)}
    heads = getattr(text, "num_attention_heads", 1)  # models without attention, such as Mamba, keep a state that is smaller than this
    numbers = told.get("num_key_value_heads", heads) * told.get("head_dim", text.hidden_size // heads)
    token = 2 * text.num_hidden_layers * numbers * dtype.itemsize
    return Need(token=token, logits=LOGIT_BYTES * text.vocab_size, numbers=numbers, reading=16 * text.hidden_size * dtype.itemsize)


@dataclass(frozen=True)
class Plan:
    """Answers under way at once, and whether siblings share their prompt's keys and values."""

    rows: int
    shared: bool


def memory_for_answers(device: torch.device, processes: int = 1) -> int:
    """Bytes that answers may take: 70 % of what a GPU has free, a quarter of a host's memory divided among its processes.

    Of a host the whole memory counts (a container's limit, where it has one), not what is free: a run that is resumed makes the same
    batches, and rounds the same.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(DEVICE_SHARE * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)))
    return int(HOST_SHARE * host_memory() / processes)


def host_memory() -> int:
    """Bytes of this host's memory, or of this container's limit."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = [path.read_text().strip() for path in LIMITS if path.is_file()]
    return min([whole, *(int(limit) for limit in told if limit.isdigit())])


def plan_rows(
    requests: Sequence[Request],
    new_tokens: int,
    *,
    need: Need,
    memory: int,
    most: int | None,
    max_tokens: int | None,
    device: str,
    may_share: bool = True,
) -> Plan:
    """The rows that fit, at most `most` and one for each request; at least one.

    max_tokens: Tokens, prompts included, for which keys and values may be kept at once. Prompts are shared where that saves time, and where
    fewer answers would fit otherwise; never where not `may_share`.
    """
    if not requests:
        return Plan(1, False)
    lengths, distinct = [len(request.prompt) for request in requests], len({tuple(request.prompt) for request in requests})
    longest = max(lengths)
    wanted = min(len(requests), most or len(requests), max_tokens // (longest + new_tokens) if max_tokens else len(requests))
    alone = memory // ((longest + new_tokens) * need.token + longest * need.reading + need.logits)
    together = (memory - distinct * longest * need.token) // (new_tokens * need.token + need.logits)
    repeated = 1 - distinct / len(requests)
    saved = min(wanted, max(alone, together)) * repeated * sum(lengths) / len(lengths) * need.numbers
    shared = saved >= WORTH_SHARING.get(device, WORTH_SHARING["cuda"]) or (alone < wanted and together > alone)
    if not may_share or together < distinct:  # each of few rows may have a prompt of its own
        shared = False
    return Plan(max(1, min(wanted, together if shared else alone)), shared)
