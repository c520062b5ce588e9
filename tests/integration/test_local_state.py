"""Tests of the directories of running processes, and of the user ids of running scripts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from bfaas.machines.local.script_users import UID_RANGES, ScriptUsers, unavailable_reason
from bfaas.machines.local.state_directory import StateDirectory, abandoned
from bfaas.system import process_tree

_OWNER = """
import sys, time
from bfaas.machines.local.state_directory import StateDirectory
state = StateDirectory.create(sys.argv[1])
(state.path / "file").touch()
print(state.path, flush=True)
time.sleep(1000)
"""


class StateDirectoryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.parent = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.parent)

    def names(self) -> list[str]:
        return [path.name for path in Path(self.parent).iterdir()]

    def test_directory_is_abandoned_once_its_owner_was_killed(self) -> None:
        command = [sys.executable, "-c", _OWNER, self.parent]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout is not None
            path = Path(owner.stdout.readline().strip())
            self.assertEqual([], abandoned([self.parent]))
            owner.send_signal(signal.SIGKILL)
        [state] = abandoned([self.parent, self.parent, "/no/such/directory"])
        self.assertEqual(path, state.path)
        self.assertEqual([], abandoned([self.parent]))  # this process owns it now
        state.remove()
        self.assertEqual([], self.names())

    def test_directory_of_this_process_is_not_abandoned(self) -> None:
        state = StateDirectory.create(self.parent)
        self.assertEqual([], abandoned([self.parent]))
        state.remove()
        self.assertEqual([], self.names())

    def test_other_directories_are_not_abandoned(self) -> None:
        Path(self.parent, "bfaas-machines-notes").mkdir(mode=0o711)
        Path(self.parent, "bfaas-machines-aaaaaaaa").touch()
        Path(self.parent, "bfaas-machines-bbbbbbbb").mkdir(mode=0o755)
        Path(self.parent, "bfaas-machines-cccccccc").symlink_to("bfaas-machines-notes")
        if os.geteuid() == 0:
            other = Path(self.parent, "bfaas-machines-dddddddd")
            other.mkdir()
            other.chmod(0o711)
            os.chown(other, 12345, 12345)
        self.assertEqual([], abandoned([self.parent]))

    def test_removed_or_replaced_directory_is_not_intact(self) -> None:
        state = StateDirectory.create(self.parent)
        self.assertTrue(state.intact)
        state.path.rmdir()
        self.assertFalse(state.intact)
        state.path.mkdir()
        self.assertFalse(state.intact)
        (state.path / "other").touch()
        state.remove()
        self.assertTrue((state.path / "other").exists())

    def test_removed_directory_is_created_again_and_locked(self) -> None:
        state = StateDirectory.create(self.parent)
        self.assertTrue(state.restore())
        state.path.rmdir()

        self.assertTrue(state.restore())

        self.assertTrue(state.intact)
        self.assertEqual(0o711, state.path.stat().st_mode & 0o777)
        self.assertEqual([], abandoned([self.parent]))
        state.remove()

    def test_replaced_directory_is_not_created_again(self) -> None:
        state = StateDirectory.create(self.parent)
        state.path.rmdir()
        state.path.mkdir()

        self.assertFalse(state.restore())

        state.abandon()
        self.assertTrue(state.path.exists())


class ScriptUsersTests(SynchronousTestCase):
    def setUp(self) -> None:
        reason = unavailable_reason()
        if reason:
            self.skipTest(reason)

    def users(self) -> ScriptUsers:
        users = ScriptUsers()
        self.addCleanup(users.close)
        return users

    def test_id_is_not_shared_until_it_is_released(self) -> None:
        first, second = self.users(), self.users()
        second._next = first._next
        acquired = [users.acquire() for users in (first, second, second, first)]
        self.assertEqual(4, len(set(acquired)))
        self.assertTrue(all(user.uid in UID_RANGES[0] and user.gid == user.uid for user in acquired))

        first._next = second._next = UID_RANGES[0].index(acquired[0].uid)
        self.assertNotIn(second.acquire(), acquired)
        first.release(acquired[0])
        second._next = UID_RANGES[0].index(acquired[0].uid)
        self.assertEqual(acquired[0], second.acquire())

    def test_first_id_follows_the_last(self) -> None:
        users = self.users()
        users._next = len(UID_RANGES[0]) - 1
        self.assertEqual([UID_RANGES[0][-1], UID_RANGES[0][0]], [users.acquire().uid for _ in range(2)])

    def test_id_with_processes_is_not_chosen(self) -> None:
        users = self.users()
        user = users.acquire()
        command = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "--"]
        with subprocess.Popen(
            [*command, "sh", "-c", "echo up; exec sleep 1000"], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            self.assertEqual(b"up\n", process.stdout.readline())
            users.release(user)
            users._next = UID_RANGES[0].index(user.uid)
            self.assertNotEqual(user, users.acquire())
            self.assertTrue(process_tree.kill_user(user.uid))
        self.assertEqual(-signal.SIGKILL, process.returncode)
        self.assertTrue(process_tree.kill_user(user.uid))
