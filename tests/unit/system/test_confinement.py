"""Which user and which program the settings of a worker name, and what a command prefix contains."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from bfaas.settings import SettingsError
from bfaas.system.confinement import (
    SANDBOX_ACCOUNT,
    Confinement,
    User,
    find_program,
    first_victim_of_low_memory,
    sandbox_prefix,
    write_accounts,
)


class ResolveTests(SynchronousTestCase):
    def problems(self, run_as: str, *sandbox: str) -> tuple[str, ...]:
        error = self.assertRaises(SettingsError, Confinement.resolve, run_as, sandbox)
        problems: tuple[str, ...] = error.problems
        return problems

    def test_empty_settings_confine_neither_by_user_nor_by_sandbox(self) -> None:
        self.assertEqual(Confinement(None, ()), Confinement.resolve("", ()))

    def test_the_program_of_a_sandbox_is_an_absolute_path(self) -> None:
        expected = Confinement(None, (str(shutil.which("env")), "--chdir", "a b"))
        self.assertEqual(expected, Confinement.resolve("", ("env", "--chdir", "a b")))

    def test_users_are_names_or_numbers(self) -> None:
        for name in ("no-such-user", "-1", "0x1", "4294967295", "10000000000", "\u0663"):
            self.assertEqual((f"RUN_AS: there is no user {name!a}",), self.problems(name))

    def test_a_number_without_a_name_is_a_user_of_up_to_ten_digits(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can run scripts as another user")
        self.assertEqual(User(4294967294, 4294967294), Confinement.resolve("4294967294", ()).user)

    def test_the_worker_s_own_user_is_set_only_by_root(self) -> None:
        expected = User(0, 0) if os.geteuid() == 0 else None
        self.assertEqual(expected, Confinement.resolve(str(os.geteuid()), ()).user)

    def test_missing_programs_and_users_are_reported_together(self) -> None:
        expected = ("SANDBOX: no-such-program is not installed", "RUN_AS: there is no user 'no-such-user'")
        self.assertEqual(expected, self.problems("no-such-user", "no-such-program", "--"))


class CommandPrefixTests(SynchronousTestCase):
    def test_only_what_is_not_counted_with_the_worker_has_a_limit_of_processes(self) -> None:
        for confinement, limited in (
            (Confinement(), False),
            (Confinement(None, ("env",)), False),
            (Confinement(User(1, 1)), True),
            (Confinement(None, ("/usr/bin/bwrap", "--")), True),
        ):
            self.assertEqual(limited, " -u 512 " in f"{confinement.command_prefix()[-2]} ", confinement)

    def test_bubblewrap_is_followed_by_another_session_unless_it_creates_one(self) -> None:
        prefix = Confinement(None, ("/usr/bin/bwrap", "--")).command_prefix()
        setsid = find_program("setsid")
        self.assertEqual([setsid, setsid], [word for word in prefix if word == setsid])
        self.assertEqual(setsid, prefix[prefix.index("/usr/bin/bwrap") + 2])
        self.assertNotIn(setsid, Confinement(None, sandbox_prefix("/home")).command_prefix())

    def test_script_is_the_first_victim_of_low_memory_and_this_process_is_not(self) -> None:
        score = Path("/proc/self/oom_score_adj")
        original = score.read_text()
        with self.assertRaises(ZeroDivisionError), first_victim_of_low_memory():
            self.assertEqual("1000\n", score.read_text())
            _ = 1 / 0
        self.assertEqual(original, score.read_text())
        self.assertNotIn(find_program("choom"), Confinement().command_prefix())

        self.patch(os, "access", lambda *_: False)
        self.assertEqual([find_program("choom"), "-n", "1000", "--"], Confinement().command_prefix()[1:5])
        with first_victim_of_low_memory():
            self.assertEqual(original, score.read_text())

    def test_another_user_has_no_groups_and_gains_no_privileges(self) -> None:
        prefix = Confinement(User(7, 8)).command_prefix()
        options = prefix[prefix.index(find_program("setpriv")) + 1 :][:4]
        self.assertEqual(["--reuid=7", "--regid=8", "--clear-groups", "--no-new-privs"], options)


class AccountsTests(SynchronousTestCase):
    def test_the_user_has_a_name_before_those_of_the_host(self) -> None:
        directory = Path(self.mktemp())
        directory.mkdir()
        write_accounts(directory, User(7, 8))
        lines = (directory / "passwd").read_text().splitlines()
        self.assertEqual(f"{SANDBOX_ACCOUNT}:x:7:8::/home/worker:/bin/bash", lines[0])
        self.assertEqual(Path("/etc/passwd").read_text().splitlines(), lines[1:])
        self.assertEqual(f"{SANDBOX_ACCOUNT}:x:8:", (directory / "group").read_text().splitlines()[0])
