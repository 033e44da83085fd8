"""Log-probabilities of given tokens straight from hidden states, without the logits of all of them in memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**22, "other": 2**26}
"""Logits at a time: what a CPU's caches still help with, and what keeps a GPU busy. If all are fewer, autograd may keep them."""


class TokenLogprobs(NamedTuple):
    """Results for N tokens, float32 (float64 for float64 input). The gradient flows through `logprobs` and `entropy` only."""

    logprobs: Float[Tensor, "N"]
    entropy: Float[Tensor, "N"] | None = None  # of the whole distribution


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, "N"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    low_rank: tuple[Float[Tensor, "N R"], Float[Tensor, "V R"]] | None = None,
    temperature: float | Float[Tensor, "N"] = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    arriving: Float[Tensor, "N"] | None = None,
    chunk: int | None = None,
) -> TokenLogprobs:
    """log_softmax(z)[target], z = softcap tanh(scale (hidden W^T + bias + low up^T) / softcap) / temperature, with gradients.

    Give it the hidden states of scored positions only (those *before* the scored tokens): prompts then cost nothing. Logits are
    made `chunk` tokens at a time and again in backward, so that no more than chunk * V of them exist.

    Args:
        low_rank: (low, up): an adapter of the head, hidden A^T and its B with the scaling in one of them; low in the precision of up.
        temperature: that of sampling, of all tokens or of each: log-probabilities must be of the distribution that was sampled from.
        entropy: also the entropy, with its gradient.
        arriving: the gradient that backward will bring to `logprobs`, but for one factor that all tokens share: the weights of a loss that
            is linear in them. Gradients are then made in forward, with the logits at hand, and scaled in backward, which raises
            RuntimeError if another gradient arrives. Saves one of the four matrix products of a trained head (Liger, arXiv 2410.10989).
        chunk: tokens at a time; default by the vocabulary and the device, and if that covers all of them the plain way, which keeps logits.
    """
    head = _Head(scale=scale, softcap=softcap, temperature=temperature, entropy=entropy)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        low_rank = None if low_rank is None else (low_rank[0].to(dtype), low_rank[1].to(dtype))
    with torch.autocast(device, enabled=False):
        size = chunk or max(CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["other"]) // weight.shape[0], 1)
        learns = weight.requires_grad or (bias is not None and bias.requires_grad) or low_rank is not None
        low, up = low_rank or (None, None)
        exact = hidden.dtype != torch.float16  # whose small gradients vanish before a scaler's factor arrives
        if arriving is not None and exact and torch.is_grad_enabled() and learns and not entropy:
            return TokenLogprobs(_Linear.apply(hidden, weight, bias, low, up, targets, head, size, arriving.detach()))
        if chunk is None and len(targets) <= size:
            return _plain(hidden, weight, bias, low_rank, targets, head)
        unit = torch.is_grad_enabled() and hidden.requires_grad and not learns and not entropy and softcap is None
        return TokenLogprobs(*_Chunked.apply(hidden, weight, bias, low, up, targets, head, size, unit))


class _Head(NamedTuple):
    scale: float
    softcap: float | None
    temperature: float | Tensor  # of all tokens; or Float "N" of each, and "N 1" where `of` has chosen some
    entropy: bool

    def of(self, rows: slice) -> _Head:
        """The head for these tokens' logits "n V"."""
        return self._replace(temperature=self.temperature[rows, None]) if isinstance(self.temperature, Tensor) else self

    @property
    def slope(self) -> float | Tensor:
        """d z / d (hidden W^T + bias + low up^T), where no cap bends it."""
        return self.scale / self.temperature

    @property
    def plain(self) -> bool:
        """The slope is 1 for all tokens."""
        return not isinstance(self.temperature, Tensor) and self.scale == self.temperature

    def logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """z, a new tensor in at least float32, and the tanh of the cap."""
        raw = F.linear(hidden, weight, bias)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if low is not None and up is not None:
            raw = raw + F.linear(low, up)
        if self.softcap is None:
            return (raw if self.plain else raw * self.slope), None
        bent = torch.tanh(raw * (self.scale / self.softcap))
        return bent * (self.softcap / self.temperature), bent


