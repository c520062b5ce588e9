"""
Copy the output of `trial --reporter=timing` from standard input, and end it with the ten slowest tests.

Usage: trial --reporter=timing PACKAGE ... | python -m tests.support.slowest
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TEST = re.compile(r"(tests\.[\w.]+) \.\.\. ")
_SECONDS = re.compile(r"\((\d+\.\d+) secs\)")


def durations(lines: Iterable[str]) -> Iterator[tuple[float, str]]:
    """Yield the seconds that each test took, and its name."""
    name = ""
    for line in lines:
        if test := _TEST.match(line):
            name = test[1]
        # A test may write a line of its own between its name and its time.
        if name and (seconds := _SECONDS.search(line)):
            yield float(seconds[1]), name
            name = ""


def _copied(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, end="", flush=True)
        yield line


def main() -> None:
    """Copy, and print the ten slowest."""
    found = sorted(durations(_copied(sys.stdin)), reverse=True)
    print(f"\nThe ten slowest of {len(found)} tests, which took {sum(s for s, _ in found):.0f} s:")
    for seconds, name in found[:10]:
        print(f"{seconds:8.2f} s  {name}")


if __name__ == "__main__":
    main()
