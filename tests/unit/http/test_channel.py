"""A server hears whatever bytes there are, in whatever pieces: what it makes of them, in memory."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as some
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.logger import LogLevel, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from bfaas.http.server import BoundedSite, read_body
from tests.support.hostile_worker import LAST_CHUNK, chunk
from tests.support.transport import ServerTransport

if TYPE_CHECKING:
    from collections.abc import Iterable

    from twisted.logger import LogEvent
    from twisted.web.server import Request

EXAMPLES = 50 if "BFAAS_BRIEF" in os.environ else 500
MAX_BODY = 64
START = b"POST /run HTTP/1.1\r\nHost: there\r\n"
OTHER = b"POST /other HTTP/1.1\r\nHost: there\r\nContent-Length: 0\r\n\r\n"


class Recorder(Resource):
    """Takes every request; with `wait`, answers it only when told to."""

    isLeaf = True

    def __init__(self, *, wait: bool = False) -> None:
        super().__init__()
        self.received: list[tuple[bytes, bytes]] = []
        self._wait = wait
        self.answer: Deferred[None] = Deferred()

    def render(self, request: Request) -> object:
        self.received.append((request.path, read_body(request)))
        if self._wait:
            self.answer.addCallback(lambda _: request.finish())
            return NOT_DONE_YET
        return b"ran"


def hear(pieces: Iterable[bytes], root: Recorder) -> ServerTransport:
    """Let a server hear these pieces, and then the client's end."""
    clock = Clock()
    connection = BoundedSite(clock, root, MAX_BODY).buildProtocol(None)
    transport = ServerTransport()
    connection.makeConnection(transport)
    for piece in pieces:
        connection.dataReceived(piece)
    if not root.answer.called and not transport.ended:
        root.answer.callback(None)
    connection.connectionLost(Failure(ConnectionDone()))
    assert clock.getDelayedCalls() == []
    return transport


def split(data: bytes, at: Iterable[int]) -> list[bytes]:
    cuts = sorted({0, len(data), *(cut % (len(data) + 1) for cut in at)})
    return [data[start:end] for start, end in pairwise(cuts)]


# What an attack is made of: pieces of requests, in any order, with rubbish between them.
FRAGMENTS = [
    START, OTHER, b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.0\r\n", b"GET /\r\n", b"HEAD * HTTP/1.1\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"Host: there\r\n", b"Content-Length: 0\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: 65\r\n", b"Content-Length: 5,5\r\n",
    b"Content-Length: " + b"9" * 5000 + b"\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: xchunked\r\n", b"Transfer-Encoding : chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b" folded\r\n",
    b"\r\n", b"\n", b"\r", b"\0",
    b"X: \xff\r\n", b"X: a\rb\r\n", b"X: a\nb\r\n", b"Cookie: a=b; c\r\n", b": \r\n",
    b"-1\r\n", b"hello", b"5\r\nhello\r\n", LAST_CHUNK, b"0\r\nX: y\r\n\r\n",
    b"f" * 20 + b"\r\n", b"5;x=y\r\n", b"x" * 17_000,
]  # fmt: skip
ATTACKS = some.lists(some.one_of(some.sampled_from(FRAGMENTS), some.binary(max_size=8)), max_size=12)
CUTS = some.lists(some.integers(0, 1 << 20), max_size=8)


class FuzzTests(SynchronousTestCase):
    def assert_quiet(self, events: list[LogEvent]) -> None:
        self.assertEqual([], [event for event in events if event["log_level"] >= LogLevel.info])

    def setUp(self) -> None:
        self.events: list[LogEvent] = []
        keep: Any = self.events.append
        globalLogPublisher.addObserver(keep)
        self.addCleanup(globalLogPublisher.removeObserver, keep)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(ATTACKS, CUTS, some.booleans())
    def test_whatever_comes_is_answered_once_or_refused(
        self, fragments: list[bytes], cuts: list[int], wait: bool
    ) -> None:
        root = Recorder(wait=wait)
        data = b"".join(fragments)
        transport = hear(split(data, cuts), root)

        said = transport.value()
        finals = said.count(b"HTTP/1.1 ") - said.count(b"HTTP/1.1 100 Continue\r\n\r\n")
        finals += said.count(b"HTTP/1.0 ")
        refused = sum(said.count(b"HTTP/1.1 %d " % code) for code in (400, 413))
        self.assertLessEqual(refused, 1)
        self.assertLessEqual(finals, data.count(b"\r\n\r\n") + 1)
        self.assertLessEqual(len(root.received), data.count(b"HTTP/1."))
        for _, content in root.received:
            self.assertLessEqual(len(content), MAX_BODY)
            if content:
                self.assertIn(content[:5], data)
        self.assert_quiet(self.events)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(some.integers(0, 2 * MAX_BODY), some.lists(some.integers(1, 40)), some.integers(0), CUTS)
    def test_a_body_is_dispatched_whole_or_not_at_all(
        self, length: int, sizes: list[int], end: int, cuts: list[int]
    ) -> None:
        script = bytes(range(length))
        chunks = b"".join(chunk(piece) for piece in split(script, sizes) if piece) + LAST_CHUNK
        framed = {
            "with a length": START + b"Content-Length: %d\r\n\r\n" % len(script) + script,
            "in chunks": START + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
        }
        for way, whole in framed.items():
            for data in (whole, whole + OTHER, whole + b"\0", whole[: end % len(whole)]):
                root = Recorder()
                said = hear(split(data, cuts), root).value()
                complete = len(data) >= len(whole) and len(script) <= MAX_BODY
                self.assertEqual([(b"/run", script)] if complete else [], root.received[:1], way)
                if len(script) > MAX_BODY and len(data) >= len(whole):
                    self.assertTrue(said.startswith(b"HTTP/1.1 413 "), said)
                    self.assertEqual(1, said.count(b"HTTP/1."))
        self.assert_quiet(self.events)


