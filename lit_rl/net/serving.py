"""The parts that all routes of a reward server share: the error envelope, the token, bodies bounded in size and time."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware

from lit_rl.net.guards import STATUS_CODES, ApiError, check_token, envelope, request_id
from lit_rl.net.metrics import Metrics

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)
OPEN_ROUTES = ("/health",)
REQUEST_ID = web.RequestKey("request_id", str)


def in_one_line(record: logging.LogRecord) -> bool:
    """Logging filter for aiohttp: a request that is not HTTP is a line of the log; a trace each would let a scanner fill it."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        reason = " ".join(error.message.split())[:120]
        record.msg, record.args, record.exc_info = "%s: no HTTP request: %s", (record.getMessage(), reason), None
    return True


def guard(metrics: Metrics, *, token: str | None) -> Middleware:
    """Middleware: checks the token, turns every failure into the envelope, counts and times by route pattern."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unmatched"  # a raw path would let any scanner create time series
        start = time.perf_counter()
        request[REQUEST_ID] = request_id(request.headers.get("X-Request-Id"))
        response: web.StreamResponse
        try:
            if token is not None and route not in OPEN_ROUTES:
                check_token(request.headers.get("Authorization"), token)
            response = await handler(request)
        except ApiError as error:
            response = _envelope(request, error)
        except web.HTTPException as error:
            response = _envelope(
                request, ApiError(error.status, STATUS_CODES.get(error.status, "http_error"), f"{error.reason}: {request.path[:200]}")
            )
        except Exception:
            log.exception("request %s on %s failed", request[REQUEST_ID], route)
            response = _envelope(request, ApiError(500, "internal_error", "internal error; the server's log has the trace"))
        response.headers["X-Request-Id"] = request[REQUEST_ID]
        metrics.requests.labels(route, str(response.status)).inc()
        metrics.request_seconds.labels(route).observe(time.perf_counter() - start)
        return response

    return middleware


def _envelope(request: web.Request, error: ApiError) -> web.Response:
    response = web.json_response(envelope(error, request[REQUEST_ID]), status=error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if error.status in (408, 413):
        response.force_close()  # the rest of the body is not worth waiting for
    return response


async def read_body(request: web.Request, *, limit: int, seconds: float, reserve: Callable[[int], None]) -> bytearray:
    """The body, copied once. 413 above `limit` bytes (before reading when the length is announced), 408 when `seconds` run out.

    reserve: told of the bytes of each piece as it arrives, and raises where there is no room for them.
    """
    announced = request.content_length
    too_large = ApiError(413, "too_large", f"the body is larger than {limit} bytes; send fewer images per request")
    if announced is not None and announced > limit:
        raise too_large
    body, end = bytearray(announced or 0), 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.content.iter_any():
                if end + len(chunk) > limit:
                    raise too_large
                reserve(len(chunk))
                body[end : end + len(chunk)] = chunk
                end += len(chunk)
    except TimeoutError as error:
        raise ApiError(
            408, "timeout", f"the body did not arrive within {seconds:g} s; {end} of {announced or 'unknown'} bytes came"
        ) from error
    except aiohttp.ClientPayloadError as error:
        raise ApiError(400, "bad_body", f"the body broke off: {error}") from error
    del body[end:]
    return body


def check_content_type(request: web.Request, *allowed: str) -> None:
    """415 unless the request names one of these types. None of them can be sent by a foreign web page without asking first."""
    if request.content_type not in allowed:
        raise ApiError(415, "unsupported_media_type", f"Content-Type is {request.content_type}; this route takes {' or '.join(allowed)}")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ApiError(415, "unsupported_media_type", "compressed bodies are not taken; send the body as it is")


def whole_number(request: web.Request, header: str, *, highest: int) -> int | None:
    """A header that must be a whole number in 1..highest; None when absent, 400 otherwise."""
    text = request.headers.get(header)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text, re.ASCII) or not 1 <= int(text) <= highest:
        raise ApiError(400, "bad_header", f"{header} is {text[:40]!r}; expected a whole number from 1 to {highest}")
    return int(text)
