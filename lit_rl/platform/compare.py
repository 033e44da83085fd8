"""Runs beside each other: where their configurations differ, and how they stand."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

MISSING = None


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    """A nested mapping by dotted keys; lists are values."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def difference(configs: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Keys whose values are not the same in all runs, with the value of each; None where a run does not have it."""
    every = {name: flat(config) for name, config in configs.items()}
    keys = dict.fromkeys(key for values in every.values() for key in values)
    rows = {key: {name: values.get(key, MISSING) for name, values in every.items()} for key in keys}
    return {key: row for key, row in rows.items() if any(value != next(iter(row.values())) for value in row.values())}


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a table that a spreadsheet opens, in which no text is a formula."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([plain(name) for name in names])
    writer.writerows([[plain(row.get(name)) for name in names] for row in rows])
    return file.getvalue()


def plain(value: object) -> object:
    """A cell; a text that a spreadsheet would compute is quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
