"""
A worker that lies: what it says, and the one ending that this has.

Each case also shows what it costs the coordinator, and that the next request is served.
"""

from __future__ import annotations

import enum
import json
import zlib
from dataclasses import dataclass
from itertools import chain, count, repeat
from typing import TYPE_CHECKING

import pytest_twisted
from twisted.internet.task import deferLater

from bfaas.coordinator.app import MIN_GRACE
from tests.e2e.coordinator import reactor
from tests.e2e.hostile import HEAD, MAX_LINES, MAX_MEMORY, Spent, start_harness
from tests.support.hostile_worker import LAST_CHUNK, End, chunk, post
from tests.support.responses import parse_events, parse_response

if TYPE_CHECKING:
    import pytest

    from tests.e2e.hostile import Harness, Script, ScriptFactory

MAX_REQ_TIME = 2.5
SLOW_REQ_TIME = 30.0
TOLERANCE = 10.0
"""Tolerated delay on a busy machine, in seconds."""
MAX_OUTPUT = 64 * 1024


class Ending(enum.Enum):
    """The outcomes of a response."""

    BAD = "502 the worker failed"
    NOT_STARTED = "502 the worker could not start the script"
    LATE = "504 the worker did not respond in time"
    LOST = "125 worker-lost"
    LIMIT = "125 output-limit"
    TIMEOUT = "124 timeout"
    FINE = "3"


@dataclass(frozen=True)
class Case:
    """
    What a worker sends for a script, the outcome of the client's response, and its output if that is certain.

    Cases that keep the coordinator busy are `slow`: they must reach their limit before their deadline.
    """

    name: str
    says: ScriptFactory
    ending: Ending
    output: str | None = None
    raw: bool = False
    slow: bool = False


def once(*script: bytes | End) -> ScriptFactory:
    """Send data, and keep the connection."""
    return lambda: script


def endless(start: bytes, more: bytes) -> ScriptFactory:
    """Send data, then other data without end."""
    big = more * max(1, 60_000 // len(more))
    return lambda: chain([start], repeat(big))


def slowly(start: bytes, more: bytes) -> ScriptFactory:
    """Send data without end, one byte at a time."""

    def script() -> Script:
        yield start
        for at in count():
            yield more[at % len(more) :][:1]
            yield deferLater(reactor, 0.02)

    return script


def instead(old: bytes, new: bytes) -> ScriptFactory:
    """Send an honest worker's response with one part replaced."""
    assert old in HEAD
    return once(HEAD.replace(old, new) + chunk(OUT + DONE) + LAST_CHUNK, End.CLOSE)


def added(*fields: bytes) -> ScriptFactory:
    """Send an honest worker's response with more headers."""
    return instead(b"\r\n\r\n", b"\r\n".join([b"", *fields, b"", b""]))


def events(*data: bytes) -> ScriptFactory:
    """Send events in a complete body."""
    return once(HEAD, *map(chunk, data), LAST_CHUNK, End.CLOSE)


def body(data: bytes) -> ScriptFactory:
    """Send data in place of a chunked body."""
    return once(HEAD + data, End.CLOSE)


def with_length(length: bytes, data: bytes) -> ScriptFactory:
    head = HEAD.replace(b"Transfer-Encoding: chunked", b"Content-Length: " + length)
    return once(head + data, End.CLOSE)


def exit_event(data: bytes) -> bytes:
    return b"event: exit\ndata: " + data + b"\n\n"


STRING = b'event: stdout\ndata: "'
OUT = b'event: stdout\ndata: "out"\n\n'
DONE = exit_event(b'{"code": 3}')
RAW = HEAD.replace(b"text/event-stream", b"application/octet-stream")
ENDLESS = HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"")
ENDLESS_RAW = RAW.replace(b"Transfer-Encoding: chunked\r\n", b"")
STATUS = b"HTTP/1.1 200 OK\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nfly-replay: app=evil\r\nConnection: fly-replay\r\n\r\n"
BOMB = zlib.compress(b"\0" * (16 << 20), 9, 31)
TINY = chunk(b"x") * 50_000
LIES = {
    "wall_ms": 10**30, "cpu_ms": -1, "max_rss_kb": "9", "truncated": "yes", "dropped_bytes": 1e300,
    "signal": "\x1b[31m", "reason": "a\nb", "fly-replay": "app=evil",
}  # fmt: skip

