"""Rewards that are computed while the rollout goes on."""

from __future__ import annotations

import difflib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.base import Method, RLCallback, check_alone
from lit_rl.errors import ConfigError
from lit_rl.rewards.background import Background
from lit_rl.rewards.base import Reward, RewardError, Scorer
from lit_rl.rewards.pseudo import PseudoReward
from lit_rl.types import Info

log = logging.getLogger(__name__)

DEBUG_VARIABLE = "DISABLE_RL_REWARD_MODEL"
YES, NO = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")


class RewardScoring(RLCallback, Scorer):
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
        self._strategy: Any = None  # set while there are other ranks to agree with
        self._background: Background | None = None
        self._chunks: list[_Chunk] = []

    # -- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its scorer and every reward its place. A reward that cannot start stops all ranks, before any model is loaded."""
        check_alone(trainer, RewardScoring, "the method has one scorer; name all rewards under `rewards` of one")
        pl_module.scorer = self  # type: ignore[assignment]
        self._strategy = trainer.strategy if trainer.world_size > 1 else None
        if stage == "predict":
            return
        if _is_set(DEBUG_VARIABLE):
            log.warning("%s is set: NO REWARD MODEL IS ASKED, every score is pseudo-random. For dry runs only.", DEBUG_VARIABLE)
            self._use(_pseudo(self.rewards, self._given_weights))
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
        failed = self._share([float(problem is not None)])[:, 0]
        if failed.any():
            message = self._told_by(int(failed.argmax()), str(problem))
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

    # -- Scorer

    @property
    def highest(self) -> Mapping[str, float]:
        """The highest value of each score that has one."""
        return {name: value for reward in self._rewards.values() for name, value in reward.highest.items()}

    def submit(self, media: Tensor | Sequence[str], info: Sequence[Info]) -> None:
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
        self._chunks.append(_Chunk(len(info), futures))

    def gather(self) -> dict[str, Tensor]:
        """Await the scores of all chunks; see `Scorer.gather`."""
        started = time.perf_counter()
        chunks, self._chunks = self._chunks, []
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_background": None, "_chunks": [], "_strategy": None}

    # -- steps of gather

    def _use(self, rewards: dict[str, Reward]) -> None:
        """Take these rewards; check the names that they declare."""
        self._rewards = rewards
        self._names = {label: list(reward.outputs) for label, reward in rewards.items() if reward.outputs}
        self._weights = resolve_weights(self._names, self._given_weights, complete=len(self._names) == len(rewards))
        self._errors: dict[str, str] = {}

    def _join(self, chunks: Sequence[_Chunk]) -> dict[str, Tensor]:
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
        return {name: _concatenate(answers[label], name, chunks) for label, names in self._names.items() for name in names}

    def _await(self, label: str, chunk: _Chunk) -> dict[str, Tensor] | None:
        """Checked scores Float64 "B" of one chunk, or None if the reward raised."""
        reward = self._rewards[label]
        try:
            answer = chunk.futures[label].result()
        except RewardError:
            raise
        except Exception as error:
            self._complain(label, f"{type(error).__name__}: {error}", error)
            return None
        scores = {name: torch.as_tensor(values).detach().to("cpu", torch.float64) for name, values in answer.items()}
        for name, values in scores.items():
            if values.shape != (chunk.size,):
                raise RewardError(
                    f"reward {label} ({type(reward).__name__}) answered {name} of shape {tuple(values.shape)} for {chunk.size} samples; "
                    "score() must return one number per sample, in order"
                )
            if reward.last_error and not values.isfinite().all():
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
        table = self._share([total, failed, float(broken is not None)])
        if table[:, 2].any():
            raise RewardError(self._told_by(int(table[:, 2].argmax()), str(broken))) from broken
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
            raise RewardError(self._told_by(worst, message))

    def _measure(self, scores: Mapping[str, Tensor], total: int, waited: float) -> None:
        """Fill `metrics`. Collective."""
        failed = {f"reward/{name}/failed_fraction": float(values.isnan().sum()) for name, values in scores.items()}
        counters = {f"reward/{label}/{k}": float(v) for label, reward in self._rewards.items() for k, v in reward.counters().items()}
        table = self._share([total, waited, *failed.values(), *counters.values()])
        sums = dict(zip([*failed, *counters], table[:, 2:].sum(0).tolist(), strict=True))
        samples = max(float(table[:, 0].sum()), 1.0)
        self._metrics = {key: value / samples if key in failed else value for key, value in sums.items()}
        self._metrics["reward/wait_seconds"] = float(table[:, 1].max())

    # -- other ranks

    def _share(self, values: Sequence[float]) -> Tensor:
        """This rank's numbers -> Float64 "ranks N" of all. Collective."""
        row = torch.tensor(values, dtype=torch.float64)
        if self._strategy is None:
            return row[None]
        return self._strategy.all_gather(row.to(self._strategy.root_device)).cpu()

    def _told_by(self, rank: int, text: str) -> str:
        """`text` as `rank` has it. Collective."""
        return text if self._strategy is None else self._strategy.broadcast(text, src=rank)


