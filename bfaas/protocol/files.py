"""
The files of a run: paths of files that a request sends, patterns of those that it wants back, and limits.

A path is relative to the script's working directory, and has the same rules in requests and in responses:
components joined by `/`, none of them empty, `.` or `..`, and no control characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_FILES = 1000
"""Files that a request sends, or that a run returns."""

MAX_PATTERNS = 20
"""Patterns of files that a request wants back."""

MAX_PATH = 1024
"""Bytes of a path or a pattern, in UTF-8."""

_MAX_COMPONENT = 255  # bytes; NAME_MAX of Linux's file systems
_MAX_DEPTH = 16
_MAX_RECURSIVE = 2

DEFAULT_MODE = 0o644

# Controls, line separators, and what UTF-8 cannot encode: paths are printed on terminals, one per line.
_FORBIDDEN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InvalidPathError(ValueError):
    """A path or a pattern is invalid. The message is a short phrase of ASCII without the path."""


@dataclass(frozen=True)
class File:
    """The content of a file, and its permission bits."""

    data: bytes
    mode: int = DEFAULT_MODE


def check_path(path: str) -> None:
    """Raise `InvalidPathError` unless a path is valid."""
    if _FORBIDDEN.search(path):
        raise InvalidPathError("it contains a control character or is not UTF-8")
    if len(path.encode()) > MAX_PATH:
        raise InvalidPathError(f"it is longer than {MAX_PATH} bytes")
    components = path.split("/")
    if any(component in ("", ".", "..") for component in components):
        raise InvalidPathError("it must be a relative path without empty components, . and ..")
    if any(len(component.encode()) > _MAX_COMPONENT for component in components):
        raise InvalidPathError(f"a component is longer than {_MAX_COMPONENT} bytes")
    if len(components) > _MAX_DEPTH:
        raise InvalidPathError(f"it has more than {_MAX_DEPTH} components")


def check_paths(paths: Iterable[str]) -> None:
    """Raise `InvalidPathError` if a path is also the directory of another."""
    directories = {path[:at] for path in paths for at, letter in enumerate(path) if letter == "/"}
    if not directories.isdisjoint(paths):
        raise InvalidPathError("it is both a file and a directory")


def check_pattern(pattern: str) -> None:
    """Raise `InvalidPathError` unless a pattern is valid."""
    check_path(pattern)
    if "\\" in pattern or re.search(r"\[.*\[[:.=]", pattern):
        raise InvalidPathError("backslashes and character classes are not supported")
    if pattern.split("/").count("**") > _MAX_RECURSIVE:
        raise InvalidPathError(f"it has more than {_MAX_RECURSIVE} components **")


def literal_prefix(pattern: str) -> str:
    """Return the part of a pattern before its first wildcard."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0]


def pattern_depth(pattern: str) -> int:
    """Return the largest number of components of a path that matches."""
    components = pattern.split("/")
    return _MAX_DEPTH if "**" in components else len(components)


def pattern_matcher(pattern: str) -> Callable[[str], bool]:
    """
    Return a function that tells whether a path matches a valid pattern.

    As in a shell, `*` and `?` match within a component, `[a-z]` and `[!a-z]` one character, and a leading dot
    only matches a dot. A component `**` matches any number of directories, or, at the end, all files below.
    The time is linear in the length of the path for each `*`.
    """
    *parents, last = pattern.split("/")
    regex = "".join(
        "(?:(?!\\.)[^/]+/)*" if parent == "**" else _component(parent) + "/" for parent in parents
    )
    regex += "(?:(?!\\.)[^/]+/)*(?!\\.)[^/]+" if last == "**" else _component(last)
    compiled = re.compile(regex)
    return lambda path: compiled.fullmatch(path) is not None


_WORD = re.compile(r"\*+|\?|\[(?P<not>[!^]?)(?P<set>\]?[^\]]*)\]|.", re.DOTALL)


def _component(pattern: str) -> str:
    """Return a regular expression for one component."""
    literals = [""]  # regular expressions, between which any text matches
    for match in _WORD.finditer(pattern):
        word = match[0]
        if word.startswith("*"):
            literals.append("")
        elif word == "?":
            literals[-1] += "[^/]"
        elif match["set"]:
            literals[-1] += _bracket(match["set"], negated=bool(match["not"]))
        else:
            literals[-1] += re.escape(word)
    first, *others = literals
    hidden = "(?!\\.)" if pattern[0] in "*?[" else ""
    if not others:
        return hidden + first
    # The first place that fits is as good as any later one, so others are not tried: atomic groups.
    return hidden + first + "".join(f"(?>[^/]*?{text})" for text in others[:-1]) + "[^/]*" + others[-1]


def _bracket(text: str, *, negated: bool) -> str:
    items = re.findall(r"(.)-(.)|(.)", text, re.DOTALL)
    ranges = "".join(
        re.escape(single) if single else f"{re.escape(low)}-{re.escape(high)}"
        for low, high, single in items
        if single or low <= high
    )
    if negated:
        return f"[^/{ranges}]"
    return f"[{ranges}]" if ranges else "(?!)"