HEADS = [
    ("hangs up at once", once(End.CLOSE)),
    ("resets at once", once(End.RESET)),
    ("breaks off in its head", once(HEAD[:60], End.CLOSE)),
    ("speaks another protocol", once(b"SSH-2.0-OpenSSH_9.9\r\n")),
    ("speaks HTTP/1.0", instead(b"HTTP/1.1", b"HTTP/1.0")),
    ("has no version", instead(b"HTTP/1.1 ", b"")),
    ("negative status", instead(b"200", b"-200")),
    ("status of eight digits", instead(b"200", b"99999999")),
    ("status with underscores", instead(b"200", b"2_0_0")),
    ("status with a sign", instead(b"200", b"+200")),
    ("status zero", instead(b"200", b"000")),
    ("status 299", instead(b"200", b"299")),
    ("no content", instead(b"200", b"204")),
    ("switches protocols", instead(b"200 OK", b"101 Switching Protocols\r\nUpgrade: websocket")),
    ("redirects inside", instead(b"200 OK", b"302 Found\r\nLocation: http://169.254.169.254/")),
    ("redirects the POST", instead(b"200 OK", b"307 Go\r\nLocation: http://[fdaa::3]/v1/apps")),
    ("an error page of its own", instead(b"200 OK", b"503 Busy\r\nfly-replay: app=evil")),
    ("interim answers without end", endless(b"", INTERIM)),
    ("six interim answers", once(INTERIM * 6 + HEAD)),
    ("headers without end", lambda: (STATUS, *(b"x-%d: y\r\n" % number for number in range(3000)))),
    ("sixty-five headers", added(*[b"x: y"] * 65)),
    ("a header line without end", endless(STATUS + b"x: ", b"y" * 1000)),
    ("a status line without end", endless(b"HTTP/1.1 200 ", b"y" * 1000)),
    ("bare line feeds", once(HEAD.replace(b"\r\n", b"\n"), End.CLOSE)),
    ("a folded header", added(b"X: a\r\n fly-replay: app=evil")),
    ("a space before the colon", added(b"fly-replay : app=evil")),
    ("a NUL in a header", added(b"X: a\0b")),
    ("a bare CR in a header", added(b"X: a\rfly-replay: app=evil")),
    ("a header that is none", added(b"hello")),
    ("a name that is no token", added(b"fly(replay): app=evil")),
    ("chunked and a length", added(b"Content-Length: 5")),
    ("chunked twice", added(b"Transfer-Encoding: chunked")),
    ("two lengths", with_length(b"5\r\nContent-Length: 6", b"")),
    ("a negative length", with_length(b"-1", b"")),
    ("a hexadecimal length", with_length(b"0x10", b"")),
    ("a length of 400 digits", with_length(b"1" * 400, b"")),
    ("an unknown coding", instead(b"chunked", b"gzip, chunked")),
    ("a compressed bomb", once(HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n" + chunk(BOMB))),
    ("a replay by its type", instead(b"text/event-stream", b"application/vnd.fly.replay+json")),
    ("two types", added(b"Content-Type: text/html")),
    ("the other format", once(RAW + chunk(b"\nexit: 0\n") + LAST_CHUNK, End.CLOSE)),
    ("another machine's name", added(b"Worker: 0123456789abcd")),
]  # fmt: skip

BAD, NOT_STARTED, LATE, LOST, LIMIT, TIMEOUT, FINE = Ending

CASES = [
    *(Case(name, says, BAD) for name, says in HEADS),
    Case("could not start it", instead(b"200 OK", b"500 Oh\r\nfly-replay: app=evil"), NOT_STARTED),
    Case("says nothing", once(), LATE),
    Case("a head that does not end", once(HEAD[:-2]), LATE),
    Case("a head of a byte at a time", slowly(STATUS, b"X: y\r\n"), LATE),
    # Harmless, with nothing of it passed on.
    Case("five interim answers", once(INTERIM * 5 + HEAD + chunk(DONE) + LAST_CHUNK), FINE, ""),
    Case("headers for Fly's proxy", added(b"fly-replay: app=evil", b"fly-replay-cache: /*"), FINE, "out"),
    Case("cookies and the like", added(b"Set-Cookie: a=b", b"Location: /", b"Alt-Svc: x"), FINE, "out"),
    Case("a reason of its own", instead(b"OK", b"<script>alert(1)</script>"), FINE, "out"),
    Case("a type with a parameter", added(b"Connection: content-type, worker"), FINE, "out"),
    Case("a trailer for Fly's proxy", body(chunk(OUT + DONE) + b"0\r\nfly-replay: app=evil\r\n\r\n"),
         FINE, "out"),
    Case("a second answer", body(chunk(DONE) + LAST_CHUNK + INTERIM + HEAD + chunk(OUT)), FINE, ""),
    Case("more than it announced", with_length(b"%d" % len(DONE), DONE + OUT), FINE, ""),
    Case("an end by hanging up", once(ENDLESS + OUT + DONE, End.CLOSE), FINE, "out"),
    Case("a reset after the exit",
         lambda: (HEAD + chunk(OUT + DONE), deferLater(reactor, 0.2), End.RESET), FINE, "out"),
    Case("lies in the exit", events(exit_event(json.dumps({"code": 3, **LIES}).encode())), FINE, ""),
    Case("line ends of every kind", events(STRING + b'\xe2\x80\xa8\\r\\n\\u0000\xc2\x85"\n\n', DONE),
         FINE, "\u2028\r\n\0\x85"),
    Case("chunks of one byte", once(RAW + TINY + chunk(b"\nexit: 3\n") + LAST_CHUNK),
         FINE, "x" * 50_000, raw=True),
    # Framing.
    Case("a chunk of 2**64", body(chunk(OUT) + b"f" * 16 + b"\r\n"), LOST, "out"),
    Case("a signed chunk", body(chunk(OUT) + b"-1\r\n" + OUT), LOST, "out"),
    Case("a chunk in C", body(chunk(OUT) + b"0x5\r\n" + OUT), LOST, "out"),
    Case("a chunk without a size", body(chunk(OUT) + b"\r\n" + OUT), LOST, "out"),
    Case("a chunk longer than its size", body(chunk(OUT) + b"1\r\n" + OUT), LOST, "out"),
    Case("bare line feeds in chunks", body(chunk(OUT) + b"1\nx\n"), LOST, "out"),
    Case("an extension without end", endless(HEAD + chunk(OUT) + b"1;", b"x" * 1000), LOST, "out"),
    Case("extensions without end", endless(HEAD, b"4;" + b"x" * 90 + b"\r\n: \n\n\r\n"), LOST, ""),
    Case("trailers without end", endless(HEAD + chunk(OUT) + b"0\r\n", b"x: y\r\n"), LOST, "out"),
    Case("a trailer that is none", body(chunk(DONE) + b"0\r\nfly-replay : app=evil\r\n\r\n"), LOST, ""),
    Case("less than it announced", with_length(b"1000", OUT), LOST, "out"),
    Case("a chunk that breaks off", body(chunk(OUT) + b"5\r\nab"), LOST, "out"),
    Case("no end", body(chunk(OUT)), LOST, "out"),
    Case("no exit", events(OUT), LOST, "out"),
    Case("an end by hanging up, too early", once(ENDLESS + OUT, End.CLOSE), LOST, "out"),
    Case("a reset", once(HEAD + chunk(OUT) + chunk(b"event: "), End.RESET), LOST),
    Case("a raw end by hanging up", once(ENDLESS_RAW + b"x\nexit: 0\n", End.CLOSE),
         LOST, "x\nexit: 0\n", raw=True),
    Case("a raw exit, and no end", once(RAW + chunk(b"x\nexit: 0\n"), End.CLOSE),
         LOST, "x\nexit: 0\n", raw=True),
    Case("a raw exit in the middle", once(RAW + chunk(b"\nexit: 0\n") + chunk(b"x") + LAST_CHUNK, End.CLOSE),
         LOST, "\nexit: 0\nx", raw=True),
    # Events.
    Case("an event of 100 MB", endless(HEAD, chunk(b"x" * 50_000)), LOST, ""),
    Case("a string of 100 MB", endless(HEAD + chunk(STRING), chunk(b"x" * 50_000)), LOST, ""),
    Case("comments without end", endless(HEAD, chunk(b": \n\n" * 10_000)), LOST, ""),
    Case("blank lines without end", endless(HEAD, chunk(b"\n" * 50_000)), LOST, ""),
    Case("nested lists", events(OUT, b"event: stdout\ndata: " + b"[" * 100_000 + b"\n\n"), LOST, "out"),
    Case("a nested exit", events(OUT, exit_event(b'{"a":' * 50_000 + b"0" + b"}" * 50_000)), LOST, "out"),
    Case("an exit of many fields", events(OUT, exit_event(b'{"code": 0, "x": [' + b"[]," * 100_000 + b"0]}")),
         LOST, "out"),
    Case("a CR in data", events(OUT, b'event: stdout\ndata: "a\r"\n\n'), LOST, "out"),
    Case("CRLF in events", events(OUT, OUT.replace(b"\n", b"\r\n")), LOST, "out"),
    Case("two data lines", events(OUT, b'event: stdout\ndata: "a"\ndata: "b"\n\n'), LOST, "out"),
    Case("an event of no kind of ours", events(OUT, b'event: fly-replay\ndata: "app=evil"\n\n'), LOST, "out"),
    Case("a field of no kind of ours", events(OUT, b'id: 1\nevent: stdout\ndata: "a"\n\n'), LOST, "out"),
    Case("output that is no string", events(OUT, b'event: stdout\ndata: {"a": 1}\n\n'), LOST, "out"),
    Case("output that is no JSON", events(OUT, b"event: stdout\ndata: out\n\n"), LOST, "out"),
    Case("output that is no UTF-8", events(OUT, b'event: stdout\ndata: "\xff"\n\n'), LOST, "out"),
    Case("half a character", events(OUT, b'event: stdout\ndata: "\\ud800"\n\n'), LOST, "out"),
    Case("output after the exit", events(OUT, exit_event(b'{"code": 0}'), OUT), LOST, "out"),
    Case("two exits", events(OUT, exit_event(b'{"code": 0}'), exit_event(b'{"code": 0}')), LOST, "out"),
    Case("an exit, then garbage", events(OUT, exit_event(b'{"code": 0}'), b"garbage\n\n"), LOST, "out"),
    Case("an invalid exit code", events(OUT, exit_event(b'{"code": 256}')), LOST, "out"),
    Case("an exit without a code", events(OUT, exit_event(b"{}")), LOST, "out"),
    # Too much, or too long.
    Case("output without end", endless(HEAD, chunk(STRING + b"x" * 8192 + b'"\n\n')),
         LIMIT, "x" * MAX_OUTPUT),
    Case("raw output without end", endless(RAW, chunk(b"x" * 8192)),
         LIMIT, "x" * (MAX_OUTPUT + 64), raw=True),
    Case("escapes without end", endless(HEAD, chunk(STRING + b"\\u0078" * 8192 + b'"\n\n')),
         LIMIT, "x" * MAX_OUTPUT),
    Case("events of one byte", endless(HEAD, chunk(STRING + b'x"\n\n') * 2000), LIMIT, "x" * MAX_OUTPUT,
         slow=True),
    Case("events of nothing", endless(HEAD, chunk(STRING + b'"\n\n') * 2000), LIMIT, "", slow=True),
    Case("a wide string", events(STRING + "\U0001f600".encode() + b"x" * 500_000 + b'"\n\n'), LIMIT, ""),
    Case("silence in the body", once(HEAD + chunk(OUT)), TIMEOUT, "out"),
    Case("silence after the exit", once(HEAD + chunk(OUT + DONE)), TIMEOUT, "out"),
    Case("a byte at a time", slowly(HEAD + chunk(OUT), chunk(b":")), TIMEOUT, "out"),
]  # fmt: skip

HEADERS = {
    "cache-control", "connection", "content-encoding", "content-length", "content-type", "coord", "date",
    "run-id", "server", "transfer-encoding", "worker", "x-accel-buffering", "x-content-type-options",
}  # fmt: skip


def read(received: bytes, *, raw: bool) -> tuple[str, str]:
    """Return the outcome of a response, and its output; fail unless it is one complete response."""
    answer, content = parse_response(received)
    assert {name.lower() for name, _ in answer.getheaders()} <= HEADERS, answer.getheaders()
    assert b"evil" not in received
    assert answer.reason in ("OK", "Bad Gateway", "Gateway Time-out"), answer.reason
    if answer.status != 200:
        assert answer.getheader("content-type") == "text/plain; charset=utf-8"
        return f"{answer.status} {content.decode().removesuffix(chr(10))}", ""
    if raw:
        assert answer.getheader("content-type") == "application/octet-stream"
        output, line, ending = content.decode().rpartition("\nexit: ")
        assert line, content[-80:]
        return ending.removesuffix("\n"), output
    assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
    *output_events, (name, exit_) = parse_events(content)
    assert name == "exit"
    assert "exit" not in dict(output_events)
    assert set(exit_) <= {"code", "reason", "wall_ms"}, exit_
    ending = f"{exit_['code']} {exit_.get('reason', '')}".strip()
    return ending, "".join(data for _, data in output_events)


async def run(harness: Harness, case: Case) -> None:
    """Run one case, and check what must hold for every case."""
    harness.worker.responses[case.name.encode()] = case.says
    spent = Spent(harness.coordinator)
    received, seconds = await harness.request(post("/run?raw=1" if case.raw else "/run", case.name.encode()))
    ending, output = read(received, raw=case.raw)
    assert ending == case.ending.value
    assert case.output is None or output == case.output
    assert seconds < (SLOW_REQ_TIME if case.slow else MAX_REQ_TIME) + TOLERANCE
    received, _ = await harness.request(post("/run", b"honest"))
    assert read(received, raw=False) == ("0", "honest\n")
    assert spent.memory <= MAX_MEMORY
    assert spent.lines <= MAX_LINES, harness.coordinator.program.output[-3000:].decode()


@pytest_twisted.ensureDeferred
async def test_each_hostile_response_has_one_outcome_and_a_bounded_cost(subtests: pytest.Subtests) -> None:
    for max_req_time in (MAX_REQ_TIME, SLOW_REQ_TIME):
        settings = {"MAXREQTIME": f"{max_req_time}s", "MAXOUTPUT": str(MAX_OUTPUT)}
        async with start_harness(**settings) as harness:
            # Imports and one-time allocations are not a case's cost.
            for path in ("/run", "/run?raw=1", "/run"):
                await harness.request(post(path, b"honest"))
            for case in CASES:
                if case.slow == (max_req_time == SLOW_REQ_TIME):
                    with subtests.test(case.name):
                        await run(harness, case)


def once_late() -> Script:
    """Send an honest worker's head 0.3 s after the request."""
    return [deferLater(reactor, 0.3), HEAD, chunk(OUT)]


@pytest_twisted.ensureDeferred
async def test_a_worker_that_never_responds_is_a_failure_even_for_short_timeouts() -> None:
    payload = b'{"script": "true", "timeout": "10ms"}'
    request = post("/run", payload, "Content-Type: application/json")
    async with start_harness(MAXREQTIME="1s") as harness:
        harness.worker.responses[b'{"script":"true","timeout":"10ms"}'] = once(b"")
        received, seconds = await harness.request(request)
        assert read(received, raw=False) == (Ending.LATE.value, "")
        assert MIN_GRACE - 0.1 <= seconds < MIN_GRACE + TOLERANCE
        harness.worker.responses[b'{"script":"true","timeout":"10ms"}'] = once_late
        received, _ = await harness.request(request)
        assert read(received, raw=False)[0] == Ending.TIMEOUT.value
