"""One browser for the tests of the page, and pages of it that note what a user would see go wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from lit_rl.envs.browser import find_browser

HOSTILE = "<img src=x onerror='window.owned = 1'><script>window.owned = 1</script>"
"""A name that would run, were it ever read as HTML."""


@contextmanager
def started() -> Iterator[Browser]:
    """A browser without a screen."""
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(find_browser()), args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, *, allowed: str = "never", width: int = 1280, **settings: Any) -> Iterator[Page]:
    """A page at an address. Afterwards nothing was written to its console but what `allowed` finds, and no script failed.

    The page is not wider than its window, and nothing of `HOSTILE` has run.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, **{"locale": "en", **settings})
    context.set_default_timeout(60_000)
    page, wrong = context.new_page(), list[str]()
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    try:
        page.goto(address)
        yield page
        assert [text for text in wrong if not re.search(allowed, text)] == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.evaluate("window.owned") is None
    finally:
        context.close()