def _plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None, targets: Tensor, head: _Head
) -> TokenLogprobs:
    z, _ = head.of(slice(None)).logits(hidden, weight, bias, *(low_rank or (None, None)))
    logp = z.log_softmax(-1)
    picked = logp.gather(-1, targets[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1) if head.entropy else None
    return TokenLogprobs(picked, entropy)


class _Gradients:
    """Gradients of hidden states and of a head, summed over chunks of tokens; None where none is needed."""

    def __init__(self, needed: Sequence[bool], inputs: Sequence[Tensor | None], head: _Head, work: torch.dtype) -> None:
        """needed, inputs: For hidden, weight, bias, low, up."""
        self.inputs, self.head = inputs, head
        rows = (True, False, False, True, False)  # hidden and low have a row per token, of the others all tokens' gradients are summed
        self.sums = [
            None if like is None or not asked else torch.empty_like(like) if own else torch.zeros_like(like, dtype=work)
            for asked, like, own in zip(needed, inputs, rows, strict=True)
        ]

    def add(self, rows: slice, dz: Tensor, bent: Tensor | None) -> None:
        """Take in d loss / d z "n V" of the tokens `rows`; bent: the tanh of the cap. Overwrites dz."""
        hidden, weight, _, low, up = self.inputs
        g_hidden, g_weight, g_bias, g_low, g_up = self.sums
        if bent is not None:
            dz.mul_(1 - bent**2)
        if not self.head.plain:
            dz.mul_(self.head.of(rows).slope)
        if g_bias is not None:
            g_bias += dz.sum(0)
        if g_low is not None and up is not None:
            torch.mm(dz.to(up.dtype), up, out=g_low[rows])
        if g_up is not None and low is not None:
            g_up += dz.to(low.dtype).T @ low[rows]
        assert hidden is not None and weight is not None
        dz = dz.to(weight.dtype)
        if g_hidden is not None:
            torch.mm(dz, weight, out=g_hidden[rows])
        if g_weight is not None and g_weight.dtype == dz.dtype:
            g_weight.addmm_(dz.T, hidden[rows])
        elif g_weight is not None:
            g_weight += dz.T @ hidden[rows]

    def cast(self) -> list[Tensor | None]:
        """In the dtypes of the inputs."""
        return [None if g is None or like is None else g.to(like) for g, like in zip(self.sums, self.inputs, strict=True)]


class _Linear(torch.autograd.Function):
    """Makes the gradients of sum_i arriving_i logprob_i in forward; backward brings a multiple of `arriving`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None,
        targets: Tensor, head: _Head, size: int, arriving: Tensor,
    ) -> Tensor:  # fmt: skip
        work = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(targets), dtype=work, device=hidden.device)
        gradients = _Gradients(ctx.needs_input_grad[:5], (hidden, weight, bias, low, up), head, work)
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            target, g = targets[rows, None], arriving[rows, None].to(work)
            z, bent = head.of(rows).logits(hidden[rows], weight, bias, None if low is None else low[rows], up)
            picked, highest = z.gather(1, target), z.amax(1, keepdim=True)
            e = z.sub_(highest).exp_()
            total = e.sum(1, keepdim=True)
            logprobs[rows] = (picked - highest - total.log())[:, 0]
            gradients.add(rows, e.mul_(-g / total).scatter_add_(1, target, g), bent)
        ctx.save_for_backward(arriving)
        ctx.made = [(g, None if like is None else like.dtype) for g, like in zip(gradients.sums, gradients.inputs, strict=True)]
        return logprobs

    @staticmethod
    def backward(ctx: Any, g_logprobs: Tensor) -> tuple[Tensor | None, ...]:
        (arriving,) = ctx.saved_tensors
        largest = arriving.abs().argmax() if len(arriving) else slice(0)
        factor = torch.where(arriving[largest] == 0, 0.0, g_logprobs[largest] / arriving[largest])
        if not torch.allclose(g_logprobs, factor * arriving, rtol=1e-3, atol=1e-6 * float(g_logprobs.abs().max()), equal_nan=True):
            raise RuntimeError("token_logprobs: the gradient that arrives is no multiple of `arriving`; leave `arriving` out for this loss")
        made, ctx.made = ctx.made, None
        return (*[None if g is None else (g * factor).to(dtype) for g, dtype in made], *[None] * 4)


class _Chunked(torch.autograd.Function):
    """Keeps the normalisers of all tokens and makes the logits of a chunk again when its gradient is asked for.

    ahead: the head is frozen (LoRA), so that a token's gradient is its unit gradient W[target] - sum_v p_v W_v times what arrives: that one
    is made in forward, and nothing again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None,
        targets: Tensor, head: _Head, size: int, ahead: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        work = torch.promote_types(hidden.dtype, torch.float32)
        count = len(targets)
        logprobs, normalisers = (torch.empty(count, dtype=work, device=hidden.device) for _ in range(2))
        entropy = torch.empty_like(logprobs) if head.entropy else None
        unit = torch.empty_like(hidden) if ahead else None
        for start in range(0, count, size):
            rows = slice(start, start + size)
            target = targets[rows, None]
            z, _ = head.of(rows).logits(hidden[rows], weight, bias, None if low is None else low[rows], up)
            picked, highest = z.gather(1, target), z.amax(1, keepdim=True)
            z.sub_(highest)
            e = z.exp() if entropy is not None else z.exp_()
            total = e.sum(1, keepdim=True)
            log_total = total.log()
            logprobs[rows] = (picked - highest - log_total)[:, 0]
            normalisers[rows] = (highest + log_total)[:, 0]
            if entropy is not None:
                entropy[rows] = log_total[:, 0] - torch.linalg.vecdot(e, z) / total[:, 0]
            if unit is not None:
                unit[rows] = weight[targets[rows]] - (e / total).to(weight.dtype) @ weight
        ctx.head, ctx.size = head, size
        if unit is not None:
            ctx.save_for_backward(unit)
        else:
            ctx.save_for_backward(hidden, weight, targets, normalisers, bias, low, up, entropy)
        ctx.ahead = ahead
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, g_logprobs: Tensor, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        head = ctx.head
        if ctx.ahead:
            (unit,) = ctx.saved_tensors
            return (unit * (g_logprobs * head.slope)[:, None].to(unit.dtype), *[None] * 8)
        hidden, weight, targets, normalisers, bias, low, up, entropy = ctx.saved_tensors
        gradients = _Gradients(ctx.needs_input_grad[:5], (hidden, weight, bias, low, up), head, normalisers.dtype)
        for start in range(0, len(targets), ctx.size):
            rows = slice(start, start + ctx.size)
            z, bent = head.of(rows).logits(hidden[rows], weight, bias, None if low is None else low[rows], up)
            z.sub_(normalisers[rows, None])
            g = g_logprobs[rows, None]
            if entropy is None or g_entropy is None:
                dz = z.exp_().mul_(-g)
            else:  # dH/dz = -p (log p + H)
                p, weigh = z.exp(), g_entropy[rows, None]
                dz = z.add_(entropy[rows, None]).mul_(-weigh).sub_(g).mul_(p)
            gradients.add(rows, dz.scatter_add_(1, targets[rows, None], g), bent)
        return (*gradients.cast(), *[None] * 4)
