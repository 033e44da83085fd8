"""Variables that a launch script sets and the options of the command it starts, read from its text: nothing in it is executed."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from lit_rl.errors import ConfigError

ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$")
SUBSTITUTION = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`")
OPERATORS = "<>|&;"
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


def command(file: Path, program: str, *, names: str) -> tuple[list[str], dict[str, str]]:
    """The words of the first command that a script starts a program with, from the program's name on, and the script's variables.

    program: A regular expression. names: The programs, for the error. Redirections, pipes, later commands of the line and "$@" are left
    out. Raises ConfigError where no line starts it, or where a quote is open.
    """
    text = file.read_text(encoding="utf-8")
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    starts = (re.search(rf"(?<![\w#/])({program})(\.py)?(?=\s|$).*", line) for line in joined.splitlines())
    found = next((match for match in starts if match), None)
    if found is None:
        raise ConfigError(f"{file}: no line starts {names}: give the script that starts training")
    line = SUBSTITUTION.sub("$(...)", found[0])
    lexer = shlex.shlex(re.sub(r"(?<=\s)[0-9&](?=>)", "", line), posix=True, punctuation_chars=OPERATORS)  # 2> and &> are one operator
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError as error:
        raise ConfigError(f"{file}: the command that starts {found[1]} cannot be read: {error}") from error
    own = itertools.takewhile(lambda word: not word or not set(word) <= set(OPERATORS), words)
    return [word for word in own if word not in ("$@", "${@}", "$*")], variables(text)


def command_options(file: Path, program: str) -> tuple[dict[str, str | None], dict[str, str]]:
    """The options behind the name of a program in a script, and the script's variables.

    An option without a value is ""; None is one whose value only running the script would tell; several words are joined by a space.
    Raises ConfigError where the program is not started.
    """
    words, known = command(file, re.escape(program), names=program)
    found: dict[str, str | None] = {}
    option = ""
    for word in words[1:]:
        if word.startswith("--"):
            option, given, value = word[2:].partition("=")
            found[option] = expanded(value, known) if given else ""
        elif option:
            more, before = expanded(word, known), found[option]
            found[option] = None if more is None or before is None else f"{before} {more}".strip()
    return found, known
