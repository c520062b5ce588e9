"""
All benchmarks, or those that are named, one after the other, each in a process of its own.

Run it with `make bench`, or `python -m benchmarks stream streams`.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.programs import ENDS_WITH_US
from benchmarks.report import ROOT

ALL = ("startup", "first_byte", "saturation", "stream", "streams", "overshoot", "fleet")


def main() -> None:
    """Run them, also if one fails; and fail then."""
    failed = []
    for name in sys.argv[1:] or ALL:
        began = time.monotonic()
        command = [*ENDS_WITH_US, sys.executable, "-m", f"benchmarks.{name}"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        sys.stderr.write(f"{name}: {time.monotonic() - began:.0f} s\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
