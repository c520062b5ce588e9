"""
Run `make test` with every Python process of this environment measured, and report the coverage of bfaas/.

A .pth file starts coverage.py in all processes, also in those that get an environment of their own. Processes
that are killed leave no data. Exits with the status of `make test`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.support.paths import ROOT

HOME = ROOT / "build" / "coverage"
CONFIG = HOME / "rc"

# The variable is removed again: programs and scripts of the tests must not see it.
START = "import os, coverage; os.environ['{0}'] = {1!r}; coverage.process_startup(); del os.environ['{0}']\n"


def main() -> int:
    """Measure, and write the report to standard output and as HTML."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    HOME.chmod(0o1777)  # some workers run as other users
    CONFIG.write_text(
        f"[run]\nsource_pkgs = bfaas\nbranch = True\nparallel = True\ndata_file = {HOME / 'data'}\n"
        "disable_warnings = no-data-collected, module-not-imported, couldnt-parse\n"
    )
    hook = Path(sysconfig.get_path("purelib"), "bfaas-coverage.pth")
    hook.write_text(START.format("COVERAGE_PROCESS_START", str(CONFIG)))
    try:
        status = subprocess.run(["make", "test"], cwd=ROOT, check=False).returncode
    finally:
        hook.unlink()
    coverage = [sys.executable, "-m", "coverage"]
    for words in (["combine", "--quiet"], ["html", "--quiet"], ["report"]):
        subprocess.run([*coverage, *words], cwd=ROOT, check=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
