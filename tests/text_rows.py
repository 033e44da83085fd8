"""Files of rows, and datamodules attached to a miniature's tokenizer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from datamodules.text import TextData

T = TypeVar("T", bound=TextData)


def jsonl(path: Path, *rows: Any) -> str:
    """Rows as JSON; a string is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8"
    )
    return str(path)


def parquet(path: Path, *rows: dict[str, Any]) -> str:
    """Rows as pyarrow writes them: what one lacks is null."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    names = {name: None for row in rows for name in row}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([names | row for row in rows]), path)
    return str(path)


def attached(data: T, policy: Any, *, stage: str = "fit") -> T:
    """The datamodule as it is after Lightning's setup."""
    module = SimpleNamespace(policy=policy)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=module)  # type: ignore[assignment]
    data.setup(stage)
    return data
