"""The part of an image that a reward looks at."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lit_rl.rewards.base import RewardError
from lit_rl.rewards.service.images import mask_problem
from lit_rl.types import Info


def mask_of(info: Info, height: int, width: int) -> np.ndarray | None:
    """`info["mask"]`, a Tensor or array "H W", as uint8 [H, W] of 0 and 255; None without one.

    Raises RewardError when it has another size than the image or leaves nothing to look at.
    """
    mask = info.get("mask")
    if mask is None:
        return None
    if (problem := mask_problem(mask, height, width)) is not None:
        raise RewardError(f"the mask of prompt {str(info.get('id', info['prompt']))!r} {problem}")
    mask = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    return (mask > 0).astype(np.uint8) * 255


def look_through(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The smallest rectangle of an image [H, W, 3] that holds all of a mask [H, W] > 0; what is outside of the mask in it becomes the
    median colour of what is inside, which hides it without drawing an edge."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    part, inside = image[box], mask[box] > 0
    if inside.all():
        return part
    return np.where(inside[..., None], part, np.median(part[inside], axis=0).astype(np.uint8))
