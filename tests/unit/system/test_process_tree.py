"""Process trees: found, stopped, killed and reaped."""

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

# The root of each tree becomes the parent of orphans, as a worker does.
_ROOT = """
import os, sys
from bfaas.system import process_tree
assert process_tree.become_subreaper()
os.spawnlp(os.P_NOWAIT, "bash", "bash", "-c", sys.argv[1])
print("up", flush=True)
sys.stdin.read()
"""


class ProcessTreeTests(SynchronousTestCase):
    def start_tree(self, script: str) -> subprocess.Popen[bytes]:
        """Start a subreaper with bash as its child, and return the subreaper."""
        root = subprocess.Popen(
            [sys.executable, "-c", _ROOT, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert root.stdin
        assert root.stdout
        self.addCleanup(self.kill_tree, root)
        self.assertEqual(root.stdout.readline(), b"up\n")
        return root

    def kill_tree(self, root: subprocess.Popen[bytes]) -> None:
        block_until(lambda: process_tree.kill_descendants_once(root.pid) == 0)
        root.kill()
        with root:
            pass

    def descendant_names(self, pid: int) -> list[str]:
        names = []
        for process in process_tree.descendants(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                names.append(Path(f"/proc/{process.pid}/comm").read_text().strip())
        return sorted(names)

    def assert_killed(self, script: str, sleeps: int) -> None:
        root = self.start_tree(script)
        block_until(lambda: self.descendant_names(root.pid).count("sleep") == sleeps)
        killed = process_tree.kill_tree(root.pid)
        self.assertEqual(killed[0].pid, root.pid)
        self.assertGreater(len(killed), sleeps)
        root.wait(20)
        block_until(lambda: not any(map(process_tree.is_running, killed)))
        self.assertEqual(root.returncode, -signal.SIGKILL)

    def test_kills_a_child(self) -> None:
        self.assert_killed("sleep 1000; true", 1)

    def test_kills_a_process_in_another_session(self) -> None:
        self.assert_killed("setsid sleep 1000; true", 1)

    def test_kills_a_daemon_that_forked_twice(self) -> None:
        self.assert_killed("( ( setsid sleep 1000 & ) & )", 1)

    def test_kills_hundreds_of_processes(self) -> None:
        self.assert_killed("for i in {1..200}; do sleep 1000 & done; wait", 200)

    def test_kill_descendants_once_kills_neither_the_root_nor_excluded_processes(self) -> None:
        root = self.start_tree("setsid sleep 1000 & sleep 1000; true")
        block_until(lambda: self.descendant_names(root.pid) == ["bash", "sleep", "sleep"])
        (bash,) = process_tree.children(root.pid)
        self.assertEqual(process_tree.kill_descendants_once(root.pid, {bash}), 0)
        self.assertEqual(self.descendant_names(root.pid), ["bash", "sleep", "sleep"])
        self.assertEqual(process_tree.kill_descendants_once(root.pid), 3)
        block_until(lambda: process_tree.kill_descendants_once(root.pid) == 0)
        self.assertIsNone(root.poll())

    def test_kills_processes_that_fork_without_end(self) -> None:
        # Each generation starts the next and ends, so that any list of pids is outdated when it is read.
        root = self.start_tree("f() { sleep 0.001; ((SECONDS > 5)) || f & }; f & f & f")
        block_until(lambda: len(process_tree.descendants(root.pid)) > 3)
        block_until(lambda: process_tree.kill_descendants_once(root.pid) == 0)
        self.assertEqual([], [p for p in process_tree.descendants(root.pid) if not p.dead])

    def test_stops_and_continues_a_tree(self) -> None:
        root = self.start_tree("while true; do :; done")
        block_until(lambda: self.descendant_names(root.pid) == ["bash"])
        process_tree.stop_tree(root.pid)
        block_until(lambda: [p.state for p in process_tree.process_and_descendants(root.pid)] == ["T", "T"])
        process_tree.continue_tree(root.pid)
        block_until(lambda: "T" not in [p.state for p in process_tree.process_and_descendants(root.pid)])

    def test_does_not_signal_another_process_with_the_same_pid(self) -> None:
        root = subprocess.Popen(["sleep", "1000"])
        self.addCleanup(root.kill)
        (process,) = process_tree.process_and_descendants(root.pid)
        process_tree._send_signal([process._replace(start_time=process.start_time - 1)], signal.SIGKILL)
        self.assertFalse(process_tree.is_running(process._replace(start_time=process.start_time - 1)))
        self.assertIsNone(root.poll())
        process_tree._send_signal([process], signal.SIGKILL)
        self.assertEqual(root.wait(20), -signal.SIGKILL)

    def test_a_process_that_no_longer_exists_is_no_error(self) -> None:
        ended = subprocess.Popen(["true"])
        ended.wait()
        self.assertEqual(process_tree.kill_tree(ended.pid), [])
        self.assertEqual(process_tree.kill_descendants_once(ended.pid), 0)
        self.assertFalse(process_tree.is_running(process_tree.Process(ended.pid, os.getpid(), 1, "R")))

    def test_parses_program_names_with_parentheses(self) -> None:
        root = self.start_tree("cp /bin/sleep '/tmp/) Z 1 ('$$ && exec -a x '/tmp/) Z 1 ('$$ 1000")
        block_until(lambda: self.descendant_names(root.pid)[0].startswith(")"))
        (process,) = process_tree.descendants(root.pid)
        self.addCleanup(os.remove, f"/tmp/) Z 1 ({process.pid}")
        self.assertEqual(process.parent, root.pid)
        self.assertFalse(process.dead)

    def test_reaps_orphans_but_no_excluded_children(self) -> None:
        # Orphans of other tests may be reaped, too.
        excluded = subprocess.Popen(["true"])
        self.addCleanup(excluded.wait)
        orphan = os.spawnlp(os.P_NOWAIT, "true", "true")
        block_until(lambda: {excluded.pid, orphan} <= self.dead_descendants())
        self.assertGreaterEqual(process_tree.reap_orphans({excluded.pid}), 1)
        self.assertNotIn(orphan, process_tree.children(os.getpid()))
        self.assertEqual(excluded.wait(), 0)

    def test_an_unreaped_child_of_this_process_counts_as_left(self) -> None:
        existing = set(process_tree.children(os.getpid()))
        pid = os.spawnlp(os.P_NOWAIT, "true", "true")
        block_until(lambda: pid in self.dead_descendants())
        self.assertEqual(process_tree.kill_descendants_once(os.getpid(), existing), 1)
        self.assertEqual(process_tree.reap_orphans(existing), 1)
        self.assertEqual(process_tree.kill_descendants_once(os.getpid(), existing), 0)

    def test_reaps_in_order_until_an_excluded_child(self) -> None:
        process_tree.reap_orphans(())  # of other tests
        excluded = subprocess.Popen(["true"])
        self.addCleanup(excluded.wait)
        block_until(lambda: excluded.pid in self.dead_descendants())
        orphan = os.spawnlp(os.P_NOWAIT, "true", "true")
        block_until(lambda: orphan in self.dead_descendants())
        process_tree.reap_until_excluded({excluded.pid})
        self.assertLessEqual({excluded.pid, orphan}, self.dead_descendants())
        excluded.wait()
        process_tree.reap_until_excluded(())
        self.assertNotIn(orphan, self.dead_descendants())

    def dead_descendants(self) -> set[int]:
        return {process.pid for process in process_tree.descendants(os.getpid()) if process.dead}
