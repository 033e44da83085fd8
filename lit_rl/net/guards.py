"""Checks of a request that every server here makes, whatever its framework: who asks, and from where. And the form of an error."""

from __future__ import annotations

import hmac
import ipaddress
import re
import struct
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

_REQUEST_ID = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
STATUS_CODES: Mapping[int, str] = {
    401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large", 415: "unsupported_media_type",
}  # fmt: skip
"""Names of errors that a framework answers by itself."""

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
TIME_WAIT = "06"


class ApiError(Exception):
    """An answer other than 200: `{"error": {"code", "message", "details", "request_id"}}`, with Retry-After where a retry makes sense."""

    def __init__(self, status: int, code: str, message: str, *, retry_after: int | None = None, details: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.details = list(details)


def envelope(error: ApiError, request_id: str) -> dict[str, object]:
    """The body of an error."""
    return {"error": {"code": error.code, "message": str(error), "details": error.details, "request_id": request_id}}


def request_id(given: str | None) -> str:
    """The caller's X-Request-Id where it is a plain word of at most 128 characters, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def check_token(header: str | None, token: str) -> None:
    """Raises ApiError 401 unless the header Authorization carries the token. The comparison takes equally long for every wrong one."""
    scheme, _, given = (header or "").partition(" ")
    sent = given.encode("utf-8", "surrogateescape")  # header bytes above 127 arrive as lone surrogates
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent, token.encode()):
        raise ApiError(401, "unauthorized", "send `Authorization: Bearer <token>` with the token this server was started with")


def check_host(hosts: Sequence[str], allowed: Collection[str]) -> None:
    """Raises ApiError 421 unless there is one Host header and its name, without the port, is among `allowed`: a foreign name that is made
    to point here (DNS rebinding) is refused."""
    name = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]/@\s]+)(:[0-9]{1,5})?", hosts[0]) if len(hosts) == 1 else None
    if name is None or name[1].lower().rstrip(".") not in allowed:
        raise ApiError(421, "wrong_host", f"the Host header is none of {', '.join(sorted(allowed))}; add names by --allowed-hosts")


def check_origin(host: str, origin: str | None, site: str | None) -> None:
    """Raises ApiError 403 for a request that a page of another origin makes (headers Host, Origin, Sec-Fetch-Site)."""
    foreign = origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower())
    if foreign or site in ("cross-site", "same-site"):
        raise ApiError(403, "cross_origin", "pages of other origins may not ask this server")


def socket_owner(client: tuple[str, int], server: tuple[str, int], *, tables: Path = Path("/proc/net")) -> int | None:
    """The user id that owns the client's end of a connection on this machine; None where it is not on this machine.

    Each line of Linux' /proc/net/tcp and tcp6 is one end of a connection: local address, remote address, state, ..., user id.
    """
    ends = _hexadecimal(*client), _hexadecimal(*server)
    table = tables / ("tcp6" if ":" in client[0] else "tcp")
    if not table.exists():
        return None
    for line in table.read_text().splitlines()[1:]:
        words = line.split()
        if (words[1], words[2]) == ends and words[3] != TIME_WAIT:
            return int(words[7])
    return None


def _hexadecimal(host: str, port: int) -> str:
    """An address as /proc/net/tcp writes it: 32-bit words in the machine's byte order."""
    packed = ipaddress.ip_address(host).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
