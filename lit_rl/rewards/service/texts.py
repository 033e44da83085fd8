"""Texts as they travel between a trainer and a reward server: JSON in both directions.

Request of `/v1/score_batch`: {"texts": [N texts], "prompts": [N prompts], "rows": [N objects], "request_id": text}; of `/score`:
{"text": ..., "prompt": ..., "row": {...}}. A text is a string, or an object {"text", "opened", "written", "special"} with the fields of
`lit_rl.types.Answer`; a prompt is a string, or a list of messages with `role` and `content`; a row has the other columns of the prompt's
data. Rows may be left out.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from lit_rl.rewards.base import RewardError
from lit_rl.rewards.service.wire import WireError, is_text, parse_json
from lit_rl.types import Answer, Info

TEXT_TYPE = "application/json"
MAX_TEXT = 1 << 20
"""Characters of one answer, and of one prompt."""

Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"
"""A value of JSON."""


class TextBatch(NamedTuple):
    """N texts to score, and the row that each answers, its prompt in it."""

    texts: list[Answer]
    infos: list[dict[str, object]]
    request_id: str


def encode_texts(texts: Sequence[str], infos: Sequence[Info], *, request_id: str) -> bytes:
    """N answers and the rows of their prompts -> the body of the batched route. Raises RewardError for a column that JSON cannot carry."""
    rows = [_plain_row(info) for info in infos]
    prompts = [row.pop("prompt") for row in rows]
    body = {"texts": [_text(text) for text in texts], "prompts": prompts, "rows": rows, "request_id": request_id}
    return json.dumps(body, allow_nan=False).encode()


def encode_text(text: str, info: Info) -> bytes:
    """One answer and the row of its prompt -> the body of the single route. Raises as `encode_texts`."""
    row = _plain_row(info)
    return json.dumps({"text": _text(text), "prompt": row.pop("prompt"), "row": row}, allow_nan=False).encode()


def decode_texts(body: bytes | bytearray) -> TextBatch:
    """The inverse of `encode_texts`. Raises WireError on anything that is not exactly this format."""
    request = _object(body)
    texts, prompts = request.get("texts"), request.get("prompts", [])
    if not isinstance(texts, list) or not texts:
        raise WireError("`texts` is no list of at least one text")
    rows = request.get("rows", [{}] * len(texts))
    prompts, rows = (_one_each(values, len(texts), name) for name, values in {"prompts": prompts, "rows": rows}.items())
    request_id = request.get("request_id", "")
    if not isinstance(request_id, str) or not is_text(request_id):
        raise WireError("`request_id` is no text")
    answers = [_answer(text, f"text {i}") for i, text in enumerate(texts)]
    infos = [_info(prompt, row, f" {i}") for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
    return TextBatch(answers, infos, request_id)


def _one_each(values: object, count: int, name: str) -> list[object]:
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} entries" if isinstance(values, list) else "no list"
        raise WireError(f"`{name}` has {found}; expected {count}, one for each text")
    return values


def decode_text(request: Mapping[str, object]) -> tuple[Answer, dict[str, object]]:
    """The parsed body of the single route -> answer and row. Raises WireError."""
    return _answer(request["text"], "`text`"), _info(request.get("prompt"), request.get("row", {}), "")


def _object(body: bytes | bytearray) -> dict[str, object]:
    parsed = parse_json(bytes(body), "the body")
    if not isinstance(parsed, dict):
        raise WireError('the body is no JSON object; expected {"texts": [...], "prompts": [...], "rows": [...]}')
    return parsed


def _answer(value: object, name: str) -> Answer:
    fields: dict[str, object] = {"text": value} if isinstance(value, str) else value if isinstance(value, dict) else {}
    text, opened, written = (fields.get(key) for key in ("text", "opened", "written"))
    if not isinstance(text, str):
        raise WireError(f'{name} is {type(value).__name__}; expected a text, or an object {{"text": ...}}')
    special = fields.get("special", [])
    words = [word for word in (text, opened, written) if word is not None]
    valid = isinstance(special, list) and all(is_text(word, limit=MAX_TEXT) for word in [*words, *special])
    if not (valid and isinstance(special, list) and isinstance(opened, str | None) and isinstance(written, str | None)):
        raise WireError(f"{name} must hold valid Unicode of at most {MAX_TEXT} characters, `special` be a list of texts")
    return Answer(text, opened=opened or "", written=written, special=frozenset(special))


def _info(prompt: object, row: object, number: str) -> dict[str, object]:
    if not isinstance(row, dict):
        raise WireError(f"row{number} is {type(row).__name__}; expected an object with the columns of the prompt's data")
    messages = isinstance(prompt, list) and prompt and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in prompt)
    if not messages and not is_text(prompt, limit=MAX_TEXT):
        raise WireError(f"prompt{number} is neither a text of at most {MAX_TEXT} characters nor a list of messages with a `role`")
    return {**row, "prompt": prompt}


def _text(text: str) -> Plain:
    if not isinstance(text, Answer) or (not text.opened and text.written == text and not text.special):
        return str(text)
    return {"text": str(text), "opened": text.opened, "written": text.written, "special": sorted(text.special)}


def _plain_row(info: Info) -> dict[str, Plain]:
    return {str(column): _plain(value, column, info) for column, value in info.items()}


def _plain(value: object, column: str, info: Info) -> Plain:
    """A column's value as JSON has it: arrays as lists, days and times as ISO 8601, paths as text, bytes of images as `data:` URLs, what is
    not finite as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, column, info) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, column, info) for entry in value]
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return _plain(value.tolist(), column, info)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes) and column == "images":
        return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"
    prompt = str(info.get("id") or info["prompt"])[:60]
    raise RewardError(
        f"column {column!r} of prompt {prompt!r} is {type(value).__name__}, which cannot go to a reward server as JSON: leave the column "
        "out of the data, write it as text, or score in this process"
    )
