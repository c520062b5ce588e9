"""
Searches for lines of the pool that no episode executes.

`python -m tests.simulation.coverage_search` runs episodes until every line was executed, or prints the
lines that were not.
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
from tests.simulation.run import prepare_process
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
_EPISODES = 5000
_BATCH_SIZE = 32
_BATCHES_PER_PROCESS = 16
_REPORT_EVERY = 16  # batches


class LineTracer:
    """Traces which lines of some modules are executed; `missing` holds the others, as (path, line)."""

    def __init__(self, paths: list[Path]) -> None:
        self.missing = {
            (str(path), line)
            for path in paths
            for line in _lines_within_functions(path)
            if path.read_text().splitlines()[line - 1].strip() not in EXEMPT
        }
        self._paths = {str(path) for path in paths}

    def trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        """Trace the functions of these modules, and no others."""
        return self._trace_line if frame.f_code.co_filename in self._paths else None

    def _trace_line(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        self.missing.discard((frame.f_code.co_filename, frame.f_lineno))
        return self._trace_line


def _lines_within_functions(path: Path) -> Iterator[int]:
    """Find the lines that are executed by the module's functions, not when it is imported."""
    codes = [compile(path.read_text(), str(path), "exec")]
    while codes:
        code = codes.pop()
        inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        codes += inner
        if code.co_flags & 0x2:  # CO_NEWLOCALS: a function, not a class or module
            first = code.co_firstlineno
            yield from {line for _, _, line in code.co_lines() if line is not None and line > first}


_TRACERS: list[LineTracer] = []  # this process's tracer, once it traces


def _start_tracing() -> None:
    prepare_process()
    tracer = LineTracer([Path(bfaas.__file__).with_name(f"{name}.py") for name in MODULES])
    _TRACERS.append(tracer)
    threading.settrace(tracer.trace)
    sys.settrace(tracer.trace)


def _run_episodes(seeds: range) -> set[tuple[str, int]]:
    """Run episodes; return the lines that this process has not executed so far."""
    for seed in seeds:
        World(seed).run_episode()
    return _TRACERS[0].missing


def main() -> int:
    """Search, print the lines that were never executed; return 1 if there are any."""
    batches = [range(first, first + _BATCH_SIZE) for first in range(0, _EPISODES, _BATCH_SIZE)]
    missing: set[tuple[str, int]] | None = None
    with multiprocessing.get_context("spawn").Pool(
        os.cpu_count(), _start_tracing, maxtasksperchild=_BATCHES_PER_PROCESS
    ) as pool:
        for number, batch in enumerate(pool.imap_unordered(_run_episodes, batches), 1):
            missing = batch if missing is None else missing & batch
            if not missing:
                print(
                    f"every line of {', '.join(MODULES)} was executed, after {number * _BATCH_SIZE} episodes"
                )
                return 0
            if number % _REPORT_EVERY == 0:
                print(f"... {number * _BATCH_SIZE} episodes, {len(missing)} lines missing", flush=True)
    for path, line in sorted(missing or ()):
        print(f"{Path(path).name}:{line}: {Path(path).read_text().splitlines()[line - 1]}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
