"""
Runs all benchmarks, or the given ones, one after the other, each in a process of its own.

Run it with `make bench`, or `python -m benchmarks stream streams`.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.programs import DIE_WITH_PARENT
from benchmarks.report import ROOT

ALL = (
    "startup",
    "first_byte",
    "saturation",
    "overhead",
    "stream",
    "streams",
    "scaling",
    "overshoot",
    "fleet",
)


def main() -> None:
    """Run the benchmarks. A failed one does not prevent the others; it is reported at the end."""
    failed = []
    for name in sys.argv[1:] or ALL:
        started_at = time.monotonic()
        command = [*DIE_WITH_PARENT, sys.executable, "-m", f"benchmarks.{name}"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        sys.stderr.write(f"{name}: {time.monotonic() - started_at:.0f} s\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
