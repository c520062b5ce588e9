"""
Debian's Chromium, controlled by Playwright.

Playwright's calls block and must be made in one thread: Chromium has its own thread, so that the reactor
continues to run. Playwright's own browsers are not needed.
"""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from playwright.sync_api import sync_playwright
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from tests.e2e.coordinator import PATIENCE, Running, reactor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

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
    """A running Chromium, in which each test opens pages of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPool(1, 1, "playwright")
        self._playwright: Playwright
        self._browser: Browser

    async def start(self) -> None:
        self._thread.start()
        await self.call(self._start)

    async def stop(self) -> None:
        """Stop Chromium and its thread."""
        try:
            await self.call(self._stop)
        finally:
            self._thread.stop()

    @asynccontextmanager
    async def open(self, coordinator: Running, fragment: str = "") -> AsyncIterator[Tab]:
        """
        Open a coordinator's page, without the storage, the cookies and the cache of other tabs.

        Fail if it causes errors.
        """
        url = f"http://localhost:{coordinator.port}/{fragment}"
        tab = await self.call(self._new_tab)
        try:
            await tab.do(lambda page: page.goto(url, wait_until="load"))
            await tab.do(lambda page: page.wait_for_selector("#run"))
            yield tab
        finally:
            await tab.do(lambda page: page.context.close())
        assert tab.errors == []

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function in Chromium's thread; return its result."""
        result: T = await deferToThreadPool(reactor, self._thread, function, *arguments)
        return result

    def _start(self) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=PROGRAM, args=_OPTIONS)

    def _stop(self) -> None:
        try:
            self._browser.close()
        finally:
            self._playwright.stop()

    def _new_tab(self) -> Tab:
        # A page that is created in this way has a context of its own.
        page = self._browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        return Tab(self, page)


class Tab:
    """
    One page.

    `errors` are its uncaught exceptions, console errors and violations of its content security policy.
    """

    def __init__(self, chromium: Chromium, page: Page) -> None:
        self.errors: list[str] = []
        self._chromium = chromium
        self._page = page
        page.on("pageerror", lambda error: self.errors.append(f"{error}"))
        page.on("console", self._on_console)

    async def do(self, action: Callable[[Page], T]) -> T:
        """Run an action on the page in Chromium's thread; return its result."""
        return await self._chromium.call(action, self._page)

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
