"""The HTTP channel in memory: limits, ambiguous requests, and arbitrary input in arbitrary pieces."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from bfaas.http.server import BoundedSite, read_body
from tests.support.hostile_worker import LAST_CHUNK, chunk
from tests.support.transport import ServerTransport

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from twisted.logger import LogEvent
    from twisted.web.server import Request

EXAMPLES = 50 if "BFAAS_BRIEF" in os.environ else 500
MAX_BODY = 64
START = b"POST /run HTTP/1.1\r\nHost: there\r\n"
OTHER = b"POST /other HTTP/1.1\r\nHost: there\r\nContent-Length: 0\r\n\r\n"


class Recorder(Resource):
    """Records every request; with `wait`, responds only once `response` fires."""

    isLeaf = True

    def __init__(self, *, wait: bool = False) -> None:
        super().__init__()
        self.received: list[tuple[bytes, bytes]] = []
        self._wait = wait
        self.response: Deferred[None] = Deferred()

    def render(self, request: Request) -> object:
        self.received.append((request.path, read_body(request)))
        if self._wait:
            self.response.addCallback(lambda _: request.finish())
            return NOT_DONE_YET
        return b"ran"


def feed(pieces: Iterable[bytes], root: Recorder) -> ServerTransport:
    """Feed these pieces to a server, then disconnect; return the transport with its output."""
    clock = Clock()
    connection = BoundedSite(clock, root, MAX_BODY).buildProtocol(None)
    transport = ServerTransport()
    connection.makeConnection(transport)
    for piece in pieces:
        connection.dataReceived(piece)
    if not root.response.called and not transport.ended:
        root.response.callback(None)
    connection.connectionLost(Failure(ConnectionDone()))
    assert clock.getDelayedCalls() == []
    return transport


def split(data: bytes, at: Iterable[int]) -> list[bytes]:
    cuts = sorted({0, len(data), *(cut % (len(data) + 1) for cut in at)})
    return [data[start:end] for start, end in pairwise(cuts)]


# Pieces of requests, to be joined in any order with arbitrary bytes between them.
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
ATTACKS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=8)), max_size=12)
CUTS = st.lists(st.integers(0, 1 << 20), max_size=8)


class FuzzTests(SynchronousTestCase):
    def assert_quiet(self, events: Sequence[LogEvent]) -> None:
        self.assertEqual([], [event for event in events if event["log_level"] >= LogLevel.info])

    def setUp(self) -> None:
        self.events = self.enterContext(capturedLogs())

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(ATTACKS, CUTS, st.booleans())
    def test_any_input_gets_at_most_one_response_per_request(
        self, fragments: list[bytes], cuts: list[int], wait: bool
    ) -> None:
        root = Recorder(wait=wait)
        data = b"".join(fragments)
        transport = feed(split(data, cuts), root)

        output = transport.value()
        finals = output.count(b"HTTP/1.1 ") - output.count(b"HTTP/1.1 100 Continue\r\n\r\n")
        finals += output.count(b"HTTP/1.0 ")
        refused = sum(output.count(b"HTTP/1.1 %d " % code) for code in (400, 413))
        self.assertLessEqual(refused, 1)
        self.assertLessEqual(finals, data.count(b"\r\n\r\n") + 1)
        self.assertLessEqual(len(root.received), data.count(b"HTTP/1."))
        for _, content in root.received:
            self.assertLessEqual(len(content), MAX_BODY)
            if content:
                self.assertIn(content[:5], data)
        self.assert_quiet(self.events)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.integers(0, 2 * MAX_BODY), st.lists(st.integers(1, 40)), st.integers(0), CUTS)
    def test_only_complete_bodies_are_dispatched(
        self, length: int, sizes: list[int], end: int, cuts: list[int]
    ) -> None:
        script = bytes(range(length))
        chunks = b"".join(chunk(piece) for piece in split(script, sizes) if piece) + LAST_CHUNK
        framed = {
            "with a length": START + b"Content-Length: %d\r\n\r\n" % len(script) + script,
            "in chunks": START + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
        }
        for way, request in framed.items():
            for data in (request, request + OTHER, request + b"\0", request[: end % len(request)]):
                root = Recorder()
                output = feed(split(data, cuts), root).value()
                complete = len(data) >= len(request) and len(script) <= MAX_BODY
                self.assertEqual([(b"/run", script)] if complete else [], root.received[:1], way)
                if len(script) > MAX_BODY and len(data) >= len(request):
                    self.assertTrue(output.startswith(b"HTTP/1.1 413 "), output)
                    self.assertEqual(1, output.count(b"HTTP/1."))
        self.assert_quiet(self.events)


class SmugglingTests(SynchronousTestCase):
    def test_two_errors_in_one_request_get_one_response(self) -> None:
        head = START + b"Transfer-Encoding: chunked\r\n\r\n"
        output = feed([head + chunk(b"x" * 65) + b"nonsense\r\n"], Recorder()).value()
        self.assertTrue(output.startswith(b"HTTP/1.1 413 "))
        self.assertEqual(1, output.count(b"HTTP/1."))

    def test_input_that_is_not_http_gets_400_at_once(self) -> None:
        for hello in (b"\x16\x03\x01", b"\0", b"\xff", b" "):
            self.assertTrue(feed([hello], Recorder()).value().startswith(b"HTTP/1.1 400 "), hello)

    def test_ambiguous_requests_get_400_and_end_the_connection(self) -> None:
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
            "a length in non-ASCII digits": "Content-Length: \u0665\r\n".encode(),
            "an empty length": b"Content-Length: \r\n",
            "a length that int() does not read": b"Content-Length: " + b"1" * 5000 + b"\r\n",
            "chunked twice": chunked + chunked,
            "an unknown coding": b"Transfer-Encoding: xchunked\r\n",
            "a coding before chunked": b"Transfer-Encoding: gzip, chunked\r\n",
            "a coding after chunked": b"Transfer-Encoding: chunked, identity\r\n",
            "identity coding": b"Transfer-Encoding: identity\r\n",
            "identity coding and a length": b"Transfer-Encoding: identity\r\n" + length,
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
            "two Host headers": b"Host: elsewhere\r\n" + length,
            "invalid UTF-8": b"X: \xff\r\n" + length,
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
            "an invalid method": post % b"PO(ST" + b"\r\n",
            "two spaces": START.replace(b" /", b"  /") + b"\r\n",
            "a tab": START.replace(b" /", b"\t/") + b"\r\n",
            "an endless line": b"GET /" + b"x" * 20_000,
            "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            "a chunk longer than its size": START + chunked + b"\r\n5\r\nhelloX\r\n",
            "a C-style chunk size": START + chunked + b"\r\n0x5\r\nhello\r\n",
            "a signed chunk size": START + chunked + b"\r\n+5\r\nhello\r\n",
            "a chunk with a bare LF": START + chunked + b"\r\n5\nhello\r\n",
            "an extension with a bare LF": START + chunked + b"\r\n5;a\nb\r\nhello\r\n",
            "endless trailers": START + chunked + b"\r\n0\r\n" + b"a\r\n" * 2000,
        }
        for name, output in cases.items():
            for step in (1 << 20, 7):
                root = Recorder()
                data = output + OTHER
                transport = feed([data[at : at + step] for at in range(0, len(data), step)], root)
                self.assertEqual([], root.received, name)
                self.assertTrue(transport.value().startswith(b"HTTP/1.1 400 Bad Request\r\n"), name)
                self.assertEqual(1, transport.value().count(b"HTTP/1."), name)
                self.assertTrue(transport.ended, name)
