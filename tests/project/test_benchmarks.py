"""The benchmarks: their reports, and that those which no other test runs still run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from benchmarks.compare import Coordinator
from benchmarks.plot import Panel
from benchmarks.programs import COORD, coordinator
from benchmarks.report import ROOT, Report, percentile
from bfaas.tokens import genkey

SMALL_LOAD = {
    "SAMPLES": "1",
    "ROUNDS": "1",
    "SECONDS": "0.5",
    "CLIENTS": "2",
    "MEGABYTES": "0.01",
    "PAUSE": "0",
}


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

    def test_plot_has_the_curves_of_each_panel(self) -> None:
        self.report.panels.append(Panel("by runs", {"a": [(1, 0.5), (16, 50)], "b": [(1, 5), (16, 5)]}))
        curves = [
            each.get("points", "")
            for each in ET.fromstring(self.report.to_svg()).iter()
            if each.get("points")
        ]
        self.assertEqual(2, len(curves))
        level = {point.split(",")[1] for point in curves[1].split()}
        self.assertEqual(1, len(level))
        start, end = (float(point.split(",")[1]) for point in curves[0].split())
        self.assertGreater(start, end)

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

    def test_overhead_compares_with_another_checkout(self) -> None:
        rows = self.run_benchmark(
            "overhead", SAMPLES="2", ROUNDS="1", SECONDS="0.5", CLIENTS="2", AGAINST=str(ROOT)
        )

        self.assertLess({"worker", "added", "added before", "rate", "processor before", "busy"}, rows)

    def test_scaling_measures_each_number_of_runs(self) -> None:
        rows = self.run_benchmark("scaling", RUNS="1,3", SECONDS="0.5")

        self.assertLess({"sleep 1: memory", "lines 3: processor", "direct 3", "way 1", "way 3"}, rows)

    def test_compare_measures_coordinators_by_their_urls(self) -> None:
        with coordinator(POOLSIZE="2") as coord:
            url = f"http://127.0.0.1:{coord.port}"
            with self.assertRaises(RuntimeError):
                Coordinator(url).run("exit 3")
            rows = self.run_benchmark("compare", URLS=f"a={url} b={url}", **SMALL_LOAD)

        kinds = ("first byte", "rate", "rejected", "raw", "events")
        self.assertEqual({f"{kind}, {name}" for kind in kinds for name in "ab"}, rows)
        self.assertRaises(SystemExit, Coordinator, "localhost:8000")

    def test_side_by_side_runs_with_programs_in_place_of_the_original(self) -> None:
        lacks = [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]
        if os.geteuid() != 0 or (lacks and "CI" not in os.environ):
            raise SkipTest(f"needs root, and {lacks}")
        original = Path(self.mktemp()).resolve()
        original.mkdir()
        # Ours, at the names and ports that are built into the original's.
        programs = {
            "coord": shlex.join([f"PRIVATE={genkey().private}", sys.executable, *COORD]),
            "basher": f"{sys.executable} -m bfaas.basher --listen tcp:8001",
        }
        for name, command in programs.items():
            (original / name).write_text(f"#!/bin/sh\nexec env {command}\n")
            (original / name).chmod(0o755)
        rows = self.run_benchmark("side_by_side", ORIGINAL=str(original), BOOT="0.01", **SMALL_LOAD)

        self.assertLess({"first byte, standby", "rate, original", "raw, bfaas, its worker"}, rows)
