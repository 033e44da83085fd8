"""Drawing a token: one uniform number for each, so that an answer depends on its own seed and on nothing it was batched with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def draw_tokens(
    logits: Float[Tensor, "B V"],
    uniform: Float[Tensor, "B"],
    *,
    temperature: float | Float[Tensor, "B"],
    top_p: float = 1.0,
    top_k: int = 0,
    banned: Sequence[int] = (),
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """Tokens by inverse cumulative distribution of softmax(logits / temperature), and their log-probabilities in the *whole* of it.

    temperature: Of all rows, or of each. 0, of all alone: the likeliest token, its log-probability at temperature 1. top_k, then top_p
    leave the likeliest tokens only, as transformers' warpers do; at least one stays. banned: Tokens that are never drawn. A multiple
    faster than `torch.multinomial` on a CPU.
    """
    logits = logits.float()
    allowed = logits.index_fill(-1, torch.tensor(banned, device=logits.device), -torch.inf) if banned else logits
    each = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    if not isinstance(each, Tensor) and not each:
        chosen = allowed.argmax(-1)
        return chosen, log_probability(logits, chosen)
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).div_(each).exp_()
    kept = allowed
    if 0 < top_k < logits.shape[-1]:
        kept = kept.where(kept >= kept.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        kept = nucleus(kept / each, top_p)
    chosen, total = inverse_cumulative(weights if kept is logits else weights.where(kept > -torch.inf, 0.0), uniform)
    if kept is not logits:
        total = weights.sum(-1)
    return chosen, (logits.gather(-1, chosen[:, None]) - largest)[:, 0] / temperature - total.log().float()


BLOCK = 128
"""Weights that are summed before anything is accumulated: sums are parallel and float32, running sums neither."""


def inverse_cumulative(weights: Float[Tensor, "B V"], uniform: Float[Tensor, "B"]) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """The first place whose running sum exceeds uniform * (the whole sum), so never one of weight 0; and the whole sum, Float64.

    uniform: in [0, 1). Found in the running sum of blocks first, then within the block.
    """
    size = weights.shape[-1]
    if size <= 16 * BLOCK:
        heaped = weights.cumsum(-1, dtype=torch.float64)
        total = heaped[:, -1]
        place = torch.searchsorted(heaped, (uniform.to(heaped) * total)[:, None], right=True)
        return place[:, 0].clamp(max=size - 1), total
    if size % BLOCK:
        weights = F.pad(weights, (0, -size % BLOCK))
    blocks = weights.unflatten(-1, (-1, BLOCK))
    heaped = F.pad(blocks.sum(-1).double().cumsum(-1), (1, 0))
    total = heaped[:, -1]
    at = uniform.to(heaped)[:, None] * total[:, None]
    block = (torch.searchsorted(heaped, at, right=True) - 1).clamp(max=blocks.shape[1] - 1)
    below, above = heaped.gather(1, block), heaped.gather(1, block + 1)
    # Relative, because the sum of the block in float64 is not quite its sum in float32; and below 1 also after rounding.
    share = ((at - below) / (above - below)).clamp(max=1 - 2**-53)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(within, share * within[:, -1:], right=True)
    return (block * BLOCK + place)[:, 0].clamp(max=size - 1), total


def nucleus(logits: Float[Tensor, "B V"], top_p: float) -> Float[Tensor, "B V"]:
    """Logits with -inf outside the fewest likeliest tokens that hold at least `top_p` of the probability (arXiv 1904.09751)."""
    falling, order = logits.sort(dim=-1, descending=True)
    shares = falling.softmax(-1)
    before = shares.cumsum(-1) - shares
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)


def log_probability(logits: Float[Tensor, "B V"], chosen: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """log softmax(logits)[chosen]."""
    return logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
