"""Dynamic sampling: groups whose answers are all equally good teach nothing and are replaced by others (arXiv 2503.14476)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from torch import Tensor

from lit_rl.credit.tokens import groups_that_teach
from lit_rl.credit.trajectories import voters
from lit_rl.errors import ConfigError
from lit_rl.modules.gradient import LitPolicyGradient
from lit_rl.modules.media import with_media
from lit_rl.replay.exchange import handed_over
from lit_rl.replay.partition import fair_owners
from lit_rl.replay.rows import concatenated
from lit_rl.types import TokenRollout


@final
class DynamicSampling:
    """Generation after generation until a batch is full of groups that teach.

    Args:
        prompts_per_generation: Prompts that are answered at a time, over all processes; default: `prompts_per_iteration`. What is left over
            when the batch is full is thrown away.
        filter_metric: The score that must differ within a group; default: the total reward, without what its length costs.
        max_generations: So often at most in an iteration.
        on_limit: What becomes of an iteration whose batch is not full then: it stops the run (`error`), trains on the groups that there are
            (`train_partial`), or leaves all weights as they are (`skip_step`).
    """

    stored_with = ("prompts_per_generation", "filter_metric")

    def __init__(
        self,
        *,
        prompts_per_generation: int | None = None,
        filter_metric: str | None = None,
        max_generations: int = 10,
        on_limit: Literal["error", "train_partial", "skip_step"] = "error",
    ) -> None:
        self.prompts_per_generation = prompts_per_generation or 0
        self.filter_metric = filter_metric
        self.max_generations, self.on_limit = max_generations, on_limit
        self.generations = 0  # drawn so far, over all iterations
        self.metrics: dict[str, float] = {}

    def check(self, wanted: int) -> None:
        """Raise ConfigError where the generations allowed cannot fill a batch of so many prompts."""
        self.prompts_per_generation = self.prompts_per_generation or wanted
        if self.prompts_per_generation * self.max_generations < wanted or self.max_generations < 1:
            raise ConfigError(
                f"model.dynamic_sampling.max_generations={self.max_generations} of prompts_per_generation={self.prompts_per_generation} "
                f"cannot fill prompts_per_iteration={wanted}: raise max_generations to at least "
                f"{max(1, -(-wanted // self.prompts_per_generation))}"
            )

    def check_geometry(self, run: LitPolicyGradient) -> None:
        """Raise ConfigError for what the strategy or the number of processes does not allow."""
        if self.on_limit != "error":
            run.check_can_freeze(f"model.dynamic_sampling.on_limit={self.on_limit}")
        if self.prompts_per_generation % run.trainer.world_size:
            raise ConfigError(
                f"model.dynamic_sampling.prompts_per_generation={self.prompts_per_generation} does not divide among "
                f"{run.trainer.world_size} processes"
            )

    def fill(self, run: LitPolicyGradient) -> TokenRollout:
        """A scored batch of groups that teach; log-probabilities are computed for those alone. Collective."""
        run.answers.engine.update_weights(run.iteration)
        drawn: list[TokenRollout] = []
        teaches: list[bool] = []  # of all groups so far, on all processes, in order
        while sum(teaches) < run.prompts_per_iteration and len(drawn) < self.max_generations:
            with run.rolling_out():
                prompts = run.draw(self.generations, self.prompts_per_generation)
                answers = run.sample(replace(prompts, group=prompts.group + len(teaches)))
            self.generations += 1
            drawn.append(run.score(answers))
            teaches += self.teaching(run, drawn[-1], range(len(teaches), len(teaches) + self.prompts_per_generation))
        everything = concatenated(drawn)
        self._count(run, everything, teaches, generations=len(drawn))
        with run.rolling_out():
            rollout = self.select(run, everything, teaches)
            run.notify("on_rollout_chosen", rollout)
            return run.annotate(with_media(rollout, run.policy, run.data))

    def teaching(self, run: LitPolicyGradient, rollout: TokenRollout, groups: range) -> list[bool]:
        """For each group of a generation on all processes: its answers are told apart. Collective."""
        if self.filter_metric is not None and self.filter_metric not in rollout.rewards:
            known = ", ".join(sorted(rollout.rewards))
            raise ConfigError(f"model.dynamic_sampling.filter_metric={self.filter_metric} is no score; there are {known}")
        metric = run.total(rollout) if self.filter_metric is None else rollout.rewards[self.filter_metric].to(run.device)
        values, group = told_apart(run, rollout, metric)
        teaching = set(group[groups_that_teach(values, group)].tolist())
        return [g in teaching for g in groups]

    def select(self, run: LitPolicyGradient, drawn: TokenRollout, teaches: list[bool]) -> TokenRollout:
        """The first groups that teach, numbered anew and dealt evenly; others fill up where they are few, without a part in the loss."""
        first = [g for g, good in enumerate(teaches) if good] + [g for g, good in enumerate(teaches) if not good]
        first = first[: run.prompts_per_iteration]
        here = torch.full_like(drawn.group, run.global_rank)
        home = dict(run.all_ranks(torch.stack([drawn.group, here], 1)).tolist())  # the process that drew a group
        owners = fair_owners([home[g] for g in first], parts=run.updates, world=run.trainer.world_size)
        number = torch.full((len(teaches),), -1)
        number[first] = torch.arange(len(first))
        group = number[drawn.group.cpu()]
        return handed_over(replace(drawn, group=group.to(drawn.group.device)), torch.tensor([*owners, -1])[group])

    def _count(self, run: LitPolicyGradient, drawn: TokenRollout, teaches: list[bool], *, generations: int) -> None:
        """Metrics of sampling. Raises ConfigError where too few groups teach and that is an error."""
        kept, wanted = sum(teaches), run.prompts_per_iteration
        if kept < wanted and self.on_limit == "error":
            raise ConfigError(
                f"Only {kept} of {len(teaches)} groups in model.dynamic_sampling.max_generations={self.max_generations} generations have "
                f"answers of different reward, and model.prompts_per_iteration={wanted} are wanted: the task is too easy, too hard or "
                "badly scored. Raise max_generations or model.group_size, lower prompts_per_iteration, or set "
                "model.dynamic_sampling.on_limit to train_partial or skip_step; continue with --ckpt_path last"
            )
        trained = min(kept, wanted) if self.on_limit == "train_partial" else wanted * (kept >= wanted)
        rewards, _ = told_apart(run, drawn, run.total(drawn))
        self.metrics = {
            "dapo/generations": float(generations),
            "dapo/kept_share": kept / len(teaches),
            "dapo/groups": float(trained),
            "dapo/reward_mean_of_all": float(rewards.nanmean()),
        }

    def trained(self, rollout: TokenRollout) -> TokenRollout:
        """The rollout without chosen tokens in the groups that only fill up."""
        return replace(rollout, mask=rollout.mask & (rollout.group < self.metrics["dapo/groups"])[:, None])

    def state_dict(self) -> dict[str, int]:
        return {"generations": self.generations}

    def load_state_dict(self, checkpoint: Mapping[str, int]) -> None:
        self.generations = checkpoint.get("generations", 0)  # other methods draw none


def told_apart(run: LitPolicyGradient, rollout: TokenRollout, values: Tensor) -> tuple[Tensor, Tensor]:
    """Value and group of each trajectory of all processes, one row of each. values: Float "B". Collective."""
    group, trajectory = run.all_ranks(rollout.group), rollout.columns.get("trajectory")
    everyones = run.all_ranks(values)
    rows = voters(group, None if trajectory is None else run.all_ranks(trajectory), ~everyones.isnan())
    return everyones[rows], group[rows]
