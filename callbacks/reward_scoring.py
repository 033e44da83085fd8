"""Rewards that are computed while the rollout goes on."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.base import Method, RLCallback, check_alone, method_of
from lit_rl.credit.row_weights import asks_for, counting
from lit_rl.errors import ConfigError
from lit_rl.ranks import gather_objects
from lit_rl.rewards.background import Background
from lit_rl.rewards.base import Reward, RewardError, RewardQueue
from lit_rl.rewards.chunks import Scores, Table, Task, checked
from lit_rl.rewards.failures import Failures
from lit_rl.rewards.measures import Measures, share
from lit_rl.rewards.pseudo import DEBUG_VARIABLE, is_dry_run, stand_ins
from lit_rl.rewards.submissions import Media, Submissions, handed_back
from lit_rl.rewards.weights import check_rows, resolve_weights
from lit_rl.types import Info, Rollout

log = logging.getLogger(__name__)


class RewardScoring(RLCallback, RewardQueue):
    """Owns the rewards: chunks are submitted while the next one is sampled, `gather` waits for what is still under way.

    With DISABLE_RL_REWARD_MODEL=true in the environment no reward is asked: every score is a hash of prompt and pixels.

    Args:
        rewards: By label, or a list (labelled by class name). A label names the reward in logs and errors; scores keep their names.
        weights: Of named scores in the total; scores without one are computed and logged with weight 0. May be left out when there is one
            reward: its main score, `score` or else the first that it names, then has weight 1.
        max_failed_fraction: In [0, 1]. When more of the samples of an iteration, over all ranks, lack a score that has a weight, the run
            stops on every rank. Fewer are left out of the loss.
    """

    def __init__(
        self,
        rewards: dict[str, Reward] | list[Reward],
        weights: dict[str, float] | None = None,
        max_failed_fraction: float = 0.05,
    ) -> None:
        if not 0 <= max_failed_fraction <= 1:
            raise ConfigError(f"max_failed_fraction={max_failed_fraction} must lie in [0, 1]; 0.05 lets a run lose 5 % of its scores")
        self.rewards = dict(rewards) if isinstance(rewards, Mapping) else _labelled(rewards)
        if not self.rewards:
            raise ConfigError("rewards is empty; name at least one reward")
        if weights is not None and not (any(weights.values()) and all(map(math.isfinite, weights.values()))):
            raise ConfigError(f"weights={weights} must be finite and not all zero")
        self.max_failed_fraction = max_failed_fraction
        self._given_weights = weights
        self._use(self.rewards)
        self._measures = Measures()
        self._background: Background | None = None

    # -- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its queue, and every reward its place. A reward that cannot start stops all ranks before models load."""
        check_alone(trainer, RewardScoring, "the method has one queue of rewards; name all rewards under `rewards` of one")
        method_of(pl_module).reward_queue = self
        if stage == "predict":
            return
        if is_dry_run():
            log.warning("%s is set: NO REWARD MODEL IS ASKED, every score is pseudo-random. For dry runs only.", DEBUG_VARIABLE)
            self._use(stand_ins(self.rewards, self._given_weights))
        else:
            self._use(self.rewards)
        if self._given_weights is None and len(self._weights) > 1:
            log.info("RewardScoring has no weights, so these hold: %s", self._weights)
        self._submissions.groups.size = int(getattr(pl_module, "group_size", 1))
        problem: Exception | None = None
        try:
            if stage == "fit" and self._submissions.groups.size == 1 and self._submissions.comparing:
                raise ConfigError(f"reward {self._submissions.comparing[0]} compares the samples of a group: set model.group_size above 1")
            self.check(getattr(trainer, "datamodule", None), stage)
            for reward in self._rewards.values():
                reward.setup(rank=trainer.global_rank, world_size=trainer.world_size, device=str(trainer.strategy.root_device))
        except Exception as error:  # re-raised below, after the other ranks know
            problem = error
        failed = share([float(problem is not None)])[:, 0]
        if failed.any():
            message = gather_objects(str(problem))[int(failed.argmax())]
            raise problem or ConfigError(message)

    def check(self, datamodule: object, stage: str) -> None:
        """Have the rewards look at the rows that they will score. Raises ConfigError; scores that count nothing may be missing."""
        rows = getattr(datamodule, "rows_to_score", None)
        if len(self._names) == len(self._rewards):
            check_rows(getattr(datamodule, "reward_places", {}), self._weights)
        for label, reward in self._rewards.items():
            names = self._names.get(label)
            reward.counted = None if names is None else [name for name in names if self._weights.get(name, 1)]
            if rows is not None and reward.counted != [] and type(reward).check is not Reward.check:  # reading all rows takes time
                reward.check(row for row in rows(stage) if asks_for(row, names))

    def on_rollout_end(self, trainer: Trainer, module: Method, rollout: Rollout) -> None:
        """Have the module log `metrics`."""
        module.rollout_metrics |= self.metrics()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the scoring thread."""
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the scoring thread."""
        self.close()  # Lightning does not call a callback's teardown after an error

    # -- queue

    @property
    def highest(self) -> Mapping[str, float]:
        """The highest value of each score that has one."""
        return {name: value for reward in self._rewards.values() for name, value in reward.highest.items()}

    @property
    def submitted(self) -> int:
        return len(self._submissions.chunks)

    def submit(self, media: Media, info: Sequence[Info], *, groups: Sequence[int] | None = None, place: int | None = None) -> None:
        """Queue a chunk. Raises RewardError where a reward does not score its kind."""
        if isinstance(media, Tensor) and (media.dtype != torch.uint8 or media.ndim != 4 or media.shape[1] != 3):
            raise ValueError(f"submit takes uint8 B 3 H W; got {media.dtype} {tuple(media.shape)}")
        if len(media) != len(info):
            raise ValueError(f"submit takes one prompt for each sample; got {len(media)} samples and {len(info)} prompts")
        medium = "images" if isinstance(media, Tensor) else "texts"
        if wrong := [label for label, reward in self._rewards.items() if reward.medium not in (None, medium)]:
            raise RewardError(f"this method makes {medium}, which reward {wrong[0]} does not score: name another one in RewardScoring")
        media = media.detach().cpu() if isinstance(media, Tensor) else list(media)
        self._ready()
        self._submissions.add(media, info, groups=groups, place=place, start=self._start)

    def gather(self) -> dict[str, Tensor]:
        """Await the scores of all chunks; see `RewardQueue.gather`."""
        started = time.perf_counter()
        chunks, tasks = self._submissions.take(self._start)
        table = Table(chunks)
        broken: Exception | None = None
        try:
            self._join(table, tasks)
        except Exception as error:  # raised in agree, after the other ranks know
            broken = error
        waited = time.perf_counter() - started
        counts = counting(table.info, self._weights)
        lost = [values.isnan() & counts[name] for name, values in table.scores.items() if name in counts]
        failed = int(torch.stack(lost).any(0).sum()) if lost else 0
        self._failures.agree(table.total, failed, broken, allowed=self.max_failed_fraction)
        self._measures.take(table, self._rewards, waited, compared=[name for name, weight in self._weights.items() if weight])
        return table.scores

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each named score in the total."""
        return self._weights

    def metrics(self) -> dict[str, float]:
        """Those of the last `gather`, over all ranks: see `lit_rl.rewards.measures.Measures`."""
        return dict(self._measures.metrics)

    def close(self) -> None:
        """Cancel what is under way and end the thread. The next `submit` starts a new one."""
        background, self._background = self._background, None
        self._submissions.clear()
        if background is not None and background.pid == os.getpid():
            background.close(self._rewards.values())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_background": None, "_submissions": self._submissions.emptied()}

    def _use(self, rewards: dict[str, Reward]) -> None:
        """Take these rewards; check the names that they declare."""
        self._rewards = rewards
        self._names = {label: list(reward.outputs) for label, reward in rewards.items() if reward.outputs}
        self._weights = resolve_weights(self._names, self._given_weights, complete=len(self._names) == len(rewards))
        self._failures = Failures(rewards)
        self._submissions = Submissions(rewards, self._names)

    def _start(self, label: str, media: Media, info: Sequence[Info]) -> Future[Mapping[str, Tensor]]:
        return self._ready().start(label, self._rewards[label], media, info)

    def _ready(self) -> Background:
        """The scoring thread of this process; what was submitted before it began is of no use."""
        if self._background is None or self._background.pid != os.getpid():
            self._background = Background()
            self._submissions.clear()
        return self._background

    def _join(self, table: Table, tasks: Sequence[Task]) -> None:
        """Wait for all tasks and write their scores. Raises RewardError when a reward breaks its contract."""
        broken: Exception | None = None
        answers: list[Scores | None] = []
        for task in tasks:
            try:
                answers.append(None if task.future is None or broken else self._await(task, task.future))
            except RewardError as error:  # raised below, after the groups of all processes have been handed back
                answers, broken = [*answers, None], error
        rows = handed_back(tasks, answers) if self._submissions.comparing else [(t.rows, a) for t, a in zip(tasks, answers, strict=True)]
        if broken:
            raise broken
        for label in self._rewards:
            own = [(places, scores) for task, (places, scores) in zip(tasks, rows, strict=True) if task.label == label]
            names = self._learn(label, [scores for _, scores in own if scores is not None])
            if label in self._submissions.comparing and not table.grouped:
                continue
            for name in names:
                table.add(name)
            for places, scores in own:
                table.write(names, places, scores)
        self._weights = resolve_weights(self._names, self._given_weights, complete=True)

    def _learn(self, label: str, answers: Sequence[Scores]) -> Sequence[str]:
        """The names of a reward's scores. Raises RewardError where answers disagree, or nothing tells them."""
        names = next((list(scores) for scores in answers), [])
        if not self._names.setdefault(label, names):
            del self._names[label]
            raise RewardError(f"reward {label} scored nothing: {self._failures.errors.get(label, 'no sample was submitted')}")
        for scores in answers:
            if set(scores) != set(self._names[label]):
                raise RewardError(f"reward {label} answered the scores {sorted(scores)} instead of {sorted(self._names[label])}")
        return self._names[label]

    def _await(self, task: Task, future: Future[Mapping[str, Tensor]]) -> Scores | None:
        """Checked scores Float64 "B" of one task, or None if the reward raised."""
        label, reward = task.label, self._rewards[task.label]
        try:
            answer = future.result()
        except RewardError:
            raise
        except Exception as error:
            self._failures.complain(label, f"{type(error).__name__}: {error}", error)
            return None
        count = len(task.rows) if task.cut is None else len(task.cut.whole.rows)
        scores = checked(answer, count=count, label=f"{label} ({type(reward).__name__})")
        if reward.last_error and any(not values.isfinite().all() for values in scores.values()):
            self._failures.complain(label, reward.last_error)
        return {name: values.where(values.isfinite(), math.nan) for name, values in scores.items()}


def _labelled(rewards: Sequence[Reward]) -> dict[str, Reward]:
    kinds = [type(reward).__name__ for reward in rewards]
    return {kind if kinds.count(kind) == 1 else f"{kind}_{i}": reward for i, (kind, reward) in enumerate(zip(kinds, rewards, strict=True))}
