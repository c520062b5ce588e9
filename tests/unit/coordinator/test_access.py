"""Tests of the identification of clients by access token, and of files of tokens that change."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import HTTPChannel
from twisted.web.server import Request

from bfaas.access_tokens import AccessToken, AccessTokens
from bfaas.coordinator.access import AccessControl
from bfaas.http.errors import HTTPError
from bfaas.system.startup import StartError

ALICE, BOB = AccessToken.of("alice", "alice-token"), AccessToken.of("bob", "bob-token")

MISSING = (401, "an access token is required: Authorization: Bearer TOKEN", 'Bearer realm="bfaas"')
INVALID = (401, "the access token is not valid", 'Bearer realm="bfaas", error="invalid_token"')
REPEATED = (400, "more than one Authorization header", 'Bearer realm="bfaas", error="invalid_request"')
UNREADABLE = (503, "the access tokens cannot be read", None)


def answer(access: AccessControl, *headers: str | bytes) -> str | tuple[int, str, str | None]:
    """Return the name of the client with these Authorization headers, or the error."""
    channel = HTTPChannel()
    channel.makeConnection(StringTransport())
    request = Request(channel, parsePOSTFormSubmission=False)
    for header in headers:
        request.requestHeaders.addRawHeader("authorization", header)
    try:
        return access.client_name(request)
    except HTTPError as error:
        return error.code, error.message, error.headers.get("WWW-Authenticate")


class HeaderTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.access = AccessControl(AccessTokens((ALICE, BOB)), Clock().seconds)

    def test_the_token_names_the_client(self) -> None:
        for header, name in (
            ("Bearer alice-token", "alice"),
            ("Bearer bob-token", "bob"),
            ("bearer alice-token", "alice"),
            ("BEARER   alice-token ", "alice"),
        ):
            self.assertEqual(name, answer(self.access, header))

    def test_other_headers_are_rejected(self) -> None:
        for header in (
            "",
            "Basic YWxpY2U6YWxpY2UtdG9rZW4=",
            "alice-token",
            "Bearer: alice-token",
            "Bearer\talice-token",
            "Token alice-token",
            '"Bearer" alice-token',
        ):
            self.assertEqual(MISSING, answer(self.access, header), header)
        self.assertEqual(MISSING, answer(self.access))
        invalid: tuple[str | bytes, ...] = (
            "Bearer",
            "Bearer ",
            "Bearer alice",
            "Bearer ALICE-TOKEN",
            "Bearer alice-token,bob-token",
            "Bearer alice-token, Bearer bob-token",
            'Bearer "alice-token"',
            "Bearer alice-token\0",
            b"Bearer \xff\xfe",
            f"Bearer {ALICE.digest.hex()}",
            f"Bearer {ALICE}",
            "Bearer " + "a" * 10_000,
        )
        for token in invalid:
            self.assertEqual(INVALID, answer(self.access, token), token)

    def test_two_headers_are_ambiguous_even_if_they_are_equal(self) -> None:
        self.assertEqual(REPEATED, answer(self.access, "Bearer alice-token", "Bearer alice-token"))
        self.assertEqual(REPEATED, answer(self.access, "Bearer alice-token", ""))

    def test_without_any_token_all_requests_are_rejected(self) -> None:
        empty = AccessControl(AccessTokens(()), Clock().seconds)
        self.assertEqual(INVALID, answer(empty, "Bearer alice-token"))


class FileTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp())
        self.now = 0.0
        self.events = self.enterContext(capturedLogs())
        self.read_events = 0

    def write(self, *lines: object, settled: bool = True) -> None:
        """Replace the file, a minute ago unless it is not `settled`."""
        self.path.write_text("".join(f"{line}\n" for line in lines))
        self.now = self.path.stat().st_ctime + (60 if settled else 0)

    def control(self) -> AccessControl:
        return AccessControl(self.path, lambda: self.now)

    @property
    def log(self) -> list[str]:
        """The lines that were logged since this was last read."""
        events = self.events[self.read_events :]
        self.read_events = len(self.events)
        return [formatEvent(event).replace(str(self.path), "FILE") for event in events]

    def test_a_token_is_revoked_and_added_while_the_coordinator_runs(self) -> None:
        self.write(ALICE)
        access = self.control()
        self.assertEqual(["1 access tokens in FILE"], self.log)
        self.assertEqual("alice", answer(access, "Bearer alice-token"))
        self.assertEqual(INVALID, answer(access, "Bearer bob-token"))

        self.write("# others", BOB)
        self.assertEqual(INVALID, answer(access, "Bearer alice-token"))
        self.assertEqual("bob", answer(access, "Bearer bob-token"))
        self.assertEqual(["1 access tokens in FILE"], self.log)

        self.write()
        self.assertEqual(INVALID, answer(access, "Bearer bob-token"))

    def test_a_file_that_replaces_it_is_read(self) -> None:
        self.write(ALICE)
        access = self.control()
        other = self.path.with_suffix(".new")
        other.write_text(f"{BOB}\n")
        other.rename(self.path)
        self.assertEqual("bob", answer(access, "Bearer bob-token"))

    def test_a_change_that_leaves_size_and_times_as_they_were_is_noticed(self) -> None:
        carol = AccessToken.of("carol", "carol-token")
        self.write(ALICE, settled=False)
        access = self.control()
        self.assertEqual("alice", answer(access, "Bearer alice-token"))
        # Within one tick of the clock of the file system: nothing but the content is different.
        status = self.path.stat()
        self.patch(Path, "stat", lambda _: status)
        self.path.write_text(f"{carol}\n")
        self.assertEqual(INVALID, answer(access, "Bearer alice-token"))
        self.assertEqual("carol", answer(access, "Bearer carol-token"))

    def test_a_file_that_has_not_changed_is_not_read_again(self) -> None:
        self.write(ALICE)
        access = self.control()
        self.patch(Path, "read_bytes", lambda _: self.fail("read again"))
        for _ in range(3):
            self.assertEqual("alice", answer(access, "Bearer alice-token"))

    def test_an_invalid_line_is_skipped_and_logged_once(self) -> None:
        self.write(ALICE, BOB)
        access = self.control()
        self.log  # noqa: B018 - forget it
        self.write("oops", BOB)
        for _ in range(3):
            self.assertEqual(INVALID, answer(access, "Bearer alice-token"))
            self.assertEqual("bob", answer(access, "Bearer bob-token"))
        problem = "line 1 is not NAME:DIGEST, as `bfaas token NAME` prints it"
        self.assertEqual(["1 access tokens in FILE", f"access tokens: FILE: {problem}"], self.log)

    def test_while_the_file_cannot_be_read_no_token_is_valid(self) -> None:
        self.write(ALICE)
        access = self.control()
        self.log  # noqa: B018 - forget it
        for _ in range(2):
            self.path.unlink()
            for _ in range(3):
                self.assertEqual(UNREADABLE, answer(access, "Bearer alice-token"))
                self.assertEqual(MISSING, answer(access))
            self.assertEqual(["access tokens: FILE: No such file or directory"], self.log)
            self.write(ALICE)
            self.assertEqual("alice", answer(access, "Bearer alice-token"))
            self.assertEqual([], self.log)

        self.path.unlink()
        self.path.mkdir()
        self.assertEqual(UNREADABLE, answer(access, "Bearer alice-token"))
        self.assertEqual(["access tokens: FILE: not a regular file"], self.log)

    def test_binary_data_is_invalid_and_harmless(self) -> None:
        self.write(ALICE)
        access = self.control()
        self.path.write_bytes(os.urandom(10_000).replace(b"#", b"") + b"\n" + str(BOB).encode())
        self.assertEqual("bob", answer(access, "Bearer bob-token"))
        self.assertEqual(INVALID, answer(access, "Bearer alice-token"))

    def test_start_fails_without_a_valid_file(self) -> None:
        def problem() -> str:
            return str(self.assertRaises(StartError, self.control)).replace(str(self.path), "FILE")

        self.assertEqual("ACCESS_TOKENS: FILE: No such file or directory", problem())
        self.write(ALICE, "alice-token")
        self.assertEqual(
            "ACCESS_TOKENS: FILE: line 2 is not NAME:DIGEST, as `bfaas token NAME` prints it", problem()
        )
        self.path.unlink()
        os.mkfifo(self.path)
        self.assertEqual("ACCESS_TOKENS: FILE: not a regular file", problem())
