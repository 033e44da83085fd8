"""A run on the nodes of a Ray cluster: on each an actor that runs the launcher there, and servers beside them.

Ray places; torchrun starts, watches and restarts processes, as without Ray. Where an actor or a server is lost, all ends and begins anew.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_rl.command_line.options import options_of
from lit_rl.errors import ConfigError
from lit_rl.launch.attempt import Asked, Attempt, Lost, Wanted, last_line
from lit_rl.launch.options import say, whole
from lit_rl.launch.placed import Place
from lit_rl.launch.servers import read_servers
from lit_rl.launch.shipping import check_folder, excluded, shipped_by_job

OTHERS = ("nnodes", "node_rank", "master_addr", "master_port")


def wanted(args: argparse.Namespace, run: Sequence[str], environment: Mapping[str, str], *, restarts: int, grace: int) -> Wanted:
    """The run that the options ask for. Raises ConfigError."""
    if args.ray is None:
        option = next(name for name in ("nodes", "gpus_per_node", "with_servers") if getattr(args, name) is not None)
        raise ConfigError(f"--{option.replace('_', '-')} is for a Ray cluster: add --ray")
    if other := next((name for name in OTHERS if getattr(args, name) is not None), None):
        raise ConfigError(f"--{other.replace('_', '-')} does not go with --ray, which finds the nodes itself: say --nodes N")
    address = args.ray or environment.get("RAY_ADDRESS") or "auto"
    if "://" in address:
        raise ConfigError(f"--ray {address}: it is HOST:PORT of the cluster, auto or local; from outside of it use `ray job submit`")
    if shipped_by_job(environment):
        check_folder(run, environment)
    nodes, gpus = args.nodes or environment.get("NNODES") or "1", args.gpus_per_node or environment.get("NGPUS")
    processes = args.nproc_per_node
    return Wanted(
        address=address,
        nodes=whole(nodes, "--nodes", least=1),
        gpus=None if gpus is None else whole(gpus, "--gpus-per-node", least=0),
        processes=None if processes is None else whole(processes, "--nproc-per-node", least=1),
        run=run,
        restarts=restarts,
        grace=grace,
        servers=read_servers(Path(args.with_servers)) if args.with_servers else (),
    )


def lines(wanted: Wanted) -> str:
    """Returns the lines that --dry-run prints: the launcher's own line on each node, and the servers' before them."""
    first = Place("node-0", "NODE_0", 29700, "python", ".")
    servers = [f"{kind.count} x {shlex.join(kind.words(Place('', 'NODE', 0, 'python', '.')))}" for kind in wanted.servers]
    full = filled_in(wanted, [])
    return "\n".join([*servers, *(shlex.join(["python", *full.words(rank, first)]) for rank in range(full.nodes))])


def start(wanted: Wanted) -> int:
    """Run on the cluster to the end. Returns the exit code: 0, that of the first process that failed, 128 + a signal, 1 for a lost node."""
    with ExitStack() as held:
        ray = held.enter_context(connected(wanted.address))
        asked = held.enter_context(signals())
        wanted = filled_in(wanted, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        for attempt in range(wanted.restarts + 1):
            try:
                with Attempt(ray, wanted, asked) as started:
                    return started.run()
            except Lost as lost:
                if asked.number is not None:
                    return 128 + asked.number
                say(f"{lost}, so all end; {_next(attempt, wanted.restarts)}")
        return 1


def _next(attempt: int, restarts: int) -> str:
    if attempt < restarts:
        return f"the run starts again from its newest checkpoint (restart {attempt + 1} of {restarts})"
    return "the run ends" + (" (no restart is left)" if restarts else "; with --restarts N it would go on by itself")


def filled_in(wanted: Wanted, nodes: Sequence[Mapping[str, float]]) -> Wanted:
    """Fill in the GPUs of a node, where none were asked for, by those that there are, and a process for each. nodes: their resources."""
    counts = sorted((int(node.get("GPU", 0)) for node in nodes), reverse=True)
    gpus = wanted.gpus if wanted.gpus is not None else counts[wanted.nodes - 1] if len(counts) >= wanted.nodes else 0
    devices = dict(options_of(wanted.run)).get("trainer.devices", "")
    return replace(wanted, gpus=gpus, processes=wanted.processes or gpus or (int(devices) if devices.isdecimal() else 1))


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster, with the working folder on its way to the nodes. Raises ConfigError where there is none."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray needs the package ray: pip install '.[ray]', here and on the nodes") from error
    runtime_env = {} if shipped_by_job(os.environ) else {"working_dir": str(Path.cwd()), "excludes": excluded(Path.cwd())}
    try:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR, namespace="lit-rl")
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r}: `ray start --head` on the first machine and `ray start --address=FIRST:6379` on the "
            "others make one; --ray local takes this machine alone"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"Ray at {address!r}: {last_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def signals() -> Iterator[Asked]:
    """Notes the first SIGTERM or SIGINT; a second one ends at once."""
    asked = Asked()

    def note(number: int, _: object) -> None:
        if asked.number is not None:
            raise SystemExit(128 + number)
        asked.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
