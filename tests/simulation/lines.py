"""
Tells which lines of the pool no episode goes through.

`python -m tests.simulation.lines` lives through episodes until every line was reached, or there were too
many.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import bfaas
from tests.simulation.run import quiet
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

MODULES = ("pool", "pooling/lifecycle", "pooling/standby", "pooling/backoff", "pooling/reconciler")

EXEMPT = (
    'raise RuntimeError(f"machine {self.machine.id} was released before")',  # what a coordinator never does
    "return fail(PoolClosedError())",  # one that drains asks for no machine
    "raise  # nobody cancels a life; whoever would is heard",
)
_SEEDS = 5000
_BATCH = 32
_LIFETIME = 16  # batches in one process
_OFTEN = 16  # batches after which it tells how far it is


class Lines:
    """The lines of some modules that are still to be reached."""

    def __init__(self, paths: list[Path]) -> None:
        self.left = {
            (str(path), line)
            for path in paths
            for line in _lines_within_functions(path)
            if path.read_text().splitlines()[line - 1].strip() not in EXEMPT
        }
        self._paths = {str(path) for path in paths}

    def trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        """Watch the functions of these modules, and no others."""
        return self._reach if frame.f_code.co_filename in self._paths else None

    def _reach(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        self.left.discard((frame.f_code.co_filename, frame.f_lineno))
        return self._reach


def _lines_within_functions(path: Path) -> Iterator[int]:
    """Find the lines that run when the module's functions do, not when it is imported."""
    codes = [compile(path.read_text(), str(path), "exec")]
    while codes:
        code = codes.pop()
        inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        codes += inner
        if code.co_flags & 0x2:  # CO_NEWLOCALS: a function's, not a class's or a module's
            first = code.co_firstlineno
            yield from {line for _, _, line in code.co_lines() if line is not None and line > first}


_LINES: list[Lines] = []  # of this process, once it watches


def _watch() -> None:
    quiet()
    lines = Lines([Path(bfaas.__file__).with_name(f"{name}.py") for name in MODULES])
    _LINES.append(lines)
    threading.settrace(lines.trace)
    sys.settrace(lines.trace)


def _run_lifecycle(seeds: range) -> set[tuple[str, int]]:
    """Live through some episodes; tell what this process has not reached since it began."""
    for seed in seeds:
        World(seed).live()
    return _LINES[0].left


def main() -> int:
    """Tell what is left; the exit code is 1 where something is."""
    batches = [range(first, first + _BATCH) for first in range(0, _SEEDS, _BATCH)]
    left: set[tuple[str, int]] | None = None
    with multiprocessing.get_context("spawn").Pool(
        os.cpu_count(), _watch, maxtasksperchild=_LIFETIME
    ) as pool:
        for number, others in enumerate(pool.imap_unordered(_run_lifecycle, batches), 1):
            left = others if left is None else left & others
            if not left:
                print(f"every line of {', '.join(MODULES)} was reached, after {number * _BATCH} episodes")
                return 0
            if number % _OFTEN == 0:
                print(f"... {number * _BATCH} episodes, {len(left)} lines left", flush=True)
    for path, line in sorted(left or ()):
        print(f"{Path(path).name}:{line}: {Path(path).read_text().splitlines()[line - 1]}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
