"""
Run the trial cases on each supported Python, with the lowest and the newest versions of the dependencies.

`python -m tests.project.matrix [PYTHON ...]`; without arguments, on each Python of the classifiers that is
installed. Exits with 1 if a combination fails. The environments are created in `build/matrix` each time.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tests.support.paths import ROOT

HOME = ROOT / "build" / "matrix"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def supported() -> list[str]:
    """Return the versions of Python that the classifiers name, such as 3.11."""
    found = [
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in PROJECT["classifiers"]
    ]
    return [match[1] for match in found if match]


def installed() -> list[str]:
    """Find the supported Pythons in PATH, and among those of pyenv."""
    found = []
    for version in supported():
        of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob(f"{version}.*")
        candidates = [shutil.which(f"python{version}"), *(str(path / "bin" / "python") for path in of_pyenv)]
        usable = (path for path in candidates if path and is_usable(path))
        found += [path for path in [next(usable, None)] if path]
    return found


def is_usable(python: str) -> bool:
    """Return whether a Python starts (pyenv's may not) and can create environments (Debian's may not)."""
    return not subprocess.run([python, "-c", "import ensurepip"], capture_output=True, check=False).returncode


def floors() -> list[str]:
    """Return a constraint for each declared dependency, at the lowest version that it allows."""
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    found = []
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:  # an extra that includes another
            continue
        [floor] = [part.version for part in requirement.specifier if part.operator == ">="]
        found.append(f"{requirement.name}=={floor}")
    return found


def try_one(python: str, constraints: Path | None) -> bool:
    """Install into a new environment, and run the trial cases there. Return whether they passed."""
    home = HOME / "environment"
    shutil.rmtree(home, ignore_errors=True)
    limits = ["--constraint", str(constraints)] if constraints else []
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    packages = ["tests.unit", "tests.integration", "tests.project", "tests.simulation"]
    trial = [str(home / "bin" / "python"), "-m", "twisted.trial", "--reporter=text", *packages]
    commands = [[python, "-m", "venv", str(home)], [*pip, *limits, "--editable", ".[test]"], trial]
    return all(subprocess.run(command, cwd=ROOT, check=False).returncode == 0 for command in commands)


def main(arguments: list[str]) -> int:
    """Try all combinations, and print one line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.project.matrix", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "pythons",
        nargs="*",
        metavar="PYTHON",
        help=f"a Python program; default: each of {', '.join(supported())} that is installed",
    )
    pythons: list[str] = parser.parse_args(arguments).pythons
    HOME.mkdir(parents=True, exist_ok=True)
    constraints = HOME / "lowest.txt"
    constraints.write_text("\n".join([*floors(), ""]))
    results = {
        (python, name): try_one(python, limits)
        for python in pythons or installed()
        for name, limits in (("lowest", constraints), ("newest", None))
    }
    for (python, name), passed in results.items():
        print(f"{python:40} {name}: {'passed' if passed else 'FAILED'}")
    return 0 if results and all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
