"""Numbers of trajectories over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lit_rl.agents.episodes import Trajectory
from lit_rl.envs.failures import Status
from lit_rl.ranks import gather_objects


def trajectory_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Shares of successes, of answers that are no action and of lost episodes, turns and seconds of an episode. Collective.

    Lost episodes count in `episodes/lost` and `episodes/retries` alone; where all are lost the other shares and means are NaN.
    """
    here = [(t.status.value, t.status.counts, len(t.turns), t.parse_errors, t.attempt, t.seconds) for t in trajectories]
    told = [row for rank in gather_objects(here) for row in rank]
    kept = [row for row in told if row[1]]
    turns = sum(row[2] for row in kept)
    metrics = {
        "success": _mean(row[0] == Status.SUCCESS for row in kept),
        "episodes/turns": _mean(row[2] for row in kept),
        "episodes/invalid_action_rate": sum(row[3] for row in kept) / turns if turns else math.nan,
        "episodes/lost": _mean(not row[1] for row in told),
        "episodes/retries": float(sum(row[4] for row in told)),
        "episodes/seconds": _mean(row[5] for row in kept),
    }
    ends = (Status.MAX_TURNS, Status.PARSE_ERROR, Status.TASK_TIMEOUT)
    return metrics | {f"episodes/{end.value}": _mean(row[0] == end for row in kept) for end in ends}


def _mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else math.nan
