"""The door of the service: every request passes here first, whatever its route."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_rl.net.guards import LOOPBACK_NAMES, ApiError, check_host, check_origin, check_token, envelope, request_id
from lit_rl.platform.answers import trouble
from lit_rl.platform.patience import CONNECTION
from lit_rl.platform.settings import Settings

log = logging.getLogger(__name__)
COOKIE = "lit_rl_token"
BODY_LIMIT, UPLOAD_LIMIT = 16 << 20, 72 << 20
"""Bytes of a body of JSON, and of one with images."""

OPEN_PATHS = ("/healthz", "/api/login")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
POLICY_VIOLATION = 1008


class Guard:
    """ASGI middleware: Host, origin, identity, kind and size of the body; errors in the envelope; headers that a browser obeys."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.hosts = {*LOOPBACK_NAMES, *(name.lower() for name in settings.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        named = scope.setdefault("state", {})["request_id"] = request_id(headers.get("x-request-id"))
        answering = _Answer(send, named)
        try:
            self._check(scope, headers)
            if scope["type"] == "http":
                receive = await self._body(scope, headers, receive)
            await self.app(scope, receive, answering if scope["type"] == "http" else send)
        except ApiError as error:
            await _refuse(scope, answering, error)
        except Exception as error:
            if answering.begun or scope["type"] == "websocket":
                raise
            log.exception("request %s on %s failed", named, scope["path"][:200])
            await _refuse(scope, answering, trouble(error))

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        check_host(hosts, self.hosts)
        if not _private(scope["path"]):
            return
        check_origin(hosts[0], headers.get("origin"), headers.get("sec-fetch-site"))
        if scope["path"] not in OPEN_PATHS:
            self._identify(scope, headers)

    def _identify(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """A token in the header or the cookie, or the same user of this machine at the other end of the connection."""
        token = self.settings.token
        if (bearer := headers.get("authorization")) is not None:
            check_token(bearer, token)
        elif not hmac.compare_digest(_cookie(headers).encode(), token.encode()) and not self._same_user(scope):
            raise ApiError(
                401, "unauthorized", "another user's connection: send `Authorization: Bearer <token>`, see the file `token` in --data"
            )

    def _same_user(self, scope: Scope) -> bool:
        client, server = scope.get("client"), scope.get("server")
        if not client or not server or not server[1]:
            return False
        known: dict[str, int | None] = scope.get("state", {}).get(CONNECTION, {})
        if "owner" not in known:  # a connection has one owner; the system's table of all connections can be long
            known["owner"] = self.settings.owner(tuple(client), tuple(server))
        return known["owner"] in (os.getuid(), 0)

    async def _body(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> Receive:
        """The whole body, read within its limits, as something to receive from."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        upload = kind == "multipart/form-data" and scope["path"].endswith("/samples")
        body = await self._whole(receive, headers, UPLOAD_LIMIT if upload else BODY_LIMIT)
        if body and not upload and kind != "application/json":
            raise ApiError(415, "unsupported_media_type", f"Content-Type is {kind[:80] or 'missing'}; this route takes application/json")
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "unsupported_media_type", "compressed bodies are not taken; send the body as it is")
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again

    async def _whole(self, receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
        too_large = ApiError(413, "too_large", f"the body is larger than {limit} bytes; send it in parts")
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or len(announced) > 18 or int(announced) > limit:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "bad_body", "the body broke off")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, "timeout", f"the body did not arrive within {self.settings.body_seconds:g} s") from error
        return bytes(body)


class _Answer:
    """Sends what the application answers, with our headers."""

    def __init__(self, send: Send, named: str) -> None:
        self.send, self.named, self.begun = send, named, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            ours = HEADERS | {"x-request-id": self.named}
            given = {name.lower() for name, _ in message.get("headers", [])}
            added = [(name.encode(), value.encode()) for name, value in ours.items() if name.encode() not in given]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self.send(message)


async def _refuse(scope: Scope, answer: _Answer, error: ApiError) -> None:
    if scope["type"] == "websocket":
        await answer.send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.code})
        return
    headers = [(b"content-type", b"application/json")]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not worth waiting for
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await answer({"type": "http.response.start", "status": error.status, "headers": headers})
    await answer({"type": "http.response.body", "body": orjson.dumps(envelope(error, answer.named))})


def _private(path: str) -> bool:
    """True for all but the page, which holds nothing of anybody."""
    return path.startswith(("/api", "/ws", "/metrics"))


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _cookie(headers: Mapping[str, str]) -> str:
    jar = SimpleCookie[str]()
    try:
        jar.load(headers.get("cookie", ""))
    except CookieError:
        return ""
    return jar[COOKIE].value if COOKIE in jar else ""
