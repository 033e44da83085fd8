"""Pictures of the rows of a rollout: read from the data, and compared with the places that the tokens hold for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.types import Info, Media, TokenRollout


def media_of(data: object, info: Sequence[Info]) -> Media:
    """The media of each row, as the datamodule's `media(info)` gives them; siblings share theirs. Empty where no row has any."""
    read = getattr(data, "media", None)
    if not callable(read):
        return ()
    known = {id(row): row for row in info}
    found = {key: read(row) for key, row in known.items()}
    return [found[id(row)] for row in info] if any(found.values()) else ()


def with_media(rollout: TokenRollout, policy: TokenPolicy, data: object) -> TokenRollout:
    """The rollout with the media of its rows. An answer that holds a place for a picture has no chosen token, and so no part in the loss.

    Raises ConfigError with id and turn of a row whose tokens hold more or fewer places than its pictures have pieces.
    """
    media = media_of(data, rollout.info)
    for i, pictures in enumerate(media):
        prompt = rollout.tokens[i, : int(rollout.lengths[i])][~torch.nn.functional.pad(rollout.mask[i], (1, 0))[: int(rollout.lengths[i])]]
        if wrong := policy.misplaced(prompt.tolist(), pictures):
            turn = f", turn {int(rollout.columns['turn'][i])}" if "turn" in rollout.columns else ""
            raise ConfigError(f"row {rollout.info[i].get('id', i)}{turn}: {wrong}: has an image file changed since the run began?")
    if policy.banned_ids:
        banned = torch.isin(rollout.tokens[:, 1:], torch.tensor(policy.banned_ids, device=rollout.tokens.device)) & rollout.mask
        rollout = replace(rollout, mask=rollout.mask & ~banned.any(1, keepdim=True))
    return replace(rollout, media=media) if media else rollout
