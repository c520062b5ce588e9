"""
Tells which lines of the pool no episode goes through.

`python -m tests.sim.lines` lives through episodes until every line was reached, or there were too many.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import bfaas
from tests.sim.run import quiet
from tests.sim.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

MODULES = ("pool", "life", "standby", "backoff", "sweep")

EXEMPT = (
    'raise RuntimeError(f"machine {self.machine.id} was released before")',  # what a coordinator never does
    "return fail(PoolClosedError())",  # one that drains asks for no machine
    "return sum(member.phase is phase for member in self._members)",  # for those who look on
)
_SEEDS = 5000


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


def main() -> int:
    """Tell what is left; the exit code is 1 where something is."""
    quiet()
    lines = Lines([Path(bfaas.__file__).with_name(f"{name}.py") for name in MODULES])
    threading.settrace(lines.trace)
    sys.settrace(lines.trace)
    for seed in range(_SEEDS):
        World(seed).live()
        if not lines.left:
            print(f"every line of {', '.join(MODULES)} was reached, after {seed + 1} episodes")
            return 0
    for path, line in sorted(lines.left):
        print(f"{Path(path).name}:{line}: {Path(path).read_text().splitlines()[line - 1]}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
