"""Durations in Go's notation (`1m30s`), and sizes (`64 KiB`)."""

from __future__ import annotations

import json
import re
from decimal import Decimal

_MAX_NANOSECONDS = (1 << 63) - 1
"""The longest duration in Go; the shortest is one nanosecond longer, and negative."""

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
# A number with at least one digit, and a unit that ends before the next number.
_TERM = re.compile(rf"(?=\.?[0-9])([0-9]*\.?[0-9]*)({'|'.join(_NANOSECONDS)})(?![^0-9.])")
_DURATION = re.compile(rf"[-+]?(?:0|(?:{_TERM.pattern})+)")
_SIZE = re.compile(rf"([0-9]{{1,18}})(?: ?({'|'.join(_BYTES)}))?")

quoted = json.dumps
"""Quote a value for an error message: always in one line of ASCII."""


def parse_duration(text: str) -> float:
    """
    Parse a Go duration such as `1m30s`, and return it in seconds, rounded to nanoseconds.

    Accepts and rejects the same texts as Go (https://pkg.go.dev/time#ParseDuration). Raises `ValueError`.
    """
    return _nanoseconds(text) / 1_000_000_000


def parse_size(text: str) -> int:
    """
    Parse a whole number of bytes such as `1024`, `64 kB` or `1MiB`. Raises `ValueError`.

    The units are `B`; `kB` (or `KB`), `MB`, `GB`, powers of 1000; and `KiB`, `MiB`, `GiB`, powers of 1024.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{quoted(text)} is not a size such as 1MiB")
    return int(match[1]) * _BYTES[match[2] or "B"]


def _nanoseconds(text: str) -> int:
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not a duration such as 1m30s")
    total = sum(Decimal(number) * _NANOSECONDS[unit] for number, unit in _TERM.findall(text))
    nanoseconds = round(-total if text.startswith("-") else total)
    if not -_MAX_NANOSECONDS - 1 <= nanoseconds <= _MAX_NANOSECONDS:
        raise ValueError(f"{quoted(text)} is too long a duration")
    return nanoseconds
