"""From jsonargparse's reports to one sentence that says where the mistake is and what was probably meant."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

EXPECTATION = re.compile(r"Expected a |Not a valid subclass|Does not validate|a class path|a dict with")
"""How jsonargparse begins what it says of the types that a value might also have had, beside the one whose constructor objected."""


def explain(message: str, argv: Sequence[str]) -> str:
    """One line from the report of a failed parse: its innermost cause, the file and line of the key, the nearest key that exists."""
    lines = [line.strip() for line in message.splitlines()]
    bullets = [line.removeprefix("- ") for line in lines if line.startswith("- ") and "NoneType" not in line]
    causes = [line for line in bullets if not EXPECTATION.match(line)] or bullets
    sentence = " ".join(dict.fromkeys(causes)) if "Union subtypes" in message and causes else " ".join(lines)
    sentence = re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", sentence)
    sentence = re.sub(r'Parser key "([\w.]+)": ', r"\1: ", sentence)
    key = re.search(
        r"(?:Option|Key|key) '([\w.]+)' is not (?:accepted|expected)|does not accept option '([\w.]+)'|No action for key \"([\w.]+)\"",
        sentence,
    )
    name = key and next(part for part in key.groups() if part)
    if name:
        near = difflib.get_close_matches(name.rsplit(".")[-1], known_keys(argv), n=1, cutoff=0.6)
        sentence += f"; did you mean '{near[0]}'?" if near else ""
    at = where(name or sentence.split(":")[0], argv)
    return f"{at}: {sentence}" if at else sentence


def where(key: str, argv: Sequence[str]) -> str | None:
    """`file:line` of the only place in the run's YAML files that sets the last part of `key`, unless an option sets it anew."""
    last = re.escape(key.rsplit(".")[-1])
    if any(re.match(rf"--(?:[\w.]+\.)?{last}(?:=|$)", word) for word in argv):
        return None
    places = [
        f"{file}:{number}"
        for file in config_files(argv)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(rf"(?:^|[\s{{,]){last}\s*:", line.split("#")[0])
    ]
    return places[0] if len(places) == 1 else None


def config_files(argv: Sequence[str]) -> list[Path]:
    """The files given by --config."""
    values = [value for flag, value in pairwise(argv) if flag in ("--config", "-c")]
    values += [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    return [Path(value) for value in values if Path(value).is_file()]


def known_keys(argv: Sequence[str]) -> set[str]:
    """Parameters of every class that the run names, and of the Trainer."""
    text = "\n".join([*(file.read_text(encoding="utf-8") for file in config_files(argv)), *argv])
    paths = set(re.findall(r"\b(?:\w+\.)+[A-Z]\w+\b", text)) | {"lightning.Trainer"}
    return {"model", "data", "trainer", "seed_everything", "ckpt_path"}.union(*map(_parameters, paths))


def _parameters(class_path: str) -> Iterable[str]:
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError):  # not a class path after all, e.g. a file name
        return set()
    classes = inspect.getmro(cls) if inspect.isclass(cls) else ()
    return {p for c in classes if "__init__" in vars(c) for p in inspect.signature(c.__init__).parameters} - {"self", "args", "kwargs"}
