"""Checkpoints of jobs: those that runs report, and those that lie in a run's folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from lit_rl.platform.answers import invalid, not_found, text_of
from lit_rl.platform.places import file_below, modified, size_of, there, utf8
from lit_rl.platform.records import Records
from lit_rl.platform.schema import checkpoints
from lit_rl.platform.store import Store

Found = dict[str, object]
FALLING = ("loss", "perplexity", "error")


class Checkpoints:
    """The checkpoints of a store's jobs."""

    def __init__(self, store: Store, records: Records) -> None:
        self.store, self.records = store, records

    def add(self, job: str, *, step: int, path: str, eval_results: Mapping[str, object] | None, kind: str = "reported") -> Found:
        """Note a checkpoint; one of the same path is replaced."""
        values = {"job": job, "step": step, "path": path, "eval_results": eval_results, "kind": kind, "created_at": time.time()}
        new = {key: value for key, value in values.items() if key not in ("job", "path")}
        query = insert(checkpoints).values(values).on_conflict_do_update(index_elements=["job", "path"], set_=new)
        with self.store.write() as connection:
            connection.execute(query)
        return next(found for found in self.listed(job) if found["path"] == path)

    def choose(self, job: str, path: str) -> None:
        """Mark the checkpoint of a job that was selected as its best, in place of an earlier one."""
        mine = sa.update(checkpoints).where(checkpoints.c.job == job)
        with self.store.write() as connection:
            connection.execute(mine.values(chosen=sa.case((checkpoints.c.path == path, 1), else_=None)))

    def listed(self, job: str) -> list[Found]:
        """All checkpoints of a job by step, and which of them is the best, see `best_of`."""
        query = sa.select(checkpoints).where(checkpoints.c.job == job).order_by(checkpoints.c.step, checkpoints.c.id)
        with self.store.read() as connection:
            rows: list[Found] = [dict(row) for row in connection.execute(query).mappings()]
        known = {row["path"] for row in rows}
        rows += [found for found in self._on_disk(job) if found["path"] not in known]
        folder, best = self.records.folder(job), best_of(rows)
        return [self._shown(row, folder, is_best=row is best) for row in rows]

    def file(self, job: str, which: str) -> Path:
        """The file of a checkpoint below the job's folder, links followed. Raises ApiError 404 for all others."""
        row = next((found for found in self.listed(job) if str(found["id"]) == which), None)
        folder = self.records.folder(job)
        path = None if row is None else file_below(folder, folder / str(row["path"]))
        if path is None:
            raise not_found("checkpoint", which)
        return path

    def chosen(self, job: str, which: str | int) -> Path:
        """The checkpoint that `last`, `best` or an id means. Raises ApiError 422 where there is none."""
        folder, rows = self.records.folder(job), self.listed(job)
        if which == "last":
            paths = [path for path in (folder / "checkpoints").glob("last*.ckpt") if path.exists()]
            paths = paths or [folder / str(row["path"]) for row in rows if row["exists"]][-1:]
        elif which == "best":
            paths = [folder / str(row["path"]) for row in rows if row["is_best"] and row["exists"]]
            paths = paths or list((folder / "best").glob("*.ckpt"))
        else:
            paths = [folder / str(row["path"]) for row in rows if str(row["id"]) == str(which) and row["exists"]]
        if not paths:
            raise invalid(f"the job has no checkpoint {str(which)[:80]!r} any more", [{"field": "checkpoint", "problem": "not there"}])
        return max(paths, key=modified)

    def _on_disk(self, job: str) -> list[Found]:
        folder = self.records.folder(job)
        paths = [path for kind in ("checkpoints", "best") for path in sorted((folder / kind).glob("*.ckpt")) if utf8(path)]
        return [
            {"id": f"{path.parent.name}.{path.stem}", "step": _step(path), "path": str(path), "kind": path.parent.name,
             "eval_results": None, "created_at": modified(path)}
            for path in paths
        ]  # fmt: skip

    def _shown(self, row: Found, folder: Path, *, is_best: bool) -> Found:
        path = folder / str(row["path"])
        created = row["created_at"]
        assert isinstance(created, float)
        mark: Found = {"is_best": is_best, "exists": there(path), "size_bytes": size_of(path)}
        mark["created_at"] = text_of(created)
        return {key: row[key] for key in ("id", "step", "path", "kind", "eval_results")} | mark


def best_of(rows: Sequence[Found]) -> Found | None:
    """The checkpoint that was selected, else the first one of the best result; None where none has a result.

    Results are compared under one name: the first of those that were kept for their result, in `best`, or else of any. The lowest value is
    the best of a name with one of the words `FALLING` in it.
    """
    if (selected := next((row for row in rows if row.get("chosen")), None)) is not None:
        return selected
    kept = sorted(rows, key=lambda row: Path(str(row["path"])).parent.name != "best")
    name = next((name for row in kept for name in _numbers(row)), "")
    found = [row for row in rows if name in _numbers(row)]
    sign = -1 if any(word in name for word in FALLING) else 1
    return max(found, key=lambda row: sign * _numbers(row)[name], default=None)


def _numbers(row: Found) -> dict[str, float]:
    """Results of a checkpoint."""
    results = row["eval_results"]
    found = results.items() if isinstance(results, Mapping) else ()
    return {str(name): float(value) for name, value in found if isinstance(value, int | float) and not isinstance(value, bool)}


def _step(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0
