"""The page, in a browser: what those who use it see."""

from __future__ import annotations

import json
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_twisted

from tests.e2e import chromium
from tests.e2e.coordinator import Running, start_coordinator, stop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

with_twisted = pytest_twisted.ensureDeferred

# Where it has to be there, a browser that is missing is a failure.
needs_a_browser = pytest.mark.skipif(
    chromium.PROGRAM is None and "CI" not in os.environ, reason="chromium is not installed"
)

STATE, OUTPUT = "document.querySelector('#state').textContent", "document.querySelector('#output').innerText"


@asynccontextmanager
async def shown(coordinator: Running, fragment: str = "") -> AsyncIterator[chromium.Chromium]:
    """Show a coordinator's page, which at its end has nothing to be blamed for."""
    browser = chromium.Chromium()
    await browser.open(f"http://localhost:{coordinator.port}/{fragment}")
    try:
        yield browser
    finally:
        await browser.close()
    assert browser.complaints == []


async def run(browser: chromium.Chromium, script: str) -> None:
    """Write a script and run it with the keyboard."""
    await browser.ask(f"""(() => {{
        const field = document.querySelector('#script');
        field.value = {json.dumps(script)};
        field.dispatchEvent(new Event('input', {{bubbles: true}}));
        field.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', ctrlKey: true, bubbles: true}}));
    }})()""")


@needs_a_browser
@with_twisted
async def test_output_is_shown_as_it_comes_and_the_end_is_plain() -> None:
    coordinator = await start_coordinator(POOL_STANDBY="1")
    async with shown(coordinator) as browser:
        await run(
            browser, "printf '\\e[31mred\\e[0m plain\\n'; echo '<b>err</b>' >&2; sleep 3; echo last; exit 3"
        )
        await browser.until(f"{OUTPUT}.includes('red plain') && {OUTPUT}.includes('<b>err</b>')")
        assert "Running" in await browser.ask(STATE)
        assert await browser.ask("document.querySelector('#output .front-1').textContent") == "red"
        assert await browser.ask("document.querySelector('#output .row.err').textContent") == "<b>err</b>"

        await browser.until(f"{STATE}.startsWith('Failed')")
        assert "exit code 3" in await browser.ask(STATE)
        assert (await browser.ask(OUTPUT)).rstrip().endswith("last")
        facts = await browser.ask("document.querySelector('#facts').innerText")
        for name in ("Exit code", "Waited", "Ran", "Machine", "Run"):
            assert name in facts
        await browser.until("document.querySelector('#recent tbody').innerText.includes('exit 3')")
        assert "1 running a script" not in await browser.ask("document.querySelector('#phases').innerText")
    assert await stop(coordinator) == 0


@needs_a_browser
@with_twisted
async def test_a_run_is_cancelled_and_one_that_takes_too_long_is_ended() -> None:
    coordinator = await start_coordinator(MAXREQTIME="4s", POOLSIZE="1")
    async with shown(coordinator) as browser:
        await run(browser, "echo begun; sleep 1000")
        await browser.until(f"{OUTPUT}.includes('begun')")
        await browser.ask("document.querySelector('#cancel').click()")
        await browser.until(f"{STATE}.startsWith('Cancelled')")
        await coordinator.settle()

        await run(browser, "echo begun; sleep 1000")
        await browser.until(f"{STATE}.startsWith('Ended: its time was over')")
        assert "exit code 124" in await browser.ask(STATE)
    assert await stop(coordinator) == 0


@needs_a_browser
@with_twisted
async def test_a_refusal_is_told_with_when_to_try_again() -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXWAIT="3s")
    busy = await coordinator.begin("echo begun; sleep 1000")
    async with shown(coordinator) as browser:
        await run(browser, "true")
        await browser.until("!document.querySelector('#problem').hidden")
        problem = await browser.ask("document.querySelector('#problem').textContent")
        assert problem.startswith("503: no worker within 3 s. Try again in "), problem
        assert await browser.ask(STATE) == "Not run"
    busy.leave()
    assert await stop(coordinator) == 0


@needs_a_browser
@with_twisted
async def test_a_connection_that_breaks_is_told_and_what_came_is_kept() -> None:
    coordinator = await start_coordinator()
    async with shown(coordinator) as browser:
        await run(browser, "echo begun; sleep 1000")
        await browser.until(f"{OUTPUT}.includes('begun')")
        coordinator.kill(signal.SIGKILL)
        await browser.until(f"{STATE} === 'Broken off'")
        assert "The connection broke." in await browser.ask("document.querySelector('#problem').textContent")
        assert "begun" in await browser.ask(OUTPUT)

        await run(browser, "true")
        await browser.until(f"{STATE} === 'Not run'")
        assert "could not be reached" in await browser.ask("document.querySelector('#problem').textContent")
        await browser.until("document.querySelector('#pool-state').textContent.includes('not be reached')")


