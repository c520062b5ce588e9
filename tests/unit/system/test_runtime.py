"""The limit of open files of a role, and how many connections it allows."""

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
    def test_soft_limit_is_raised_up_to_a_maximum(self) -> None:
        cases = {
            (256, 4096): (4096, 4096, 1344),
            (256, 256): (256, 256, 64),
            (64, 100): (100, 100, 12),
            (256, 19_000): (16_384, 19_000, 5440),
            (18_000, 19_000): (18_000, 19_000, 5978),
        }
        for (soft, hard), expected in cases.items():
            command = ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-c", PROGRAM]
            output = subprocess.run(command, check=True, capture_output=True).stdout
            self.assertEqual(expected, tuple(map(int, output.split())))

    def test_limit_that_allows_hardly_any_connection_is_a_start_error(self) -> None:
        command = ["prlimit", "--nofile=64:80", sys.executable, "-c", PROGRAM]
        completed = subprocess.run(command, check=False, capture_output=True, text=True)
        self.assertIn(
            "StartError: 80 open files (ulimit -n) are too few: at least 88 are needed", completed.stderr
        )
