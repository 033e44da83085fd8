"""Images between a trainer and a reward server: a safetensors body of raw uint8, a JSON answer.

Request: tensor `images` uint8 [N, H, W, 3], or `image_000`, `image_001`, ... uint8 [H, W, 3] when sizes differ; optional `masks` uint8
[N, H, W] or `mask_000`, ... ; metadata `prompts` (JSON list of N strings), optional `targets` (JSON list of N strings or nulls: the text
that the image should show), `request_id`.
Answer: `{"scores": [{name: number | null, "ocr_text": text} | null, ...], "errors": {"3": {"code": "...", "message": "..."}}}`; a null
number could not be computed (NaN in the trainer), a null entry has its reason in `errors`.

Raw uint8 costs 0.3-0.6 ms of CPU per 512 x 512 image where base64 PNG in JSON costs 9 ms. There is no pickle in either direction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lit_rl.net import strict_json

CONTENT_TYPE = "application/octet-stream"
MAX_HEADER = 1 << 20
"""Bytes of JSON that may stand in front of the pixels."""
MAX_PROMPT = 1 << 16
"""Characters of one prompt."""

Image = np.ndarray
"""uint8 [H, W, 3]."""


class WireError(ValueError):
    """A body that breaks the format; the text says where and what was expected."""


class Batch(NamedTuple):
    """N images to score. Images and masks are read-only views into the body."""

    images: list[Image]
    prompts: list[str]
    masks: list[np.ndarray] | None
    request_id: str
    targets: list[str | None] | None = None


def encode_batch(
    media: np.ndarray | Sequence[Image],
    prompts: Sequence[str],
    *,
    request_id: str,
    masks: np.ndarray | Sequence[np.ndarray] | None = None,
    targets: Sequence[str | None] | None = None,
) -> bytes:
    """N images uint8 [H, W, 3] (one array [N, H, W, 3] or a list of any sizes) and their prompts -> a safetensors body.

    masks: uint8 [H, W] each, non-zero where the text is; targets: the wanted text, which wins over what the prompt quotes.
    Raises WireError when counts, dtypes or shapes do not fit together.
    """
    from safetensors.numpy import save

    count = len(media)
    for name, rows in {"prompts": prompts, "masks": masks, "targets": targets}.items():
        if rows is not None and len(rows) != count:
            raise WireError(f"{count} images came with {len(rows)} {name}; give one per image")
    if not count or not all(map(is_text, prompts)):
        raise WireError(f"a batch needs at least one image, and prompts of valid Unicode with at most {MAX_PROMPT} characters")
    tensors = _stack("image", media, dims=3)
    if masks is not None:
        tensors |= _stack("mask", masks, dims=2)
    metadata = {"prompts": json.dumps(list(prompts)), "request_id": request_id}
    if targets is not None:
        metadata["targets"] = json.dumps(list(targets))
    return save(tensors, metadata=metadata)


def decode_batch(body: bytes | bytearray | memoryview) -> Batch:
    """The inverse of `encode_batch`, without a copy of the pixels. Raises WireError on anything that is not exactly this format."""
    tensors, metadata = _read_safetensors(memoryview(body))
    prompts = _json_strings(metadata, "prompts")
    images = _unstack("image", tensors, len(prompts), dims=3)
    masks = _unstack("mask", tensors, len(prompts), dims=2) if any(name.startswith("mask") for name in tensors) else None
    if tensors:
        raise WireError(f"unknown tensors {sorted(tensors)[:4]}; expected `images` or `image_000`.., optionally `masks` or `mask_000`..")
    for i, mask in enumerate(masks or []):
        if mask.shape != images[i].shape[:2]:
            raise WireError(f"mask {i} is {mask.shape}, its image {images[i].shape[:2]}; they must be equal")
    targets = _json_strings(metadata, "targets", count=len(prompts), allow_null=True) if "targets" in metadata else None
    return Batch(images, [str(p) for p in prompts], masks, metadata.get("request_id", ""), targets)


def decode_answer(body: bytes | str, count: int) -> tuple[list[dict[str, float] | None], dict[int, str]]:
    """A server's answer -> (per image {name: float, NaN for null} or None, {index: "code: message"}). Texts in the answer are left out.

    Raises WireError unless it is JSON of the documented shape with `count` entries.
    """
    try:
        answer = json.loads(body, parse_int=float)  # Python refuses to read a whole number of thousands of digits
        scores, errors = answer["scores"], answer["errors"]
        rows = [None if row is None else {k: _number(v) for k, v in row.items() if not isinstance(v, str)} for row in scores]
        reasons = {int(i): f"{e['code']}: {e['message']}" for i, e in errors.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WireError(f"not an answer of a reward server ({type(error).__name__}: {error}): {body[:80]!r}") from error
    if len(rows) != count:
        raise WireError(f"the server answered {len(rows)} scores for {count} images")
    return rows, reasons


def is_text(value: object, *, limit: int = MAX_PROMPT) -> bool:
    """A string that can be written as UTF-8 (JSON can hold lone surrogates) and has at most `limit` characters."""
    if not isinstance(value, str) or len(value) > limit:
        return False
    return value.isascii() or value == value.encode("utf-8", "replace").decode()


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, float):
        raise TypeError(f"a score must be a number or null, got {value!r}")
    return value if math.isfinite(value) else math.nan


def _stack(name: str, rows: np.ndarray | Sequence[np.ndarray], *, dims: int) -> dict[str, np.ndarray]:
    """One tensor `names` when all rows have the same shape, else `name_000`, `name_001`, ..."""
    for i, row in enumerate(rows):
        if row.dtype != np.uint8 or row.ndim != dims or (dims == 3 and row.shape[-1] != 3):
            raise WireError(f"{name} {i} is {row.dtype} {row.shape}; expected uint8 {'[H, W, 3]' if dims == 3 else '[H, W]'}")
    if isinstance(rows, np.ndarray):
        return {f"{name}s": np.ascontiguousarray(rows)}
    if len({row.shape for row in rows}) == 1:
        return {f"{name}s": np.stack(rows)}
    return {f"{name}_{i:03d}": np.ascontiguousarray(row) for i, row in enumerate(rows)}


def _unstack(name: str, tensors: dict[str, np.ndarray], count: int, *, dims: int) -> list[np.ndarray]:
    """The inverse of `_stack`; takes what it used out of `tensors`."""
    shape = "H, W, 3" if dims == 3 else "H, W"
    if f"{name}s" in tensors:
        stacked = tensors.pop(f"{name}s")
        if stacked.ndim != dims + 1 or len(stacked) != count:
            raise WireError(f"`{name}s` is {list(stacked.shape)}; expected [{count}, {shape}], one per prompt")
        rows = list(stacked)
    else:
        names = [f"{name}_{i:03d}" for i in range(count)]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise WireError(f"tensor `{missing[0]}` is missing: {count} prompts need `{name}s` or `{name}_000`..`{name}_{count - 1:03d}`")
        rows = [tensors.pop(n) for n in names]
    for i, row in enumerate(rows):
        if row.ndim != dims or 0 in row.shape or (dims == 3 and row.shape[-1] != 3):
            raise WireError(f"{name} {i} has shape {list(row.shape)}; expected [{shape}] without empty axes")
    return rows


def _read_safetensors(body: memoryview) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """uint8 tensors as views, and the metadata. Every byte of the body must be accounted for exactly once."""
    if len(body) < 8:
        raise WireError(f"a safetensors body has at least 8 bytes, this one {len(body)}")
    length = int.from_bytes(body[:8], "little")
    if length > min(len(body) - 8, MAX_HEADER):
        raise WireError(f"the safetensors header claims {length} bytes; the body has {len(body) - 8} left and the limit is {MAX_HEADER}")
    header = parse_json(bytes(body[8 : 8 + length]), "the safetensors header")
    if not isinstance(header, dict):
        raise WireError("the safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WireError("`__metadata__` must map strings to strings")
    data, tensors, end = body[8 + length :], {}, 0
    for name, begin, stop, shape in sorted((_entry(n, e) for n, e in header.items()), key=lambda row: row[1:3]):
        if begin != end or stop - begin != math.prod(shape) or stop > len(data):
            raise WireError(
                f"tensor `{name}` {shape} at bytes {begin}:{stop} does not fit: previous one ended at {end}, data has {len(data)} bytes"
            )
        tensors[name], end = np.frombuffer(data[begin:stop], dtype=np.uint8).reshape(shape), stop
    if end != len(data):
        raise WireError(f"{len(data) - end} bytes follow the last tensor")
    return tensors, metadata


def _entry(name: str, entry: object) -> tuple[str, int, int, list[int]]:
    def whole(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 48

    match entry:
        case {"dtype": "U8", "shape": [*shape], "data_offsets": [begin, stop]} if (
            all(map(whole, [*shape, begin, stop])) and len(shape) <= 4
        ):
            return name, begin, stop, shape
    raise WireError(f"tensor `{name}` is {json.dumps(entry)[:120]}; expected dtype U8, a shape of whole numbers and two data_offsets")


def parse_json(text: bytes | str, what: str) -> object:
    """JSON without keys that appear twice. Raises WireError; what: the text's name in it."""
    try:
        return strict_json.parse_json(text)
    except ValueError as error:
        raise WireError(f"{what} is not JSON: {error}") from error


def _json_strings(metadata: Mapping[str, str], key: str, *, count: int | None = None, allow_null: bool = False) -> list[str | None]:
    if key not in metadata:
        raise WireError(f"metadata `{key}` is missing; expected a JSON list of strings, one per image")
    rows = parse_json(metadata[key], f"metadata `{key}`")
    if not isinstance(rows, list) or not all(is_text(r) or (allow_null and r is None) for r in rows):
        raise WireError(f"metadata `{key}` must be a JSON list of strings of at most {MAX_PROMPT} characters")
    if not rows or (count is not None and len(rows) != count):
        raise WireError(f"metadata `{key}` has {len(rows)} entries; expected {count or 'at least 1'}")
    return rows