SHOWN = {
    r"\e]0;title\a<i>x</i>\e]8;;http://a\e\\link\e]8;;\e\\\e[2J\e[9;9H\e(B\e7!\n": "<i>x</i>link!",
    r"12345\rab\n": "ab345",
    r"12345\r\e[Kab\n": "ab",
    r"12345\r\e[2Kab\n": "ab",
    r"abc\bX\r\n": "abX",
    r"\e[1;38;2;1;2;3mtrue\e[38:2::9:8:7mtrue\e[38;5;200mone of many\e[0m\n": "truetrueone of many",
    r"caf\xc3\xa9\x00\x7f\n": "café",
}
"""Format strings of bash's `printf`, and the row that each makes."""

COLORS = ["rgb(1, 2, 3)", "rgb(9, 8, 7)", "rgb(255, 0, 215)"]


@needs_a_browser
@with_twisted
async def test_what_terminals_know_is_shown_as_text_or_dropped() -> None:
    coordinator = await start_coordinator()
    async with shown(coordinator) as browser:
        await run(
            browser,
            "\n".join([f"printf '{text}'" for text in SHOWN] + [r"printf '\e['; sleep .3; echo 31mred"]),
        )
        await browser.until(f"{STATE}.startsWith('Done')")
        await browser.until(f"{OUTPUT}.includes('red')")
        rows = await browser.ask(
            "[...document.querySelectorAll('#output .row')].map((row) => row.textContent)"
        )
        assert rows == [*SHOWN.values(), "red"]
        spans = "[...document.querySelectorAll('#output span')]"
        assert await browser.ask(f"{spans}.map((span) => span.style.color).filter(Boolean)") == COLORS
        assert await browser.ask("document.querySelector('#output .front-1').textContent") == "red"
    assert await stop(coordinator) == 0


@needs_a_browser
@with_twisted
async def test_keys_are_enough_and_so_is_a_phone() -> None:
    coordinator = await start_coordinator()
    focused = "document.activeElement.id"
    async with shown(coordinator) as browser:
        await browser.ask("document.querySelector('#script').focus()")
        await browser.press("Enter", 13, ctrl=True)
        await browser.until(f"{STATE}.startsWith('Done')")
        await browser.press("Tab", 9)
        assert await browser.ask(focused) == "run"

        await run(browser, "sleep 1000")
        assert await browser.ask(focused) == "cancel"
        await browser.press(" ", 32)
        await browser.until(f"{STATE}.startsWith('Cancelled')")
        assert await browser.ask(focused) == "run"
        await browser.until("document.querySelector('[role=status]').textContent.startsWith('Cancelled')")

        await browser.screenshot(390, 844)
        assert await browser.ask("document.documentElement.scrollWidth") == 390
        assert await browser.ask("document.querySelector('#script').offsetWidth") > 300
    assert await stop(coordinator) == 0


@needs_a_browser
@with_twisted
async def test_a_link_holds_the_script_and_so_does_the_curl_line() -> None:
    coordinator = await start_coordinator()
    async with shown(coordinator, "#script=ZWNobyAnw6Qn") as browser:
        assert await browser.ask("document.querySelector('#script').value") == "echo 'ä'"
        assert not await browser.ask("document.querySelector('#from-link').hidden")
        command = await browser.ask("document.querySelector('#command').textContent")
        origin = f"http://localhost:{coordinator.port}"
        assert command == rf"curl -sN '{origin}/run' --data-raw 'echo '\''ä'\'''"
        await browser.ask("document.querySelector('#link').click()")
        assert await browser.ask("location.hash") == "#script=ZWNobyAnw6Qn"
    assert await stop(coordinator) == 0


@needs_a_browser
@with_twisted
async def test_much_output_leaves_the_page_alive_and_only_the_latest_is_kept() -> None:
    coordinator = await start_coordinator(MAXREQTIME="60s")
    async with shown(coordinator) as browser:
        await run(browser, "seq 1 200000")
        await browser.until(f"{STATE}.startsWith('Done')")
        await browser.until(f"{OUTPUT}.trimEnd().endsWith('200000')")
        assert await browser.ask("document.querySelectorAll('#output .row').length") < 10_000
        assert "earlier lines" in await browser.ask("document.querySelector('#dropped').textContent")
    assert await stop(coordinator) == 0
