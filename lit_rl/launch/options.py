"""Options of the launcher, and the place of this node among the nodes of a run: option before environment before default."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from lit_rl.command_line.options import options_of
from lit_rl.errors import ConfigError
from lit_rl.net.gpus import gpus

COMMANDS = ("fit", "validate", "test", "predict")
PORT = 29700
GRACE = 120
SECONDS_TO_WAIT = 600
"""The patience with a node that has not started yet, with one that is lost and may come back, and with a cluster that has no room."""

USAGE = "python -m lit_rl.launch [OPTIONS] -- fit --config FILE"


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run, and the one that this is.

    least, most: How many nodes. rank: Of this node. address, port: Where the first node is reached; None = one node, any free port.
    processes: On this node.
    """

    least: int
    most: int
    rank: int
    address: str | None
    port: int
    processes: int


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; usage: {USAGE}")


def parser() -> argparse.ArgumentParser:
    """Options of the launcher; those of the run follow `--`."""
    p = Parser(prog="python -m lit_rl.launch", usage=USAGE, allow_abbrev=False, description=__doc__)
    p.add_argument("--nnodes", help="number of nodes, or MIN:MAX (default: NNODES, else the length of NODE_IP_LIST, SLURM's, else 1)")
    p.add_argument("--node-rank", help="number of this node, 0 is the first (default: NODE_RANK, INDEX, SLURM's, else 0)")
    p.add_argument("--master-addr", help="address of the first node (default: MASTER_ADDR, CHIEF_IP, SLURM's first node)")
    p.add_argument("--master-port", help=f"a free port of the first node (default: MASTER_PORT, SLURM's, else {PORT})")
    p.add_argument("--nproc-per-node", help="processes on this node (default: NGPUS, --trainer.devices, one for each GPU, 1)")
    p.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="run on a Ray cluster: HOST:PORT, local, auto (default: RAY_ADDRESS, auto)"
    )
    p.add_argument("--nodes", metavar="N", help="with --ray: number of nodes (default: NNODES, else 1)")
    p.add_argument("--gpus-per-node", metavar="G", help="with --ray: GPUs of each node (default: NGPUS, else those that the nodes have)")
    p.add_argument("--with-servers", metavar="FILE", help="with --ray: YAML of servers to run beside, see docs/scaling.md")
    p.add_argument("--restarts", default="0", metavar="N", help="how often a run goes on by itself after a process or node is lost")
    p.add_argument(
        "--grace",
        default=str(GRACE),
        metavar="SECONDS",
        help="after SIGTERM the processes have so long to write a checkpoint (default: %(default)s)",
    )
    p.add_argument("--dry-run", action="store_true", help="print the line that is run, and stop")
    return p


def say(sentence: str) -> None:
    """Write a sentence to the error stream, at once."""
    sys.stderr.write(f"launcher: {sentence}\n")
    sys.stderr.flush()


def divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for the launcher, and those of the run behind `--`. Raises ConfigError where they are not told apart."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    own, run = words[:cut], words[cut + 1 :]
    if not run and not {"-h", "--help"} & set(own):
        raise ConfigError(f"the words of the run stand behind `--`: {USAGE}")
    if run and run[0] not in COMMANDS:
        raise ConfigError(f"behind `--` stands one of {', '.join(COMMANDS)}, not {run[0]!r}: {USAGE}")
    return own, run


def whole(text: str, name: str, *, least: int, most: int | None = None) -> int:
    """A whole number from text. Raises ConfigError that names the option or variable."""
    if text.strip().isascii() and text.strip().isdecimal() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    allowed = f"from {least} to {most}" if most is not None else f"of at least {least}"
    raise ConfigError(f"{name} is {text!r}; it is a whole number {allowed}")


