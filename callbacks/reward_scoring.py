"""Rewards that are computed while the rollout goes on."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.base import Method, RLCallback, check_alone, method_of
from lit_rl.errors import ConfigError
from lit_rl.ranks import gather_objects
from lit_rl.rewards.background import Background
from lit_rl.rewards.base import Reward, RewardError, RewardQueue
from lit_rl.rewards.chunks import Chunk, checked, concatenated
from lit_rl.rewards.pseudo import DEBUG_VARIABLE, is_dry_run, stand_ins
from lit_rl.rewards.weights import resolve_weights
from lit_rl.types import Info, Rollout

log = logging.getLogger(__name__)


class RewardScoring(RLCallback, RewardQueue):
    """Owns the rewards: chunks are submitted while the next one is sampled, `gather` waits for what is still under way.

    With DISABLE_RL_REWARD_MODEL=true in the environment no reward is asked: every score is a hash of prompt and pixels.

    Args:
        rewards: By label, or a list (labelled by class name). A label only names the reward in logs and errors; scores keep the names that
            the reward gives them.
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
        self._metrics: dict[str, float] = {}
        self._background: Background | None = None
        self._chunks: list[Chunk] = []

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
        problem: Exception | None = None
        try:
            self.check(getattr(trainer, "datamodule", None), stage)
            for reward in self._rewards.values():
                reward.setup(rank=trainer.global_rank, world_size=trainer.world_size, device=str(trainer.strategy.root_device))
        except Exception as error:  # re-raised below, after the other ranks know
            problem = error
        failed = _share([float(problem is not None)])[:, 0]
        if failed.any():
            message = gather_objects(str(problem))[int(failed.argmax())]
            raise problem or ConfigError(message)

    def check(self, datamodule: object, stage: str) -> None:
        """Have the rewards look at the rows that they will score. Raises ConfigError; scores that count nothing may be missing."""
        rows = getattr(datamodule, "rows_to_score", None)
        for label, reward in self._rewards.items():
            names = self._names.get(label)
            reward.counted = None if names is None else [name for name in names if self._weights.get(name, 1)]
            if rows is not None and reward.counted != [] and type(reward).check is not Reward.check:  # reading all rows takes time
                reward.check(rows(stage))

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
        return len(self._chunks)

    def submit(self, media: Tensor | Sequence[str], info: Sequence[Info], *, place: int | None = None) -> None:
        """Queue a chunk. Raises RewardError where a reward does not score its kind."""
        if isinstance(media, Tensor) and (media.dtype != torch.uint8 or media.ndim != 4 or media.shape[1] != 3):
            raise ValueError(f"submit takes uint8 B 3 H W; got {media.dtype} {tuple(media.shape)}")
        if len(media) != len(info):
            raise ValueError(f"submit takes one prompt for each sample; got {len(media)} samples and {len(info)} prompts")
        medium = "images" if isinstance(media, Tensor) else "texts"
        if wrong := [label for label, reward in self._rewards.items() if reward.medium not in (None, medium)]:
            raise RewardError(f"this method makes {medium}, which reward {wrong[0]} does not score: name another one in RewardScoring")
        if self._background is None or self._background.pid != os.getpid():
            self._background, self._chunks = Background(), []
        media = media.detach().cpu() if isinstance(media, Tensor) else list(media)
        futures = {label: self._background.start(label, reward, media, info) for label, reward in self._rewards.items()}
        self._chunks.append(Chunk(len(info), futures, len(self._chunks) if place is None else place))

    def gather(self) -> dict[str, Tensor]:
        """Await the scores of all chunks; see `RewardQueue.gather`."""
        started = time.perf_counter()
        chunks, self._chunks = sorted(self._chunks, key=lambda chunk: chunk.place), []
        total = sum(chunk.size for chunk in chunks)
        scores: dict[str, Tensor] = {}
        broken: Exception | None = None
        try:
            scores = self._join(chunks)
        except Exception as error:  # raised in _agree, after the other ranks know
            broken = error
        waited = time.perf_counter() - started
        unscored = torch.stack([values.isnan() for name, values in scores.items() if self._weights[name]] or [torch.zeros(total)]).any(0)
        self._agree(total, int(unscored.sum()), broken)
        self._measure(scores, total, waited)
        return scores

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each named score in the total."""
        return self._weights

    def metrics(self) -> dict[str, float]:
        """reward/<name>/failed_fraction, reward/<label>/<counter>, reward/wait_seconds (the longest): of the last `gather`, all ranks."""
        return dict(self._metrics)

    def close(self) -> None:
        """Cancel what is under way and end the thread. The next `submit` starts a new one."""
        background, self._background, self._chunks = self._background, None, []
        if background is not None and background.pid == os.getpid():
            background.close(self._rewards.values())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_background": None, "_chunks": []}

    def _use(self, rewards: dict[str, Reward]) -> None:
        """Take these rewards; check the names that they declare."""
        self._rewards = rewards
        self._names = {label: list(reward.outputs) for label, reward in rewards.items() if reward.outputs}
        self._weights = resolve_weights(self._names, self._given_weights, complete=len(self._names) == len(rewards))
        self._errors: dict[str, str] = {}

    def _join(self, chunks: Sequence[Chunk]) -> dict[str, Tensor]:
        """Wait for all chunks; scores by name in order of submission. Raises RewardError when a reward breaks its contract."""
        answers = {label: [self._await(label, chunk) for chunk in chunks] for label in self._rewards}
        for label, rows in answers.items():
            names = next((list(row) for row in rows if row is not None), [])
            if not self._names.setdefault(label, names):
                del self._names[label]
                raise RewardError(f"reward {label} scored nothing: {self._errors.get(label, 'no sample was submitted')}")
            for row in rows:
                if row is not None and set(row) != set(self._names[label]):
                    raise RewardError(f"reward {label} answered the scores {sorted(row)} instead of {sorted(self._names[label])}")
        self._weights = resolve_weights(self._names, self._given_weights, complete=True)
        return {name: concatenated(answers[label], name, chunks) for label, names in self._names.items() for name in names}

    def _await(self, label: str, chunk: Chunk) -> dict[str, Tensor] | None:
        """Checked scores Float64 "B" of one chunk, or None if the reward raised."""
        reward = self._rewards[label]
        try:
            answer = chunk.futures[label].result()
        except RewardError:
            raise
        except Exception as error:
            self._complain(label, f"{type(error).__name__}: {error}", error)
            return None
        scores = checked(answer, count=chunk.size, label=f"{label} ({type(reward).__name__})")
        if reward.last_error and any(not values.isfinite().all() for values in scores.values()):
            self._complain(label, reward.last_error)
        return {name: values.where(values.isfinite(), math.nan) for name, values in scores.items()}

    def _complain(self, label: str, text: str, error: Exception | None = None) -> None:
        """Log the first failure of each reward; the rest is counted."""
        if label not in self._errors:
            log.warning(
                "reward %s left samples without a score, which are masked: %s. Further failures are counted.", label, text, exc_info=error
            )
        self._errors[label] = text

    def _agree(self, total: int, failed: int, broken: Exception | None) -> None:
        """Raise the same RewardError on every rank if a reward is broken or too many samples failed on any of them. Collective."""
        table = _share([total, failed, float(broken is not None)])
        if table[:, 2].any():
            raise RewardError(gather_objects(str(broken))[int(table[:, 2].argmax())]) from broken
        all_total, all_failed = int(table[:, 0].sum()), int(table[:, 1].sum())
        if all_failed > self.max_failed_fraction * all_total:
            worst = int(table[:, 1].argmax())
            told = [f"{label}: {text} ({self._rewards[label].remedy})" for label, text in self._errors.items()]
            reasons = "; ".join(told) or "the reward itself answered NaN"
            message = (
                f"{all_failed} of {all_total} samples got no score, more than max_failed_fraction={self.max_failed_fraction} allows. "
                f"Last reasons on rank {worst}: {reasons}. Raise max_failed_fraction if the loss is acceptable; "
                "continue with --ckpt_path last"
            )
            raise RewardError(gather_objects(message)[worst])

    def _measure(self, scores: Mapping[str, Tensor], total: int, waited: float) -> None:
        """Fill `metrics`. Collective."""
        failed = {f"reward/{name}/failed_fraction": float(values.isnan().sum()) for name, values in scores.items()}
        counters = {f"reward/{label}/{k}": float(v) for label, reward in self._rewards.items() for k, v in reward.counters().items()}
        table = _share([total, waited, *failed.values(), *counters.values()])
        sums = dict(zip([*failed, *counters], table[:, 2:].sum(0).tolist(), strict=True))
        samples = max(float(table[:, 0].sum()), 1.0)
        self._metrics = {key: value / samples if key in failed else value for key, value in sums.items()}
        self._metrics["reward/wait_seconds"] = float(table[:, 1].max())


def _share(values: Sequence[float]) -> Tensor:
    """This rank's numbers -> Float64 "ranks N" of all. Collective."""
    return torch.tensor(gather_objects(list(values)), dtype=torch.float64)


def _labelled(rewards: Sequence[Reward]) -> dict[str, Reward]:
    kinds = [type(reward).__name__ for reward in rewards]
    return {kind if kinds.count(kind) == 1 else f"{kind}_{i}": reward for i, (kind, reward) in enumerate(zip(kinds, rewards, strict=True))}
