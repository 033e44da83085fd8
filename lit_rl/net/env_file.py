"""`.env` in the working folder: values of variables that the environment lacks. `env.example` is its template.

Programs call `use_env_file` before they import what reads variables when it is imported, such as the hub's client with HF_ENDPOINT.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from lit_rl.errors import ConfigError
from lit_rl.net.environment import HUB, SECRETS, VARIABLES

FILE = ".env"
PLACEHOLDER = "your_"
"""Beginning of the values that the template has for the user to replace."""
_of_file: set[str] = set()


def use_env_file(folder: Path | None = None) -> None:
    """Set the variables of `.env` in a folder (default: the working folder) that the environment lacks.

    Empty values and the template's placeholders count as unset, wherever they stand: containers hand the whole file over as their
    environment, and a placeholder that is sent as a token is refused by the other side with a sentence about everything else.
    Raises ConfigError with file and line.
    """
    file = (folder or Path.cwd()) / FILE
    found = read_env_file(file) if file.is_file() else {}
    for name in {*found, *SECRETS, *HUB, *(variable.name for variable in VARIABLES)}:
        if is_unset(os.environ.get(name, "")) and not is_unset(found.get(name, "")):
            os.environ[name] = found[name]
            _of_file.add(name)
        elif os.environ.get(name, "").strip().startswith(PLACEHOLDER):
            del os.environ[name]


def read_env_file(file: Path) -> dict[str, str]:
    """Name and value of each line KEY=VALUE; `export`, quotes, comments after a value and ${NAME} are those of a shell.

    Raises ConfigError with file and line.
    """
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    for line in parse_stream(io.StringIO(text)):
        if line.error or (line.key is not None and line.value is None):
            said = line.original.string.strip().partition("=")[0]
            where = line.original.line + len(line.original.string) - len(line.original.string.lstrip("\r\n"))
            raise ConfigError(f"{file}:{where}: {said!r} begins no line KEY=VALUE: correct it, or put # before it")
    return {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}


def is_unset(value: str) -> bool:
    """True for an empty value and for a placeholder of the template."""
    return not value.strip() or value.strip().startswith(PLACEHOLDER)


def place_of(name: str) -> str:
    """Where the value of a variable comes from: `.env` or `the environment`."""
    return FILE if name in _of_file else "the environment"


def why_unset(name: str) -> str:
    """Why a variable has no value, as the end of a sentence about it."""
    file = Path.cwd() / FILE
    held = [os.environ.get(name, ""), (read_env_file(file).get(name, "") if file.is_file() else "")]
    if any(value.strip().startswith(PLACEHOLDER) for value in held):
        return "it holds the template's placeholder"
    return f"it is not in the environment, and {file} {'has none' if file.is_file() else 'is not there'}"
