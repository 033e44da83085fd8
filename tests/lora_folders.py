"""Folders of adapters that are not zero, and what a miniature language model says with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(lm: Any) -> Tensor:
    return lm.eval()(input_ids=TOKENS).logits.float()


def moved(policy: Any, folder: Path, seed: int = 0) -> Path:
    """The folder of what the policy trains, drawn at random."""
    torch.manual_seed(seed)
    policy.load()
    with torch.no_grad():
        for _, p in policy.trainable():
            p.normal_(0, 0.2)
    folder.mkdir()
    policy.save(folder, {name: p.detach() for name, p in policy.trainable()})
    return folder
