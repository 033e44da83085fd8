"""The server itself: whether it works, who may enter."""

from __future__ import annotations

import hmac
from importlib.metadata import version

from fastapi import APIRouter, Response

from lit_rl.net.guards import ApiError
from lit_rl.platform.answers import Json, StrictRoute
from lit_rl.platform.bodies import Login
from lit_rl.platform.guard import COOKIE
from lit_rl.platform.service import Here

router = APIRouter(route_class=StrictRoute, tags=["system"])
VERSION = version("lit-rl")


@router.get("/healthz")
def health(here: Here) -> Response:
    """Whether the server and its database work."""
    with here.store.read() as connection:
        connection.exec_driver_sql("SELECT 1")
    return Json({"status": "ok", "version": VERSION, "db": "ok"})


@router.post("/api/login", status_code=204)
def login(body: Login, here: Here) -> Response:
    """Let a browser in that knows the token."""
    if not hmac.compare_digest(body.token.encode(), here.settings.token.encode()):
        raise ApiError(401, "unauthorized", "this is not the token of the server; it is in the file `token` of its --data folder")
    answer = Response(status_code=204)
    answer.set_cookie(COOKIE, body.token, httponly=True, samesite="strict", max_age=30 * 86400)
    return answer
