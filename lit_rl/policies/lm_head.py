"""From a language model's hidden states to its logits: as its own `forward` goes, which may scale, bend or transform on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_rl.losses.token_logprobs import CHUNK_ELEMENTS
from lit_rl.policies.unread import leaves_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")

PROBED = (1e-3, 0.1, 1.0, 10.0, 1000.0)
"""Sizes of the hidden states that a head is tried with: where a cap does not bend, where it does, and where nothing else is left."""


@dataclass(frozen=True)
class LMHead:
    """The function from hidden states to logits.

    affine: softcap tanh(scale (hidden W^T + bias) / softcap), which `token_logprobs` knows. own: some other function of each place's hidden
    state, for which the model's `forward` is asked. whole: not told apart from the model's body, so that all logits are made at once.
    """

    kind: Literal["affine", "own", "whole"] = "affine"
    scale: float = 1.0
    softcap: float | None = None


def body(lm: PreTrainedModel) -> nn.Module:
    """The part of `lm` that goes from tokens to hidden states; `lm` itself where it is not told apart."""
    return lm.base_model if lm.base_model is not lm else getattr(lm, "model", lm)


@torch.no_grad()
def recognized(lm: PreTrainedModel) -> LMHead:
    """The head of `lm`, found by trying what its `forward` makes of a few hidden states. Before adapters are added. Nothing is drawn."""
    head = lm.get_output_embeddings()
    if body(lm) is lm:
        return LMHead("whole")
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return LMHead("own")
    if leaves_weights():
        return LMHead()  # there is nothing to try
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(4, head.in_features, generator=generator)
    hidden = torch.cat([size * direction for size in PROBED]).to(head.weight)
    try:
        found = own_logits(lm, hidden)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError):
        return LMHead("whole")  # its forward needs more of its body than the hidden states, or those of another width
    raw = F.linear(hidden, head.weight, head.bias).float()
    if found.shape != raw.shape:
        return LMHead("own")
    return _affine(found.float(), raw, _numbers(lm.config), torch.finfo(head.weight.dtype).eps)


def _affine(found: Tensor, raw: Tensor, numbers: list[float], eps: float) -> LMHead:
    """The affine head that makes `found` of `raw`, its scale and cap among the model's settings; another kind where there is none."""
    tolerance = max(4 * eps, 1e-5)
    scales = dict.fromkeys([1.0, *(factor for v in numbers for factor in (v, 1 / v))])
    small = slice(0, len(raw) // len(PROBED))
    ratio = float((found[small] * raw[small]).double().sum() / (raw[small] ** 2).double().sum().clamp(min=1e-300))
    for scale in sorted((s for s in scales if abs(s - ratio) <= tolerance * abs(s)), key=lambda s: abs(s - ratio)):
        for softcap in (None, *dict.fromkeys(abs(v) for v in numbers)):
            made = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
            if ((found - made).abs() <= tolerance * made.abs().amax(1, keepdim=True)).all():
                return LMHead("affine", scale, softcap)
    return LMHead("own")


def _numbers(config: PreTrainedConfig) -> list[float]:
    """Every number of the settings but 0, those of a text model within them too."""
    found: list[float] = []
    for value in config.to_dict().values():
        entries = value.values() if isinstance(value, dict) else [value]
        found += [float(v) for v in entries if isinstance(v, int | float) and not isinstance(v, bool) and v and abs(v) < 1e30]
    return found


def own_logits(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits "N V" that the model's `forward` makes of the last hidden states "N H" of its body."""
    with _given(lm, hidden[None]):
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return lm(input_ids=ids).logits[0]


def own_logprobs(
    lm: PreTrainedModel, hidden: Tensor, targets: Tensor, *, temperature: float | Tensor, entropy: bool, chunk: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """log_softmax(logits / temperature)[targets] and the entropies of hidden states "N H", a chunk at a time and again in backward."""
    embedding = lm.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    size = chunk or max(CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["other"]) // embedding.shape[0], 1)

    def of(rows: Tensor, chosen: Tensor, own: float | Tensor) -> tuple[Tensor, Tensor | None]:
        return picked(own_logits(lm, rows), chosen, temperature=own, entropy=entropy)

    waits = any(hasattr(p, "ds_id") for p in lm.parameters())  # then every process must ask for the head equally often
    if waits or len(targets) <= size:
        return of(hidden, targets, temperature)
    chunks = [slice(first, first + size) for first in range(0, len(targets), size)]
    parts = [_again(of, hidden[at], targets[at], temperature[at] if isinstance(temperature, Tensor) else temperature) for at in chunks]
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if entropy else None


def picked(logits: Tensor, targets: Tensor, *, temperature: float | Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies Float32 "N" of logits "N V", divided by the temperature of all or Float "N" of each."""
    each = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / each).log_softmax(-1)
    found = logp.gather(-1, targets[:, None])[:, 0]
    return found, torch.special.entr(logp.exp()).sum(-1) if entropy else None  # p log p is 0 where p is, for masked words too


def _again(of: Callable[..., T], *given: Tensor | float) -> T:
    return checkpoint(of, *given, use_reentrant=False) if torch.is_grad_enabled() else of(*given)


class _Given(nn.Module):
    """Stands in for the body of a model, or for the decoder in it, and answers with given hidden states."""

    def __init__(self, body: nn.Module, outputs: object) -> None:
        super().__init__()
        self.__dict__["body"], self.__dict__["outputs"] = body, outputs

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        return self if name == "decoder" else getattr(self.__dict__["body"], name)

    def forward(self, *_: object, **__: object) -> object:
        return self.__dict__["outputs"]


@contextmanager
def _given(lm: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Inside it the body of `lm` answers with `hidden`."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Outputs(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:  # router logits, states, ...
            if name.startswith("__"):
                raise AttributeError(name)

    real = body(lm)
    name = next(name for name, module in lm.named_children() if module is real)
    lm._modules[name] = _Given(real, Outputs(last_hidden_state=hidden))
    try:
        yield
    finally:
        lm._modules[name] = real
