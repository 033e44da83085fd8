"""Compares a server's log-probabilities with the trainer's, to find out whether it answers with the trainer's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.weights.shards import reshard
from lit_rl.rollouts.base import Request, Sample
from lit_rl.types import Media

MEASURABLE = 1e-3
"""A move of the trainer's log-probabilities that a server in 16 bits cannot miss."""


@dataclass(frozen=True)
class Probe:
    """A sequence of which the log-probabilities from token `first` on are compared: a text, or a conversation with a picture."""

    request: Request
    first: int

    @property
    def row(self) -> tuple[Sequence[int], Sequence[int]]:
        """The tokens that go before, and those that are compared."""
        return self.request.prompt[: self.first], self.request.prompt[self.first :]


def probe_ids(policy: TokenPolicy, text: str) -> list[int]:
    """Token ids of the text that is compared. Raises ConfigError where it is less than two tokens."""
    ids = policy.encode(text)
    if len(ids) < 2:
        raise ConfigError(f"engine.probe={text!r} is {len(ids)} tokens to this model; give a text of at least 2")
    return ids


def probes_of(policy: TokenPolicy, text: str, *, most: int | None) -> list[Probe]:
    """A text, and where the policy reads pictures a conversation of a picture and that text. most: Tokens that a server takes.

    Raises ConfigError for a text of one token, and where the picture leaves no room.
    """
    ids = probe_ids(policy, text)
    room = len(ids) if most is None else max(2, most - 1)  # the server draws a token after it
    media = policy.trial(ids)[1]
    probes = [Probe(Request(ids[:room], ()), 1)]
    return [*probes, _with_picture(policy, text, media, most)] if media else probes


def _with_picture(policy: TokenPolicy, text: str, media: Sequence[Tensor], most: int | None) -> Probe:
    content = [*({"type": "image"} for _ in media), {"type": "text", "text": text}]
    row = {"prompt": [{"role": "user", "content": content}]}
    ids = policy.encode(row["prompt"])
    whole, _ = policy.with_pictures(ids, [False] * len(ids), [(picture.shape[1], picture.shape[2]) for picture in media])
    if most is not None and len(whole) >= most:
        raise ConfigError(
            f"engine.probe has {len(whole)} tokens with an image and the chat template, and the inference server takes {most} "
            "(--max-model-len): set engine.probe to a shorter text, or raise that"
        )
    behind = max(i for i, token in enumerate(whole) if token in policy.banned_ids) + 1
    return Probe(Request(whole, (), media, row), behind)


@torch.no_grad()
def trainer_logprobs(
    policy: TokenPolicy, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, temperature: float | Tensor, media: Media = ()
) -> list[list[float]]:
    """Log-probabilities of the answers in (prompt, answer) pairs, without autocast: the same numbers in every hook. One forward."""
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
    tokens = torch.zeros(len(rows), max(int(lengths.max()), 2), dtype=torch.long)
    mask = torch.zeros(len(rows), tokens.shape[1] - 1, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : lengths[i]] = torch.tensor([*prompt, *answer])
        mask[i, len(prompt) - 1 : int(lengths[i]) - 1] = True
    device = policy.device
    with torch.autocast(device.type, enabled=False):
        found, _ = policy.logprobs(tokens.to(device), lengths.to(device), mask.to(device), media=media, temperature=temperature)
    reshard(policy)  # what the first process does alone with the weights afterwards would put just its own shards back
    return [row[chosen].tolist() for row, chosen in zip(found.cpu(), mask)]


class ProbeHistory:
    """The last measurable change of a server's and the trainer's log-probabilities of the probe."""

    def __init__(self) -> None:
        self.before: tuple[Tensor, Tensor] | None = None

    def compare(self, told: Sequence[float], mine: Sequence[float], *, tolerance: float) -> str:
        """The difference between server and trainer, in words; empty if there is none.

        Two numbers apart by more than rounding are other weights. But a step of training moves them by less than a server in 16 bits
        rounds: weights that the server never took show in that its numbers stay where they were, to a tenth of the trainer's move.
        """
        theirs, ours = torch.tensor(told, dtype=torch.float64), torch.tensor(mine, dtype=torch.float64)
        gap = (theirs - ours).abs()
        if self.before is not None and float((ours - self.before[1]).abs().max()) >= MEASURABLE:
            at = int((ours - self.before[1]).abs().argmax())
            moved, stayed = ours - self.before[1], theirs - self.before[0]
            if float(stayed.abs().max()) <= 0.1 * float(moved.abs().max()):
                return (
                    f"stale weights: since an earlier push the trainer's log-probability of token {at} of the probe went from "
                    f"{self.before[1][at]:.5f} to {ours[at]:.5f}, and the server's from {self.before[0][at]:.5f} to {theirs[at]:.5f}"
                )
        if float(gap.mean()) > tolerance:
            at = int(gap.argmax())
            return (
                f"other weights: its log-probabilities of the probe are {gap.mean():.4f} from the trainer's on average "
                f"(token {at}: {theirs[at]:.5f}, trainer {ours[at]:.5f}), more than engine.probe_tolerance={tolerance:g}"
            )
        if self.before is None or float((ours - self.before[1]).abs().max()) >= MEASURABLE:
            self.before = theirs, ours
        return ""


def distinct(requests: Sequence[Request], most: int) -> list[int]:
    """Places of requests with different prompts, the longest prompt first: what a server kept of old weights shows in long prompts.

    One with pictures is among them, where there is one.
    """
    first: dict[tuple[int, ...], int] = {}
    for i, request in enumerate(requests):
        first.setdefault(tuple(request.prompt), i)
    places = [place for _, place in sorted(first.items(), key=lambda item: -len(item[0]))]
    shown = next((place for place in places if requests[place].media), None)
    chosen = places[:most]
    return chosen if shown is None or shown in chosen else [*chosen[:-1], shown]


def disagreement(samples: Sequence[Sample], mine: Sequence[Sequence[float]], *, temperature: float | Tensor, tolerance: float) -> str:
    """The difference between the log-probabilities of answers, in words; empty if there is none."""
    theirs = torch.tensor([value for sample in samples for value in sample.logprobs], dtype=torch.float64)
    ours = torch.tensor([value for row in mine for value in row], dtype=torch.float64)
    gap = (theirs - ours).abs()
    if not len(gap) or float(gap.mean()) <= tolerance:
        return ""
    told = ", ".join(f"{value:g}" for value in temperature.unique().tolist()) if isinstance(temperature, Tensor) else f"{temperature:g}"
    return (
        f"its log-probabilities of its own answers are {gap.mean():.4f} from the trainer's on average (mean {theirs.mean():.4f}, trainer "
        f"{ours.mean():.4f} at temperature {told}), above engine.probe_tolerance={tolerance:g}, while its weights are right"
    )
