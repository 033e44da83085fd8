"""MiniWoB++ (Liu et al. 2018, arXiv:1802.08802): small web tasks, the pages of PyPI's `miniwob` in a headless browser."""

from __future__ import annotations

import asyncio
import difflib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lit_rl.envs.actions import Action, ActionError, Kind
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.browser import BrowserPool, Running, check_packages
from lit_rl.envs.failures import Limits, WorldError
from lit_rl.envs.keyboard import browser_chord
from lit_rl.envs.tasks import Task, known_keys
from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext, Page

WIDTH, HEIGHT = 160, 210
"""Pixels of a MiniWoB++ page: the instruction in the upper 50 rows, the task below."""

WEB_KINDS: frozenset[Kind] = frozenset(("click", "double_click", "right_click", "move", "drag", "scroll", "type", "key", "wait"))
READY_SECONDS = 0.02
"""Between two looks whether a page has set up its task."""

BEGIN = """seed => {
  document.head.append(Object.assign(document.createElement('style'), {textContent: '#reward-display {display: none !important}'}));
  core.EPISODE_MAX_TIME = 2147483647; Math.seedrandom(String(seed)); core.startEpisodeReal(); scrollTo(0, 0);
}"""
"""The page's own limit of ten seconds by the wall clock is put off by 24 days. Its display of rewards, right of the task, is taken away: a
dialog that takes the focus would scroll it into view.
"""
STATE = "() => [WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL]"


def pages_folder() -> Path:
    """The folder with the pages of the installed `miniwob`. Raises ConfigError where it is missing."""
    check_packages("miniwob", "playwright")
    spec = find_spec("miniwob")  # found, not imported: importing it asks for selenium and a window system
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "html" / "miniwob"


class MiniWoB(World):
    """One page in a browser context of its own. See `MiniWoBs`."""

    kinds = WEB_KINDS

    def __init__(self, pool: BrowserPool, running: Running, context: BrowserContext, page: Page, limits: Limits) -> None:
        super().__init__(limits)
        self.pool, self.running, self.context, self.page = pool, running, context, page
        self.least = 1.0

    async def on_reset(self, task: Task, seed: int) -> str:
        self.least = least_reward(task)
        await self.page.goto((pages_folder() / f"{task.params['page']}.html").as_uri())
        await self.page.evaluate(BEGIN, seed)
        while not await self.page.evaluate("() => WOB_TASK_READY"):
            await asyncio.sleep(READY_SECONDS)
        return task.instruction or str(await self.page.evaluate("() => core.getUtterance()"))

    async def on_screenshot(self) -> Observation:
        done, _ = await self.page.evaluate(STATE)
        with Image.open(io.BytesIO(await self.page.screenshot())) as png:
            return Observation(png.convert("RGB"), ended=bool(done))

    async def on_execute(self, action: Action) -> None:
        mouse, points = self.page.mouse, action.points
        match action.kind:
            case "click" | "double_click" | "right_click":
                count = 2 if action.kind == "double_click" else 1
                await mouse.click(*points[0], button="right" if action.kind == "right_click" else "left", click_count=count)
            case "move":
                await mouse.move(*points[0])
            case "drag":
                await mouse.move(*points[0])
                await mouse.down()
                await mouse.move(*points[1], steps=5)
                await mouse.up()
            case "scroll":
                await mouse.move(*(points[0] if points else (WIDTH / 2, HEIGHT / 2)))
                await mouse.wheel(action.dx, action.dy)
            case "type":
                await self.page.keyboard.type(action.text)
            case "key":
                await self._press(action.keys)
            case "wait":
                await asyncio.sleep(action.seconds)
            case _:
                pass  # done and fail leave the page as it is

    async def _press(self, keys: tuple[str, ...]) -> None:
        from playwright.async_api import Error

        chord = browser_chord(keys)
        try:
            await self.page.keyboard.press(chord)
        except Error as error:
            if "Unknown key" not in str(error):
                raise
            raise ActionError(f"there is no key {' + '.join(keys)} on this keyboard") from error

    async def on_evaluate(self) -> Outcome:
        done, raw = await self.page.evaluate(STATE)
        success = bool(done) and float(raw) >= self.least
        return Outcome(success, float(success), {"done": bool(done), "raw_reward": float(raw)})

    async def on_close(self) -> None:
        await self.pool.release(self.running, self.context)


def least_reward(task: Task) -> float:
    """The page's own reward from which on the task is done. Raises ConfigError, beginning with the key."""
    known_keys(task.evaluator, ("at_least",), "evaluator.")
    least = task.evaluator.get("at_least", 1.0)
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 < least <= 1:
        raise ConfigError(f"evaluator.at_least: {least!r} is not a number above 0 and up to 1, the greatest reward of a page")
    return float(least)


class MiniWoBs(Worlds):
    """Pages of MiniWoB++ in a headless browser, which `python -m lit_rl.doctor` looks for. The seed decides the page's task.

    A task's `params` are {"page": "click-test-2"}; its evaluator may be {"at_least": 0.5}, the page's own reward without its share for
    haste, else 1 is asked for. The reward is 1 or 0, whatever the page takes off for a wrong click. A page that ends takes no more actions.

    Args:
        browser_episodes: A browser is replaced after so many episodes, since it grows.
        limits: Seconds that each call to a world may take.
    """

    kinds = WEB_KINDS

    def __init__(self, *, browser_episodes: int = 500, limits: Limits | None = None) -> None:
        super().__init__(limits)
        if browser_episodes < 1:
            raise ConfigError(f"browser_episodes={browser_episodes}: a browser serves at least one episode")
        self.browser_episodes = browser_episodes
        self.pool: BrowserPool | None = None

    def check(self, task: Task) -> None:
        known_keys(task.params, ("page",), "params.")
        folder, page = pages_folder(), task.params.get("page")
        pages = sorted(path.stem for path in folder.glob("*.html"))
        if page not in pages:
            near = difflib.get_close_matches(str(page), pages, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {len(pages)} in {folder}"
            raise ConfigError(f"params.page: {page!r} is no page of MiniWoB++; {hint}")
        least_reward(task)

    async def start(self) -> None:
        pages_folder()
        self.pool = BrowserPool(episodes=self.browser_episodes, seconds=self.limits.reset)
        await self.pool.start()

    async def stop(self) -> None:
        if self.pool is not None:
            pool, self.pool = self.pool, None
            await pool.stop()

    async def on_open(self) -> MiniWoB:
        if self.pool is None:
            raise WorldError("the browser was not started; open worlds between start and stop")
        running, context = await self.pool.context(WIDTH, HEIGHT)
        try:
            context.set_default_timeout(0)  # the limits of the worlds hold
            return MiniWoB(self.pool, running, context, await context.new_page(), self.limits)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self.pool.release(running, context)))
            raise