def _is_set(variable: str) -> bool:
    """True when a variable of the environment says yes. Raises ConfigError for a value that says neither yes nor no."""
    value = os.environ.get(variable, "").strip().lower()
    if value not in (*YES, *NO):
        raise ConfigError(f"{variable}={value} in the environment is neither true nor false; set it to true, or unset it")
    return value in YES


@dataclass
class _Chunk:
    size: int
    futures: Mapping[str, Future[Mapping[str, Tensor]]]


def resolve_weights(names: Mapping[str, Sequence[str]], given: Mapping[str, float] | None, *, complete: bool) -> dict[str, float]:
    """Weight of every named score: the given one, else 0. Where nothing is given and there is one reward, 1 for its main score.

    names: by label of the reward; complete: these are all. Raises ConfigError when two rewards share a name, a weight has no score,
    or several rewards have no weights.
    """
    owner: dict[str, str] = {}
    for label, outputs in names.items():
        for name in outputs:
            if name in owner:
                raise ConfigError(
                    f"rewards {owner[name]} and {label} both give a score named {name}; rename one, "
                    f"e.g. by HTTPReward's outputs: {{{name}_2: {name}}}"
                )
            owner[name] = label
    if not complete:
        return dict(given or {})
    mains = {main_score(outputs): 1.0 for outputs in names.values() if outputs}
    if given is None and len(mains) > 1:
        raise ConfigError(
            f"{len(names)} rewards give {len(owner)} scores, {sorted(owner)}; set weights to say how much each counts, e.g. {mains}"
        )
    if unknown := sorted(set(given or {}) - set(owner)):
        near = [match for name in unknown for match in difflib.get_close_matches(name, owner, n=1)]
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"weights name {unknown}, but the rewards give {sorted(owner)}{meant}")
    return {name: (mains if given is None else given).get(name, 0.0) for name in owner}


def main_score(outputs: Sequence[str]) -> str:
    """The score of a reward that counts where a run gives no weights: `score`, else the first."""
    return "score" if "score" in outputs else outputs[0]


def _labelled(rewards: Sequence[Reward]) -> dict[str, Reward]:
    kinds = [type(reward).__name__ for reward in rewards]
    return {kind if kinds.count(kind) == 1 else f"{kind}_{i}": reward for i, (kind, reward) in enumerate(zip(kinds, rewards, strict=True))}


def _concatenate(rows: Sequence[Mapping[str, Tensor] | None], name: str, chunks: Sequence[_Chunk]) -> Tensor:
    """Float64 "B" of all chunks, NaN where a chunk failed."""
    lost = (torch.full((chunk.size,), math.nan, dtype=torch.float64) for chunk in chunks)
    return torch.cat(
        [torch.empty(0, dtype=torch.float64), *(nan if row is None else row[name] for row, nan in zip(rows, lost, strict=True))]
    )


class _PseudoScores(Reward):
    """Stands for a reward in a dry run: the same names, other numbers."""

    medium = None

    def __init__(self, outputs: Sequence[str]) -> None:
        self.outputs = outputs

    def score(self, media: Any, info: Sequence[Info]) -> Mapping[str, Tensor]:
        return {name: PseudoReward(seed=i).score(media, info)["pseudo"] for i, name in enumerate(self.outputs)}


def _pseudo(rewards: Mapping[str, Reward], weights: Mapping[str, float] | None) -> dict[str, Reward]:
    """Rewards that do not declare their names get those that only the weights name, else their label."""
    declared = {name for reward in rewards.values() for name in reward.outputs}
    free = [name for name in weights or {} if name not in declared]
    stand_ins: dict[str, Reward] = {}
    for label, reward in rewards.items():
        names = list(reward.outputs)
        if not names:
            names, free = free or [label], []
        stand_ins[label] = _PseudoScores(names)
    return stand_ins
