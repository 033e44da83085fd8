"""The rewards a server was asked for, built by name and applied to images of mixed sizes."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_rl.rewards.service.images import ImageError

if TYPE_CHECKING:
    from lit_rl.rewards.base import Reward

log = logging.getLogger(__name__)
SCORERS = {
    "ocr": "lit_rl.rewards.ocr.OCRReward",
    "vlm": "lit_rl.rewards.vlm.VLMReward",
    "clip": "lit_rl.rewards.clip.CLIPScoreReward",
    "pickscore": "lit_rl.rewards.clip.PickScoreReward",
    "jpeg": "lit_rl.rewards.jpeg.JPEGSizeReward",
    "pseudo": "lit_rl.rewards.pseudo.PseudoReward",
}
"""Short names; any other reward is named by its dotted path."""
_NEED_MODEL = ("vlm", "clip", "pickscore")


def check(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for whatever can be known to be wrong before anything heavy is imported."""
    if not names:
        raise ValueError(f"no scorer was named; choose from {', '.join(SCORERS)}, or a dotted path to a Reward")
    for name in names:
        if name not in SCORERS and "." not in name:
            raise ValueError(f"there is no scorer {name!r}; choose from {', '.join(SCORERS)}, or give the dotted path of a Reward class")
        path = options.get(name, {}).get("model_path")
        if name in _NEED_MODEL and not path:
            knob = "--vlm-model-path FOLDER" if name == "vlm" else f"""--scorer-args '{{"{name}": {{"model_path": "FOLDER"}}}}'"""
            raise ValueError(f"scorer {name} needs a model; give {knob}")
        if path and str(path).startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
            raise ValueError(f"the model folder of scorer {name} does not exist: {path}")
    if unused := set(options) - set(names):
        raise ValueError(f"options were given for {', '.join(sorted(unused))}, which --scorers does not name")


def build(names: Sequence[str], options: Mapping[str, Mapping[str, Any]], *, device: str | None) -> list[Reward]:
    """Import, construct and load the named rewards on `device` (None: the GPU if there is one)."""
    paths = [SCORERS.get(name, name).rpartition(".") for name in names]
    classes = [getattr(importlib.import_module(module), attribute) for module, _, attribute in paths]
    rewards: list[Reward] = [cls(**options.get(name, {})) for cls, name in zip(classes, names, strict=True)]
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for reward in rewards:
        reward.setup(rank=0, world_size=1, device=device)
    return rewards


def score_images(
    rewards: Sequence[Reward], images: Sequence[np.ndarray], infos: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any] | ImageError]:
    """RGB images uint8 [H, W, 3] of any sizes -> one row each. Equal sizes are scored together; an image that fails spoils no other."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(i)
    rows: dict[int, Mapping[str, Any] | ImageError] = {}
    for group in by_size.values():
        rows |= zip(group, _score_group(rewards, [images[i] for i in group], [infos[i] for i in group]), strict=True)
    return [rows[i] for i in range(len(images))]


def _score_group(
    rewards: Sequence[Reward], images: Sequence[np.ndarray], infos: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any] | ImageError]:
    try:
        return list(_rows(rewards, images, infos))
    except Exception as error:  # a scorer is foreign code; the request gets the reason, the log the trace
        if len(images) > 1:
            return [row for image, info in zip(images, infos, strict=True) for row in _score_group(rewards, [image], [info])]
        log.exception("an image of %s could not be scored", images[0].shape)
        return [ImageError("model_error", f"scoring failed with {type(error).__name__}; the server's log has the trace")]


def _rows(rewards: Sequence[Reward], images: Sequence[np.ndarray], infos: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    import torch

    media = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    rows: list[dict[str, Any]] = [{} for _ in images]
    for reward in rewards:
        scores, texts = reward.explain(media, infos)
        for name, values in {**{k: v.tolist() for k, v in scores.items()}, **texts}.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
    return rows
