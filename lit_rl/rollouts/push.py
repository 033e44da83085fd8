"""The policy's present weights in a folder that servers read: gathered by all processes, written by the first, known by their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_rl.checkpoints.replacing import beside, put_in_place, remove, swept
from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.weights.shards import gathered_on_first, part, reshard

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(policy: TokenPolicy) -> tuple[int, ...]:
    """`sum_of_bits` of each trained tensor, of what this process holds of it: another one after any optimizer step.

    By contents, because the number of an iteration does not tell an average that takes the weights' place in evaluation from them.
    """
    reshard(policy)
    return tuple(sum_of_bits(part(p)) for _, p in policy.trainable())


def sum_of_bits(tensor: Tensor) -> int:
    """The sum modulo 2^64 of a tensor's bits in words of 64, and of what is left of them at its end.

    Nothing is converted: a sum of 32-bit words in 64 bits takes twenty times as long on a CPU.
    """
    size = tensor.element_size()
    flat = tensor.contiguous().view(-1)
    if flat.storage_offset() * size % 8:
        flat = flat.clone()
    even = flat.numel() - flat.numel() % (8 // size)
    return int(flat[:even].view(torch.int64).sum()) + int(flat[even:].view(WORDS[size]).sum(dtype=torch.int64))


def gather(policy: TokenPolicy, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Whole trained tensors by name on the first process, in `dtype` or as they are; nothing on the others. Collective.

    What the policy keeps in float32 in any precision (`float32_weights`) stays so.
    """
    kept = policy.float32_weights()
    dtypes = {name: w.dtype if dtype is None or name in kept else dtype for name, w in policy.trainable()}
    return dict(gathered_on_first(policy, dtypes))


def digest(fingerprints: Sequence[tuple[int, ...]]) -> str:
    """8 hex digits of the contents, from the fingerprints of all processes: no byte of the weights is read for it."""
    return hashlib.blake2b(repr(list(fingerprints)).encode(), digest_size=4).hexdigest()


def write(policy: TokenPolicy, weights: dict[str, Tensor], folder: Path) -> None:
    """`folder` with the weights as `policy.save` writes them: it appears whole or not at all, whoever else writes it."""
    temporary = beside(folder)
    try:
        swept(folder, lambda path: False)  # what a killed run has left
        temporary.mkdir(parents=True)
        policy.save(temporary, weights)
        put_in_place(temporary, folder)
    except OSError as error:
        raise ConfigError(f"engine.sync_dir={folder.parent} cannot be written: {error}") from error
    finally:
        remove(temporary)
