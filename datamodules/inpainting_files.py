"""Inpainting items from JSON, JSONL and benchmark folders: read, checked field by field, and told apart by name when they are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

from datamodules.inpainting_items import Item, Raw, _Check
from datamodules.text_encoding import parse_json, read_text
from lit_rl.errors import ConfigError
from lit_rl.types import Size

BENCHMARKS = ("self_bench.txt", "cross_bench.txt")
SHOWN = 10
"""Problems named in one message."""


def read_items(path: Path, *, size: Size) -> list[Item]:
    """The items of a JSON or JSONL file or a benchmark folder, every image looked at. Raises one ConfigError for all that is wrong.

    size: (height, width) to which masks will be resized; one that is empty then is a problem too.
    """
    rows, root = read_rows(path)
    check = _Check(root, size)
    items = [check.item(row) for row in rows]
    if check.problems:
        more = len(check.problems) - SHOWN
        shown = check.problems[:SHOWN] + ([f"... and {more} more"] if more > 0 else [])
        count = f"{len(check.problems)} problem{'s' if len(check.problems) > 1 else ''}"
        raise ConfigError(f"{path}: {count} in the inpainting data\n" + "\n".join(f"  {line}" for line in shown))
    return [item for item in items if item is not None]


def read_rows(path: Path) -> tuple[list[Raw], Path]:
    """The entries, unchecked, and the folder from which their paths count."""
    path = path.expanduser()
    if path.is_dir():
        return read_benchmark(path), path
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(
            f"{path}: inpainting items are read from .json and .jsonl files and benchmark folders ({' or '.join(BENCHMARKS)})"
        )
    text = read_text(path)
    rows, root = _jsonl(path, text) if path.suffix == ".jsonl" else _json(path, text)
    if not rows:
        raise ConfigError(f"{path}: holds no items")
    return rows, root


def _json(path: Path, text: str) -> tuple[list[Raw], Path]:
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object per line is named .jsonl" if error.msg == "Extra data" else ""
        raise ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    head = {"items": content} if isinstance(content, list) else content
    if not isinstance(head, dict) or not isinstance(head.get("items"), list):
        found = f"an object with {sorted(head)}" if isinstance(head, dict) else type(head).__name__
        raise ConfigError(f'{path}: expected {{"version": 1, "root": "folder", "items": [...]}} or a list of items, found {found}')
    if unknown := sorted(head.keys() - {"version", "root", "items"}):
        raise ConfigError(f"{path}: beside items there may be version and root, found {unknown}")
    if head.get("version", 1) != 1:
        raise ConfigError(f"{path}: version is {head['version']!r}; this program reads version 1")
    if not isinstance(head.get("root", "."), str):
        raise ConfigError(f"{path}: root must be the name of a folder, is {head['root']!r}")
    rows = [Raw(f"{path.name}: items[{i}]", i, fields) for i, fields in enumerate(head["items"])]
    return rows, path.parent / Path(head.get("root", ".")).expanduser()


def _jsonl(path: Path, text: str) -> tuple[list[Raw], Path]:
    rows: list[Raw] = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON has other line separators in its strings
        if line.strip():
            try:
                rows.append(Raw(f"{path.name}:{number}", len(rows), parse_json(line)))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); each line must be one item") from error
    return rows, path.parent


def read_benchmark(folder: Path) -> list[Raw]:
    """`self_bench.txt` (lines `id-text`) and `cross_bench.txt` (lines `id-ref1,ref2-text`) beside `test{id}_{source,mask,ref}.png`.

    A self item without its `_ref.png` takes the crop of its source, which is what the published files hold.
    """
    lists = [folder / name for name in BENCHMARKS if (folder / name).is_file()]
    if not lists:
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise ConfigError(f"{folder}: a benchmark folder holds {' or '.join(BENCHMARKS)}; found {found}. Or name a .json or .jsonl file")
    rows: list[Raw] = []
    for file in lists:
        cross = file.name == BENCHMARKS[1]
        line_format = re.compile(r"([^-,\s]+)-([^-\s]+)-(.+)" if cross else r"([^-,\s]+)-()(.+)")
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            parts = line_format.fullmatch(line.strip())
            if parts is None:
                expected = "id-ref1,ref2-text" if cross else "id-text"
                raise ConfigError(f"{file}:{number}: expected `{expected}`, found {line.strip()!r}")
            name, references, text = parts.groups()
            files = [f"test{ref}_ref.png" for ref in references.split(",")] if cross else [f"test{name}_ref.png"]
            fields: dict[str, object] = {"id": f"cross-{name}" if cross else name}
            fields |= {"source": f"test{name}_source.png", "mask": f"test{name}_mask.png"}
            if cross or (folder / files[0]).is_file():
                fields["reference"] = files if len(files) > 1 else files[0]
            rows.append(Raw(f"{file.name}:{number}", len(rows), fields | {"text": text.strip()}))
    if not rows:
        raise ConfigError(f"{' and '.join(map(str, lists))}: no items")
    return rows
