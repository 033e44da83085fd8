"""The file of --with-servers: what Ray starts beside a run, and how the run learns the addresses."""

from __future__ import annotations

import http.client
import re
import shlex
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lit_rl.command_line.errors import no_option
from lit_rl.command_line.yaml_files import fault
from lit_rl.errors import ConfigError
from lit_rl.launch.placed import Place

PLACES = ("{host}", "{port}", "{python}")


@dataclass(frozen=True)
class Served:
    """Servers of one kind.

    name: theirs in the file and in the log. command: words in which {host}, {port} and {python} stand for those of the node. gpus: of each
    one, also a part of one. count: how many. variable, option: of the run, which gets the addresses, divided by commas. health: path that
    is answered with 200 when it is ready. ready_s: seconds that loading may take. cpus: of each one, as Ray counts them.
    """

    name: str
    command: tuple[str, ...]
    gpus: float = 0.0
    count: int = 1
    variable: str | None = None
    option: str | None = None
    health: str = "/health"
    ready_s: float = 900.0
    cpus: float = 1.0

    def words(self, place: Place) -> list[str]:
        """The command on a node."""
        meant = dict(zip(PLACES, (place.address, str(place.port), place.python)))
        return [re.sub(r"\{(host|port|python)\}", lambda found: meant[found[0]], word) for word in self.command]


KEYS = tuple(name for name in Served.__dataclass_fields__ if name != "name")
NUMBERS = {"gpus": 0.0, "count": 1.0, "ready_s": 1.0, "cpus": 0.0}
"""Keys whose value is a number, and the least of them."""


def read_servers(file: Path) -> list[Served]:
    """The servers that a file asks for, in its order. Raises ConfigError with file, line and key."""
    if not file.is_file():
        raise ConfigError(f"--with-servers {file}: there is no such file")
    if wrong := fault(file, holds="servers by their names, each with its command"):
        raise ConfigError(wrong)
    root = yaml.compose(file.read_text(encoding="utf-8"))
    assert isinstance(root, yaml.MappingNode)
    return [_served(file, str(key.value), key.start_mark.line + 1, value) for key, value in root.value]


def addressed(servers: Sequence[Served], places: Sequence[Sequence[Place]]) -> tuple[dict[str, str], list[str]]:
    """Variables and words of the run that name the servers' addresses, by the places of each kind."""
    variables: dict[str, list[str]] = {}
    options: dict[str, list[str]] = {}
    for server, found in zip(servers, places, strict=True):
        urls = [url(place) for place in found]
        if server.variable:
            variables.setdefault(server.variable, []).extend(urls)
        if server.option:
            options.setdefault(server.option, []).extend(urls)
    words = [word for name, urls in options.items() for word in (f"--{name}", ",".join(urls))]
    return {name: ",".join(urls) for name, urls in variables.items()}, words


def url(place: Place) -> str:
    """The address of a server."""
    host = f"[{place.address}]" if ":" in place.address else place.address
    return f"http://{host}:{place.port}"


def _served(file: Path, name: str, line: int, node: yaml.Node) -> Served:
    if not isinstance(node, yaml.MappingNode):
        _refuse(file, line, name, "it is a mapping with a command, e.g. {command: ..., gpus: 1, variable: REWARD_SERVER_URLS}")
    given = {str(key.value): (value, key.start_mark.line + 1) for key, value in node.value}
    for key, (_, at) in given.items():
        if key not in KEYS:
            _refuse(file, at, name, no_option("a server", key, sorted(KEYS)))
    if "command" not in given:
        _refuse(file, line, name, "it has no command")
    values = dict(_values(file, name, given))
    command, at = values["command"], given["command"][1]
    if not any("{port}" in word for word in command):
        _refuse(file, at, f"{name}.command", "it does not say {port}, by which Ray chooses one that is free on the node")
    if not ("variable" in values or "option" in values):
        _refuse(file, line, name, "nothing gets its address: name a variable of the run, e.g. VLLM_API_BASE, or an option")
    return Served(name=name, **values)


def _values(file: Path, name: str, given: dict[str, tuple[yaml.Node, int]]) -> Iterator[tuple[str, Any]]:
    for key, (node, line) in given.items():
        where, text = f"{name}.{key}", node.value if isinstance(node, yaml.ScalarNode) else None
        if key == "command":
            yield key, _command(file, line, where, node)
        elif text is None or not text.strip():
            _refuse(file, line, where, "it is a single value")
        elif key in NUMBERS:
            yield key, _number(file, line, where, text, NUMBERS[key], whole=key == "count")
        elif key == "variable" and not re.fullmatch(r"[A-Za-z_]\w*", text):
            _refuse(file, line, where, f"{text!r} is no name of a variable")
        elif key == "health" and not text.startswith("/"):
            _refuse(file, line, where, f"{text!r} is no path such as /health")
        else:
            yield key, text.removeprefix("--")


def _command(file: Path, line: int, where: str, node: yaml.Node) -> tuple[str, ...]:
    if isinstance(node, yaml.SequenceNode) and all(isinstance(word, yaml.ScalarNode) for word in node.value):
        words = [str(word.value) for word in node.value]
    else:
        try:
            words = shlex.split(node.value) if isinstance(node, yaml.ScalarNode) else []
        except ValueError as error:
            _refuse(file, line, where, f"its quotes do not close ({error})")
    if not words:
        _refuse(file, line, where, "it is a line of words, e.g. {python} -m lit_rl.rewards.server --host {host} --port {port}")
    return tuple(words)


def _number(file: Path, line: int, where: str, text: str, least: float, *, whole: bool) -> float:
    kind = "whole number" if whole else "number"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        _refuse(file, line, where, f"{text!r} is no {kind} of at least {least:g}")
    return value


def _refuse(file: Path, line: int, where: str, why: str) -> NoReturn:
    raise ConfigError(f"{file}:{line}: {where}: {why}")


@contextmanager
def healthy(address: str) -> Iterator[threading.Event]:
    """An event that is set once an address answers 200, which a thread asks for."""
    answered, done = threading.Event(), threading.Event()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask() -> None:
        while not answered.is_set() and not done.wait(0.2):
            try:
                with opener.open(address, timeout=5) as response:
                    if response.status == 200:
                        answered.set()
            except (OSError, http.client.HTTPException):
                continue

    threading.Thread(target=ask, daemon=True).start()
    try:
        yield answered
    finally:
        done.set()
