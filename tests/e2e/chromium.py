"""A browser that shows a page: Chromium without a screen, driven through its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
from tempfile import mkdtemp
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol

from bfaas.deadline import Deadline
from tests.e2e.coordinator import PATIENCE, reactor
from tests.support.waiting import wait_until

PROGRAM = shutil.which("chromium")

# Chromium's own sandbox wants a user that is not root; nothing but our page is shown. The rest keeps it from
# asking for hosts of its own.
_OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
    "--window-size=1280,900",
]  # fmt: skip


class ProtocolError(Exception):
    """Chromium refused a command."""


class Chromium(ProcessProtocol):
    """
    Chromium with one page. It reads commands from descriptor 3 and writes answers and events to 4: JSON, each
    ended by a NUL.

    `complaints` are what the page did wrong: exceptions, errors on the console, breaches of its policy.
    """

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.ended: Deferred[None] = Deferred()
        self._home = mkdtemp(prefix="chromium-")
        self._rest = b""
        self._calls: dict[int, Deferred[dict[str, Any]]] = {}
        self._session: str | None = None
        self._process: Any = None

    async def open(self, url: str) -> None:
        """Start it, and show a page."""
        assert PROGRAM is not None
        words = [PROGRAM, *_OPTIONS, f"--user-data-dir={self._home}"]
        files = {0: "w", 1: "r", 2: "r", 3: "w", 4: "r"}
        self._process = reactor.spawnProcess(self, PROGRAM, words, env=os.environ, childFDs=files)
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", flatten=True, **target)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self._call(f"{domain}.enable")
        await self._call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && document.querySelector('#run') !== null")

    async def ask(self, expression: str) -> Any:
        """Evaluate JavaScript in the page; returns what it comes to."""
        told = await self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in told:
            raise ProtocolError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until something is so."""
        await wait_until(lambda: self.ask(condition))

    async def press(self, key: str, code: int, *, ctrl: bool = False) -> None:
        """Press a key on the keyboard, by its name and its number, and let it go."""
        press: dict[str, Any] = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": code,
            "modifiers": 2 if ctrl else 0,
        }
        await self._call("Input.dispatchKeyEvent", type="keyDown", **press)
        await self._call("Input.dispatchKeyEvent", type="keyUp", **press)

    async def screenshot(self, width: int, height: int, *, dark: bool = False) -> bytes:
        """Draw the page, as a PNG, as it is on a screen of so many pixels."""
        metrics: dict[str, Any] = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": width < 600,
        }
        await self._call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self._call("Emulation.setEmulatedMedia", features=[scheme])
        await self.ask("new Promise((resolve) => setTimeout(resolve, 300))")
        drawn = await self._call("Page.captureScreenshot", format="png")
        return base64.b64decode(drawn["data"])

    async def close(self) -> None:
        """End it."""
        await self._call("Browser.close", browser=True)
        await Deadline(reactor, PATIENCE).run(self.ended)

    def _call(self, method: str, *, browser: bool = False, **parameters: Any) -> Deferred[dict[str, Any]]:
        number = len(self._calls) + 1
        answer: Deferred[dict[str, Any]] = Deferred()
        self._calls[number] = answer
        command = {"id": number, "method": method, "params": parameters}
        if self._session and not browser:
            command["sessionId"] = self._session
        self._process.writeToChild(3, json.dumps(command).encode() + b"\0")
        return answer

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        if childFD != 4:  # what it says otherwise is of no use
            return
        *messages, self._rest = (self._rest + data).split(b"\0")
        for message in messages:
            self._take(json.loads(message))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            answer = self._calls[message["id"]]
            if "error" in message:
                answer.errback(ProtocolError(f"{message['error']}"))
            else:
                answer.callback(message["result"])
            return
        parameters = message["params"]
        match message["method"]:
            case "Runtime.exceptionThrown":
                self.complaints.append(f"{parameters['exceptionDetails']}")
            case "Runtime.consoleAPICalled" if parameters["type"] == "error":
                self.complaints.append(f"{parameters['args']}")
            # An answer that is an error is the network's complaint, and the page's to tell.
            case "Log.entryAdded" if parameters["entry"]["source"] != "network":
                self.complaints.append(f"{parameters['entry']}")

    def processEnded(self, reason: Any) -> None:
        shutil.rmtree(self._home, ignore_errors=True)
        self.ended.callback(None)
