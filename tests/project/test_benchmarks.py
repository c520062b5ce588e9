"""The reports of benchmarks."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

from twisted.trial.unittest import SynchronousTestCase

from benchmarks.report import Report, percentile


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
