"""Blocks of the README that start a program in the background and use it at once, as a shell runs them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol

from bfaas.deadline import Deadline
from tests.e2e.coordinator import PATIENCE, reactor
from tests.support.network import free_port
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from twisted.python.failure import Failure

DEPLOYMENT = ROOT / "docs" / "deploy-fly.md"
BLOCKS = [
    block
    for block in re.findall(r"(?ms)^```\n(.*?)^```$", DEPLOYMENT.read_text())
    if re.search(r" &$", block, re.MULTILINE)
]


class Terminal(ProcessProtocol):
    """A shell at a terminal, into which a block is pasted."""

    def __init__(self, shell: list[str], block: str, home: Path) -> None:
        self.shown = b""
        self.ended: Deferred[None] = Deferred()
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TERM": "dumb", "HOME": str(home), "PS1": "> "}
        process = reactor.spawnProcess(self, f"/bin/{shell[0]}", shell, env=env, path=str(home), usePTY=True)
        process.write(block.encode() + b"wait; exit\n")

    def outReceived(self, data: bytes) -> None:
        self.shown += data

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(None)


def test_there_is_such_a_block() -> None:
    assert len(BLOCKS) == 1


@pytest.mark.parametrize("shell", [["bash", "--norc", "-i"], ["dash", "-i"]], ids=lambda shell: shell[0])
@pytest_twisted.ensureDeferred
async def test_a_pasted_block_works_at_once(shell: list[str], tmp_path: Path) -> None:
    for block in BLOCKS:
        pasted = block.replace(".venv/bin", str(Path(sys.executable).parent)).replace(
            "8001", str(free_port())
        )
        terminal = Terminal(shell, pasted, tmp_path)
        await Deadline(reactor, PATIENCE).run(terminal.ended)
        assert b"hello\r\n\r\nexit: 0\r\n" in terminal.shown, terminal.shown.decode()
