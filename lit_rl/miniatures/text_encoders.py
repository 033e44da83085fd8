"""Random text encoders of image pipelines, with tokenizers of one token per character."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel, T5EncoderModel, T5Tokenizer


def _byte_alphabet() -> list[str]:
    """The 256 printable characters by which byte-level BPE writes bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def clip_tokenizer(length: int) -> CLIPTokenizer:
    """CLIP's tokenizer with one token per byte and no merges: ids 0..255 inside a word, 256..511 at its end, then start and end of text."""
    from transformers import CLIPTokenizer

    letters = _byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)


def clip_encoder(hidden: int, length: int, *, projection: bool) -> PreTrainedModel:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    start, end = 512, 513
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=1.0)
    return model.eval()


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer over single printable ASCII characters: <pad> 0, </s> 1, <unk> 2, the word mark 3, then "!" to "~"."""
    from transformers import T5Tokenizer

    pieces = ["▁", *(chr(code) for code in range(33, 127))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def t5_encoder(hidden: int) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=98,
        d_model=hidden,
        d_kv=hidden // 2,
        d_ff=2 * hidden,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model: Any = T5EncoderModel(config)
    # T5 knows places by this bias alone, which is drawn so small that "47" and "74" would give the same tokens in another order.
    torch.nn.init.normal_(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=4.0)
    return model.eval()
