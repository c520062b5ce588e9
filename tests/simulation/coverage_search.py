"""
Searches for lines of the pool that no episode executes.

`python -m tests.simulation.coverage_search` runs up to 5000 episodes, or as many as its argument says, until
every line was executed. Otherwise it prints the lines that were not.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from tests.simulation.mutation import find_lines
from tests.simulation.run import prepare_process
from tests.simulation.world import World
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_ROOM = ROOT / "bfaas"

PATHS = (_ROOM / "pool.py", _ROOM / "backoff.py", *sorted((_ROOM / "pooling").glob("*.py")))

EXEMPT = (
    ("pool.py", "Allocation.release", "raise RuntimeError(_1)"),  # a coordinator releases once
    ("pooling/fair_queue.py", "FairQueue.enqueue", "return fail(_1)"),  # a closing pool gets no requests
    ("pooling/slot.py", "Slot.machine", "raise RuntimeError(_1)"),  # steps after a creation have a machine
    ("pooling/lifecycle.py", "MachineLifecycle.wait_until_ready", "raise"),  # lifecycles are not cancelled
)
"""Statements that no episode can execute: module, function and code."""

_MAX_EPISODES = 5000
_BATCH_SIZE = 32
_BATCHES_PER_PROCESS = 16
_REPORT_EVERY = 16  # batches


class LineTracer:
    """Traces which lines of some modules are executed; `missing` holds the others, as (path, line)."""

    def __init__(self) -> None:
        lines = {(str(path), line) for path in PATHS for line in _lines_within_functions(path)}
        self.missing = lines - find_exempt_lines()
        self._paths = {str(path) for path in PATHS}

    def trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        """Trace the functions of these modules, and no others."""
        return self._trace_line if frame.f_code.co_filename in self._paths else None

    def _trace_line(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        self.missing.discard((frame.f_code.co_filename, frame.f_lineno))
        return self._trace_line


def find_exempt_lines() -> set[tuple[str, int]]:
    """Return the lines of `EXEMPT`, as (path, line). Raises `AnchorError` if one does not match."""
    return {
        (str(_ROOM / module), line)
        for module, function, code in EXEMPT
        for line in find_lines((_ROOM / module).read_text(), function, code)
    }


def _lines_within_functions(path: Path) -> Iterator[int]:
    """Find the lines that are executed by the module's functions, not when it is imported."""
    source = path.read_text()
    stubs = _stub_lines(source)
    codes = [compile(source, str(path), "exec")]
    while codes:
        code = codes.pop()
        inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        codes += inner
        if code.co_flags & 0x2:  # CO_NEWLOCALS: a function, not a class or module
            first = code.co_firstlineno
            lines = {line for _, _, line in code.co_lines() if line is not None and line > first}
            yield from lines - stubs


def _stub_lines(source: str) -> set[int]:
    """Find the lines of functions without code, such as those of a `Protocol`."""
    return {
        line
        for function in ast.walk(ast.parse(source))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        and all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in function.body)
        for line in range(function.lineno, (function.end_lineno or function.lineno) + 1)
    }


_TRACERS: list[LineTracer] = []  # this process's tracer, once it traces


def _start_tracing() -> None:
    prepare_process()
    tracer = LineTracer()
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
    maximum = int(sys.argv[1]) if len(sys.argv) > 1 else _MAX_EPISODES
    batches = [range(first, first + _BATCH_SIZE) for first in range(0, maximum, _BATCH_SIZE)]
    missing: set[tuple[str, int]] | None = None
    with multiprocessing.get_context("spawn").Pool(
        os.cpu_count(), _start_tracing, maxtasksperchild=_BATCHES_PER_PROCESS
    ) as pool:
        for number, batch in enumerate(pool.imap_unordered(_run_episodes, batches), 1):
            missing = batch if missing is None else missing & batch
            if not missing:
                print(f"every line was executed, after {number * _BATCH_SIZE} episodes, in:")
                print("\n".join(str(path.relative_to(ROOT)) for path in PATHS))
                return 0
            if number % _REPORT_EVERY == 0:
                print(f"... {number * _BATCH_SIZE} episodes, {len(missing)} lines missing", flush=True)
    for path, line in sorted(missing or ()):
        print(f"{Path(path).name}:{line}: {Path(path).read_text().splitlines()[line - 1]}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
