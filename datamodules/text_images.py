"""Images of the rows of text files: where they come from, and the places of a conversation that they stand at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from datamodules.picture_files import header_size, picture_bytes
from datamodules.text_files import Fields, InvalidRow
from lit_rl.errors import ConfigError
from lit_rl.policies.base import Message
from lit_rl.policies.chat import is_learned
from lit_rl.rewards.service.images import decode_base64
from lit_rl.rewards.service.samples import SampleError
from lit_rl.types import Info, Size

Source = Path | bytes
"""An image file, or what is in one."""

PLACE = "<image>"
"""Stands for an image in a text (verl, LLaVA, ms-swift)."""

PART: Message = {"type": "image"}
"""Stands for an image in a content of parts (transformers, TRL)."""

CONVERSATIONS = ("messages", "prompt")


# ---------------------------------------------------------------------- sources
def sources(value: object, *, key: str, folder: Path) -> list[Source]:
    """Images of a field: one, or a list of them. Raises InvalidRow for what is none."""
    values = value if isinstance(value, list | tuple) else [value]
    return [_source(one, f"{key}[{i}]", folder) for i, one in enumerate(values)]


def _source(value: object, key: str, folder: Path) -> Source:
    """A path, a data URL, bytes, {"bytes": ..., "path": ...} as `datasets` writes it, or a picture of Pillow."""
    from PIL import Image

    if isinstance(value, dict):
        given = {name: part for name in ("bytes", "path", "image", "url") if (part := value.get(name)) is not None}
        if not given:
            raise InvalidRow(f'{key}: expected a path, bytes or {{"bytes": ..., "path": ...}}, found an object with {sorted(value)}')
        return _source(next(iter(given.values())), key, folder)
    if isinstance(value, Image.Image):
        return picture_bytes(value)
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        raise InvalidRow(f"{key}: expected the path of an image, bytes or a picture, found {type(value).__name__}")
    if not value:
        raise InvalidRow(f"{key}: is empty: name an image, or leave the field out (or null) where a row has none")
    if value[:5].lower() == "data:":
        try:
            return decode_base64(value)
        except SampleError as error:
            raise InvalidRow(f"{key}: {error}") from error
    if re.match(r"https?://", value):
        raise InvalidRow(f"{key}: {value[:80]!r} is on the network; download the images and give their paths")
    return folder / Path(value.removeprefix("file://")).expanduser()


@lru_cache(maxsize=65536)
def _size(source: Source) -> Size | str:
    return header_size(source if isinstance(source, Path) else BytesIO(source))


def sizes_of(info: Info) -> list[Size]:
    """(height, width) of a row's images, from their headers. Raises ConfigError for a file that is missing, or is no image."""
    found = [_size(source) for source in info.get("images", ())]
    for i, size in enumerate(found):
        if isinstance(size, str):
            raise ConfigError(f"images[{i}]: {size}")
    return [size for size in found if not isinstance(size, str)]


# ---------------------------------------------------------------------- places
def check_places(info: Info, *, key: str) -> None:
    """Raise InvalidRow for a row without images whose text has a place for one, which a model would read as the letters of it."""
    turns = [turn for name in CONVERSATIONS if isinstance(talk := info.get(name), list) for turn in talk]
    if "images" not in info and any(PLACE in str(turn.get("content")) for turn in turns if turn["role"] != "assistant"):
        raise InvalidRow(
            f"{key}: the text has a place {PLACE}, and the row has no images there: name the field that has them as data.images_key, or "
            f"take {PLACE} out of the text"
        )


def with_images(row: Fields, *, given: object, key: str, folder: Path) -> Fields:
    """The row with `images`, a list of sources, and one part {"type": "image"} in its conversation for each of them, in order.

    Parts of the conversation may name their image themselves. Where nothing in it says where images stand, they stand before the first
    text of the user.

    given: The images of the row's own field `key`, or None. folder: Relative paths count from it. Raises InvalidRow where there are more
    or fewer places than images.
    """
    name = next((name for name in CONVERSATIONS if isinstance(row.get(name), list)), None)
    talk = row[name] if name is not None else None
    turns: list[Message] = talk if isinstance(talk, list) else []
    inside = [part["image"] for turn in turns for part in _image_parts(turn) if "image" in part]
    if inside and given is not None:
        raise InvalidRow(f"{key}: the conversation names its images itself ({len(inside)} of them): give them in one place only")
    rest = {field: value for field, value in row.items() if field not in (key, "images")}
    found = sources(inside if given is None else given, key=key if given is not None else str(name), folder=folder)
    if not found and not any(map(_image_parts, turns)):
        return rest
    if name is None:
        raise InvalidRow(f"{key}: images stand in conversations, and the prompt is a string: set data.chat to true, or give it as messages")
    placed = _placed(turns, len(found), key=name)
    rest |= {"images": found, name: placed}
    if name == "messages" and isinstance(prompt := row.get("prompt"), list):
        rest["prompt"] = placed[: len(prompt)]
    return rest


def _image_parts(turn: Message) -> list[Message]:
    content = turn.get("content")
    return [part for part in content if part["type"] == "image"] if isinstance(content, list) else []


def learned_picture(turns: Sequence[Message]) -> int | None:
    """The number of the first turn of the assistant's that is learned and holds an image."""
    return next((i for i, turn in enumerate(turns) if turn["role"] == "assistant" and is_learned(turn) and _image_parts(turn)), None)


def _placed(turns: Sequence[Message], count: int, *, key: str) -> list[Message]:
    marked = any(PLACE in text for turn in turns if turn["role"] != "assistant" and isinstance(text := turn.get("content"), str))
    if not marked and not any(map(_image_parts, turns)):
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
        turns = [{**turn, "content": _before(turn, count)} if i == first else turn for i, turn in enumerate(turns)]
    placed = [_parted(turn) for turn in turns]
    places = sum(len(_image_parts(turn)) for turn in placed)
    if places != count:
        raise InvalidRow(f"{key}: it has {places} places for images, and the row has {count} images")
    return placed


def _before(turn: Message, count: int) -> list[Message]:
    content = turn.get("content", "")
    texts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return [dict(PART) for _ in range(count)] + list(texts)


def _parted(turn: Message) -> Message:
    """The turn with a content of parts where it holds images, whose sources are taken out."""
    content = turn.get("content")
    if isinstance(content, str) and PLACE in content and turn["role"] != "assistant":
        texts = re.split(f"({PLACE})", content)
        return {**turn, "content": [dict(PART) if text == PLACE else {"type": "text", "text": text} for text in texts if text]}
    if isinstance(content, list):
        return {**turn, "content": [dict(PART) if part["type"] == "image" else part for part in content]}
    return turn
