"""
What a benchmark found: samples under names, told as a table, as JSON and as a plot, with where that was.

Each row says what it is compared with; all rows of a report were measured in the same run.
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

from benchmarks.plot import Bar, number, plot

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"

_COLUMNS = {"median": 50, "25 %": 25, "75 %": 75, "99 %": 99, "min": 0, "max": 100}
"""A table's columns, by percentile: the middle, its half, the slow ones, the extremes."""


def percentile(samples: Sequence[float], percent: float) -> float:
    """Tell the smallest sample that so many of a hundred do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


@dataclass(frozen=True)
class Row:
    """Samples of one thing, in one unit; `against` are the rows that it is compared with, by other names."""

    name: str
    unit: str
    samples: tuple[float, ...]
    against: Mapping[str, str]

    @property
    def median(self) -> float:
        """The middle sample."""
        return percentile(self.samples, 50)


@dataclass(frozen=True)
class Report:
    """Rows in the order in which they are told; notes are sentences beneath them."""

    name: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def add(self, name: str, unit: str, samples: Iterable[float], *against: str, **called: str) -> Row:
        """Add a row, compared with others of this report, some of which are called something else here."""
        row = Row(name, unit, tuple(samples), {**{base: base for base in against}, **called})
        if not row.samples:
            raise RuntimeError(f"nothing was measured of {name}")
        self.rows.append(row)
        return row

    def row(self, name: str) -> Row:
        """Find a row."""
        return next(row for row in self.rows if row.name == name)

    def ratios(self, row: Row) -> dict[str, float]:
        """Tell how many times each baseline's median a row's is."""
        bases = {name: self.row(base).median for name, base in row.against.items()}
        return {name: row.median / base for name, base in bases.items() if base}

    def table(self) -> str:
        """Tell all rows: the head of the table, and a line for each."""
        width = max(len(row.name) + len(row.unit) for row in self.rows) + 4
        heads = "".join(f"{head:>9}" for head in ("mean", *_COLUMNS))
        lines = [f"{self.name:<{width}}{'n':>6}{heads}"]
        for row in self.rows:
            values = [fmean(row.samples), *(percentile(row.samples, each) for each in _COLUMNS.values())]
            told = "".join(f"{number(value):>9}" for value in values)
            ratios = ", ".join(f"{number(ratio)} x {name}" for name, ratio in self.ratios(row).items())
            lines.append(
                f"{f'{row.name}, {row.unit}':<{width}}{len(row.samples):>6}{told}  {ratios}".rstrip()
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Write everything."""
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
        told = {"benchmark": self.name, "where": where(self.load_before), "notes": self.notes, "rows": rows}
        return json.dumps(told, indent=1)

    def to_svg(self) -> str:
        """Draw the medians, with the middle half of the samples."""
        bars = [
            Bar(row.name, row.unit, row.median, percentile(row.samples, 25), percentile(row.samples, 75))
            for row in self.rows
        ]
        facts = where(self.load_before)
        return plot(self.name, f"{facts['commit']}, {facts['cores']} cores of {facts['cpu']}", bars)

    def write(self) -> None:
        """Print the table, and leave JSON and plot in `build/bench`."""
        told = [self.table(), *self.notes, ", ".join(f"{k} {v}" for k, v in where(self.load_before).items())]
        sys.stdout.write("\n".join(told) + "\n\n")
        sys.stdout.flush()
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / f"{self.name}.json").write_text(self.to_json() + "\n")
        (BUILD / f"{self.name}.svg").write_text(self.to_svg())


def where(load_before: float) -> dict[str, str]:
    """Tell what was measured, on what, and how busy that was with it and with everything else."""
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
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
