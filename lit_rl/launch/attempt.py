"""One start of a run on a Ray cluster: servers and nodes are placed, heard and ended together."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_rl.errors import LEFT_BY_ANOTHER, ConfigError
from lit_rl.launch.options import SECONDS_TO_WAIT, say
from lit_rl.launch.placed import Place, Placed
from lit_rl.launch.servers import Served, addressed, healthy, url
from lit_rl.launch.shipping import FOLDER, carried, shipped_by_job

SECONDS_TO_FOLLOW = 30.0
"""Time that the other nodes have to end by themselves after one has failed."""

SECONDS_TO_CLOSE = 15.0
"""Time that servers have to end after SIGTERM."""

TOKENS = ("REWARD_TOKEN", "ROLLOUT_TOKEN", "JUDGE_TOKEN", "VLLM_API_KEY")
"""Variables of the token that servers ask for, and that the run sends. One is made where none is set."""


@dataclass(frozen=True)
class Wanted:
    """A run on a cluster.

    address: of the cluster, as `ray.init` takes it. nodes, gpus, processes: how many nodes, and what each has; None: what there is.
    run: words of the run. restarts, grace: as the launcher's options. servers: what runs beside it.
    """

    address: str
    nodes: int
    gpus: int | None
    processes: int | None
    run: Sequence[str]
    restarts: int
    grace: int
    servers: Sequence[Served] = ()

    def words(self, rank: int, first: Place) -> list[str]:
        """The launcher's own command on a node."""
        several = ("--node-rank", str(rank), "--master-addr", first.address, "--master-port", str(first.port))
        return [
            *("-m", "lit_rl.launch", "--nnodes", str(self.nodes), *(several if self.nodes > 1 else ())),
            *("--nproc-per-node", str(self.processes), "--restarts", str(self.restarts), "--grace", str(self.grace), "--", *self.run),
        ]


@dataclass(eq=False)
class Member:
    """An actor of the run, by the name that its lines have in the log. code: of its program, once that has ended."""

    name: str
    actor: Any
    place: Place
    code: int | None = None


class Lost(Exception):
    """An actor or a server that the run cannot do without; its name and what happened."""


@dataclass
class Asked:
    """The signal that this process has got, if any."""

    number: int | None = None


