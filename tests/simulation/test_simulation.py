"""
The promises of `docs/promises.md`, in simulated worlds. `make soak` and `make proof` are the long form.

Episodes run in processes of their own: what waits for ever in a crashed coordinator would look like a
fault of the test that happens to run when Python collects it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

from tests.support.paths import ROOT


class SimulationTests(SynchronousTestCase):
    def run_module(self, name: str, *arguments: str) -> str:
        """Run a program of the simulation, and tell what it said; it must end well."""
        command = [sys.executable, "-m", f"tests.simulation.{name}", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        return done.stdout

    def test_every_promise_holds_whatever_goes_wrong_and_everything_does(self) -> None:
        said = self.run_module("run", "50" if "BFAAS_BRIEF" in os.environ else "400")

        self.assertIn("0 broken", said)

    def test_an_episode_can_be_lived_through_again(self) -> None:
        one, other = self.run_module("run", "--seed", "7"), self.run_module("run", "--seed", "7")

        self.assertGreater(len(one.splitlines()), 100)
        self.assertEqual(one, other)

    def test_a_small_world_in_every_way(self) -> None:
        self.assertIn("343 paths, 0 broken", self.run_module("small", "3"))
