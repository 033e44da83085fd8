"""The browser behind worlds of web pages: found on the machine, driven by playwright, one context per episode, replaced after many."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Coroutine
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lit_rl.envs.failures import WorldError, limited
from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    from playwright.async_api import Browser, BrowserContext, Playwright

log = logging.getLogger(__name__)

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
VARIABLE = "CHROME_BINARY"
INSTALL = (
    "apt-get install chromium-headless-shell (Debian's, 205 MB; `chromium` or `google-chrome` will do, too), or name its file in "
    f"{VARIABLE}; playwright's own download is not needed"
)
FLAGS = [
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--font-render-hinting=none",
    "--disable-lcd-text",
]
"""For pictures that are the same each time. Without a limit of the rate of frames an episode takes 0.1 CPU seconds more."""


def find_browser() -> Path:
    """The browser's file: `CHROME_BINARY`, or the first of `PROGRAMS` on the path. Raises ConfigError that says what to install."""
    if named := os.environ.get(VARIABLE, "").strip():
        if not os.access(named, os.X_OK):
            raise ConfigError(f"{VARIABLE}={named} in the environment is no program; name a browser's file, or: {INSTALL}")
        return Path(named)
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        raise ConfigError(f"there is no browser: none of {', '.join(PROGRAMS)} is on the path. Install one: {INSTALL}")
    return Path(found)


def check_packages(*names: str) -> None:
    """Raises ConfigError where a package of the extra `agents` is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} cannot be imported; run `make setup`, or pip install -e '.[agents]' -c constraints.txt")


@dataclass
class Running:
    """A browser that runs. episodes: Contexts that it has opened. open: Those that are open now. retired: It gets no more."""

    browser: Browser
    episodes: int = 0
    open: int = 0
    retired: bool = False


class BrowserPool:
    """One browser at a time, and those before it that still have an episode open. Everything happens in one event loop.

    episodes: A browser is replaced after so many contexts, since it grows. It is replaced, too, when it has died or a context of it could
    not be closed. seconds: Limit for starting and for ending a browser.
    """

    def __init__(self, *, episodes: int, seconds: float) -> None:
        self.episodes, self.seconds = episodes, seconds
        self.started = 0
        """Browsers that were started."""
        self._driver: Playwright | None = None
        self._running: list[Running] = []
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start the first browser. Raises ConfigError with what the browser said where it does not come up."""
        check_packages("playwright")
        program = find_browser()
        try:
            await self._fresh()
        except WorldError as error:
            trial = f"{program} --headless --no-sandbox --dump-dom about:blank"
            raise ConfigError(f"the browser does not start: {error}. Try `{trial}`") from error

    async def stop(self) -> None:
        """End all browsers and the driver."""
        while self._running:
            await self._end(self._running.pop())
        if self._driver is not None:
            driver, self._driver = self._driver, None
            await self._quietly(driver.stop(), "ending playwright")

    async def context(self, width: int, height: int) -> tuple[Running, BrowserContext]:
        """A new context, without cookies or storage of others, in a browser that is alive; `release` gives it back."""
        from playwright.async_api import ViewportSize

        async with self._lock:
            running = next((one for one in self._running if self._usable(one)), None) or await self._fresh()
            running.episodes += 1
            running.open += 1
            running.retired |= running.episodes >= self.episodes
        try:
            size = ViewportSize(width=width, height=height)
            return running, await running.browser.new_context(viewport=size, service_workers="block")
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self.release(running, None)))
            raise

    async def release(self, running: Running, context: BrowserContext | None) -> None:
        """Close a context, and its browser where it was the last one of a browser that is to go."""
        from playwright.async_api import Error

        try:
            if context is not None:
                await context.close()
        except BaseException as error:
            running.retired = True
            if not (isinstance(error, Error) and "has been closed" in str(error)):  # it went with its browser, or with the driver
                raise
        finally:
            running.open -= 1
            if running in self._running and not running.open and not self._usable(running):
                self._running.remove(running)
                await asyncio.shield(asyncio.ensure_future(self._end(running)))

    def _usable(self, running: Running) -> bool:
        return running.browser.is_connected() and not running.retired

    async def _fresh(self) -> Running:
        for running in [one for one in self._running if not one.open and not self._usable(one)]:
            self._running.remove(running)
            await self._end(running)
        launched = self._launch()
        browser = await limited(launched, self.seconds, "starting the browser", "limits.reset")
        self._running.append(Running(browser))
        self.started += 1
        return self._running[-1]

    async def _launch(self) -> Browser:
        from playwright.async_api import Error, async_playwright

        program = str(find_browser())
        if self._driver is not None:
            try:
                return await self._driver.chromium.launch(executable_path=program, args=FLAGS)
            except Error as error:  # the driver itself may have died
                log.warning("the browser does not start (%s); trying again with a new driver", str(error).splitlines()[0])
                await self._quietly(self._driver.stop(), "ending playwright")
        self._driver = await async_playwright().start()
        return await self._driver.chromium.launch(executable_path=program, args=FLAGS)

    async def _end(self, running: Running) -> None:
        if running.browser.is_connected():
            await self._quietly(running.browser.close(), "ending the browser")

    async def _quietly(self, work: Coroutine[None, None, None], name: str) -> None:
        try:
            await limited(work, self.seconds, name, "limits.close")
        except WorldError as error:
            log.warning("%s", error)
