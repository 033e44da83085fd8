"""Prints a run's YAML for files of another system, which are read without executing them.

    python -m lit_rl.migrate deepgen FILE

deepgen: DeepGen-RL's launch scripts (.sh), training and evaluation data (.yaml) and SFT-aux configurations (.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lit_rl.errors import ConfigError
from lit_rl.migrate import deepgen
from lit_rl.migrate.migrated import Migrated

SYSTEMS: Mapping[str, Callable[[Path], Migrated]] = {"deepgen": deepgen.migrate}


def parser() -> argparse.ArgumentParser:
    """The system and its file."""
    p = argparse.ArgumentParser(prog="python -m lit_rl.migrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("system", choices=SYSTEMS, help="whose file it is")
    p.add_argument("file", type=Path, help="the file")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Print the YAML, or one sentence and exit with 2."""
    args = parser().parse_args(argv)
    try:
        print(SYSTEMS[args.system](args.file.expanduser()).yaml(str(args.file)), end="")
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
