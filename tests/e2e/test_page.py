"""Tests of the page in a browser."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.utils import getProcessOutput

from bfaas import __version__
from tests.e2e.chromium import PROGRAM, Chromium, Tab
from tests.e2e.coordinator import reactor, start_coordinator, stop

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Page

    from tests.e2e.coordinator import Running

with_twisted = pytest_twisted.ensureDeferred

# In CI a missing browser is a failure.
needs_chromium = pytest.mark.skipif(
    PROGRAM is None and "CI" not in os.environ, reason="chromium is not installed"
)

TERMINAL = "document.querySelector('#output')"
STATE, OUTPUT = "document.querySelector('#state').textContent", "document.querySelector('#output').innerText"


async def run(tab: Tab, script: str) -> None:
    """Enter a script, and run it with the keyboard."""
    await tab.do(lambda page: page.fill("#script", script))
    await tab.do(lambda page: page.press("#script", "Control+Enter"))


@needs_chromium
@with_twisted
async def test_output_is_shown_as_it_arrives_and_then_the_result(chromium: Chromium) -> None:
    coordinator = await start_coordinator(POOL_STANDBY="1")
    async with chromium.open(coordinator) as tab:
        await run(
            tab, "printf '\\e[31mred\\e[0m plain\\n'; echo '<b>err</b>' >&2; sleep 3; echo last; exit 3"
        )
        await tab.wait_until(f"{OUTPUT}.includes('red plain') && {OUTPUT}.includes('<b>err</b>')")
        assert "Running" in await tab.text("#state")
        assert await tab.text("#output .front-1") == "red"
        assert await tab.text("#output .row.err") == "<b>err</b>"

        await tab.wait_until(f"{STATE}.startsWith('Failed')")
        assert "exit code 3" in await tab.text("#state")
        assert (await tab.text("#output")).rstrip().endswith("last")
        await tab.wait_until("document.querySelector('#details').innerText.includes('Ran')")
        details = await tab.evaluate(
            "Object.fromEntries([...document.querySelectorAll('#details div')].map((item) =>"
            " [item.children[0].textContent, item.children[1].textContent]))"
        )
        assert list(details) == ["Exit code", "Waited", "Ran", "CPU time", "Machine", "Run ID"]
        # Each place shows the same times.
        row = await tab.evaluate(
            "[...document.querySelectorAll('#recent tbody tr:first-child td')]"
            ".map((cell) => cell.textContent)"
        )
        assert row[1:] == ["exit 3", details["Waited"], details["Ran"]]
        history = await tab.text("#runs small")
        assert history.endswith(f"waited {details['Waited']} · ran {details['Ran']}")
        assert "1 running" not in await tab.text("#phases")
    assert await stop(coordinator) == 0


@needs_chromium
@with_twisted
async def test_run_can_be_cancelled_and_time_limit_is_shown(chromium: Chromium) -> None:
    coordinator = await start_coordinator(MAXREQTIME="4s", POOLSIZE="1")
    async with chromium.open(coordinator) as tab:
        await run(tab, "echo started; sleep 1000")
        await tab.wait_until(f"{OUTPUT}.includes('started')")
        await tab.do(lambda page: page.click("#cancel"))
        await tab.wait_until(f"{STATE}.startsWith('Cancelled')")
        await coordinator.settle()

        await run(tab, "echo started; sleep 1000")
        await tab.wait_until(f"{STATE}.startsWith('Timed out after 4 s')")
        assert "exit code 124" in await tab.text("#state")
    assert await stop(coordinator) == 0


@needs_chromium
@with_twisted
async def test_rejection_is_shown_with_the_time_to_try_again(chromium: Chromium) -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXWAIT="3s")
    busy = await coordinator.begin("echo started; sleep 1000")
    async with chromium.open(coordinator) as tab:
        await run(tab, "true")
        await tab.wait_until("!document.querySelector('#problem').hidden")
        problem = await tab.text("#problem")
        assert problem.startswith("503: no worker available within 3 s. Try again in "), problem
        assert await tab.text("#state") == "Not run"
    busy.leave()
    assert await stop(coordinator) == 0


@needs_chromium
@with_twisted
async def test_lost_connection_is_shown_and_output_stays(chromium: Chromium) -> None:
    coordinator = await start_coordinator()
    async with chromium.open(coordinator) as tab:
        await run(tab, "echo started; sleep 1000")
        await tab.wait_until(f"{OUTPUT}.includes('started')")
        coordinator.kill(signal.SIGKILL)
        await tab.wait_until(f"{STATE} === 'Interrupted'")
        assert "The connection was lost." in await tab.text("#problem")
        assert "started" in await tab.text("#output")

        await run(tab, "true")
        await tab.wait_until(f"{STATE} === 'Not run'")
        assert "could not be reached" in await tab.text("#problem")
        await tab.wait_until("document.querySelector('#pool-state').textContent.includes('not be reached')")


ROWS = {
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


@needs_chromium
@with_twisted
async def test_terminal_escapes_are_applied_or_dropped(coordinator: Running, chromium: Chromium) -> None:
    async with chromium.open(coordinator) as tab:
        await run(
            tab,
            "\n".join([f"printf '{text}'" for text in ROWS] + [r"printf '\e['; sleep .3; echo 31mred"]),
        )
        await tab.wait_until(f"{STATE}.startsWith('Done')")
        await tab.wait_until(f"{OUTPUT}.includes('red')")
        rows = await tab.evaluate(
            "[...document.querySelectorAll('#output .row')].map((row) => row.textContent)"
        )
        assert rows == [*ROWS.values(), "red"]
        spans = "[...document.querySelectorAll('#output span')]"
        assert await tab.evaluate(f"{spans}.map((span) => span.style.color).filter(Boolean)") == COLORS
        assert await tab.text("#output .front-1") == "red"


@needs_chromium
@with_twisted
async def test_page_works_with_the_keyboard_and_on_a_phone(coordinator: Running, chromium: Chromium) -> None:
    focused = "document.activeElement.id"
    async with chromium.open(coordinator) as tab:
        await tab.do(lambda page: page.focus("#script"))
        await tab.do(lambda page: page.keyboard.press("Control+Enter"))
        await tab.wait_until(f"{STATE}.startsWith('Done')")
        await tab.do(lambda page: page.keyboard.press("Tab"))
        assert await tab.evaluate(focused) == "script"
        for key in ("Escape", "Tab", "Tab"):
            await tab.do(partial(_press, key=key))
        assert await tab.evaluate(focused) == "run"

        await tab.do(lambda page: page.fill("#script", "sleep 1000"))
        await tab.do(lambda page: page.focus("#run"))
        await tab.do(lambda page: page.keyboard.press("Enter"))
        assert await tab.evaluate(focused) == "cancel"
        await tab.do(lambda page: page.keyboard.press("Space"))
        await tab.wait_until(f"{STATE}.startsWith('Cancelled')")
        assert await tab.evaluate(focused) == "run"
        await tab.wait_until("document.querySelector('[role=status]').textContent.startsWith('Cancelled')")

        await tab.do(lambda page: page.set_viewport_size({"width": 390, "height": 844}))
        assert await tab.evaluate("document.documentElement.scrollWidth") == 390
        assert await tab.evaluate("document.querySelector('#script').offsetWidth") > 300
        widths = await tab.evaluate("['run', 'cancel'].map((id) => document.getElementById(id).offsetWidth)")
        assert widths[0] == widths[1] > 150


def _press(page: Page, key: str) -> None:
    page.keyboard.press(key)


@needs_chromium
@with_twisted
async def test_tab_indents_lines_and_can_be_undone(coordinator: Running, chromium: Chromium) -> None:
    async with chromium.open(coordinator) as tab:

        async def press(*keys: str) -> str:
            for key in keys:
                await tab.do(partial(_press, key=key))
            return await tab.do(lambda page: page.input_value("#script"))

        await tab.do(lambda page: page.fill("#script", "for i in 1 2; do\necho $i\n\ndone"))
        numbers = await tab.evaluate("document.querySelector('#line-numbers').textContent")
        assert numbers == "1\n2\n3\n4"
        assert await press("Control+Home", "Shift+Tab") == "for i in 1 2; do\necho $i\n\ndone"
        assert await press("ArrowDown", "Tab") == "for i in 1 2; do\n  echo $i\n\ndone"
        assert await press("Control+z") == "for i in 1 2; do\necho $i\n\ndone"
        indented = "  for i in 1 2; do\n  echo $i\n\n  done"
        assert await press("Control+a", "Tab") == indented
        assert await press("Tab") == "    for i in 1 2; do\n    echo $i\n\n    done"
        assert await press("Shift+Tab", "Shift+Tab", "Shift+Tab") == "for i in 1 2; do\necho $i\n\ndone"
        # The first two lines without the third, at whose beginning the selection ends.
        assert await press("Control+Home", "Shift+ArrowDown", "Shift+ArrowDown", "Tab") == (
            "  for i in 1 2; do\n  echo $i\n\ndone"
        )


@needs_chromium
@with_twisted
async def test_input_variables_and_time_limit_are_sent_and_the_curl_command_does_the_same(
    coordinator: Running,
    chromium: Chromium,
) -> None:
    async with chromium.open(coordinator) as tab:
        await tab.do(lambda page: page.click("#options summary"))
        await tab.do(lambda page: page.fill("#stdin", "it's\ninput\n"))
        await tab.do(lambda page: page.fill("#env", "GREETING=a=b c\n\nEMPTY="))
        await tab.do(lambda page: page.fill("#timeout", "1.5s"))
        await run(tab, 'cat; echo "$GREETING,$EMPTY."; sleep 1000')
        await tab.wait_until(f"{STATE}.startsWith('Timed out after')")
        assert (await tab.text("#output")).split() == ["it's", "input", "a=b", "c,."]
        assert await tab.text("#options-summary") == "(input, 2 variables, at most 1.5s)"

        command = await tab.evaluate("document.querySelector('#command').textContent")
        shown = (await getProcessOutput("bash", ["-c", command], os.environ, reactor=reactor)).decode()
        pieces = [json.loads(line[6:]) for line in shown.splitlines() if line.startswith('data: "')]
        assert "".join(pieces) == "it's\ninput\na=b c,.\n"
        assert '"reason": "timeout"' in shown

        await tab.do(lambda page: page.fill("#env", "no equals sign"))
        await run(tab, "true")
        await tab.wait_until("!document.querySelector('#problem').hidden")
        assert "NAME=value" in await tab.text("#problem")
        await tab.do(lambda page: page.fill("#env", ""))
        await tab.do(lambda page: page.fill("#timeout", "soon"))
        await run(tab, "true")
        await tab.wait_until("document.querySelector('#problem').textContent.startsWith('400: ')")


@needs_chromium
@with_twisted
async def test_history_survives_a_reload_and_is_not_sent(coordinator: Running, chromium: Chromium) -> None:
    async with chromium.open(coordinator) as tab:
        sent: list[tuple[str, str | None]] = []
        await tab.do(lambda page: page.on("request", lambda each: sent.append((each.method, each.post_data))))
        placeholder = f"getComputedStyle({TERMINAL}, '::before').content"
        assert "appears here" in await tab.evaluate(placeholder)
        await tab.do(lambda page: page.click("#options summary"))
        await tab.do(lambda page: page.fill("#env", "A=first"))
        await run(tab, "echo $A\nexit 4")
        await tab.wait_until(f"{STATE}.startsWith('Failed')")
        await tab.do(lambda page: page.fill("#env", ""))
        await run(tab, "true")
        await tab.wait_until(f"{STATE}.startsWith('Done')")
        assert await tab.evaluate(placeholder) == '"No output."'

        await tab.do(lambda page: page.fill("#script", "a draft"))
        await tab.do(lambda page: page.reload())
        assert await tab.do(lambda page: page.input_value("#script")) == "a draft"
        runs = await tab.evaluate(
            "[...document.querySelectorAll('#runs li')].map((item) =>"
            " [...item.children].slice(0, 2).map((part) => part.textContent))"
        )
        assert runs == [["true", "Done · exit code 0"], ["echo $A …", "Failed · exit code 4"]]

        await tab.do(lambda page: page.click("#runs li:nth-child(2) button"))
        assert await tab.do(lambda page: page.input_value("#script")) == "echo $A\nexit 4"
        assert await tab.do(lambda page: page.input_value("#env")) == "A=first"
        await tab.do(lambda page: page.click("#clear-history"))
        await tab.do(lambda page: page.reload())
        assert not await tab.do(lambda page: page.is_visible("#history"))
        assert [body for method, body in sent if body] == [
            json.dumps({"script": "echo $A\nexit 4", "env": {"A": "first"}}, separators=(",", ":")),
            "true",
        ]


@needs_chromium
@with_twisted
async def test_position_in_the_queue_is_shown_and_the_panel_follows_the_run(chromium: Chromium) -> None:
    coordinator = await start_coordinator(POOLSIZE="1")
    busy = await coordinator.begin("echo started; sleep 1000")
    others = [Deferred.fromCoroutine(coordinator.run("true")) for _ in range(2)]
    async with chromium.open(coordinator) as tab:
        await tab.wait_until("document.querySelector('#queue').innerText.includes('2 of')")
        await run(tab, "true")
        await tab.wait_until(f"{STATE}.endsWith('3 of 3 in the queue')")
        busy.leave()
        await tab.wait_until(f"{STATE}.startsWith('Done')")
        # The machine is wiped within moments, and the panel shows it.
        await tab.wait_until("!document.querySelector('#phases').innerText.includes('running')")
        for other in others:
            await other
        sandbox, version = await tab.text("#sandbox"), await tab.text("#version")
        assert "andbox" in sandbox
        assert version == f"bfaas {__version__}"
    assert await stop(coordinator) == 0


@needs_chromium
@with_twisted
async def test_link_and_curl_command_contain_the_script(coordinator: Running, chromium: Chromium) -> None:
    async with chromium.open(coordinator, "#script=ZWNobyAnw6Qn") as tab:
        assert await tab.do(lambda page: page.input_value("#script")) == "echo 'ä'"
        assert await tab.do(lambda page: page.is_visible("#from-link"))
        command = await tab.evaluate("document.querySelector('#command').textContent")
        origin = f"http://localhost:{coordinator.port}"
        assert command == rf"curl -sN '{origin}/run' --data-raw 'echo '\''ä'\'''"
        await tab.do(lambda page: page.click("#link"))
        assert await tab.evaluate("location.hash") == "#script=ZWNobyAnw6Qn"


@needs_chromium
@with_twisted
async def test_page_stays_responsive_under_large_output_and_keeps_the_latest(chromium: Chromium) -> None:
    coordinator = await start_coordinator(MAXREQTIME="60s")
    async with chromium.open(coordinator) as tab:
        await run(tab, "seq 1 200000")
        await tab.wait_until(f"{STATE}.startsWith('Done')")
        await tab.wait_until(f"{OUTPUT}.trimEnd().endsWith('200000')")
        assert await tab.evaluate("document.querySelectorAll('#output .row').length") < 10_000
        assert "earlier lines" in await tab.text("#dropped")
    assert await stop(coordinator) == 0


@needs_chromium
@with_twisted
async def test_files_are_sent_and_returned(coordinator: Running, chromium: Chromium, tmp_path: Path) -> None:
    name = 'in "1".txt'
    (tmp_path / name).write_bytes(b"b\r\na\n")
    (tmp_path / "data.bin").write_bytes(BINARY)
    async with chromium.open(coordinator) as tab:
        await tab.do(lambda page: page.click("#options summary"))
        await tab.do(lambda page: page.set_input_files("#files", [tmp_path / name, tmp_path / "data.bin"]))
        await tab.do(lambda page: page.fill("#stdin", "it's\ninput\n"))
        await tab.do(lambda page: page.fill("#env", "A=@b"))
        await tab.do(lambda page: page.fill("#outputs", "out/* missing"))
        script = 'mkdir out; cp data.bin out/; sort in*1*.txt > "out/s o"; cat -A - in*; echo "$A"'
        await run(tab, script)
        await tab.wait_until(f"{STATE}.startsWith('Done')")
        assert (await tab.text("#output")).split() == ["it's$", "input$", "b^M$", "a$", "@b"]
        assert await tab.text("#options-summary") == "(input, 1 variable, 2 files, files to fetch)"
        assert await tab.text("#problem") == "Not returned: missing (no such file)"
        links = "[...document.querySelectorAll('#downloads li')].map((item) => item.textContent)"
        assert await tab.evaluate(links) == ["out/data.bin 2.56 kB", "out/s o 5 bytes"]
        assert await tab.do(partial(_download, link="out/data.bin")) == ("out_data.bin", BINARY)
        assert await tab.do(partial(_download, link="out/s o")) == ("out_s o", b"a\nb\r\n")
        await tab.wait_until(
            "document.querySelector('[role=status]').textContent.includes('Files to download: 2.')"
        )

        command = await tab.evaluate("document.querySelector('#command').textContent")
        words = ["-c", f"cd {tmp_path} && {command}"]
        shown = (await getProcessOutput("bash", words, os.environ, reactor=reactor)).decode()
        events = [json.loads(line[6:]) for line in shown.splitlines() if line.startswith("data: ")]
        text = "".join(event for event in events if isinstance(event, str))
        assert text == "it's$\ninput$\nb^M$\na$\n@b\n"
        assert [event["name"] for event in events if "base64" in event] == ["out/data.bin", "out/s o"]

        # The next run removes the downloads; without files it is JSON.
        for _ in range(2):
            await tab.do(lambda page: page.click("#file-list button"))
        await run(tab, "mkdir out; echo 1 > out/1")
        await tab.wait_until(f"{links}.join() === 'out/1 2 bytes'")


BINARY = bytes(range(256)) * 10


def _download(page: Page, link: str) -> tuple[str, bytes]:
    with page.expect_download() as download:
        page.click(f"#downloads a:text-is('{link}')")
    return download.value.suggested_filename, download.value.path().read_bytes()


DROP = """
(names) => {
  const data = new DataTransfer();
  for (const name of names) data.items.add(new File([name + " dropped"], name));
  const event = (type) => new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: data});
  const target = document.querySelector("footer");
  const results = [target.dispatchEvent(event("dragover")), document.documentElement.className];
  return [...results, target.dispatchEvent(event("drop")), document.documentElement.className];
}
"""


@needs_chromium
@with_twisted
async def test_files_can_be_dropped_anywhere_and_unreadable_ones_are_named(
    coordinator: Running, chromium: Chromium, tmp_path: Path
) -> None:
    (tmp_path / "gone").write_text("x")
    async with chromium.open(coordinator) as tab:
        # The page accepts the drag and the drop: the browser's own action is prevented.
        dropped = await tab.do(lambda page: page.evaluate(DROP, ["a", "b"]))
        assert dropped == [False, "drop", False, ""]
        assert await tab.do(lambda page: page.is_visible("#file-list"))
        assert await tab.text("#file-list li:last-child") == "b\n9 bytes\nRemove"
        await run(tab, "cat a b")
        await tab.wait_until(f"{OUTPUT}.includes('a droppedb dropped')")
        await tab.do(lambda page: page.evaluate(DROP, ["a"]))
        assert await tab.evaluate("document.querySelectorAll('#file-list li').length") == 2

        await tab.do(lambda page: page.set_input_files("#files", tmp_path / "gone"))
        (tmp_path / "gone").unlink()
        await run(tab, "true")
        await tab.wait_until("document.querySelector('#problem').textContent.startsWith('gone cannot')")
        assert await tab.text("#state") == "Not run"


@needs_chromium
@with_twisted
async def test_incomplete_files_are_named(chromium: Chromium) -> None:
    coordinator = await start_coordinator(MAXOUTPUT="1GiB")
    async with chromium.open(coordinator) as tab:
        await tab.do(lambda page: page.click("#options summary"))
        await tab.do(lambda page: page.fill("#outputs", "*"))
        await tab.do(lambda page: page.fill("#timeout", "1.5s"))
        await run(tab, "echo 1 > a; truncate -s 900M b")
        await tab.wait_until(f"{STATE}.startsWith('Timed out')")
        assert await tab.text("#problem") == "Not returned: b (the run ended before)"
        assert (await tab.text("#downloads")).split() == ["a", "2", "bytes"]
    assert await stop(coordinator) == 0
