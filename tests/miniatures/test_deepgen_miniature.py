"""The miniature DeepGen's language model, whose states are read and never trained."""

from __future__ import annotations

from pathlib import Path

import torch
from deepgen import build, deepgen_policy
from torch import Tensor

from lit_rl.policies.tokenizer import read_tokenizer


@torch.no_grad()
def last_states(folder: Path, texts: list[str]) -> Tensor:
    """The vectors of each text's last character, as the bridge gets them: "U F"."""
    policy = deepgen_policy(folder)
    policy.load()
    conditioner, tokenizer = policy._pipe.conditioner, read_tokenizer(str(folder / "language"))
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    found = conditioner.language(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return torch.cat([found[i] for i in conditioner.states], -1)[:, -1]


def test_small_matrices_leave_a_digit_what_it_is_beside_any_other(tmp_path: Path) -> None:
    """How far a digit's state moves with the digit before it, over how far it moves with the digit itself; never to nothing, since a
    state has to say where it stands."""
    mixed = {}
    for std in (0.07, 0.15):
        folder = build(tmp_path / str(std), language_layers=3, language_std=std, adapter_rank=None)
        here, other_tens, other_ones = last_states(folder, ['"47', '"87', '"42'])
        mixed[std] = float((here - other_tens).norm() / (here - other_ones).norm())
    assert 0.01 < mixed[0.07] < mixed[0.15] / 2
