"""Evaluators that ask a machine: a command, and what its output must be."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lit_rl.envs.base import Outcome
from lit_rl.envs.failures import WorldError
from lit_rl.envs.tasks import known_keys
from lit_rl.errors import ConfigError

COMPARATORS: Mapping[str, type] = {"equals": str, "contains": str, "regex": str, "at_least": float, "at_most": float}
CANNOT_RUN = (126, 127)
"""Exit codes by which a shell says that there is no such command, or that it is no program."""


class Printed(NamedTuple):
    """The standard output of a command, and its exit code."""

    output: str
    code: int


@dataclass(frozen=True)
class Validator:
    """A command of which the output, without blanks around it, must hold against each comparator.

    equals, contains: The whole output, or a part of it. regex: A pattern that is found somewhere in it. at_least, at_most: Bounds of the
    number that the output is. The exit code does not matter, since `grep` and `test` end with 1 where they find nothing.
    """

    command: str
    comparators: Mapping[str, str | float]

    def holds(self, output: str) -> bool:
        """Hold an output against every comparator."""
        text = output.strip()
        tests: Mapping[str, Callable[[str], bool]] = {
            "equals": lambda expected: text == expected,
            "contains": lambda expected: expected in text,
            "regex": lambda expected: re.search(expected, text) is not None,
        }
        return all(
            tests[name](str(expected)) if name in tests else _bounded(text, name, float(expected))
            for name, expected in self.comparators.items()
        )


def _bounded(text: str, name: str, bound: float) -> bool:
    try:
        number = float(text)
    except ValueError:
        return False
    return number >= bound if name == "at_least" else number <= bound


def parse_validators(evaluator: Mapping[str, object]) -> list[Validator]:
    """`{"command": ..., "equals": ...}`, or `{"all": [...]}` of such, which must all hold. Raises ConfigError, beginning with the key."""
    if "all" in evaluator:
        known_keys(evaluator, ("all",), "evaluator.")
        several = evaluator["all"]
        if not isinstance(several, list) or not several or not all(isinstance(one, dict) for one in several):
            raise ConfigError("evaluator.all: it is a list of objects with a command and a comparator each")
        return [_validator(one, f"evaluator.all[{place}].") for place, one in enumerate(several)]
    return [_validator(evaluator, "evaluator.")]


def _validator(row: Mapping[str, object], where: str) -> Validator:
    known_keys(row, ("command", *COMPARATORS), where)
    command = row.get("command")
    if not isinstance(command, str) or not command.strip():
        raise ConfigError(f"{where}command: it is missing; without it no episode of this task could ever succeed")
    comparators = {name: _expected(f"{where}{name}", row[name], kind) for name, kind in COMPARATORS.items() if name in row}
    if not comparators:
        raise ConfigError(f"{where.rstrip('.')}: give one of {', '.join(COMPARATORS)} beside the command {command!r}")
    return Validator(command, comparators)


def _expected(key: str, value: object, kind: type) -> str | float:
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{key}: {value!r} is not a number")
        return float(value)
    if not isinstance(value, str):
        raise ConfigError(f"{key}: {value!r} is not a string; outputs of commands are strings, so write {str(value)!r}")
    if key.endswith("regex"):
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{key}: {value!r} is no regular expression: {error}") from error
    return value


async def validate(validators: list[Validator], run: Callable[[str], Awaitable[Printed]]) -> Outcome:
    """1 where all hold, else 0. run: Carries out a command. Raises WorldError for a command that the machine does not have."""
    details: dict[str, object] = {}
    success = True
    for validator in validators:
        printed = await run(validator.command)
        if printed.code in CANNOT_RUN:
            raise WorldError(
                f"the evaluator's command {validator.command!r} cannot be run (exit code {printed.code}): {printed.output.strip()}"
            )
        details[validator.command] = printed.output.strip()
        success &= validator.holds(printed.output)
    return Outcome(success, float(success), details)