def nodes(args: argparse.Namespace, run: Sequence[str], environment: Mapping[str, str]) -> Nodes:
    """The nodes of a run by options, variables and SLURM. Raises ConfigError for values that are wrong or do not fit each other."""
    environment = {**slurm(environment), **{name: value for name, value in environment.items() if value.strip()}}
    least, most = _counts(args.nnodes, environment)
    text, name = _first(args.node_rank, "--node-rank", environment, ("NODE_RANK", "INDEX", "SLURM_NODEID"), "0")
    rank = whole(text, name, least=0)
    if rank >= most:
        raise ConfigError(f"{name} is {rank}, and the run has {most} nodes, 0 to {most - 1}: correct it, or --nnodes (NNODES)")
    address, addressed = _first(args.master_addr, "--master-addr", environment, ("MASTER_ADDR", "CHIEF_IP", "SLURM_MASTER"), "")
    if most > 1 and not address:
        raise ConfigError(f"a run on {most} nodes needs the address of the first one: give --master-addr or set MASTER_ADDR")
    if re.search(r"[\s/]|:\d+$", address) and address.count(":") < 2:
        raise ConfigError(f"{addressed} is {address!r}; it is a name or an IP address without port, which is --master-port (MASTER_PORT)")
    text, name = _first(args.master_port, "--master-port", environment, ("MASTER_PORT", "SLURM_PORT"), str(PORT))
    port = whole(text, name, least=1, most=65535)
    return Nodes(least, most, rank, address if most > 1 else None, port, processes(args.nproc_per_node, run, environment))


def slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """SLURM's word about the first node, as `SLURM_MASTER` and `SLURM_PORT`, through Lightning's own environment; nothing without srun."""
    if "SLURM_NNODES" not in environment or "SLURM_NODEID" not in environment:
        return {}
    if whole(environment.get("SLURM_NTASKS_PER_NODE", "1"), "SLURM_NTASKS_PER_NODE", least=1) > 1:
        raise ConfigError(
            "the launcher starts the processes of a node itself, and SLURM_NTASKS_PER_NODE is "
            f"{environment['SLURM_NTASKS_PER_NODE']}: give #SBATCH --ntasks-per-node=1"
        )
    from lightning.fabric.plugins.environments import SLURMEnvironment

    listed = environment.get("SLURM_JOB_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1"))
    first = SLURMEnvironment.resolve_root_node_address(listed)
    job = environment.get("SLURM_JOB_ID", "")
    return {"SLURM_MASTER": first} | ({"SLURM_PORT": str(15000 + int(job[-4:]))} if job.isdecimal() else {})


def processes(asked: str | None, run: Sequence[str], environment: Mapping[str, str]) -> int:
    """The number of processes of this node; `--trainer.devices` of the run counts where it is a number."""
    devices = dict(options_of(run)).get("trainer.devices", "")
    text, name = _first(asked, "--nproc-per-node", environment, ("NGPUS",), devices if devices.isdecimal() else "")
    if text:
        return whole(text, name if name != "the default" else "--trainer.devices", least=1)
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    return max(len(gpus() if hidden is None else [one for one in hidden.split(",") if one.strip()]), 1)


def _counts(asked: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    text, name = _first(asked, "--nnodes", environment, ("NNODES",), "")
    if not text and (listed := environment.get("NODE_IP_LIST")):
        text, name = str(len(re.split(r"[\s,;]+", listed.strip(" \t\r\n,;")))), "NODE_IP_LIST"
    text, name = (text, name) if text else _first(None, "", environment, ("SLURM_NNODES",), "1")
    low, _, high = text.partition(":")
    least = whole(low, name, least=1)
    most = whole(high, name, least=1) if high or ":" in text else least
    if least > most:
        raise ConfigError(f"{name} is {text}; MIN:MAX begins with the smaller number, {most}:{least}")
    return least, most


def _first(option: str | None, name: str, environment: Mapping[str, str], variables: Sequence[str], default: str) -> tuple[str, str]:
    """The first value that is there, and the name under which it was given."""
    if option is not None:
        return option, name
    found = next((variable for variable in variables if environment.get(variable)), None)
    return (environment[found].strip(), found) if found else (default, "the default")


def checked_run(run: Sequence[str], *, restarts: int) -> list[str]:
    """The words of the run; of a fit that names no checkpoint `--ckpt_path last` too. Raises ConfigError for what restarts cannot do."""
    given = dict(options_of(run))
    path = given.get("ckpt_path")
    if run[0] == "fit" and path is None:
        return [*run, "--ckpt_path", "last"]
    if restarts and path not in (None, "last"):
        raise ConfigError(
            f"--restarts {restarts} begins each time at the newest checkpoint of the run, and --ckpt_path {path} at that one: leave "
            "--ckpt_path out, or start the run from it once without --restarts"
        )
    return list(run)


def working_environment(nodes: Nodes) -> dict[str, str]:
    """Variables for the processes beside torchrun's own: rank 0 of each start has a store of its own, which a lost node does not take
    along."""
    threads = {} if "OMP_NUM_THREADS" in os.environ or nodes.processes == 1 else {"OMP_NUM_THREADS": "1"}
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **threads}
