"""
Debian's Chromium, controlled by Playwright.

Playwright's calls block and must be made in one thread: each browser has its own thread, so that the reactor
continues to run. Playwright's own browsers are not needed.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, TypeVar

from playwright.sync_api import sync_playwright
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from tests.e2e.coordinator import PATIENCE, reactor

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright

T = TypeVar("T")

PROGRAM = shutil.which("chromium")

# Chromium's sandbox needs a user other than root; it shows only our page. The other options keep it from
# contacting other hosts.
_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Chromium:
    """
    Chromium with one page.

    `errors` are the page's uncaught exceptions, console errors and violations of its content security policy.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._thread = ThreadPool(1, 1, "playwright")
        self._playwright: Playwright
        self._browser: Browser
        self._page: Page

    async def open(self, url: str) -> None:
        """Start Chromium, and load a page."""
        self._thread.start()
        await self._call(self._open, url)

    async def close(self) -> None:
        """Stop Chromium and its thread."""
        try:
            await self._call(self._close)
        finally:
            self._thread.stop()

    async def do(self, action: Callable[[Page], T]) -> T:
        """Run an action on the page in the browser's thread; return its result."""
        return await self._call(action, self._page)

    async def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript in the page; return its value."""
        return await self.do(lambda page: page.evaluate(expression))

    async def wait_until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true in the page."""
        # The page's policy forbids the evaluation of strings in the page, which wait_for_function does.
        await self.do(lambda page: _poll(page, condition))

    async def text(self, selector: str) -> str:
        """Return the text of an element as it is displayed."""
        return await self.do(lambda page: page.inner_text(selector))

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        result: T = await deferToThreadPool(reactor, self._thread, function, *arguments)
        return result

    def _open(self, url: str) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=PROGRAM, args=_OPTIONS)
        self._page = page = self._browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: self.errors.append(f"{error}"))
        page.on("console", self._on_console)
        page.goto(url, wait_until="load")
        page.wait_for_selector("#run")

    def _close(self) -> None:
        try:
            self._browser.close()
        finally:
            self._playwright.stop()

    def _on_console(self, message: ConsoleMessage) -> None:
        # The browser reports each HTTP error here; the page handles those itself.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)


def _poll(page: Page, condition: str) -> None:
    for _ in range(int(PATIENCE / 0.05)):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within {PATIENCE:g} s: {condition}")
