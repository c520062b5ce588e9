"""Paths and patterns of a run's files. Real bash is the reference for patterns."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.protocol.files import (
    InvalidPathError,
    check_path,
    check_paths,
    check_pattern,
    literal_prefix,
    pattern_depth,
    pattern_matcher,
)

VALID = [
    "a",
    "A",
    ".hidden",
    "-rf",
    "a b",
    "caf\u00e9",
    "\U0001f600",
    "a\\b",
    "a*?",
    "...",
    "x/y/z",
    "~",
    "a:b",
]
INVALID = [
    "", ".", "..", "/", "/a", "a/", "a//b", "./a", "a/./b", "../a", "a/..", "a/../b",
    "a\0b", "a\nb", "a\rb", "a\x1b[31m", "a\x7f", "a\x85", "a\u2028", "a\ud800", "\udcff",
    "x" * 256, "\u20ac" * 86, "a/" * 16 + "a", "/".join(["x" * 250] * 5),
]  # fmt: skip

TREE = [
    "a", "b", "ab", "abc", "a-b", "]", "[", "^", "!", ".hidden", "A", "caf\u00e9", "a.txt", "b.txt",
    "out/a", "out/a.txt", "out/.hidden", "out/deep/a.txt", "out/deep/er/b.txt", ".dir/a.txt", "aaaaaaaa",
]  # fmt: skip
PATTERNS = [
    "a", "*", "?", "??", "a*", "*b", "a*c", "*.txt", "[ab]", "[!ab]", "[^ab]", "[a-c]", "[c-a]", "[]]",
    "[!]]", "[", "a[", "[a", "[a-]", "[-a]", "caf?", ".*", ".hidden", "out/*", "out/.*", "*/*", "*/a*", "**",
    "**/*.txt",
    "out/**", "out/**/b.txt", "**/deep/*", "**/deep/**", "a**", "*a*a*", ".dir/*", "[.]hidden", "?hidden",
    "[a-b]*", "out/?", "**/**", "[*]", "[?]", "[[]", "nothing*",
]  # fmt: skip


class PathTests(SynchronousTestCase):
    def test_paths_are_valid_or_rejected(self) -> None:
        for path in [*VALID, "x" * 255, "\u20ac" * 85, "a/" * 15 + "a"]:
            check_path(path)
        for path in INVALID:
            error = self.assertRaises(InvalidPathError, check_path, path)
            self.assertRegex(str(error), r"\A[ -~]{1,80}\Z")

    def test_a_path_is_not_also_a_directory(self) -> None:
        check_paths(["a", "b/a", "b/c", "A/x"])
        for paths in (["a", "a/b"], ["a/b/c", "a/b"]):
            self.assertRaises(InvalidPathError, check_paths, paths)

    @given(st.text(max_size=12))
    def test_valid_paths_stay_below_their_directory(self, path: str) -> None:
        try:
            check_path(path)
        except InvalidPathError:
            return
        self.assertTrue((Path("/top") / path).resolve().is_relative_to("/top"))


class PatternTests(SynchronousTestCase):
    def test_matches_are_those_of_bash(self) -> None:
        top = Path(self.mktemp())
        for path in TREE:
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            (top / path).touch()
        script = 'shopt -s globstar nullglob; IFS=; for file in $1; do [ -f "$file" ] && echo "$file"; done'
        for pattern in PATTERNS:
            check_pattern(pattern)
            done = subprocess.run(
                ["bash", "-c", script, "bash", pattern],
                cwd=top,
                env={"LC_ALL": "C.UTF-8"},
                capture_output=True,
                check=False,
            )
            matches = pattern_matcher(pattern)
            self.assertEqual(set(done.stdout.decode().splitlines()), set(filter(matches, TREE)), pattern)
            for path in filter(matches, TREE):
                self.assertTrue(path.startswith(literal_prefix(pattern)), pattern)
                self.assertLessEqual(path.count("/") + 1, pattern_depth(pattern))

    def test_invalid_patterns_are_rejected(self) -> None:
        for pattern in [
            *INVALID,
            "a\\*",
            "[[:alpha:]]",
            "[[.a.]]",
            "[[=a=]]",
            "**/**/**",
            "/etc/*",
            "../*",
            "*/..",
        ]:
            self.assertRaises(InvalidPathError, check_pattern, pattern)

    def test_matching_takes_bounded_time(self) -> None:
        started = time.process_time()
        for pattern, path in (
            ("*a" * 120 + "b", "a" * 255),
            ("*?" * 120, "a" * 100),
            ("**/" * 2 + "*a" * 100 + "b", "/".join(["a" * 60] * 16)),
            ("*/" * 15 + "*a*b", "/".join(["a" * 60] * 16)),
            ("[" * 255, "[" * 255),
        ):
            check_pattern(pattern)
            check_path(path)
            pattern_matcher(pattern)(path)
        self.assertLess(time.process_time() - started, 2)

    @given(st.text("ab*?[]!-/.^", min_size=1, max_size=12), st.text("ab./", max_size=8))
    def test_every_valid_pattern_compiles(self, pattern: str, path: str) -> None:
        try:
            check_pattern(pattern)
        except InvalidPathError:
            return
        pattern_matcher(pattern)(path)
