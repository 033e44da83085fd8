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
    """The rollout with the media of its rows from the data, `checked`."""
    media = media_of(data, rollout.info) or rollout.media
    return checked(replace(rollout, media=media), policy, remedy=": has an image file changed since the run began?")


def checked(rollout: TokenRollout, policy: TokenPolicy, *, remedy: str = "") -> TokenRollout:
    """The rollout. An answer that holds a place for a picture has no chosen token, and so no part in the loss.

    Raises ConfigError with id and turn of a row whose tokens hold more or fewer places than its pictures have pieces.
    """
    for i, pictures in enumerate(rollout.media):
        row, chosen = (x[i, : int(rollout.lengths[i])] for x in (rollout.tokens, torch.nn.functional.pad(rollout.mask, (1, 0))))
        if wrong := policy.misplaced(row[~chosen].tolist(), pictures):
            turn = f", turn {int(rollout.columns['turn'][i])}" if "turn" in rollout.columns else ""
            raise ConfigError(f"row {rollout.info[i].get('id', i)}{turn}: {wrong}{remedy}")
    if not policy.banned_ids:
        return rollout
    banned = torch.isin(rollout.tokens[:, 1:], torch.tensor(policy.banned_ids, device=rollout.tokens.device)) & rollout.mask
    return replace(rollout, mask=rollout.mask & ~banned.any(1, keepdim=True))
