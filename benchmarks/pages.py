"""Episodes a second of MiniWoB++ inside the trainer, beside miniwob's own gym environment.

    python -m benchmarks.pages [--together 1 4 16] [--episodes 32] [--rounds 3]

An episode is a page click-test-2 by its seed, a screenshot, a click at random, another screenshot and the page's reward. Ours are those of
AgentGRPO in a run of Lightning: tasks, prompts with a picture, an engine that says a random click at once, trajectories as rows;
the clock is that of the phase `rollout`. Theirs is one selenium browser, stepped with clicks at random; it shows its screen with each
observation. Both take turns, and the ratio is that of the medians. Needs chromium-headless-shell, chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.base import Method, RLCallback
from datamodules.agent_tasks import AgentTasks
from lit_rl.agents.codecs import Compact
from lit_rl.agents.episodes import Manner
from lit_rl.agents.play import Episodes
from lit_rl.envs.miniwob import MiniWoBs
from lit_rl.methods.agent_grpo import AgentGRPO
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Request, RolloutEngine, Sample, Sampling

PAGE, BINS = "click-test-2", 8
DRIVER, BROWSER = "chromedriver", "chromium"


class Clicks(RolloutEngine):
    """An engine that says a click at random, at once."""

    has_copy = True

    def setup(self, policy: TokenPolicy, *, rank: int, world_size: int) -> None:
        super().setup(policy, rank=rank, world_size=world_size)
        assert isinstance(policy, VisionLanguageModel)
        self.tokenizer = policy.tokenizer

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        found = []
        for request in requests:
            draws = random.Random(repr(request.key))
            ids = self.tokenizer.encode(f"click {draws.randrange(BINS)} {draws.randrange(BINS)}", add_special_tokens=False)
            found.append(Sample(ids, [-1.0] * len(ids), "stop"))
        return found

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> Future[list[Sample]]:
        future: Future[list[Sample]] = Future()
        future.set_result(self.generate(requests, sampling))
        return future


class RolloutSeconds(RLCallback):
    """Seconds of the phase `rollout` of each iteration, and the episodes that were lost in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.lost = 0

    def on_phase_start(self, trainer: L.Trainer, module: Method, name: str) -> None:
        if name == "rollout":
            self._start = time.perf_counter()

    def on_phase_end(self, trainer: L.Trainer, module: Method, name: str) -> None:
        if name == "rollout":
            self.seconds.append(time.perf_counter() - self._start)

    def on_trajectories(self, trainer: L.Trainer, module: Method, trajectories: Sequence[Any]) -> None:
        self.lost += sum(not trajectory.status.counts for trajectory in trajectories)


def ours(folder: Path, *, together: int, episodes: int) -> float:
    """Episodes per second of an iteration after the first, whose browser is there. Raises SystemExit where episodes were lost."""
    tasks, model = folder / "tasks.jsonl", folder / "model"
    if not model.is_dir():
        build_vlm(model, family="qwen3_vl", hidden=32, layers=1, vision_hidden=32, vision_layers=1, max_side=64)
    tasks.write_text(json.dumps({"id": PAGE, "params": {"page": PAGE}, "max_turns": 1}) + "\n")
    played = Episodes(
        worlds=MiniWoBs(browser_episodes=10**6),
        codec=Compact(space=f"bins:{BINS}", prompt=False),
        manner=Manner(history=0),
        concurrency=together,
    )
    method = AgentGRPO(
        VisionLanguageModel(str(model)),
        episodes=played,
        answers=Answers(engine=Clicks(), sampling=Sampling(max_new_tokens=12), old_logprobs="rollout"),
        prompts_per_iteration=1,
        group_size=episodes,
    )
    seconds = RolloutSeconds()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=2, limit_val_batches=0, callbacks=[seconds], **quiet)  # type: ignore[arg-type]
    trainer.fit(method, datamodule=AgentTasks(train=str(tasks)))
    if seconds.lost:
        raise SystemExit(f"{seconds.lost} episodes were lost to the browser: the machine is too busy to measure")
    return episodes / seconds.seconds[-1]


def theirs(episodes: int) -> float:
    """Episodes per second of miniwob's environment, after a first one."""
    import gymnasium
    import miniwob
    import numpy as np
    from miniwob.action import ActionTypes

    gymnasium.register_envs(miniwob)
    env = gymnasium.make(f"miniwob/{PAGE}-v1", disable_env_checker=True)
    draws = random.Random(0)

    def episode(seed: int) -> None:
        env.reset(seed=seed)
        point = np.array([draws.randrange(160), draws.randrange(50, 210)], dtype=np.float32)
        env.step(env.unwrapped.create_action(ActionTypes.CLICK_COORDS, coords=point))  # type: ignore[attr-defined]

    try:
        episode(0)
        start = time.perf_counter()
        for seed in range(1, episodes + 1):
            episode(seed)
        return episodes / (time.perf_counter() - start)
    finally:
        env.close()


def main(argv: Sequence[str] | None = None) -> str:
    """Print the table and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", nargs="+", type=int, default=[1, 4, 16], help="pages at once")
    parser.add_argument("--episodes", type=int, default=32, help="of each round")
    parser.add_argument("--rounds", type=int, default=3, help="times that the sides take turns")
    args = parser.parse_args(argv)
    if not (shutil.which(DRIVER) and shutil.which(BROWSER)):
        raise SystemExit("miniwob's own environment wants Debian's browser: apt-get install chromium chromium-driver")
    os.environ |= {"MINIWOB_CHROME_BINARY": str(shutil.which(BROWSER)), "MINIWOB_CHROMEDRIVER": str(shutil.which(DRIVER))}
    found: dict[int, list[float]] = {together: [] for together in (0, *args.together)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            found[0].append(theirs(args.episodes))
            for together in args.together:
                found[together].append(ours(Path(folder), together=together, episodes=args.episodes))
    table = report(found)
    print(table)
    return table


def report(found: dict[int, list[float]]) -> str:
    """The table. found: Episodes per second of each round, by the pages at once; 0 is the other side."""
    medians = {together: statistics.median(rates) for together, rates in found.items()}
    lines = [f"miniwob's gym environment, 1 browser: {medians[0]:.2f} episodes/s (of {_spread(found[0])})"]
    for together in [together for together in found if together]:
        rate, ratio = f"{medians[together]:.2f} episodes/s (of {_spread(found[together])})", medians[together] / medians[0]
        lines.append(f"in the trainer, {together:2} pages at once: {rate}, ratio {ratio:.2f}")
    return "\n".join(lines)


def _spread(rates: Sequence[float]) -> str:
    return " ".join(f"{rate:.2f}" for rate in rates)


if __name__ == "__main__":
    main()
