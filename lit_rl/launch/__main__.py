"""Start a run on one machine or on many; the same command on each node.

    python -m lit_rl.launch [--nnodes N --node-rank R --master-addr A --master-port P --nproc-per-node G] -- fit --config FILE
    python -m lit_rl.launch --ray [ADDRESS] --nodes N --gpus-per-node G [--with-servers FILE] -- fit --config FILE

The second one is given once, for all nodes of a Ray cluster.
Option beats environment (NNODES or NODE_IP_LIST, NODE_RANK, MASTER_ADDR, MASTER_PORT, NGPUS), environment beats SLURM's variables.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from lit_rl.command_line.early import early_mistake
from lit_rl.errors import ConfigError
from lit_rl.launch import on_ray, torchrun
from lit_rl.launch.options import checked_run, divided, nodes, parser, whole, working_environment
from lit_rl.net.env_file import use_env_file


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `launch`, 2 for a mistake in the words, which is told in one sentence."""
    try:
        return launch(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def launch(argv: Sequence[str]) -> int:
    """Start a run and wait for its end. Returns its exit code; raises ConfigError for a mistake in the words."""
    own, run = divided(argv)
    args = parser().parse_args(own)
    restarts = whole(args.restarts, "--restarts", least=0)
    run = checked_run(run, restarts=restarts)
    if any(getattr(args, name) is not None for name in ("ray", "nodes", "gpus_per_node", "with_servers")):
        return launch_on_ray(args, run, restarts)
    here = nodes(args, run, os.environ)
    local = torchrun.own_address(here)
    words = torchrun.command(here, run, restarts=restarts, grace=whole(args.grace, "--grace", least=1), local=local)
    if mistake := early_mistake(["cli.py", *run]):
        raise ConfigError(mistake)
    if args.dry_run:
        print(shlex.join(["torchrun", *words]))
        return 0
    os.environ.update(working_environment(here) | torchrun.interface(local))
    torchrun.wait_for_first(here)
    return torchrun.start(words)


def launch_on_ray(args: argparse.Namespace, run: Sequence[str], restarts: int) -> int:
    """Start a run on a Ray cluster; otherwise as `launch`."""
    use_env_file()
    wanted = on_ray.wanted(args, run, os.environ, restarts=restarts, grace=whole(args.grace, "--grace", least=1))
    if mistake := early_mistake(["cli.py", *run]):
        raise ConfigError(mistake)
    if args.dry_run:
        print(on_ray.lines(wanted))
        return 0
    return on_ray.start(wanted)


if __name__ == "__main__":
    raise SystemExit(main())
