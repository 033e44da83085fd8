"""Runs of agents in the processes of a scale test: episodes of different numbers of turns on each process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from copies import every_step
from digit_world import agent, digit_tasks
from scenarios import STRATEGIES
from toy_text import trainer

from callbacks.rng_state import RngState
from lit_rl.policies.weights.shards import gathered
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, RolloutEngine, Sample, Sampling
from lit_rl.seeding import uniforms


class Elsewhere(RolloutEngine):
    """Answers of a script, as a server would give them: no weights of the process are asked."""

    has_copy = True

    async def answer(self, request: Request, sampling: Sampling) -> Sample:
        digits = self.policy.encode("0777123=")
        place = int(uniforms([request.key], 1)[0, 0] * len(digits))
        return Sample([digits[place], self.policy.stop_ids[0]], [-1.4, -0.1], "stop")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        raise AssertionError("agents ask one by one")


def fit(model: str, out: str, strategy: str, *, parts: int = 1, save: bool = False, ckpt_path: str | None = None) -> dict[str, Any]:
    """Two iterations; every trained weight, whole, is written into out/end.pt. save: The state after each step is in out/step=N.ckpt."""
    torch.manual_seed(0)
    at = Path(out)
    at.mkdir(parents=True, exist_ok=True)
    answers = Answers(engine=Elsewhere(), sampling=Sampling(max_new_tokens=2), old_logprobs="recompute")
    learner = agent(Path(model), answers=answers, prompts_per_update=4)
    run = trainer(
        max_epochs=2,
        limit_val_batches=1,
        accumulate_grad_batches=parts,
        strategy=STRATEGIES[strategy](),
        devices=1 if strategy == "one" else 2,
        callbacks=[RngState(), every_step(at)] if save else [RngState()],
        enable_checkpointing=save,
    )
    rank = at / f"rank{run.global_rank}"
    rank.mkdir(exist_ok=True)
    run.fit(learner, datamodule=digit_tasks(rank), ckpt_path=ckpt_path)
    end = dict(gathered(learner, {name for name, p in learner.named_parameters() if p.requires_grad}))
    if run.is_global_zero:
        torch.save(end, at / "end.pt")
    metrics = {name: value for name, value in learner.rollout_metrics.items() if "seconds" not in name}
    metrics["val/accuracy"] = float(run.callback_metrics["val/accuracy"])
    return {"steps": run.global_step, "metrics": metrics, "rows": len(learner.rollout)}
