"""Durations as Go's `time.ParseDuration` accepts them, and sizes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.units import _nanoseconds, parse_duration, parse_size

MICROSECOND = 1_000
MILLISECOND = 1_000_000
SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE


class ParseDurationTests(SynchronousTestCase):
    """
    The accepted and rejected texts are those of the two tables in Go's time/time_test.go.

    The only other result is of 0.830103483285477580700h: Go truncates what is here rounded to nanoseconds.
    """

    def test_accepts_what_go_accepts(self) -> None:
        expected = {
            "0": 0,
            "5s": 5 * SECOND,
            "30s": 30 * SECOND,
            "1478s": 1478 * SECOND,
            "-5s": -5 * SECOND,
            "+5s": 5 * SECOND,
            "-0": 0,
            "+0": 0,
            "5.0s": 5 * SECOND,
            "5.6s": 5 * SECOND + 600 * MILLISECOND,
            "5.s": 5 * SECOND,
            ".5s": 500 * MILLISECOND,
            "1.0s": SECOND,
            "1.00s": SECOND,
            "1.004s": SECOND + 4 * MILLISECOND,
            "1.0040s": SECOND + 4 * MILLISECOND,
            "100.00100s": 100 * SECOND + MILLISECOND,
            "10ns": 10,
            "11us": 11 * MICROSECOND,
            "12\u00b5s": 12 * MICROSECOND,
            "12\u03bcs": 12 * MICROSECOND,
            "13ms": 13 * MILLISECOND,
            "14s": 14 * SECOND,
            "15m": 15 * MINUTE,
            "16h": 16 * HOUR,
            "3h30m": 3 * HOUR + 30 * MINUTE,
            "10.5s4m": 4 * MINUTE + 10 * SECOND + 500 * MILLISECOND,
            "-2m3.4s": -(2 * MINUTE + 3 * SECOND + 400 * MILLISECOND),
            "1h2m3s4ms5us6ns": HOUR + 2 * MINUTE + 3 * SECOND + 4 * MILLISECOND + 5 * MICROSECOND + 6,
            "39h9m14.425s": 39 * HOUR + 9 * MINUTE + 14 * SECOND + 425 * MILLISECOND,
            "52763797000ns": 52763797000,
            "0.3333333333333333333h": 20 * MINUTE,
            "9007199254740993ns": 2**53 + 1,
            "9223372036854775807ns": 2**63 - 1,
            "9223372036854775.807us": 2**63 - 1,
            "9223372036s854ms775us807ns": 2**63 - 1,
            "-9223372036854775808ns": -(2**63),
            "-9223372036854775.808us": -(2**63),
            "-9223372036s854ms775us808ns": -(2**63),
            "-2562047h47m16.854775808s": -(2**63),
            "0.100000000000000000000h": 6 * MINUTE,
            "0.830103483285477580700h": 49 * MINUTE + 48 * SECOND + 372539828,
        }
        self.assertEqual(expected, {text: _nanoseconds(text) for text in expected})

    def test_rejects_what_go_rejects(self) -> None:
        # Bytes that are not UTF-8 in Go's cases are surrogate escapes here.
        bad = [
            "", "3", "-", "s", ".", "-.", ".s", "+.s", "1d", "\x85\x85", "\udc85\udc85", "\xffff", "\udcffff",
            "hello \xffff world", "\ufffd", "\ufffd hello \ufffd world",
            "9223372036854775810ns", "9223372036854775808ns", "-9223372036854775809ns", "9223372036854776us",
            "3000000h", "9223372036854775.808us", "9223372036854ms775us808ns",
        ]  # fmt: skip
        self.assert_rejected(bad)

    def test_rejects_similar_texts(self) -> None:
        bad = [
            " 5s", "5s ", "5 s", "5s\n", "5S", "5sec", "5s5", "5s.", "--5s", "5s-5s", "00", "0.0", "0.",
            "1.2.3s", "1,5s", "1e3s", "1_0s", "0x1s", "\u0665s", "1\u00b5", "5s0", "inf", "nan",
            "1" * 5000 + "ns",
        ]  # fmt: skip
        self.assert_rejected(bad)

    def assert_rejected(self, bad: list[str]) -> None:
        for text in bad:
            error = self.assertRaises(ValueError, parse_duration, text)
            self.assertEqual(1, len(str(error).splitlines()), text)

    def test_leading_and_trailing_zeros_do_not_matter(self) -> None:
        zeros = "0" * 5000
        self.assertEqual(1, _nanoseconds(f"{zeros}1ns"))
        self.assertEqual(0, _nanoseconds(f".{zeros}1h"))
        self.assertEqual(SECOND, _nanoseconds(f"1.{zeros}s"))

    def test_result_is_in_seconds(self) -> None:
        expected = {"10s": 10.0, "1m30s": 90.0, "1.5h": 5400.0, "250ms": 0.25, "-1ns": -1e-9, "0": 0.0}
        self.assertEqual(expected, {text: parse_duration(text) for text in expected})

    @settings(deadline=None)
    @given(st.text() | st.text("0123456789.hmsnuµμ+-"))
    def test_any_text_is_a_duration_in_range_or_a_value_error(self, text: str) -> None:
        try:
            nanoseconds = _nanoseconds(text)
        except ValueError:
            return
        self.assertTrue(-(2**63) <= nanoseconds < 2**63)

    @settings(deadline=None)
    @given(st.integers(-(2**63), 2**63 - 1))
    def test_every_number_of_nanoseconds_is_exact(self, nanoseconds: int) -> None:
        self.assertEqual(nanoseconds, _nanoseconds(f"{nanoseconds}ns"))


class ParseSizeTests(SynchronousTestCase):
    def test_accepts_decimal_and_binary_units(self) -> None:
        expected = {
            "0": 0, "1024": 1024, "007": 7, "10B": 10, "2kB": 2_000, "2KB": 2_000, "3MB": 3_000_000,
            "4GB": 4_000_000_000, "64 KiB": 65_536, "1MiB": 1_048_576, "2GiB": 2_147_483_648,
        }  # fmt: skip
        self.assertEqual(expected, {text: parse_size(text) for text in expected})

    def test_rejects_all_other_texts(self) -> None:
        bad = (
            "", " ", "B", "MiB", "-1", "+1", "1.5MiB", "1_000", "1,000", "1  MiB", "1\tMiB", "1MiB1",
            "1 ", " 1", "1\n", "1M", "1k", "1kib", "1mb", "1TiB", "0x10", "1e3", "\u0661", "1" * 5000,
        )  # fmt: skip
        for text in bad:
            error = self.assertRaises(ValueError, parse_size, text)
            self.assertEqual(1, len(str(error).splitlines()), text)
