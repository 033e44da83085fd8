"""From-config miniatures of language models in transformers format: random weights, a tokenizer of single characters, nothing downloaded.

python -m lit_rl.miniatures.lm FOLDER [--family qwen2 --hidden 64 --layers 2 ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["qwen2", "qwen3", "llama", "deepseek"]

PRINTABLE = "".join(chr(code) for code in range(32, 127)) + "\n"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END = "<|endoftext|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def build_lm(
    folder: str | Path,
    *,
    family: Family = "qwen2",
    characters: str = PRINTABLE,
    vocab_size: int | None = None,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    max_length: int = 2048,
    tied: bool = False,
    chat: bool = True,
    seed: int = 0,
) -> Path:
    """Save a random language model with its tokenizer and return its folder.

    family: Qwen2 (biases on q, k, v), Qwen3 (normed queries and keys), Llama, DeepSeek (V3: latent attention, experts).
    characters: One token each, after <pad>, <|endoftext|> and, with `chat`, the marks of three roles. vocab_size: More rows than tokens,
    to weigh what a large vocabulary costs. kv_heads: Default half the heads. tied: The output layer is the embedding.
    """
    tokenizer = char_tokenizer(characters, chat=chat, max_length=max_length)
    sizes: dict[str, Any] = {
        "vocab_size": max(vocab_size or 0, len(tokenizer)),
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or max(1, heads // 2),
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tied,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(family, sizes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _model(family: Family, sizes: dict[str, Any]) -> PreTrainedModel:
    import transformers

    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    if family == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    if family == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=head))
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, head_dim=head))
    small = {
        "kv_lora_rank": head,
        "q_lora_rank": 2 * head,
        "qk_rope_head_dim": head // 2,
        "qk_nope_head_dim": head // 2,
        "v_head_dim": head,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": sizes["hidden_size"],
    }
    sizes = sizes | {"num_key_value_heads": sizes["num_attention_heads"]}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **small, **experts, first_k_dense_replace=1))


def char_tokenizer(characters: str, *, chat: bool, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, as every family's own tokenizer class reads it: one token per ASCII character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(characters)[0][0]
    special = ["<pad>", END, *(ROLES if chat else ())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *dict.fromkeys(written)])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token=END,
        additional_special_tokens=list(ROLES) if chat else [],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(build_lm, as_positional=True)
