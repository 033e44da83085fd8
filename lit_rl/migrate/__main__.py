"""Prints a run's YAML for files of another system, which are read without executing them.

    python -m lit_rl.migrate deepgen FILE
    python -m lit_rl.migrate verl FILE
    python -m lit_rl.migrate cua FILE --gpus N
    python -m lit_rl.migrate verl -- python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo ...

deepgen: DeepGen-RL's launch scripts (.sh), training and evaluation data (.yaml) and SFT-aux configurations (.py).
cua: the YAML of AReaL's guide for computer-use agents (rl-cua); --gpus are those that train.
verl: scripts (.sh) or command lines of verl.trainer.main_ppo, sft_trainer and dpo_trainer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lit_rl.errors import ConfigError
from lit_rl.migrate import cua, deepgen, verl
from lit_rl.migrate.migrated import Migrated

SYSTEMS: Mapping[str, Callable[[Path, int | None], Migrated]] = {
    "deepgen": lambda file, _: deepgen.migrate(file),
    "cua": lambda file, gpus: cua.migrate(file, gpus=gpus),
    "verl": lambda file, _: verl.migrate_file(file),
}


def parser() -> argparse.ArgumentParser:
    """The system and its file."""
    p = argparse.ArgumentParser(prog="python -m lit_rl.migrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("system", choices=SYSTEMS, help="whose file it is")
    p.add_argument("file", type=Path, nargs="?", help="the file")
    p.add_argument("--gpus", type=int, metavar="N", help="of cua: GPUs that train")
    return p


def migrated(argv: Sequence[str]) -> tuple[Migrated, str]:
    """The run, and the name of what it was read from. Raises ConfigError."""
    if "--" in argv:
        before, words = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
        if parser().parse_args(before).system != "verl":
            raise ConfigError("a command line behind -- is read for verl alone: name a file")
        return verl.migrate_words(words), "a command of verl"
    args = parser().parse_args(argv)
    if args.file is None:
        raise ConfigError(f"name a file of {args.system}")
    return SYSTEMS[args.system](args.file.expanduser(), args.gpus), str(args.file)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the YAML, or one sentence and exit with 2."""
    try:
        made, source = migrated(sys.argv[1:] if argv is None else argv)
        print(made.yaml(source), end="")
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
