"""A reward model: one number for a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import TextReward
from lit_rl.types import Info

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class ModelReward(TextReward):
    """`reward_model` = what a sequence-classification model of transformers says of prompt and answer.

    The conversation, with the answer as its last turn, goes through the model's own chat template; a prompt that is a string is what a user
    says there. A tokenizer without a template reads prompt and answer as one text. Images of a prompt are left out.

    Args:
        pretrained: Folder, or hub id.
        name: Of the score.
        batch_size: Answers per forward; they are sorted by length.
        max_length: Tokens; longer conversations lose their beginning, and are counted. Default: what the tokenizer says, and what the model
            has positions for, 4096 at most.
        device: E.g. `cuda:1`; default: that of the training process.
        dtype: Of the weights.
        label: Which of several outputs is the score.
        chat_template_kwargs: For the template.
        trust_remote_code: Run Python code that comes with the model.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        name: str = "reward_model",
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        label: int | None = None,
        chat_template_kwargs: dict[str, object] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        folder = Path(pretrained).expanduser()
        if not (folder / "config.json").is_file() and (folder.exists() or pretrained.startswith(("/", ".", "~"))):
            raise ConfigError(f"pretrained: {pretrained!r} is no folder of a transformers model; give one, or a hub id like owner/name")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self.pretrained = str(folder) if folder.exists() else pretrained
        self.device, self.dtype = device, getattr(torch, dtype)
        self.outputs = (name,)
        self.batch_size, self.max_length, self.label = batch_size, max_length, label
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.trust_remote_code = trust_remote_code
        self._model: PreTrainedModel | None = None
        self._cut = 0

    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        """Read the weights. Raises ConfigError when `pretrained` holds no such model."""
        if self._model is not None:
            return
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        options = {"trust_remote_code": self.trust_remote_code}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.pretrained, **options)
            self._limit = self._longest(AutoConfig.from_pretrained(self.pretrained, **options).get_text_config())
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.pretrained, dtype=self.dtype, output_loading_info=True, **options
            )
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(f"pretrained: {self.pretrained!r} cannot be read as a sequence-classification model: {error}") from error
        if found["missing_keys"]:  # they would be random numbers, and so would the scores
            raise ConfigError(f"pretrained: {self.pretrained!r} is no reward model: it has no {', '.join(sorted(found['missing_keys']))}")
        labels = model.config.num_labels
        if labels > 1 and self.label is None:
            raise ConfigError(f"{self.pretrained} has {labels} outputs, {model.config.id2label}: set label to the one that is the score")
        if self.label is not None and not 0 <= self.label < labels:
            raise ConfigError(f"label={self.label}: {self.pretrained} has outputs 0 ... {labels - 1}")
        self._model = model.eval().requires_grad_(False).to(self.device or device)

    def _longest(self, config: PreTrainedConfig) -> int:
        """Tokens of a conversation at most. Raises ConfigError where the model has no rows for its tokens, or no positions for them."""
        tokens, template = self._tokenizer.get_vocab(), str(self._tokenizer.chat_template or "")
        special = {token for token in self._tokenizer.all_special_tokens if token not in template}  # of images, perhaps
        largest = max(i for token, i in tokens.items() if token not in special)
        if largest >= config.vocab_size:
            raise ConfigError(
                f"pretrained: {self.pretrained!r} has a tokenizer of {largest + 1} tokens and an embedding (vocab_size) of "
                f"{config.vocab_size}: take the tokenizer that belongs to the model"
            )
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and "roberta" in config.model_type:  # the first positions are the padding's
            most -= (config.pad_token_id or 0) + 1
        if most is not None and self.max_length is not None and self.max_length > most:
            raise ConfigError(f"max_length={self.max_length}: {self.pretrained!r} has {most} positions; set it to at most that")
        return self.max_length or min(self._tokenizer.model_max_length, 4096, most or 4096)

    def counters(self) -> Mapping[str, float]:
        """Total of `cut`: conversations that lost their beginning."""
        return {"cut": float(self._cut)}

    @torch.no_grad()
    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """One forward per `batch_size` conversations, sorted by length."""
        if self._model is None:
            self.setup(rank=0, world_size=1, device="cpu")
        ids = [self._ids(row["prompt"], text) for row, text in zip(info, media, strict=True)]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = torch.empty(len(ids))
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            scores[rows] = self._forward([ids[i] for i in rows])
        return {self.outputs[0]: scores}

    def _ids(self, prompt: str | Sequence[Mapping[str, object]], answer: str) -> list[int]:
        if self._tokenizer.chat_template is None:
            opening = prompt if isinstance(prompt, str) else "\n".join(_said(message) for message in prompt)
            ids = list(self._tokenizer(opening + answer).input_ids)
            if len(ids) > 1 and ids[0] == ids[1] == self._tokenizer.bos_token_id:  # the text holds the one that a tokenizer adds
                ids = ids[1:]
        else:
            given = (
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [m | {"content": _said(m)} for m in map(dict, prompt)]
            )
            begun = _said(given.pop()) if given[-1]["role"] == "assistant" else ""
            turns = [*given, {"role": "assistant", "content": begun + answer}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, **self.chat_template_kwargs)
            ids = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        self._cut += len(ids) > self._limit
        return ids[-self._limit :]

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Float32 "B" on the CPU."""
        padding = self._padding(rows)
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        assert self._model is not None, "score sets it up"
        self._model.config.pad_token_id = padding
        device = self._model.device
        logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()
        return logits[:, self.label or 0]

    def _padding(self, rows: Sequence[Sequence[int]]) -> int:
        """A token that is in none of the rows: decoders read the score at the last token that is not padding, often an end of text."""
        used = {token for row in rows for token in row}
        own = self._tokenizer.pad_token_id
        return own if own is not None and own not in used else next(i for i in range(len(used) + 1) if i not in used)


def _said(message: Mapping[str, object]) -> str:
    """The words of a message, whose content may have images among them."""
    content = message.get("content") or ""
    return "".join(str(part.get("text", "")) for part in content) if isinstance(content, list) else str(content)
