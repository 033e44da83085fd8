"""Variables that a launch script sets and the options of the command it starts, read from its text: nothing in it is executed."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from lit_rl.errors import ConfigError

ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$")
REFERENCE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")


def variables(text: str) -> dict[str, str]:
    """Value of each variable that a line of the script assigns, as far as it is known without running anything; the environment beats
    defaults of the form ${NAME:-value}."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := ASSIGNMENT.match(line):
            try:
                words = shlex.split(match[2], comments=True)
            except ValueError:
                continue
            value = expanded(words[0], found) if words else ""
            if value is not None:
                found[match[1]] = value
    return found


def expanded(word: str, known: Mapping[str, str]) -> str | None:
    """A word with its variables in place, None where one is unknown or a command would have to be run."""
    for _ in range(8):
        if "$(" in word or "`" in word:
            return None
        if not (match := REFERENCE.search(word)):
            return word
        name, default = match[1] or match[3], match[2]
        value = os.environ.get(name) or known.get(name) or default
        if value is None:
            return None
        word = word[: match.start()] + value + word[match.end() :]
    return None


def command_options(file: Path, program: str) -> tuple[dict[str, str | None], dict[str, str]]:
    """The options behind the name of a program in a script, and the script's variables.

    An option without a value is ""; None is one whose value only running the script would tell; several words are joined by a space.
    Raises ConfigError where the program is not started.
    """
    text = file.read_text(encoding="utf-8")
    known = variables(text)
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    line = next((line for line in joined.splitlines() if re.search(rf"(?<![\w#/]){re.escape(program)}(\.py)?(?=\s|$)", line)), None)
    if line is None:
        raise ConfigError(f"{file}: no line starts {program}: give the script that starts training, or one of its YAML or Python files")
    found: dict[str, str | None] = {}
    option = ""
    for word in shlex.split(line[line.index(program) :], comments=True)[1:]:
        if word.startswith("--"):
            option, given, value = word[2:].partition("=")
            found[option] = expanded(value, known) if given else ""
        elif option:
            more, before = expanded(word, known), found[option]
            found[option] = None if more is None or before is None else f"{before} {more}".strip()
    return found, known
