"""Counts the rows of a file of training data."""

from __future__ import annotations

from pathlib import Path


def count_rows(path: Path) -> int | None:
    """Rows of a Parquet file, or lines of a text or JSONL file; None for anything else and for what cannot be read."""
    try:
        if path.suffix == ".parquet" and path.is_file():
            import pyarrow.parquet

            return int(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
        if path.suffix in (".jsonl", ".txt") and path.is_file():
            with path.open("rb") as file:
                return sum(bool(line.strip()) for line in file)
    except (ValueError, OSError):  # no Parquet file, or one of somebody else
        return None
    return None
