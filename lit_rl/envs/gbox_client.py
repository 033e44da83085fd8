"""GBox over its REST interface (https://gbox.ai/api/v1): boxes, their screens, their shells."""

from __future__ import annotations

import base64
import binascii
import io
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlencode

from PIL import Image

from lit_rl.envs.actions import ActionError
from lit_rl.envs.failures import WorldError
from lit_rl.envs.validators import Printed
from lit_rl.errors import ConfigError
from lit_rl.net.addresses import parse_urls, token_from_environment
from lit_rl.net.env_file import is_unset, why_unset
from lit_rl.net.retry import NoAnswer, Reply, exchange, open_session, refusal, retried

if TYPE_CHECKING:
    import aiohttp

Json = Mapping[str, object]
KEY = "GBOX_API_KEY"
BASE_URL = "GBOX_CLIENT_BASE_URL"
DEFAULT_URL = "https://gbox.ai/api/v1"
LIMIT = 64 * 2**20
"""Bytes of an answer."""
PAGE = 100
MAX_WAIT = 5.0


class Box(NamedTuple):
    """A box of the service. labels: Those that it was created with."""

    id: str
    status: str
    labels: Mapping[str, str]


def check_key() -> None:
    """Raises ConfigError where the environment has no key, or a template's placeholder for one."""
    key = token_from_environment(KEY)
    if key is None or is_unset(key):
        raise ConfigError(
            f"{KEY} is not set: {why_unset(KEY)}. Write your key into .env ({KEY}=...) or export it; worlds of tiny_desktop and miniwob "
            "need none"
        )


