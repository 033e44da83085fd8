"""Miniatures of language model families that `build_lm` does not know, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from lit_rl.miniatures.lm import char_tokenizer

ALPHABET = "0123456789=#? "
SIZES: dict[str, Any] = dict(
    vocab_size=20,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def save_lm(folder: Path, family: str, causal: str | None = None, **settings: Any) -> Path:
    """A random model of `transformers.<family>Config`, with weights that matter. causal: its class; default <family>ForCausalLM."""
    config = getattr(transformers, f"{family}Config")
    known = {name: value for name, value in SIZES.items() if name in (*config().to_dict(), *config.attribute_map)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = getattr(transformers, causal or f"{family}ForCausalLM")(config(**known | settings))
    lm.save_pretrained(folder)
    char_tokenizer(ALPHABET, chat=False, max_length=64).save_pretrained(folder)
    return folder
