"""Miniature language models that every stock loader takes."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rl.miniatures.lm import PRINTABLE, Family, build_lm


@pytest.mark.parametrize("family", get_args(Family))
def test_text_survives_its_tokenizer_and_the_model_reads_it(family: Family, tmp_path: Path) -> None:
    folder = build_lm(tmp_path, family=family, hidden=32)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PRINTABLE).input_ids
    assert len(ids) == len(set(ids)) == len(PRINTABLE) and tokenizer.decode(ids) == PRINTABLE
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_small_alphabet_and_a_large_vocabulary(tmp_path: Path) -> None:
    folder = build_lm(tmp_path, characters="0123456789+=#? ", chat=False, vocab_size=1000, hidden=32)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == 17 and model.config.vocab_size == 1000
    assert tokenizer.chat_template is None and tokenizer.decode(tokenizer("# 12").input_ids) == "# 12"
