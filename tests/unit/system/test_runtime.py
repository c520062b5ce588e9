"""What a role makes of the process it is."""

from __future__ import annotations

import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

PROGRAM = """
import resource
from twisted.internet import reactor
from bfaas.system.runtime import configure_reactor, max_connections
configure_reactor(reactor)
print(*resource.getrlimit(resource.RLIMIT_NOFILE), max_connections())
"""


class OpenFileTests(SynchronousTestCase):
    def test_a_role_may_open_what_it_is_allowed_and_not_without_end(self) -> None:
        cases = {
            (256, 4096): (4096, 4096, 1344),
            (256, 256): (256, 256, 64),
            (64, 100): (100, 100, 12),
            (256, 19_000): (16_384, 19_000, 5440),
            (18_000, 19_000): (18_000, 19_000, 5978),
        }
        for (soft, hard), expected in cases.items():
            command = ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-c", PROGRAM]
            said = subprocess.run(command, check=True, capture_output=True).stdout
            self.assertEqual(expected, tuple(map(int, said.split())))

    def test_where_next_to_no_connection_would_fit_it_says_what_is_needed(self) -> None:
        command = ["prlimit", "--nofile=64:80", sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        self.assertIn(
            "StartError: 80 open files (ulimit -n) are too few: at least 88 are needed", done.stderr
        )