class SmugglingTests(SynchronousTestCase):
    def test_what_is_refused_twice_is_told_once(self) -> None:
        head = START + b"Transfer-Encoding: chunked\r\n\r\n"
        said = hear([head + chunk(b"x" * 65) + b"nonsense\r\n"], Recorder()).value()
        self.assertTrue(said.startswith(b"HTTP/1.1 413 "))
        self.assertEqual(1, said.count(b"HTTP/1."))

    def test_who_waits_for_our_answer_to_something_else_has_it(self) -> None:
        for hello in (b"\x16\x03\x01", b"\0", b"\xff", b" "):
            self.assertTrue(hear([hello], Recorder()).value().startswith(b"HTTP/1.1 400 "), hello)

    def test_what_others_may_read_otherwise_is_refused_and_nothing_after_it_heard(self) -> None:
        length, chunked = b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"
        heads = {
            "a length and chunks": length + chunked,
            "chunks and a length": chunked + length,
            "two lengths": length + b"Content-Length: 6\r\n",
            "the same length twice": length + length,
            "two lengths in one": b"Content-Length: 5, 5\r\n",
            "a signed length": b"Content-Length: +5\r\n",
            "a negative length": b"Content-Length: -5\r\n",
            "a hexadecimal length": b"Content-Length: 0x5\r\n",
            "a length with an underscore": b"Content-Length: 1_0\r\n",
            "a length of other digits": "Content-Length: \u0665\r\n".encode(),
            "no length": b"Content-Length: \r\n",
            "a length that int() does not read": b"Content-Length: " + b"1" * 5000 + b"\r\n",
            "chunks twice": chunked + chunked,
            "an unknown coding": b"Transfer-Encoding: xchunked\r\n",
            "a coding before": b"Transfer-Encoding: gzip, chunked\r\n",
            "a coding after": b"Transfer-Encoding: chunked, identity\r\n",
            "no coding": b"Transfer-Encoding: identity\r\n",
            "no coding, and a length": b"Transfer-Encoding: identity\r\n" + length,
            "a quoted coding": b'Transfer-Encoding: "chunked"\r\n',
            "a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n",
            "a space before the colon": b"Transfer-Encoding : chunked\r\n",
            "a tab before the colon": b"Content-Length\t: 5\r\n",
            "a folded coding": b"Transfer-Encoding:\r\n chunked\r\n",
            "a folded header": b"X: a\r\n\tContent-Length: 5\r\n",
            "a folded first header": b" X: a\r\n" + length,
            "a bare CR": b"X: a\rTransfer-Encoding: chunked\r\n",
            "a bare LF": b"X: a\nTransfer-Encoding: chunked\r\n",
            "a NUL": b"X: a\0\r\n" + length,
            "a name with a NUL": b"X\0: a\r\n" + length,
            "no name": b": a\r\n" + length,
            "no colon": b"Content-Length 5\r\n",
            "another host": b"Host: elsewhere\r\n" + length,
            "no UTF-8": b"X: \xff\r\n" + length,
            "sixty-five headers": b"X: a\r\n" * 64,
        }
        cases = {name: START + head + b"\r\n" for name, head in heads.items()}
        post = START.replace(b"POST", b"%b")
        cases |= {
            "HTTP/1.0 in chunks": START.replace(b"1.1", b"1.0") + chunked + b"\r\n" + LAST_CHUNK,
            "HTTP/1.2": START.replace(b"1.1", b"1.2") + b"\r\n",
            "HTTP/2.0": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "HTTP/0.9": b"GET /run\r\n",
            "no host": START.replace(b"Host: there\r\n", b"") + b"\r\n",
            "a method that is none": post % b"PO(ST" + b"\r\n",
            "two spaces": START.replace(b" /", b"  /") + b"\r\n",
            "a tab": START.replace(b" /", b"\t/") + b"\r\n",
            "a line without end": b"GET /" + b"x" * 20_000,
            "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            "a chunk that is longer": START + chunked + b"\r\n5\r\nhelloX\r\n",
            "a chunk in C": START + chunked + b"\r\n0x5\r\nhello\r\n",
            "a signed chunk": START + chunked + b"\r\n+5\r\nhello\r\n",
            "a chunk with a bare LF": START + chunked + b"\r\n5\nhello\r\n",
            "an extension with a bare LF": START + chunked + b"\r\n5;a\nb\r\nhello\r\n",
            "trailers without end": START + chunked + b"\r\n0\r\n" + b"a\r\n" * 2000,
        }
        for name, said in cases.items():
            for step in (1 << 20, 7):
                root = Recorder()
                data = said + OTHER
                transport = hear([data[at : at + step] for at in range(0, len(data), step)], root)
                self.assertEqual([], root.received, name)
                self.assertTrue(transport.value().startswith(b"HTTP/1.1 400 Bad Request\r\n"), name)
                self.assertEqual(1, transport.value().count(b"HTTP/1."), name)
                self.assertTrue(transport.ended, name)
