"""The log in JSON format, and the option that chooses the format."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from bfaas import basher, coord
from bfaas.system.logs import json_observer


class JsonObserverTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.stream = StringIO()
        publisher = LogPublisher()
        publisher.addObserver(json_observer(self.stream))
        self.log = Logger("a.name", observer=publisher)

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def test_event_is_one_line_with_its_fields(self) -> None:
        self.log.info("run {run} took {ms} ms: {error}", run="ab", ms=3, error=ValueError("two\nlines"))

        [fields] = self.objects()
        self.assertRegex(fields.pop("time"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$")
        message = "run ab took 3 ms: two\nlines"
        expected = {"level": "info", "logger": "a.name", "message": message, "run": "ab", "ms": 3}
        self.assertEqual({**expected, "error": "two\nlines"}, fields)

    def test_own_fields_of_an_event_do_not_replace_common_fields(self) -> None:
        self.log.error("{time} {message}", time="never", message="none")
        [fields] = self.objects()
        self.assertEqual(("error", "never none"), (fields["level"], fields["message"]))
        self.assertNotEqual("never", fields["time"])

    def test_failure_has_its_traceback(self) -> None:
        self.log.failure("in a test", Failure(KeyError("missing")))
        [fields] = self.objects()
        self.assertEqual(("critical", "in a test"), (fields["level"], fields["message"]))
        self.assertIn("KeyError: 'missing'", fields["traceback"])


class LogFormatTests(SynchronousTestCase):
    def test_unknown_formats_are_usage_errors(self) -> None:
        for role in (basher, coord):
            options: Any = role.Options()
            options.parseOptions(["--log-format", "json"])
            self.assertEqual("json", options["log-format"])
            self.assertRaises(SystemExit, role.Options().parseOptions, ["--log-format", "xml"])
