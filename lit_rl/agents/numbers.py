"""Numbers of trajectories over all processes."""

from __future__ import annotations

from collections.abc import Sequence

from lit_rl.agents.episodes import Trajectory
from lit_rl.envs.failures import Status
from lit_rl.ranks import gather_objects


def trajectory_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Shares of successes, of answers that are no action and of lost episodes, turns and seconds of an episode. Collective.

    Lost episodes count in `episodes/lost` alone.
    """
    here = [(t.status.value, t.status.counts, len(t.turns), t.parse_errors, t.attempt, t.seconds) for t in trajectories]
    told = [row for rank in gather_objects(here) for row in rank]
    kept = [row for row in told if row[1]]
    turns = sum(row[2] for row in kept)
    metrics = {
        "success": sum(row[0] == Status.SUCCESS for row in kept) / max(len(kept), 1),
        "episodes/turns": turns / max(len(kept), 1),
        "episodes/invalid_action_rate": sum(row[3] for row in kept) / max(turns, 1),
        "episodes/lost": (len(told) - len(kept)) / max(len(told), 1),
        "episodes/retries": float(sum(row[4] for row in told)),
        "episodes/seconds": sum(row[5] for row in kept) / max(len(kept), 1),
    }
    ends = (Status.MAX_TURNS, Status.PARSE_ERROR, Status.TASK_TIMEOUT)
    return metrics | {f"episodes/{end.value}": sum(row[0] == end for row in kept) / max(len(kept), 1) for end in ends}
