"""The torchrun command of a node, and its run in this process."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import psutil

from lit_rl.errors import ConfigError
from lit_rl.launch.options import SECONDS_TO_WAIT, Nodes
from lit_rl.net.sockets import bind

ROOT = Path(__file__).parents[2]


def command(nodes: Nodes, run: Sequence[str], *, restarts: int, grace: int, local: str) -> list[str]:
    """The words of torchrun. local: the address by which the other nodes reach this one."""
    several = nodes.address is not None
    conf = f"is_host={str(nodes.rank == 0).lower()},join_timeout={SECONDS_TO_WAIT}"
    endpoint = f"[{nodes.address}]" if nodes.address and ":" in nodes.address else nodes.address
    return [
        *("--nnodes", str(nodes.most) if nodes.least == nodes.most else f"{nodes.least}:{nodes.most}"),
        *("--nproc-per-node", str(nodes.processes)),
        *("--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{endpoint}:{nodes.port}" if several else "127.0.0.1:0"),
        *("--rdzv-conf", conf),
        *("--rdzv-id", "lit-rl"),
        *("--local-addr", local),
        *("--max-restarts", str(restarts)),
        *("--shutdown-timeout", str(grace)),
        str(ROOT / "cli.py"),
        *run,
    ]


def own_address(nodes: Nodes) -> str:
    """The address of this node on the way to the first one. Raises ConfigError if that has no address."""
    if nodes.address is None:
        return "127.0.0.1"
    try:
        family, _, _, _, target = socket.getaddrinfo(nodes.address, nodes.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"the first node, {nodes.address} by --master-addr or MASTER_ADDR, cannot be found from here: {error.strerror}"
        ) from error


def interface(address: str) -> dict[str, str]:
    """The network interface of an address for gloo, which would take that of the host's name: on some machines the loopback."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    names = [name for name, found in psutil.net_if_addrs().items() if any(one.address.partition("%")[0] == address for one in found)]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


def wait_for_first(nodes: Nodes) -> None:
    """Return when the first node listens; nodes may be started in any order. Raises ConfigError after ten minutes, and on the first node
    where its port is taken."""
    if nodes.address is None:
        return
    if nodes.rank == 0:
        try:
            bind("::" if ":" in nodes.address else "0.0.0.0", nodes.port, option="--master-port").close()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return
    end, said = time.monotonic() + SECONDS_TO_WAIT, False
    while True:
        try:
            socket.create_connection((nodes.address, nodes.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"node 0 was not reached at {nodes.address}:{nodes.port} within {SECONDS_TO_WAIT} s ({error}): start the same command "
                    "there with --node-rank 0, and let that port through"
                ) from error
        if not said:
            sys.stderr.write(f"node {nodes.rank} waits for node 0 at {nodes.address}:{nodes.port}\n")
            said = True
        time.sleep(0.5)


def start(words: Sequence[str]) -> int:
    """Run torchrun in this process until the run ends. Returns the exit code: 0, that of the process that failed first, 128 + a signal."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from lit_rl.launch import agent

    if "LOGLEVEL" not in os.environ:  # the sentences of `agent` say the same
        for name in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.redirects"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    try:
        with patch("torch.distributed.launcher.api.LocalElasticAgent", agent.Agent):
            torchrun.run(torchrun.parse_args(list(words)))
    except ChildFailedError as failed:
        return agent.exit_code(agent.first(failed.failures.values()))
    except SignalException as asked:
        return 128 + asked.sigval
    except RendezvousError as error:
        closed = type(error).__name__.endswith(("ClosedError", "ExitError"))
        reason = "another node has given up, and says why" if closed else "the nodes have not come together, or node 0 is lost"
        sys.stderr.write(f"error: {reason}: {str(error).partition(' See inner')[0]}\n")
        return 1
    return 0
