"""Sizes of a language model and its tokenizer, compared before any weights are read."""

from __future__ import annotations

from typing import Any

STATIC = ("yarn", "linear")
"""Rotary positions whose `max_position_embeddings` may be that from before they were stretched."""


def positions(config: Any) -> int | None:
    """Tokens that a model has positions for, learned or trained with; None where positions have no end (alibi, states) or none is told."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or getattr(text, "alibi", False):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in (*STATIC, "dynamic"):
        original = rope.get("original_max_position_embeddings") or most
        most = max(most, int(original * (rope.get("factor") or 1)))
    padding = getattr(text, "pad_token_id", None)
    offset = "roberta" in text.model_type or "data2vec" in text.model_type  # positions begin after the padding's
    return most - (padding or 0) - 1 if offset else most
