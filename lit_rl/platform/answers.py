"""Answers of the service: JSON that browsers can read, times as texts, errors in one form."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
import sqlalchemy as sa
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from lit_rl.net.guards import STATUS_CODES, ApiError, envelope
from lit_rl.net.strict_json import parse_json

LAST = 253_402_300_799.0
"""The last second of the year 9999; files may say that they are of a later one."""


class Json(Response):
    """JSON by orjson: what is not finite is null, which JSON has, not NaN, which it has not."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """The bytes of the answer."""
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


class StrictRequest(Request):
    """A request whose JSON has no key twice, no NaN, and does not nest without end."""

    async def json(self) -> object:
        """The body's value."""
        body = await self.body()
        try:
            if b"\\u" in body:
                orjson.loads(body)  # refuses halves of characters, which no database takes
            return parse_json(body, numbers=False)
        except ValueError as error:
            raise ApiError(400, "bad_json", f"the body is not JSON: {error}") from error


class StrictRoute(APIRoute):
    """A route that reads its body by `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's function of a request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def text_of(seconds: float | None) -> str | None:
    """A time as RFC 3339, in UTC."""
    return (
        None
        if seconds is None
        else datetime.fromtimestamp(min(max(seconds, 0.0), LAST), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


def not_found(kind: str, name: object) -> ApiError:
    """The error for a thing that is not there."""
    return ApiError(404, f"{kind}_not_found", f"there is no {kind} {str(name)[:80]!r}")


def conflict(message: str, code: str = "conflict") -> ApiError:
    """The error for what the present state of a thing does not allow."""
    return ApiError(409, code, message)


def invalid(message: str, details: Sequence[object] = ()) -> ApiError:
    """The error for a body that is understood and cannot be obeyed."""
    return ApiError(422, "validation_error", message, details=details)


def trouble(error: Exception) -> ApiError:
    """The answer to an error that nobody expected: where the disk is full or the database is busy, when to come again."""
    text = str(error).lower() if isinstance(error, sa.exc.OperationalError) else ""
    if "disk is full" in text or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return ApiError(503, "storage_full", "the disk of --data is full, nothing was kept; make room, then send it again", retry_after=30)
    if "locked" in text:
        return ApiError(503, "database_busy", "another program holds the database; send it again", retry_after=1)
    return ApiError(500, "internal_error", "internal error; the server's log has the trace")


def answer_error(request: Request, error: Exception) -> Response:
    """The answer to an error that a route, or the framework before it, raised."""
    told = _api_error(error)
    headers = {} if told.retry_after is None else {"retry-after": str(told.retry_after)}
    return Json(envelope(told, request.scope["state"]["request_id"]), status_code=told.status, headers=headers)


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        details = [{"field": ".".join(map(str, found["loc"][1:]))[:200], "problem": found["msg"][:200]} for found in error.errors()[:20]]
        first = details[0] if details else {"field": "", "problem": "invalid"}
        return invalid(f"{first['field']}: {first['problem']}".removeprefix(": "), details)
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # the framework's words for a body that `StrictRequest` refused
        return error.__cause__
    return ApiError(error.status_code, STATUS_CODES.get(error.status_code, "http_error"), str(error.detail)[:200])
