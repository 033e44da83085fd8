"""GRPO of agents: a policy acts in a world turn by turn, and its episodes are compared with others of the same task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_rl.agents.episodes import Trajectory
from lit_rl.agents.numbers import trajectory_metrics
from lit_rl.agents.play import Episodes, jobs_of
from lit_rl.agents.rows import rollout_of, task_of
from lit_rl.checkpoints.options import options_of
from lit_rl.credit.groups import total_reward
from lit_rl.credit.weights import Aggregation
from lit_rl.errors import ConfigError
from lit_rl.methods.grpo import GRPO
from lit_rl.modules.evaluation import all_prompts, summaries
from lit_rl.modules.media import checked
from lit_rl.policies.base import TokenPolicy
from lit_rl.replay.pairs import sibling_numbers
from lit_rl.replay.sources import PromptSource, TaskSource
from lit_rl.rollouts.base import Sampling
from lit_rl.seeding import Key
from lit_rl.types import Prompts, TokenRollout


class EndOfWorlds(L.Callback):
    """Gives worlds back where a run ends with an error or by Ctrl-C: Lightning does not call a module's teardown then."""

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.episodes.close()


class AgentGRPO(GRPO):
    """Multi-turn GRPO: a trajectory has one reward and one vote, and its advantage is that of each of its turns (arXiv 2402.03300).

    One row is one turn: the prompt as the policy saw it, and the tokens that it sampled. Episodes that were lost to the infrastructure
    are in no statistic and in no loss. Rewards are the world's; none is asked of a callback.

    Args:
        policy: The model that is trained. See `GRPO`.
        episodes: Worlds and settings of the episodes.
        aggregation: `traj-mean`: every trajectory weighs the same whatever its turns; `token-mean`: every token; `dr-grpo`: tokens
            over a constant length.
        temperature_increment: Sibling n of a group (0, 1, ...) is sampled, and trained, at `answers.sampling.temperature` + n times this.
        kwargs: See `GRPO`.
    """

    samples = "turns"
    sources: Sequence[Callable[..., PromptSource]] = (TaskSource,)
    datamodules = "datamodules.agent_tasks.AgentTasks"
    stored_with: Sequence[str] = ("temperature_increment",)

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        episodes: Episodes | None = None,
        aggregation: Aggregation = "traj-mean",
        temperature_increment: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, aggregation=aggregation, **kwargs)
        if temperature_increment < 0:
            raise ConfigError(f"model.temperature_increment={temperature_increment} must not be negative; 0.0 is one temperature for all")
        self.temperature_increment = temperature_increment
        self.episodes = episodes or Episodes()
        self.evaluated_episodes: list[Trajectory] = []
        if self.dynamic_sampling is not None or self.answers.asynchronous:
            raise ConfigError(
                "model.dynamic_sampling and model.answers.asynchronous are not for agents, whose turns depend on each other: leave them out"
            )

    def refuse_alone(self) -> None:
        """A single trajectory of a task has advantage 0: a trial of the worlds, not a training."""
        rank_zero_warn("model.group_size=1: every trajectory has advantage 0, so nothing is learned; use 4 to 16 to train")

    # ------------------------------------------------------------------ life
    def needs_rewards(self) -> bool:
        return False

    def configure_callbacks(self) -> list[L.Callback]:
        return [*super().configure_callbacks(), EndOfWorlds(self.episodes)]

    def check_parts(self, stage: str) -> None:
        """Also starts what the worlds share, so that a missing browser or key is told before any model is loaded."""
        super().check_parts(stage)
        self.source(TaskSource).check_tasks(self.episodes.worlds.check)
        self.episodes.start()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._check_engine()

    def _check_engine(self) -> None:
        """Raise ConfigError for engines whose forwards other processes would wait for: each process plays as many turns as it takes."""
        engine = self.answers.engine
        sharded = any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in self.policy.parameters())
        if sharded and not engine.has_copy:
            raise ConfigError(
                f"model.answers.engine={type(engine).__name__} answers from weights that are cut over processes, which would wait for each "
                "other's turns: set it to lit_rl.rollouts.http.HTTPEngine, or train with DDP"
            )

    def teardown(self, stage: str) -> None:
        self.episodes.close()
        super().teardown(stage)

    def stored_options(self) -> dict[str, object]:
        return super().stored_options() | options_of(self.episodes, "model.episodes")

    def longest_sequence(self) -> int:
        limit = self.episodes.manner.max_prompt_tokens
        if limit is None:
            raise ConfigError("model.micro_batch_tokens needs the longest prompt: set model.episodes.manner.max_prompt_tokens")
        return limit + self.answers.sampling.max_new_tokens

    def plan(self) -> str:
        """A sentence on the sizes of an iteration."""
        episodes, turns = self.prompts_per_iteration * self.group_size, self.episodes.manner.max_turns
        return (
            f"An iteration: {self.prompts_per_iteration} tasks x {self.group_size} episodes = {episodes} episodes of at most {turns} "
            f"turns, or as many as a task says; optimizer steps: {self.inner_epochs * self.updates}, each of {episodes // self.updates} "
            f"episodes in {self.micro_batches_per_update} micro-batches of turns on each of {self.trainer.world_size} processes"
        )

    @property
    def units_per_prompt(self) -> int:
        """Turns that a task may have at most: micro-batches are of turns."""
        return self.group_size * self.episodes.manner.max_turns

    def micro_batches_within(self, tokens: int) -> int:
        return super().micro_batches_within(tokens) * self.episodes.manner.max_turns

    # ------------------------------------------------------------------ episodes
    def collect(self, prompts: Prompts) -> TokenRollout:
        """Play, and compute what training needs of the turns."""
        self.answers.engine.update_weights(self.iteration)
        place, increment = ("train", self.iteration), self.temperature_increment
        played = self.play(prompts, place, self.answers.sampling, seed=self.seed, increment=increment)
        self.rollout_metrics = trajectory_metrics(played)
        rows = dict(zip(prompts.group.tolist(), prompts.info, strict=True))
        return self.annotate(checked(rollout_of(played, rows, self.policy, self.episodes.manner), self.policy).to(self.device))

    def play(self, prompts: Prompts, place: tuple[Key, ...], sampling: Sampling, *, seed: int, increment: float = 0.0) -> list[Trajectory]:
        """Play these tasks and tell the callbacks of their episodes. increment: Difference of the temperatures of two siblings."""
        numbers = sibling_numbers(prompts.group)
        wanted = [(task_of(row), g, n) for row, g, n in zip(prompts.info, prompts.group.tolist(), numbers, strict=True)]
        jobs = jobs_of(wanted, seed=seed, place=place)
        if increment:
            jobs = [replace(job, temperature=sampling.temperature + job.number * increment) for job in jobs]
        with self.answers.engine.awake():
            played = self.episodes.play(self.policy, self.answers.engine, sampling, jobs)
        self.notify("on_trajectories", played)
        return played

    def score(self, rollout: TokenRollout) -> TokenRollout:
        """The worlds have told the rewards."""
        return rollout

    def total(self, rollout: TokenRollout) -> Tensor:
        return total_reward(rollout.rewards, dict.fromkeys(rollout.rewards, 1.0)).to(self.device)

    def describe(self, rollout: TokenRollout, total: Tensor) -> dict[str, float]:
        return super().describe(rollout, total) | self.rollout_metrics

    # ------------------------------------------------------------------ evaluation and prediction
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._check_engine()
        self.evaluated_episodes = []

    on_test_start = on_predict_start = on_validation_start

    def validation_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, object]:
        self.evaluated.append(batch)
        played = self._evaluate(batch)
        self.evaluated_episodes += played
        return {"texts": list(map(_told, played)), "prompts": batch}

    test_step = validation_step

    def predict_step(self, batch: Prompts, batch_idx: int) -> Mapping[str, object]:
        return {"texts": list(map(_told, self._evaluate(batch))), "prompts": batch}

    def _evaluate(self, batch: Prompts) -> list[Trajectory]:
        """One episode of each task; the world's seed depends on `answers.eval_seed` and the row alone."""
        return self.play(batch, ("eval",), self.answers.eval_sampling, seed=self.answers.eval_seed)

    def on_validation_epoch_end(self) -> None:
        played, batches, self.evaluated = self.evaluated_episodes, self.evaluated, []
        prompts = all_prompts(batches)
        known = torch.tensor([t.status.counts for t in played])
        columns = {"accuracy": [t.success for t in played], "reward": [t.reward for t in played], "turns": [len(t.turns) for t in played]}
        rewards = {name: torch.tensor(values).double().where(known, torch.nan) for name, values in columns.items()}
        for name, metrics in summaries(rewards, prompts, highest={}):
            self.report(metrics, bar=(name,) if name == "val/accuracy" else ())
        self.notify("on_evaluation_end", prompts, rewards)

    on_test_epoch_end = on_validation_epoch_end


def _told(trajectory: Trajectory) -> str:
    """An episode as a text: its answers, line by line, and how it ended."""
    return "\n".join([*(turn.text for turn in trajectory.turns), f"[{trajectory.status}]"])
