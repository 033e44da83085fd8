"""Check this machine, a run and its reward servers, and say what to fix.

    python -m lit_rl.doctor [--config run.yaml ...] [--KEY VALUE ...] [--urls ...] [--launch-gpu-ids 4,5,6,7] [--train-gpu-ids 0,1,2,3]
                            [--gpu-memory 24]

Of a run it also estimates the memory on each GPU, from the config.json files of its models. Exit code 1 when there is a problem. Loads no
weights. Without --config only the machine and the servers that the environment names.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lit_rl.doctor import machine, servers, worlds
from lit_rl.doctor.report import Finding, as_json, count, problem, show
from lit_rl.errors import ConfigError
from lit_rl.net.addresses import token_from_environment
from lit_rl.net.env_file import place_of, use_env_file
from lit_rl.net.environment import SECRETS
from lit_rl.net.gpus import gpus
from lit_rl.own_code import use_working_folder

if TYPE_CHECKING:
    from jsonargparse import Namespace


def parser() -> argparse.ArgumentParser:
    """Options of the doctor."""
    p = argparse.ArgumentParser(
        prog="python -m lit_rl.doctor",
        description="Check this machine, a run and its reward servers, and say what to fix. Exit code 1 when there is a problem.",
        epilog="Other options are the run's, as for `python cli.py fit`: --trainer.devices 4",
        allow_abbrev=False,
    )
    p.add_argument("--config", action="append", default=[], metavar="FILE", help="the run's YAML files, in the order of `cli.py fit`")
    p.add_argument("--urls", nargs="+", default=[], help="reward servers to ask beside the run's, e.g. 10.0.0.5:8000-8003")
    p.add_argument("--train-gpu-ids", default="", metavar="IDS", help="GPUs for training, e.g. 0,1,2,3 (default: what the run will take)")
    p.add_argument("--launch-gpu-ids", default="", metavar="IDS", help="GPUs for the reward servers, e.g. 4,5,6,7: checks ids and ports")
    p.add_argument("--port", type=int, help="of the launcher's first server (default: $REWARD_SERVER_PORT or 8000)")
    p.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each GPU, to see whether a run fits there; default: of those found")
    p.add_argument("--json", action="store_true", help="print the findings as JSON")
    return p


def findings(args: argparse.Namespace, rest: Sequence[str]) -> Iterator[Finding]:
    """All findings, in the order of the report."""
    found = gpus()
    train, launch = ([i.strip() for i in ids.split(",") if i.strip()] if ids else [] for ids in (args.train_gpu_ids, args.launch_gpu_ids))
    try:
        use_env_file()
    except ConfigError as error:
        yield problem("environment", str(error))
    yield from machine.packages()
    yield from worlds.browser(worlds.texts(args.config, rest))
    run, sentence = None, ""
    if args.config:
        from lit_rl.doctor.runs import Run, parse

        options = [word for file in args.config for word in ("--config", file)] + list(rest)
        try:
            run = Run(parse(options), options, found, train, args.gpu_memory)
        except ConfigError as error:
            sentence = str(error)
    wants_gpu, wants_bfloat16 = (run.wants_gpu, run.wants_bfloat16) if run else (False, False)
    yield from machine.accelerators(found, wants_gpu=wants_gpu, wants_bfloat16=wants_bfloat16)
    if sentence:
        yield problem("run", sentence)
    if run:
        yield from of_environment(run.config)
        yield from run.findings()
        yield from around(run.config)
        train = run.gpu_ids()
    if train or launch:
        yield from servers.shared(train, launch, found=found)
    port = args.port or os.environ.get("REWARD_SERVER_PORT", "8000").strip(" ,\r\n")
    if launch and str(port).isdecimal():
        yield from servers.ports(launch, first=int(port))
    if args.urls or not run:
        processes, token = len(train) or len(launch) or 1, None
        try:
            token = token_from_environment("REWARD_TOKEN")
        except ConfigError as error:
            yield problem("reward servers", str(error))
        yield from servers.of_environment(args.urls, processes=processes, token=token)


def of_environment(config: Namespace) -> Iterator[Finding]:
    """The options of a run that the environment's variables give, or would, and the secrets that are set."""
    from lit_rl.command_line.environment import sources

    yield from (ok("environment", line) for line in sources(config))
    if there := [name for name in SECRETS if os.environ.get(name)]:
        yield ok("environment", f"{', '.join(f'{name} (in {place_of(name)})' for name in there)}: set, and not shown")


def around(config: Namespace) -> Iterator[Finding]:
    """The findings about the services that an agent's run asks: that of its boxes, and the servers that answer for its policy."""
    from lit_rl.doctor import inference
    from lit_rl.doctor.boxes import boxes

    yield from boxes(config)
    yield from inference.servers(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 1 where there is a problem."""
    use_working_folder()
    args, rest = parser().parse_known_args(argv)
    if rest and not args.config:
        parser().error(f"{' '.join(rest)} is of no use without --config")
    os.environ.setdefault("TQDM_DISABLE", "1")
    result = list(findings(args, rest))
    if args.json:
        print(as_json(result))
    else:
        show(result)
    return 1 if count(result, "problem") else 0


if __name__ == "__main__":
    sys.exit(main())
