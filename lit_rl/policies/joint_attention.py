"""SD3's attention over image and text where prompts of one forward have different lengths."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn


class MaskedJointAttention:
    """`JointAttnProcessor2_0`, in which nobody looks at text that only fills up: each row is computed as it would be alone.

    `attention_mask`, from the transformer's `joint_attention_kwargs`: Bool "B L", True for real text; None where all of it is.
    """

    def __init__(self) -> None:
        self.stock: Callable[..., Tensor | tuple[Tensor, Tensor]] = JointAttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image tokens "B N D", and text tokens "B L D" where there are some."""
        if encoder_hidden_states is None or attention_mask is None:
            return self.stock(attn, hidden_states, encoder_hidden_states)
        text, pixels = encoder_hidden_states, hidden_states.shape[1]
        image = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        words = _heads(attn, text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, words))
        seen = F.pad(attention_mask, (pixels, 0), value=True)[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        text = mixed[:, pixels:]
        return attn.to_out[1](attn.to_out[0](mixed[:, :pixels])), text if attn.context_pre_only else attn.to_add_out(text)


def mask_text(transformer: nn.Module) -> None:
    """Have every attention of an SD3 transformer take a mask of its text."""
    masked = methodcaller("set_processor", MaskedJointAttention())
    for module in transformer.modules():
        if isinstance(module, Attention):
            masked(module)


def _heads(attn: Attention, x: Tensor, projections: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...]) -> list[Tensor]:
    """Query, key and value "B H N d", the first two normed where the model norms them."""
    made = [layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in projections]
    return [part if norm is None else norm(part) for part, norm in zip(made, (*norms, None))]
