"""The benchmarks: their reports, and that those which no other test runs still run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

from twisted.trial.unittest import SynchronousTestCase

from benchmarks.report import ROOT, Report, percentile


class ReportTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.report = Report("waits")
        self.report.add("plain", "ms", [1.0, 2.0, 4.0])
        self.report.add("ours <&>", "ms", [3.0, 6.0, 30.0], "plain", twice="plain")
        self.report.add("memory", "MB", [0.0])

    def test_percentile_is_the_smallest_sample_that_so_many_do_not_exceed(self) -> None:
        samples = [float(number) for number in range(100, 0, -1)]
        percentiles = [percentile(samples, percent) for percent in (0, 1, 50, 99, 100)]
        self.assertEqual([1, 1, 50, 99, 100], percentiles)
        self.assertEqual(7, percentile([7.0], 99))

    def test_table_compares_medians(self) -> None:
        header, plain, ours, memory = self.report.table().splitlines()
        self.assertEqual(["waits", "n", "mean", "median"], header.split()[:4])
        self.assertTrue(plain.startswith("plain, ms "), plain)
        self.assertTrue(ours.endswith("  3 x plain, 3 x twice"), ours)
        self.assertEqual(["memory,", "MB", "1", *["0"] * 7], memory.split())

    def test_json_has_every_sample(self) -> None:
        document = json.loads(self.report.to_json())
        self.assertEqual([[1, 2, 4], [3, 6, 30], [0]], [row["samples"] for row in document["rows"]])
        self.assertEqual({"plain": 3, "twice": 3}, document["rows"][1]["ratios"])
        self.assertTrue(document["environment"]["commit"])

    def test_plot_has_a_bar_for_each_row_and_a_scale_for_each_unit(self) -> None:
        plot = ET.fromstring(self.report.to_svg())
        bars = [bar for bar in plot.iter() if bar.get("class") == "bar"]
        plain, ours, memory = (float(bar.get("width", "")) for bar in bars)
        self.assertAlmostEqual(3, ours / plain, 1)
        self.assertEqual(1, memory)
        self.assertIn("ours <&>", [text.text for text in plot.iter() if text.tag.endswith("text")])

    def test_row_without_samples_is_an_error(self) -> None:
        self.assertRaises(RuntimeError, self.report.add, "none", "ms", [])


class ProgramTests(SynchronousTestCase):
    def run_benchmark(self, name: str, **settings: str) -> set[str]:
        """Run a benchmark; return the names of its rows."""
        output = Path(self.mktemp()).resolve()
        completed = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}"],
            cwd=ROOT,
            env={**os.environ, **settings, "BENCH_OUTPUT": str(output)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        self.assertEqual(0, completed.returncode, completed.stdout + completed.stderr)
        document = json.loads((output / f"{name}.json").read_text())
        return {row["name"] for row in document["rows"]}

    def test_streams_runs(self) -> None:
        self.assertEqual({"plain", "coordinator"}, self.run_benchmark("streams", STREAMS="10"))

    def test_fleet_runs_without_errors(self) -> None:
        rows = self.run_benchmark("fleet", COORDINATORS="2", MACHINES="5", SECONDS="60")

        self.assertLess({"start: create", "steady: all", "hottest: start", "orphans: gone after"}, rows)
