"""Sizes of a language model and its tokenizer, compared before any weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_rl.errors import ConfigError
from lit_rl.policies.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STATIC = ("yarn", "linear")
"""Rotary positions whose `max_position_embeddings` may be that from before they were stretched."""


def positions(config: PreTrainedConfig) -> int | None:
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


def read_config(pretrained: str, **source: str | bool | None) -> PreTrainedConfig | None:
    """The settings of a model in a folder or hub repository, without its weights; None where they cannot be read, which loading tells."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(pretrained, **source)
    except (OSError, ValueError):
        return None


def check_vocabulary(config: PreTrainedConfig, tokenizer: Tokenizer, stop_ids: Sequence[int], *, pretrained: str) -> None:
    """Raise ConfigError where the tokenizer, or what ends an answer, has ids that the embedding has no row for.

    Special tokens that the chat template does not write, such as an image's in a model of text, may lie beyond it: no text has them.
    """
    size = config.get_text_config().vocab_size
    stops = [i for i in stop_ids if not 0 <= i < size]
    if stops:
        raise ConfigError(
            f"pretrained: {pretrained!r} ends answers at token {stops[0]}, and its embedding (vocab_size) has {size} rows: "
            "set eos_token_id in its generation_config.json and tokenizer_config.json to a token that it has"
        )
    special, template = set(tokenizer.all_special_tokens), str(tokenizer.chat_template or "")
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= size and (token not in special or token in template)}
    if beyond:
        token, largest = max(beyond.items(), key=lambda entry: entry[1])
        raise ConfigError(
            f"pretrained: {pretrained!r} has a tokenizer of {largest + 1} tokens (the last one is {token!r}) and an embedding "
            f"(vocab_size) of {size}: take the tokenizer that belongs to the model, or give "
            "the model more rows with transformers' resize_token_embeddings"
        )


def check_length(config: PreTrainedConfig, longest: int, *, pretrained: str, what: str, remedy: str) -> None:
    """Raise ConfigError where `longest` tokens have no positions in a model: learned ones end there, others were never trained further."""
    most = positions(config)
    if most is not None and longest > most:
        raise ConfigError(
            f"{what} {longest} tokens, and pretrained: {pretrained!r} has {most} positions (max_position_embeddings in its config.json): "
            f"{remedy}, or, if its positions are rotary and it is to go beyond them, stretch them there (rope_scaling) or raise that number"
        )


def check_same_tokens(tokenizer: Tokenizer, other: Tokenizer, *, key: str, pretrained: str) -> None:
    """Raise ConfigError where `other` means something else by the ids of `tokenizer`."""
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    odd = next((token for token, i in sorted(mine.items(), key=lambda entry: entry[1]) if theirs.get(token) != i), None)
    if odd is not None:
        found = f"has {theirs[odd]}" if odd in theirs else "does not know it"
        raise ConfigError(
            f"{key}: {pretrained!r} reads other tokens than the policy (token {odd!r} is {mine[odd]} to the policy; it {found}): "
            "take a model with the policy's tokenizer"
        )
