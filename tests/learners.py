"""Miniatures that learn: what a method or one of its parts must reach on the task of `toy_text`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from toy_text import Digits, Sorted, model_folder, policy, trainer

from callbacks.reward_scoring import RewardScoring
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.sft import SFT
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling

SHORT = Sampling(max_new_tokens=5)


def demonstrated(root: Path) -> Path:
    """A model in `root` after supervised learning: about half of its answers are right."""
    random = policy(model_folder(root / "random", hidden=64, layers=2))
    adam = partial(torch.optim.AdamW, lr=2e-3)
    method = SFT(random, prompts_per_iteration=128, prompts_per_update=32, optimizer=adam, answers=Answers(sampling=SHORT))
    trainer(max_epochs=8, check_val_every_n_epoch=100).fit(method, datamodule=Digits(prompts=128))
    (root / "sft").mkdir()
    method.policy.save(root / "sft", {name: p.detach() for name, p in method.policy.trainable()})
    return root / "sft"


def rewards_rise(folder: Path, method: type[GRPO], *, by: float = 0.15, **settings: Any) -> None:
    """Within forty iterations the share of held-out prompts that are answered right rises by `by`; the run ends when it has."""
    learner = method(
        policy(folder),
        prompts_per_iteration=32,
        group_size=8,
        answers=Answers(sampling=SHORT, eval_sampling=SHORT, chunk=256),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
        **settings,
    )
    data = Digits(prompts=600, held_out=200)
    before = trainer().validate(learner, datamodule=data, verbose=False)[0]["val/exact"]
    risen = EarlyStopping("val/exact", mode="max", stopping_threshold=before + by, patience=100)
    run = trainer(max_epochs=40, check_val_every_n_epoch=10, callbacks=[RewardScoring({"sorted": Sorted()}), risen])
    run.fit(learner, datamodule=data)
    assert run.callback_metrics["val/exact"] > before + by
