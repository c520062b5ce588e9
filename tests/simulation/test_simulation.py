"""
The guarantees of `docs/guarantees.md`, in simulated worlds. `make soak` and `make proof` are the long form.

Episodes run in processes of their own: the abandoned coroutines of a crashed coordinator would look like an
error of the test during which Python happens to collect them.
"""

from __future__ import annotations

import os
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

from tests.support.paths import ROOT


class SimulationTests(SynchronousTestCase):
    def run_module(self, name: str, *arguments: str) -> str:
        """Run a program of the simulation; return its output. It must exit with 0."""
        command = [sys.executable, "-m", f"tests.simulation.{name}", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        completed = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        self.assertEqual(0, completed.returncode, completed.stdout + completed.stderr)
        return completed.stdout

    def test_invariants_hold_under_all_faults(self) -> None:
        output = self.run_module("run", "50" if "BFAAS_BRIEF" in os.environ else "160")

        self.assertIn("0 failed", output)

    def test_an_episode_can_be_replayed(self) -> None:
        first, second = self.run_module("run", "--seed", "7"), self.run_module("run", "--seed", "7")

        self.assertGreater(len(first.splitlines()), 100)
        self.assertEqual(first, second)

    def test_invariants_hold_for_all_outcomes_of_the_first_calls(self) -> None:
        self.assertIn("343 paths, 0 failed", self.run_module("exhaustive", "3"))
