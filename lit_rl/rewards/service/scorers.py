"""The rewards of a server: built by name, applied to images of mixed sizes and to texts."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lit_rl.errors import ConfigError
from lit_rl.rewards.service.samples import Medium, Row, Sample, SampleError, medium_of
from lit_rl.types import Info

if TYPE_CHECKING:
    from lit_rl.rewards.base import Reward

log = logging.getLogger(__name__)
SCORERS = {
    "ocr": "lit_rl.rewards.ocr.OCRReward",
    "quoted": "lit_rl.rewards.ocr_quoted.QuotedTextReward",
    "vlm": "lit_rl.rewards.vlm.VLMReward",
    "clip": "lit_rl.rewards.clip.CLIPScoreReward",
    "pickscore": "lit_rl.rewards.clip.PickScoreReward",
    "jpeg": "lit_rl.rewards.jpeg.JPEGSizeReward",
    "pseudo": "lit_rl.rewards.pseudo.PseudoReward",
    "rules": "lit_rl.rewards.text.rules.RuleReward",
    "function": "lit_rl.rewards.text.function.FunctionReward",
    "reward_model": "lit_rl.rewards.text.model.ModelReward",
    "format": "lit_rl.rewards.text.style.FormatReward",
    "repetition": "lit_rl.rewards.text.style.RepetitionReward",
}
"""Short names; any other reward is named by its dotted path."""
_NEEDED = {
    "vlm": ("model_path", "FOLDER"),
    "clip": ("model_path", "FOLDER"),
    "pickscore": ("model_path", "FOLDER"),
    "reward_model": ("pretrained", "FOLDER"),
    "function": ("path", "FILE.py"),
}
"""The option that a reward cannot do without, and the kind of its value."""
Options: TypeAlias = Mapping[str, Mapping[str, object]]
"""Constructor options by name of the reward, as JSON has them."""


def check(names: Sequence[str], options: Options) -> None:
    """Raise ValueError for whatever can be known to be wrong before anything heavy is imported."""
    if not names:
        raise ValueError(f"no scorer was named; choose from {', '.join(SCORERS)}, or a dotted path to a Reward")
    for name in names:
        if name not in SCORERS and "." not in name:
            raise ValueError(f"there is no scorer {name!r}; choose from {', '.join(SCORERS)}, or give the dotted path of a Reward class")
        option, kind = _NEEDED.get(name, ("model_path", ""))
        path = options.get(name, {}).get(option)
        if kind and not path:
            knob = "--vlm-model-path FOLDER" if name == "vlm" else f"""--scorer-args '{{"{name}": {{"{option}": "{kind}"}}}}'"""
            raise ValueError(f"scorer {name} needs a {'function' if name == 'function' else 'model'}; give {knob}")
        if path and str(path).startswith(("/", ".", "~")) and not Path(str(path)).expanduser().exists():
            raise ValueError(f"the {option} of scorer {name} does not exist: {path}")
    if unused := set(options) - set(names):
        raise ValueError(f"options were given for {', '.join(sorted(unused))}, which --scorers does not name")


def build(names: Sequence[str], options: Options, *, device: str | None) -> list[Reward]:
    """Import, construct and load the named rewards on `device` (None: the GPU if there is one)."""
    rewards: list[Reward] = [_made({"class_path": SCORERS.get(name, name), "init_args": options.get(name, {})}) for name in names]
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for reward in rewards:
        reward.setup(rank=0, world_size=1, device=device)
    return rewards


def _made(value: object) -> object:
    """An object that is described by `class_path` and `init_args`, as in a YAML; anything else as it is."""
    if not isinstance(value, Mapping) or "class_path" not in value or not value.keys() <= {"class_path", "init_args"}:
        return value
    module, _, attribute = str(value["class_path"]).rpartition(".")
    return getattr(importlib.import_module(module), attribute)(**{key: _made(v) for key, v in value.get("init_args", {}).items()})


def media_of(rewards: Sequence[Reward]) -> list[Medium]:
    """The kinds of samples that at least one of the rewards scores."""
    kinds: tuple[Medium, ...] = ("images", "texts")
    return [kind for kind in kinds if any(reward.medium in (None, kind) for reward in rewards)]


def score_samples(rewards: Sequence[Reward], samples: Sequence[Sample], infos: Sequence[Info]) -> list[Row | SampleError]:
    """RGB images uint8 [H, W, 3] of any sizes and texts -> one row each, of the rewards that score its kind.

    Texts, and images of equal size, are scored together; a sample that fails spoils no other.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        alike.setdefault(() if isinstance(sample, str) else sample.shape, []).append(i)
    rows: dict[int, Row | SampleError] = {}
    for group in alike.values():
        fitting = [reward for reward in rewards if reward.medium in (None, medium_of(samples[group[0]]))]
        rows |= zip(group, _score_group(fitting, [samples[i] for i in group], [infos[i] for i in group]), strict=True)
    return [rows[i] for i in range(len(samples))]


def _score_group(rewards: Sequence[Reward], samples: Sequence[Sample], infos: Sequence[Info]) -> list[Row | SampleError]:
    try:
        return list(_rows(rewards, samples, infos))
    except Exception as error:  # a reward is foreign code; the request gets the reason, the log the trace
        if len(samples) > 1:
            return [row for sample, info in zip(samples, infos, strict=True) for row in _score_group(rewards, [sample], [info])]
        log.exception("%s could not be scored", "a text" if isinstance(samples[0], str) else f"an image of {samples[0].shape}")
        return [SampleError("model_error", _reason(error))]


def _reason(error: Exception) -> str:
    """The sentence of an error that is written for users; of any other its kind, since its text may tell too much."""
    from lit_rl.rewards.base import RewardError

    if isinstance(error, RewardError | ConfigError):
        return str(error)
    return f"scoring failed with {type(error).__name__}; the server's log has the trace"


def _rows(rewards: Sequence[Reward], samples: Sequence[Sample], infos: Sequence[Info]) -> list[dict[str, object]]:
    import torch

    images = [sample for sample in samples if not isinstance(sample, str)]
    media = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) if images else samples
    rows: list[dict[str, object]] = [{} for _ in samples]
    for reward in rewards:
        scores, texts = reward.explain(media, infos)
        for name, values in {**{k: v.tolist() for k, v in scores.items()}, **texts}.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
    return rows
