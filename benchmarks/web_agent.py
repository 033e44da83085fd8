"""GRPO in a real browser: how often a miniature clicks right on held-out seeds of a page of MiniWoB++, before and after.

    python -m benchmarks.web_agent [--page click-tab] [--iterations 20] [--seed 0]

A random Qwen3-VL of 0.1 M parameters sees the page and its instruction, such as "Click on Tab #2.", and says the number of one of nine
places, where it clicks: one turn an episode, one token a turn. It begins with nothing learned, not even to say a number. Prints success on
held-out seeds, sampled at temperature 1, before and after, and CPU seconds of all processes, the browser's included, most of which are
spent in it. A click on the same tab of each page is right on a third of them; on the page click-test a click on the same place is right
on more than half, so that success tells less there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path

import lightning as L
import torch

from benchmarks.worlds import held
from datamodules.agent_tasks import AgentTasks
from lit_rl.agents.codecs import Codec, action_at
from lit_rl.agents.episodes import Manner
from lit_rl.agents.play import Episodes
from lit_rl.agents.screens import Screen
from lit_rl.envs.actions import Action, ActionError, Kind
from lit_rl.envs.miniwob import HEIGHT, WIDTH, MiniWoBs
from lit_rl.methods.agent_grpo import AgentGRPO
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.rollouts.hf import HFEngine

PLACES = "012345678"
WORDS = ("user\n", "assistant\n", "Click on Tab #", "Click the button.")
HEAD = HEIGHT - WIDTH
"""Pixels of a page that hold the instruction, above the square of the task."""


class Places(Codec):
    """The number of one of nine places, rows first: a click on the middle of a ninth of the square below the instruction."""

    def __init__(self) -> None:
        super().__init__("pixels")

    def system(self, kinds: Collection[Kind], screen: Screen | None, max_turns: int) -> str:
        return ""

    def read(self, text: str, screen: Screen | None) -> Action:
        if text not in PLACES or len(text) != 1:
            raise ActionError(f"{text!r} is no place; there are 0 to 8")
        down, across = divmod(int(text), 3)
        return action_at("click", ((across + 0.5) * WIDTH / 3, HEAD + (down + 0.5) * WIDTH / 3))

    def write(self, action: Action, screen: Screen | None) -> str:
        assert action.x is not None and action.y is not None
        return str(int((action.y - HEAD) * 3 / WIDTH) * 3 + int(action.x * 3 / WIDTH))


def learner(folder: Path, *, tasks: int = 8, group_size: int = 8, lr: float = 5e-3, seed: int = 0) -> AgentGRPO:
    """A method with a random model, which is written into a folder."""
    model = build_vlm(
        folder,
        family="qwen3_vl",
        characters=f"\n.{PLACES}",
        words=WORDS,
        hidden=32,
        layers=1,
        vision_hidden=32,
        vision_layers=1,
        max_side=96,
        seed=seed,
    )
    one = Sampling(max_new_tokens=1)
    return AgentGRPO(
        VisionLanguageModel(str(model), train_vision=True),
        prompts_per_iteration=tasks,
        group_size=group_size,
        episodes=Episodes(worlds=MiniWoBs(), codec=Places(), manner=Manner(max_turns=1, history=0), concurrency=8, patience_s=30.0),
        answers=Answers(engine=HFEngine(), sampling=one, eval_sampling=one),
        optimizer=partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        lr_scheduler=partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1, total_iters=10),
        seed=seed,
    )


def tasks_of(folder: Path, page: str, held_out: int) -> AgentTasks:
    """Tasks of a page: training ones with seeds of the run, held-out ones with their own."""
    rows = {"train": [{"id": page}], "val": [{"id": f"{page}-{seed}", "seed": seed} for seed in range(3_000_000, 3_000_000 + held_out)]}
    for split, of_split in rows.items():
        lines = (json.dumps({**row, "params": {"page": page}}) + "\n" for row in of_split)
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return AgentTasks(train=str(folder / "train.jsonl"), val=str(folder / "val.jsonl"), eval_batch_size=held_out)


def train(folder: Path, method: AgentGRPO, tasks: AgentTasks, iterations: int) -> tuple[float, float]:
    """Success on held-out seeds before and after."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=iterations,
        check_val_every_n_epoch=iterations,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        gradient_clip_val=1.0,
        **quiet,
    )
    [before] = run.validate(method, datamodule=tasks, verbose=False)
    run.fit(method, datamodule=tasks)
    return before["val/accuracy"], float(run.callback_metrics["val/accuracy"])


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", default="click-tab")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = held().cpu
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        method = learner(folder / "model", seed=args.seed)
        before, after = train(folder, method, tasks_of(folder, args.page, args.held_out), args.iterations)
    print(f"{args.page}, {args.iterations * 64} episodes: {before:.2f} -> {after:.2f} of {args.held_out} held-out seeds")
    print(f"CPU seconds: {held().cpu - began:.0f}")


if __name__ == "__main__":
    main()
