"""Durations and sizes as Go and people write them: `1m30s`, `64 KiB`."""

from __future__ import annotations

import json
import re

_INT64 = 1 << 63

_NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,  # the micro sign
    "\u03bcs": 1_000,  # the Greek letter
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_BYTES = {
    "B": 1,
    "kB": 1_000,
    "KB": 1_000,
    "MB": 1_000_000,
    "GB": 1_000_000_000,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
_TERM = re.compile(rf"(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?({'|'.join(_NANOSECONDS)})(?![^0-9.])")
_DURATION = re.compile(rf"[-+]?(?:0|(?:{_TERM.pattern})+)")
_SIZE = re.compile(rf"([0-9]{{1,18}})(?: ?({'|'.join(_BYTES)}))?")

_quoted = json.dumps  # one line of ASCII, whatever the value holds


def parse_duration(text: str) -> float:
    """
    Read a Go duration such as `1m30s`, in seconds (https://pkg.go.dev/time#ParseDuration).

    Accepts, refuses and rounds as Go does; raises `ValueError`.
    """
    return _nanoseconds(text) / 1_000_000_000


def parse_size(text: str) -> int:
    """
    Read a whole number of bytes such as `1024`, `64 kB` or `1MiB`; raise `ValueError` for anything else.

    The units are `B`; `kB` (or `KB`), `MB`, `GB`, powers of 1000; and `KiB`, `MiB`, `GiB`, powers of 1024.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{_quoted(text)} is not a size such as 1MiB")
    return int(match[1]) * _BYTES[match[2] or "B"]


def _nanoseconds(text: str) -> int:
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{_quoted(text)} is not a duration such as 1m30s")
    total = sum(_term(match[1], match[2] or "", _NANOSECONDS[match[3]]) for match in _TERM.finditer(text))
    nanoseconds = -total if text.startswith("-") else total
    if not -_INT64 <= nanoseconds < _INT64:
        raise ValueError(f"{_quoted(text)} is too long a duration")
    return nanoseconds


def _term(whole: str, fraction: str, unit: int) -> int:
    # Twenty digits are past the limit whatever follows them; int() refuses thousands.
    nanoseconds = int(whole.lstrip("0")[:20] or "0") * unit
    # The fraction as Go has it, to the bit: digits past 63 bits are dropped, the rest is a float.
    numerator, scale = 0, 1.0
    for digit in fraction:
        longer = numerator * 10 + int(digit)
        if longer > _INT64:
            break
        numerator, scale = longer, scale * 10
    return nanoseconds + int(numerator * (unit / scale))