@dataclass
class Attempt:
    """Servers and nodes, all of which end with it."""

    ray: Any
    wanted: Wanted
    asked: Asked
    nodes: list[Member] = field(default_factory=list)
    servers: list[Member] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    pending: dict[Any, Member] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    follow: float = float("inf")
    passed_on: bool = False
    closing: bool = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        """Ask the servers to end, then end whatever is left."""
        self.closing = True
        for server in self.servers:
            server.actor.send.remote(int(signal.SIGTERM))
        try:
            self._listen(lambda: all(server.code is not None for server in self.servers), SECONDS_TO_CLOSE)
        except Lost as lost:
            say(f"{lost}")
        finally:
            for member in (*self.nodes, *self.servers):
                self.ray.kill(member.actor)
            for group in self.groups:
                self.ray.util.remove_placement_group(group)

    def run(self) -> int:
        """Start everything and wait for the end of the nodes; the exit code. Raises Lost, and ConfigError for what cannot start."""
        wanted = self.wanted
        bundle = {"CPU": float(wanted.processes or 1)} | ({"GPU": float(wanted.gpus)} if wanted.gpus else {})
        spread = "STRICT_SPREAD" if wanted.nodes > 1 else "PACK"
        nodes = self._placed([bundle] * wanted.nodes, spread, f"{wanted.nodes} nodes with {_resources(bundle)} each", "node")
        environment = carried(os.environ)
        if not shipped_by_job(os.environ):
            environment.setdefault(FOLDER, str(Path.cwd()))
        variables, words = self._serve(environment)
        if self.asked.number is not None:
            return 128 + self.asked.number
        run = replace(wanted, run=[*wanted.run, *words])
        self.nodes = nodes
        for rank, node in enumerate(nodes):
            self._start(node, [node.place.python, *run.words(rank, nodes[0].place)], environment | variables)
        self._listen(self._over, None)
        if all(node.code == 0 for node in nodes):
            return 0
        # A node that finds the first one gone says 1, and may be heard before that one's own code.
        return min(self.failed, key=lambda code: (code == LEFT_BY_ANOTHER, code == 1), default=LEFT_BY_ANOTHER)

    # ------------------------------------------------------------------ placing
    def _placed(self, bundles: Sequence[Mapping[str, float]], strategy: str, what: str, name: str) -> list[Member]:
        """An actor for each bundle, once the cluster has room for all. Raises ConfigError where it gets none, Lost."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self.ray.util.placement_group([dict(bundle) for bundle in bundles], strategy=strategy)
        self.groups.append(group)
        self._wait_for_room(group, what)
        actor = self.ray.remote(Placed)
        made = [
            actor.options(
                num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=i),
            ).remote()
            for i, bundle in enumerate(bundles)
        ]  # fmt: skip
        try:
            places = self.ray.get([one.place.remote() for one in made])
        except self.ray.exceptions.RayError as error:
            raise ConfigError(f"no process can be started on a node of the cluster: {last_line(error)}") from error
        return [Member(f"{name} {i} {place[0]}", one, Place(*place)) for i, (one, place) in enumerate(zip(made, places))]

    def _wait_for_room(self, group: Any, what: str) -> None:
        ready, end, told = group.ready(), time.monotonic() + SECONDS_TO_WAIT, False
        while not self.ray.wait([ready], timeout=1.0)[0]:
            there = ", ".join(_resources(node["Resources"]) for node in self.ray.nodes() if node["Alive"])
            if time.monotonic() > end:
                raise ConfigError(f"the cluster had no room for {what} within {SECONDS_TO_WAIT} s; its nodes have {there}")
            if self.asked.number is not None:
                raise Lost("the run was asked to stop before it began")
            if not told:
                say(f"waits for {what}; the nodes of the cluster have {there}")
            told = True

    def _serve(self, environment: dict[str, str]) -> tuple[dict[str, str], list[str]]:
        """Start the servers and wait until all are healthy; variables and words for the run. Adds tokens. Raises ConfigError, Lost."""
        found: list[list[Member]] = []
        if self.wanted.servers:
            token = environment.get("ROLLOUT_TOKEN") or secrets.token_urlsafe(24)
            environment |= {name: environment.get(name) or token for name in TOKENS}
        for kind in self.wanted.servers:
            bundle = {"CPU": kind.cpus} | ({"GPU": kind.gpus} if kind.gpus else {})
            what = f"{kind.count} x {kind.name} of --with-servers with {_resources(bundle)} each"
            found.append(self._placed([bundle] * kind.count, "PACK", what, kind.name))
            self.servers += found[-1]
            hidden = {} if kind.gpus else {"CUDA_VISIBLE_DEVICES": ""}
            for member in found[-1]:
                self._start(member, kind.words(member.place), {**environment, **hidden})
        begun = time.monotonic()
        for kind, members in zip(self.wanted.servers, found):
            for member in members:
                self._wait_for_health(kind, member, kind.ready_s - (time.monotonic() - begun))
        return addressed(self.wanted.servers, [[member.place for member in members] for members in found])

    def _wait_for_health(self, kind: Served, member: Member, seconds: float) -> None:
        with healthy(f"{url(member.place)}{kind.health}") as answered:
            self._listen(lambda: answered.is_set() or self.asked.number is not None, seconds)
        if not answered.is_set() and self.asked.number is None:
            raise ConfigError(f"{member.name} was not ready within {kind.ready_s:g} s (ready_s): {kind.health} does not answer with 200")

    def _start(self, member: Member, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._answer(member.actor.start.remote(list(words), dict(environment)), member)
        self.pending[member.actor.said.remote()] = member

    # ------------------------------------------------------------------ listening
    def _listen(self, over: Callable[[], bool], seconds: float | None) -> None:
        """Print what all say until something is over, or for so many seconds. Raises Lost for an actor that is gone."""
        end = None if seconds is None else time.monotonic() + seconds
        while self.pending and not over() and (end is None or time.monotonic() < end):
            if self.asked.number is not None and self.nodes and not self.passed_on:
                self.passed_on = True
                for node in self.nodes:  # whose processes write a checkpoint
                    node.actor.send.remote(self.asked.number)
            for ref in self.ray.wait(list(self.pending), timeout=0.5)[0]:
                self._hear(ref, self.pending.pop(ref))

    def _hear(self, ref: Any, member: Member) -> None:
        lines, code = self._answer(ref, member)
        sys.stdout.write("".join(f"[{member.name}] {line}\n" for line in lines))
        sys.stdout.flush()
        if code is None:
            self.pending[member.actor.said.remote()] = member
            return
        member.code = code
        if member in self.nodes and code:
            self.failed.append(code)
            self.follow = time.monotonic() + SECONDS_TO_FOLLOW
        elif member in self.servers and not self.closing and self.asked.number is None:
            ended = f"server {member.name} has ended with code {code}"
            if self.nodes:
                raise Lost(ended)
            raise ConfigError(f"{ended} before it was ready: its lines above say why; correct its command")

    def _answer(self, ref: Any, member: Member) -> Any:
        """Returns the answer of an actor. Raises Lost."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            raise Lost(f"{member.name} is lost (its actor or its machine has ended)") from error

    def _over(self) -> bool:
        """True once all nodes have ended, or the others have not followed one that failed."""
        return all(node.code is not None for node in self.nodes) or (time.monotonic() > self.follow and self.asked.number is None)


def last_line(error: BaseException) -> str:
    """Returns the last line of an error of Ray, which says what is wrong below pages of traceback."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _resources(found: Mapping[str, float]) -> str:
    """`8 GPUs and 64 CPUs` of a node or a bundle."""
    return " and ".join(f"{found[kind]:g} {kind}s" for kind in ("GPU", "CPU") if found.get(kind)) or "nothing"
