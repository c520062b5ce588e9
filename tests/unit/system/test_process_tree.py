from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from bfaas.system import process_tree
from tests.support.waiting import block_until

# The process at the top of each tree keeps orphans below itself, as a worker does.
_TOP = """
import os, sys
from bfaas.system import process_tree
assert process_tree.become_subreaper()
os.spawnlp(os.P_NOWAIT, "bash", "bash", "-c", sys.argv[1])
print("up", flush=True)
sys.stdin.read()
"""


class TreeTests(SynchronousTestCase):
    def grow(self, script: str) -> subprocess.Popen[bytes]:
        """Start a tree: a subreaper with bash below it."""
        top = subprocess.Popen(
            [sys.executable, "-c", _TOP, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert top.stdin
        assert top.stdout
        self.addCleanup(self.fell, top)
        self.assertEqual(top.stdout.readline(), b"up\n")
        return top

    def fell(self, top: subprocess.Popen[bytes]) -> None:
        block_until(lambda: process_tree.kill_descendants_once(top.pid) == 0)
        top.kill()
        with top:
            pass

    def names_below(self, pid: int) -> list[str]:
        names = []
        for process in process_tree.descendants(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                names.append(Path(f"/proc/{process.pid}/comm").read_text().strip())
        return sorted(names)

    def assert_killed(self, script: str, sleeps: int) -> None:
        top = self.grow(script)
        block_until(lambda: self.names_below(top.pid).count("sleep") == sleeps)
        family = process_tree.kill_tree(top.pid)
        self.assertEqual(family[0].pid, top.pid)
        self.assertGreater(len(family), sleeps)
        top.wait(20)
        block_until(lambda: not any(map(process_tree.is_running, family)))
        self.assertEqual(top.returncode, -signal.SIGKILL)

    def test_kills_a_plain_child(self) -> None:
        self.assert_killed("sleep 1000; true", 1)

    def test_kills_what_moved_to_another_session(self) -> None:
        self.assert_killed("setsid sleep 1000; true", 1)

    def test_kills_what_forked_twice_and_lost_its_parents(self) -> None:
        self.assert_killed("( ( setsid sleep 1000 & ) & )", 1)

    def test_kills_hundreds(self) -> None:
        self.assert_killed("for i in {1..200}; do sleep 1000 & done; wait", 200)

    def test_kill_below_spares_the_top_and_the_spared(self) -> None:
        top = self.grow("setsid sleep 1000 & sleep 1000; true")
        block_until(lambda: self.names_below(top.pid) == ["bash", "sleep", "sleep"])
        (bash,) = process_tree.children(top.pid)
        self.assertEqual(process_tree.kill_descendants_once(top.pid, {bash}), 0)
        self.assertEqual(self.names_below(top.pid), ["bash", "sleep", "sleep"])
        self.assertEqual(process_tree.kill_descendants_once(top.pid), 3)
        block_until(lambda: process_tree.kill_descendants_once(top.pid) == 0)
        self.assertIsNone(top.poll())

    def test_outruns_a_process_that_keeps_forking(self) -> None:
        # Each generation starts the next and ends, so that a list of numbers is out of date when it is read.
        top = self.grow("f() { sleep 0.001; ((SECONDS > 5)) || f & }; f & f & f")
        block_until(lambda: len(process_tree.descendants(top.pid)) > 3)
        block_until(lambda: process_tree.kill_descendants_once(top.pid) == 0)
        self.assertEqual([], [p for p in process_tree.descendants(top.pid) if not p.dead])

    def test_freezes_and_thaws(self) -> None:
        top = self.grow("while true; do :; done")
        block_until(lambda: self.names_below(top.pid) == ["bash"])
        process_tree.stop_tree(top.pid)
        block_until(lambda: [p.state for p in process_tree.process_and_descendants(top.pid)] == ["T", "T"])
        process_tree.continue_tree(top.pid)
        block_until(lambda: "T" not in [p.state for p in process_tree.process_and_descendants(top.pid)])

    def test_never_signals_another_process_of_the_same_number(self) -> None:
        top = subprocess.Popen(["sleep", "1000"])
        self.addCleanup(top.kill)
        (process,) = process_tree.process_and_descendants(top.pid)
        process_tree._signal([process._replace(started=process.started - 1)], signal.SIGKILL)
        self.assertFalse(process_tree.is_running(process._replace(started=process.started - 1)))
        self.assertIsNone(top.poll())
        process_tree._signal([process], signal.SIGKILL)
        self.assertEqual(top.wait(20), -signal.SIGKILL)

    def test_a_process_that_is_gone_is_no_error(self) -> None:
        gone = subprocess.Popen(["true"])
        gone.wait()
        self.assertEqual(process_tree.kill_tree(gone.pid), [])
        self.assertEqual(process_tree.kill_descendants_once(gone.pid), 0)
        self.assertFalse(process_tree.is_running(process_tree.Process(gone.pid, os.getpid(), 1, "R")))

    def test_a_name_with_brackets_does_not_confuse(self) -> None:
        top = self.grow("cp /bin/sleep '/tmp/) Z 1 ('$$ && exec -a x '/tmp/) Z 1 ('$$ 1000")
        block_until(lambda: self.names_below(top.pid)[0].startswith(")"))
        (process,) = process_tree.descendants(top.pid)
        self.addCleanup(os.remove, f"/tmp/) Z 1 ({process.pid}")
        self.assertEqual(process.parent, top.pid)
        self.assertFalse(process.dead)

    def test_reaps_orphans_but_not_the_known(self) -> None:
        # Orphans that other tests left here are reaped with it.
        mine = subprocess.Popen(["true"])
        self.addCleanup(mine.wait)
        other = os.spawnlp(os.P_NOWAIT, "true", "true")
        block_until(
            lambda: {mine.pid, other} <= {p.pid for p in process_tree.descendants(os.getpid()) if p.dead}
        )
        self.assertGreaterEqual(process_tree.reap_orphans({mine.pid}), 1)
        self.assertNotIn(other, process_tree.children(os.getpid()))
        self.assertEqual(mine.wait(), 0)

    def test_a_zombie_of_ours_counts_as_left(self) -> None:
        known = set(process_tree.children(os.getpid()))
        pid = os.spawnlp(os.P_NOWAIT, "true", "true")
        block_until(lambda: pid in {p.pid for p in process_tree.descendants(os.getpid()) if p.dead})
        self.assertEqual(process_tree.kill_descendants_once(os.getpid(), known), 1)
        self.assertEqual(process_tree.reap_orphans(known), 1)
        self.assertEqual(process_tree.kill_descendants_once(os.getpid(), known), 0)
