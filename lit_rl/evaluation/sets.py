"""The evaluation YAML of DeepGen-RL: sets of prompts, each with guidance, steps, duplicates and a judge of its own.

datasets:
  - name: bench
    path: bench.csv              # absolute, or beside this file
    cfg_scale: 3.5               # default: the run's
    num_inference_steps: 20      # default: the run's
    duplicates: 2                # images of each prompt
    scoring: unigenbench/en      # or {type: unigenbench, language: zh}; left out: images alone
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from lit_rl.errors import ConfigError, listed
from lit_rl.evaluation.rows import Row, read_rows
from lit_rl.evaluation.unigenbench import Language
from lit_rl.evaluation.yaml_lines import Document, read_document

KEYS = ("name", "path", "cfg_scale", "num_inference_steps", "duplicates", "scoring")
TESTPOINTS: Mapping[Language, tuple[Sequence[str], Sequence[str]]] = {
    "en": (("Testpoints",), ("Testpoint Description",)),
    "zh": (("考点", "Testpoints"), ("考点对应描述", "考点描述", "考点说明", "Testpoint Description")),
}
"""Keys in `sub_dims` of the testpoints, and of their descriptions, by language."""


@dataclass(frozen=True)
class Scoring:
    """The judge of a set."""

    type: str
    language: Language


@dataclass(frozen=True)
class Item:
    """An image to make: a prompt and which of its duplicates it is."""

    row: Row
    duplicate: int

    @property
    def seed(self) -> int:
        """Number that its noise is drawn from, by DeepGen-RL's rule."""
        return self.row.index * 1000 + self.duplicate + 42

    @property
    def file(self) -> str:
        """Name of its image."""
        key = self.row.metadata.get("key")
        name = re.sub(r"[^\w.-]+", "_", str(key)).strip("._") if key is not None else ""
        return f"{name or self.row.index}.{self.duplicate}.png"


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts and how their images are made and judged; None: as the run says."""

    name: str
    rows: Sequence[Row]
    cfg_scale: float | None = None
    num_steps: int | None = None
    duplicates: int = 1
    scoring: Scoring | None = None

    def items(self) -> list[Item]:
        """Every image, duplicates of a prompt side by side."""
        return [Item(row, duplicate) for row in self.rows for duplicate in range(self.duplicates)]

    def testpoints(self, row: Row) -> tuple[list[str], list[str]]:
        """Testpoints of a prompt and their descriptions. Raises ConfigError that names the key that is missing."""
        assert self.scoring is not None
        return testpoints_of(row, self.scoring.language)


def read_sets(file: str | Path, *, lenient: bool = False) -> list[EvaluationSet]:
    """The sets of an evaluation YAML. Raises ConfigError with file, line and key; a set with a judge has testpoints for every prompt.

    lenient: Values that cannot be meant count as left out, as in the authors' reader.
    """
    document = read_document(Path(file).expanduser())
    content = document.content
    if not isinstance(content, dict) or "datasets" not in content:
        found = listed(sorted(content)) if isinstance(content, dict) and content else "nothing"
        raise ConfigError(f"{document.where()}: the key `datasets` is missing; found {found}")
    entries = content["datasets"]
    if not isinstance(entries, list):
        raise ConfigError(f"{document.where('datasets')}: `datasets` must be a list of sets, each beginning with `- name:`")
    sets = [_set(document, i, entry, lenient=lenient) for i, entry in enumerate(entries)]
    for i, one in enumerate(sets):
        if one.name in (other.name for other in sets[:i]):
            raise ConfigError(
                f"{document.where('datasets', i, 'name')}: the name {one.name!r} stands twice; it is the folder of a set's images"
            )
    return sets


def _set(document: Document, i: int, entry: object, *, lenient: bool) -> EvaluationSet:
    where = document.where("datasets", i)
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: entry {i} of `datasets` must have the keys name and path")
    if unknown := [key for key in entry if key not in KEYS] if not lenient else []:
        near = difflib.get_close_matches(unknown[0], KEYS, n=1)
        meant = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(KEYS)}"
        raise ConfigError(f"{document.where('datasets', i, unknown[0])}: a set has no key `{unknown[0]}`{meant}")
    for key in ("name", "path"):
        if not isinstance(entry.get(key), str | int | float) or not str(entry[key]).strip():
            raise ConfigError(f"{document.where('datasets', i, key)}: entry {i} of `datasets` lacks the key `{key}`")
    name = str(entry["name"])
    if not re.fullmatch(r"[^/\\\x00]+", name) or name in (".", ".."):
        raise ConfigError(f"{document.where('datasets', i, 'name')}: name={name!r} names a folder, and cannot have a slash or be dots")
    numbers = {key: _number(document, i, entry, key, whole=key != "cfg_scale", lenient=lenient) for key in KEYS[2:5]}
    scoring = scoring_of(entry.get("scoring"), where="" if lenient else f"{document.where('datasets', i, 'scoring')}: scoring")
    rows = _rows(document, i, str(entry["path"]), name)
    steps, duplicates = numbers["num_inference_steps"], numbers["duplicates"]
    found = EvaluationSet(
        name, rows, numbers["cfg_scale"], None if steps is None else int(steps), 1 if duplicates is None else int(duplicates), scoring
    )
    if scoring is not None:
        for row in rows:
            found.testpoints(row)
    _check_files(found)
    return found


def _rows(document: Document, i: int, path: str, name: str) -> list[Row]:
    file = document.file.parent / Path(path).expanduser()
    if not file.is_file():
        where, folder = document.where("datasets", i, "path"), document.file.parent
        raise ConfigError(f"{where}: there is no file {path} (entry {name!r}): give an absolute path, or one from {folder}")
    return read_rows(file)


def _check_files(one: EvaluationSet) -> None:
    """Keys that differ can be the same name of a file."""
    seen: dict[str, Row] = {}
    for item in one.items():
        other = seen.setdefault(item.file, item.row)
        if other is not item.row:
            raise ConfigError(f"{item.row.place}: its image would be {item.file}, as that of {other.place}: give them different keys")


def _number(document: Document, i: int, entry: Mapping[str, object], key: str, *, whole: bool, lenient: bool) -> float | None:
    """A number above 0 (guidance: at least 0), or None where it is left out."""
    value = entry.get(key)
    if value is None:
        return None
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and (value >= 0 if not whole else value > 0)
    if fits:
        assert isinstance(value, int | float)
        return float(value)
    if lenient:
        return None
    kind = "a whole number above 0" if whole else "a number of at least 0"
    raise ConfigError(f"{document.where('datasets', i, key)}: {key}={value!r} must be {kind}; leave it out for the run's own")


def scoring_of(value: object, *, where: str = "") -> Scoring | None:
    """`unigenbench`, `unigenbench/zh`, {type, language}, or a list whose first known one counts; None for anything else.

    where: Raise ConfigError that begins so for a value that is given and names no judge.
    """
    for one in value if isinstance(value, list) else [value]:
        kind, language = one, None
        if isinstance(one, dict):
            kind, language = one.get("type"), one.get("language")
        name, _, spoken = str(kind).partition("/")
        language = spoken or language or "en"
        if name == "unigenbench" and language in get_args(Language):
            return Scoring(name, "zh" if language == "zh" else "en")
    if where and value is not None:
        raise ConfigError(f"{where}={value!r} names no judge: unigenbench/en or unigenbench/zh, or leave it out for images alone")
    return None


def testpoints_of(row: Row, language: Language) -> tuple[list[str], list[str]]:
    """The lists in `sub_dims`, JSON or a mapping. Raises ConfigError with the row's place; descriptions may be missing altogether."""
    given = row.metadata.get("sub_dims")
    try:
        told = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ConfigError(f"{row.place}: sub_dims is not JSON ({error.msg} at column {error.colno})") from error
    names, descriptions = TESTPOINTS[language]
    if not isinstance(told, dict):
        raise ConfigError(f"{row.place}: a judge needs `sub_dims` with {names[0]!r}, a list of what is to be judged; or leave out scoring")
    points = next((told[name] for name in names if told.get(name)), None)
    if not isinstance(points, list) or not all(isinstance(point, str) and point for point in points):
        raise ConfigError(f"{row.place}: {names[0]!r} in sub_dims must be a list of names; found the keys {listed(sorted(told)) or 'none'}")
    texts = next((told[name] for name in descriptions if told.get(name)), [""] * len(points))
    if not isinstance(texts, list) or len(texts) != len(points):
        raise ConfigError(f"{row.place}: sub_dims describes {len(texts)} of {len(points)} testpoints: give each its own")
    return points, [str(text) for text in texts]
