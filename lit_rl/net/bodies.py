"""Reading what a server answers without believing it: bodies bounded in size, waits that are finite."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp


class TooMuch(ValueError):
    """An answer that is larger than its limit, or compressed although that was not asked for."""


async def read_answer(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body of at most `limit` bytes. Raises TooMuch.

    The session must be made with `auto_decompress=False`: a megabyte of gzip can hold gigabytes.
    """
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise TooMuch(f"the answer is compressed ({encoding}), which was not asked for")
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > limit:
            raise TooMuch(f"the answer is longer than {limit} bytes")
    return bytes(body)


def retry_after(header: str | None) -> float:
    """Seconds that `Retry-After` asks to wait; 0 where it is missing, a date, or no finite number."""
    return float(header) if header and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", header) else 0.0