class GBoxClient:
    """Requests to one GBox service, in one event loop.

    A request that fails on its way is repeated where asking twice does no more than asking once: reading, screenshots, commands of
    evaluators, ending a box. Creating one is repeated where the service refused it; where the answer was lost the box may be there. A
    click is never repeated.
    """

    def __init__(self, url: str) -> None:
        self.url = parse_urls(url)[0]
        self._session: aiohttp.ClientSession | None = None

    @property
    def is_open(self) -> bool:
        """True between `open` and `close`."""
        return self._session is not None

    async def open(self) -> None:
        """Open the connection pool. Raises ConfigError without a key."""
        import aiohttp

        check_key()
        self._session = open_session(token_env=KEY, connector=aiohttp.TCPConnector(limit=0))

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def create(self, kind: str, *, wait: str, expires_in: str, labels: Mapping[str, str], seconds: float) -> Box:
        """A running box, which ends by itself after `expires_in`."""
        config = {"expiresIn": expires_in, "labels": dict(labels)}
        return _box(
            await self.ask(f"/boxes/{kind}", {"wait": True, "timeout": wait, "config": config}, seconds=seconds, again=True, lost=False)
        )

    async def running(self, labels: Mapping[str, str], seconds: float) -> list[Box]:
        """All running boxes with these labels."""
        found: list[Box] = []
        for page in range(1, 1000):
            query = urlencode([*((f"labels[{name}]", value) for name, value in labels.items()), ("page", page), ("pageSize", PAGE)])
            answer = await self.ask(f"/boxes?{query}&status=running", seconds=seconds, again=True)
            boxes, total = answer.get("data"), answer.get("total")
            if not isinstance(boxes, list) or not isinstance(total, int):
                raise WorldError(f"{self.url}/boxes: the answer has no data and total")
            found += [_box(box) for box in boxes]
            if not boxes or len(found) >= total:
                break
        return [box for box in found if box.status != "terminated" and labels.items() <= box.labels.items()]

    async def terminate(self, box: str, seconds: float) -> None:
        """End a box; one that is gone already is as good."""
        await self.ask(f"/boxes/{quote(box)}/terminate", {"wait": True}, seconds=seconds, again=True, gone=True)

    async def screenshot(self, box: str, seconds: float) -> Image.Image:
        """The screen as it is now."""
        answer = await self.ask(f"/boxes/{quote(box)}/actions/screenshot", {"outputFormat": "base64"}, seconds=seconds, again=True)
        return picture(answer.get("uri"))

    async def act(self, box: str, action: str, body: Json, *, delay: float, seconds: float) -> Image.Image | None:
        """Carry out an action, once, and take a picture `delay` seconds after it, if the service sends one."""
        wanted = {"screenshot": {"phases": ["after"], "delay": f"{round(1000 * delay)}ms", "outputFormat": "base64"}}
        answer = await self.ask(f"/boxes/{quote(box)}/actions/{action}", {**body, "options": wanted}, seconds=seconds)
        after = _at(answer, "screenshot", "after")
        uri = after.get("uri") if isinstance(after, dict) else None
        return picture(uri) if uri else None

    async def command(self, box: str, line: str, seconds: float, *, again: bool) -> Printed:
        """Run a shell command. again: Running it twice does no more than running it once."""
        answer = await self.ask(f"/boxes/{quote(box)}/commands", {"command": line}, seconds=seconds, again=again)
        code = answer.get("exitCode")
        if not isinstance(code, int):
            raise WorldError(f"{self.url}: the command {line!r} has no exitCode in its answer")
        return Printed(str(answer.get("stdout") or answer.get("stderr") or ""), code)

    async def find(self, target: str, seen: Image.Image, seconds: float) -> tuple[float, float]:
        """The point of what `target` describes, by the service's model. Raises ActionError where it finds none."""
        body = {"model": "gbox-handy-1", "screenshot": data_uri(seen), "action": {"type": "click", "target": target}}
        answer = await self.ask("/model", body, seconds=seconds, again=True)
        x, y = (_at(answer, "response", "coordinates", name) for name in "xy")
        if not isinstance(x, int | float) or not isinstance(y, int | float):
            raise ActionError(f"nothing on the screen was found for {target!r}")
        return float(x), float(y)

    async def ask(
        self, path: str, body: Json | None = None, *, seconds: float, again: bool = False, lost: bool = True, gone: bool = False
    ) -> Json:
        """The JSON that the service answers.

        again: Repeat what may pass, up to `seconds` in all. lost: Also where no answer came. gone: 404 is as good as done.
        """
        until = time.monotonic() + seconds

        async def attempt(tries: int) -> Json:
            try:
                reply = await self._exchange(path, body, max(until - time.monotonic(), 0.001))
            except NoAnswer as error:
                error.tries = error.tries if again and lost else 1
                raise
            try:
                return self._read(path, reply, gone)
            except NoAnswer as error:
                error.tries = error.tries if again else 1
                raise

        try:
            return await retried(attempt, until=until, max_wait_s=MAX_WAIT)
        except NoAnswer as error:
            raise WorldError(str(error)) from error

    async def _exchange(self, path: str, body: Json | None, seconds: float) -> Reply:
        if self._session is None:
            raise WorldError("the connection to GBox is closed; open worlds between start and stop")
        return await exchange(
            self._session,
            self.url + path,
            name=f"{self.url}{path.partition('?')[0]}",
            seconds=seconds,
            limit=LIMIT,
            knob="limits",
            body=None if body is None else io.BytesIO(json.dumps(body).encode()),
            headers={"Content-Type": "application/json"},
        )

    def _read(self, path: str, reply: Reply, gone: bool) -> Json:
        if reply.status in (200, 201, 204):
            return _json(reply.body) if reply.body.strip() else {}
        if reply.status == 404 and gone:
            return {}
        said = reply.body.decode(errors="replace")[:300]
        if reply.status in (401, 403):
            raise ConfigError(f"{KEY} was rejected by {self.url} ({reply.status}): {said}. Give the key of an account that may make boxes")
        if reply.status in (400, 422) and "/actions/" in path:
            raise ActionError(f"the machine refuses this action: {said}")
        raise refusal(f"{self.url}{path.partition('?')[0]}: {reply.status} {said}", status=reply.status, wait=reply.wait)


def _json(body: bytes) -> Json:
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise NoAnswer(f"an answer of GBox is not JSON: {body[:100]!r}", tries=1) from error
    if not isinstance(answer, dict):
        raise NoAnswer(f"an answer of GBox is not an object: {body[:100]!r}", tries=1)
    return answer


def _at(answer: object, *names: str) -> object:
    for name in names:
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer


def _box(answer: Json) -> Box:
    if not isinstance(answer.get("id"), str):
        raise WorldError(f"GBox made a box without an id: {str(answer)[:200]}")
    labels = _at(answer, "config", "labels")
    return Box(str(answer["id"]), str(answer.get("status")), labels if isinstance(labels, dict) else {})


def data_uri(image: Image.Image) -> str:
    """A picture as the data URI of a PNG."""
    png = io.BytesIO()
    image.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def picture(uri: object) -> Image.Image:
    """The RGB picture of a data URI. Raises WorldError for what is none."""
    head, _, data = str(uri).partition(",")
    try:
        if not head.startswith("data:image/"):
            raise ValueError("it is not a data URI of an image")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            return image.convert("RGB")
    except (ValueError, OSError, binascii.Error) as error:
        raise WorldError(f"GBox sent a screenshot that cannot be read: {error}") from error
