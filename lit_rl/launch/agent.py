"""Torchrun's agent, which says in one sentence which process of the node was lost, and starts no run again that cannot go on."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from lit_rl.errors import LEFT_BY_ANOTHER
from lit_rl.launch.options import say

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

MISTAKE = 2
STOPPED = 128 + signal.SIGTERM


class Agent(LocalElasticAgent):
    """Watches the processes of a node. Torchrun's own starts them again after any failure, and tells of it in tables."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state not in (WorkerState.FAILED, WorkerState.UNHEALTHY) or not result.failures:
            return result
        ranks = {failure.local_rank: rank for rank, failure in result.failures.items()}
        failure = first(result.failures.values())
        if exit_code(failure) in (MISTAKE, STOPPED):  # the process has said why
            self._remaining_restarts = 0
        else:
            say(f"{lost(failure, ranks[failure.local_rank])}; {self._next()}")
        return result

    def _next(self) -> str:
        total = self._worker_group.spec.max_restarts
        left = self._remaining_restarts
        if left:
            return f"the run starts again from its newest checkpoint (restart {total - left + 1} of {total})"
        return "the run ends" + (" (no restart is left)" if total else "; with --restarts N it would go on by itself")


def first(failures: Iterable[ProcessFailure]) -> ProcessFailure:
    """The failure that the others followed: none of the agent's own signals, and not the end of one that has lost another."""
    found = list(failures)
    own = [one for one in found if one.exitcode not in (LEFT_BY_ANOTHER, STOPPED, -signal.SIGTERM)]
    return next(iter(own or found))


def lost(failure: ProcessFailure, rank: int) -> str:
    """Who was lost, and how."""
    name = f"process {rank} (pid {failure.pid} on {socket.gethostname()})"
    if failure.exitcode == LEFT_BY_ANOTHER:
        return f"the processes of {socket.gethostname()} have ended because one of another node was lost"
    how = f"was ended by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"has ended with code {failure.exitcode}"
    return f"{name} {how}, so all do"


def exit_code(failure: ProcessFailure) -> int:
    """The exit code as a shell has it."""
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
