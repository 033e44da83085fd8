"""Samples without a score: said once, counted, and too many of them stop the run on every process alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lit_rl.ranks import gather_objects
from lit_rl.rewards.base import Reward, RewardError
from lit_rl.rewards.measures import share

log = logging.getLogger(__name__)


class Failures:
    """The last reason of each reward for leaving samples without a score."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = rewards
        self.errors: dict[str, str] = {}

    def complain(self, label: str, text: str, error: Exception | None = None) -> None:
        """Log the first failure of each reward; the rest is counted."""
        if label not in self.errors:
            log.warning(
                "reward %s left samples without a score, which are masked: %s. Further failures are counted.", label, text, exc_info=error
            )
        self.errors[label] = text

    def agree(self, total: int, failed: int, broken: Exception | None, *, allowed: float) -> None:
        """Raise the same RewardError on every rank if a reward is broken or too many samples failed on any of them. Collective.

        allowed: Share of the samples of all ranks that may be without a score.
        """
        table = share([total, failed, float(broken is not None)])
        if table[:, 2].any():
            raise RewardError(gather_objects(str(broken))[int(table[:, 2].argmax())]) from broken
        all_total, all_failed = int(table[:, 0].sum()), int(table[:, 1].sum())
        if all_failed > allowed * all_total:
            worst = int(table[:, 1].argmax())
            told = [f"{label}: {text} ({self.rewards[label].remedy})" for label, text in self.errors.items()]
            reasons = "; ".join(told) or "the reward itself answered NaN"
            message = (
                f"{all_failed} of {all_total} samples got no score, more than max_failed_fraction={allowed} allows. "
                f"Last reasons on rank {worst}: {reasons}. Raise max_failed_fraction if the loss is acceptable; "
                "continue with --ckpt_path last"
            )
            raise RewardError(gather_objects(message)[worst])
