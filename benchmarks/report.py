"""
Reports of benchmarks: named samples as a table, as JSON and as a plot, with the environment.

Each row names its baselines; all rows of a report are measured in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.plot import Bar, Panel, number, plot, plot_curves

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path(os.environ.get("BENCH_OUTPUT", ROOT / "build" / "bench"))

_COLUMNS = {"median": 50, "25 %": 25, "75 %": 75, "99 %": 99, "min": 0, "max": 100}
"""Columns of a table: the percentiles that they show."""


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the smallest sample that at least `percent` % of the samples do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


@dataclass(frozen=True)
class Row:
    """Samples in one unit; `baselines` maps the names that a report shows to rows."""

    name: str
    unit: str
    samples: tuple[float, ...]
    baselines: Mapping[str, str]

    @property
    def median(self) -> float:
        """The median sample."""
        return percentile(self.samples, 50)


@dataclass(frozen=True)
class Report:
    """Rows in the order of the table, notes below it, and panels of curves in place of its plot, if any."""

    name: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def add(self, name: str, unit: str, samples: Iterable[float], *baselines: str, **labelled: str) -> Row:
        """Add a row, to be compared with baselines, which can be given labels (`label=row`)."""
        row = Row(name, unit, tuple(samples), {**{base: base for base in baselines}, **labelled})
        if not row.samples:
            raise RuntimeError(f"{name} has no samples")
        self.rows.append(row)
        return row

    def row(self, name: str) -> Row:
        """Return the row of a name."""
        return next(row for row in self.rows if row.name == name)

    def ratios(self, row: Row) -> dict[str, float]:
        """Return the ratios of a row's median to those of its baselines."""
        bases = {name: self.row(base).median for name, base in row.baselines.items()}
        return {name: row.median / base for name, base in bases.items() if base}

    def table(self) -> str:
        """Format the table: a header, and a line for each row."""
        width = max(len(row.name) + len(row.unit) for row in self.rows) + 4
        heads = "".join(f"{head:>9}" for head in ("mean", *_COLUMNS))
        lines = [f"{self.name:<{width}}{'n':>6}{heads}"]
        for row in self.rows:
            values = [fmean(row.samples), *(percentile(row.samples, each) for each in _COLUMNS.values())]
            columns = "".join(f"{number(value):>9}" for value in values)
            ratios = ", ".join(f"{number(ratio)} x {name}" for name, ratio in self.ratios(row).items())
            lines.append(
                f"{f'{row.name}, {row.unit}':<{width}}{len(row.samples):>6}{columns}  {ratios}".rstrip()
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Encode everything."""
        rows = [
            {
                "name": row.name,
                "unit": row.unit,
                "samples": row.samples,
                "mean": fmean(row.samples),
                "median": row.median,
                "ratios": self.ratios(row),
            }
            for row in self.rows
        ]
        environment = describe_environment(self.load_before)
        document = {"benchmark": self.name, "environment": environment, "notes": self.notes, "rows": rows}
        return json.dumps(document, indent=1)

    def to_svg(self) -> str:
        """Draw the panels, or else the medians and quartiles."""
        environment = describe_environment(self.load_before)
        subtitle = "{commit}, {cores} cores of {cpu}".format(**environment)
        if self.panels:
            return plot_curves(self.name, subtitle, self.panels)
        bars = [
            Bar(row.name, row.unit, row.median, percentile(row.samples, 25), percentile(row.samples, 75))
            for row in self.rows
        ]
        return plot(self.name, subtitle, bars)

    def write(self) -> None:
        """Print the table; write JSON and plot to `build/bench`, or to BENCH_OUTPUT."""
        environment = describe_environment(self.load_before)
        lines = [self.table(), *self.notes, ", ".join(f"{k} {v}" for k, v in environment.items())]
        sys.stdout.write("\n".join(lines) + "\n\n")
        sys.stdout.flush()
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / f"{self.name}.json").write_text(self.to_json() + "\n")
        (OUTPUT / f"{self.name}.svg").write_text(self.to_svg())


def describe_environment(load_before: float) -> dict[str, str]:
    """Return commit, host and versions, and the load average before and after the measurement."""
    return {
        "commit": _commit(),
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "twisted": version("twisted"),
        "load": f"{load_before:.1f} to {os.getloadavg()[0]:.1f}",
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return completed.stdout.strip() or "unknown"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
