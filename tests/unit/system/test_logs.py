"""The log as JSON: each event an object on a line of its own."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from bfaas import basher, coord
from bfaas.system.logs import json_lines


class JsonLinesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.out = StringIO()
        publisher = LogPublisher()
        publisher.addObserver(json_lines(self.out))
        self.log = Logger("a.name", observer=publisher)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]

    def test_an_event_is_a_line_with_its_fields(self) -> None:
        self.log.info("run {run} took {ms} ms: {error}", run="ab", ms=3, error=ValueError("two\nlines"))

        [told] = self.lines()
        self.assertRegex(told.pop("time"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$")
        message = "run ab took 3 ms: two\nlines"
        expected = {"level": "info", "from": "a.name", "message": message, "run": "ab", "ms": 3}
        self.assertEqual({**expected, "error": "two\nlines"}, told)

    def test_fields_do_not_hide_what_each_line_has(self) -> None:
        self.log.error("{time} {message}", time="never", message="none")
        [told] = self.lines()
        self.assertEqual(("error", "never none"), (told["level"], told["message"]))
        self.assertNotEqual("never", told["time"])

    def test_a_failure_has_its_traceback(self) -> None:
        self.log.failure("in a test", Failure(KeyError("gone")))
        [told] = self.lines()
        self.assertEqual(("critical", "in a test"), (told["level"], told["message"]))
        self.assertIn("KeyError: 'gone'", told["traceback"])

    def test_there_are_no_other_formats(self) -> None:
        for role in (basher, coord):
            options: Any = role.Options()
            options.parseOptions(["--log-format", "json"])
            self.assertEqual("json", options["log-format"])
            self.assertRaises(SystemExit, role.Options().parseOptions, ["--log-format", "xml"])
