"""Sorting digits as text: a task that a miniature language model learns in seconds, with everything a method asks of a datamodule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.reward_scoring import RewardScoring
from datamodules.base import PromptDataModule
from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.rewards.base import TextReward
from lit_rl.seeding import generator
from lit_rl.types import Info

ALPHABET = "0123456789=#? "


class Sorted(TextReward):
    """1 for exactly the digits of the prompt in order."""

    outputs = ("exact",)

    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {"exact": torch.tensor([float(text == row["answer"]) for text, row in zip(media, info, strict=True)])}


class Digits(PromptDataModule):
    """Prompts "2710=", answers "0127"; rejected answers have the digits falling."""

    def __init__(self, digits: int = 3, prompts: int = 64, held_out: int = 32, **kwargs: Any) -> None:
        order = torch.randperm(10**digits, generator=generator("digits", digits)).tolist()[: prompts + held_out]
        numbers = [f"{number:0{digits}d}" for number in order]
        rows = [MappingProxyType({"prompt": f"{number}=", "answer": "".join(sorted(number))}) for number in numbers]
        super().__init__(rows[:prompts], rows[prompts:], eval_batch_size=16, **kwargs)
        self.max_prompt_length, self.max_length = digits + 1, 2 * digits + 2

    @property
    def tokenizer(self) -> Any:
        return self._trainer().lightning_module.policy.tokenizer

    def prompt_ids(self, info: Info) -> list[int]:
        return list(self.tokenizer(info["prompt"]).input_ids)

    def supervised_ids(self, info: Info) -> tuple[list[int], list[bool]]:
        prompt, answer = self.prompt_ids(info), [*self.tokenizer(info["answer"]).input_ids, self.tokenizer.eos_token_id]
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def pair_ids(self, info: Info) -> tuple[list[int], list[int], list[int]]:
        end = [self.tokenizer.eos_token_id]
        chosen, rejected = (list(self.tokenizer(text).input_ids) + end for text in (info["answer"], info["answer"][::-1]))
        return self.prompt_ids(info), chosen, rejected


def model_folder(folder: Path, **settings: Any) -> Path:
    return build_lm(folder, **{"characters": ALPHABET, "chat": False, "hidden": 32, "layers": 1, "heads": 2} | settings)


def policy(folder: Path, **settings: Any) -> CausalLM:
    return CausalLM(str(folder), **settings)


def weights(method: L.LightningModule) -> Tensor:
    """All trained weights of a method's policy in one vector."""
    return torch.cat([p.detach().flatten() for _, p in method.policy.trainable()])


def weights_of(folder: Path) -> Tensor:
    """Those of a policy that is loaded from `folder`."""
    loaded = policy(folder)
    loaded.load()
    return torch.cat([p.detach().flatten() for _, p in loaded.trainable()])


def trainer(**kwargs: Any) -> L.Trainer:
    quiet = {"devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = kwargs.pop("callbacks", [RewardScoring({"sorted": Sorted()})])
    return L.Trainer(accelerator="cpu", callbacks=callbacks, num_sanity_val_steps=0, **quiet | kwargs)
