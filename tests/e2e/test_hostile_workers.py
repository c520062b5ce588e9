"""
Hostile workers: the single outcome of each response.

Each case also bounds the cost to the coordinator, and checks that the next request is served.
"""

from __future__ import annotations

import base64
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


class Outcome(enum.Enum):
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
    The response of a worker, the outcome for the client, and the output, or None if it is not deterministic.

    `slow` cases keep the coordinator busy: they have a longer deadline, so that they reach their limit first.
    The requests of cases with `outputs` ask for files.
    """

    name: str
    script: ScriptFactory
    outcome: Outcome
    output: str | None = None
    raw: bool = False
    slow: bool = False
    outputs: bool = False

    @property
    def request_body(self) -> bytes:
        """The script; with `outputs` the JSON that the coordinator sends to the worker."""
        if not self.outputs:
            return self.name.encode()
        return json.dumps({"script": self.name, "outputs": ["a", "d/*"]}, separators=(",", ":")).encode()


def once(*script: bytes | End) -> ScriptFactory:
    """Send data, and keep the connection open."""
    return lambda: script


def endless(start: bytes, more: bytes) -> ScriptFactory:
    """Send data, then repeat other data without end."""
    big = more * max(1, 60_000 // len(more))
    return lambda: chain([start], repeat(big))


def slowly(start: bytes, more: bytes) -> ScriptFactory:
    """Send data, then repeat other data without end, one byte at a time."""

    def script() -> Script:
        yield start
        for index in count():
            yield more[index % len(more) :][:1]
            yield deferLater(reactor, 0.02)

    return script


def replaced(old: bytes, new: bytes) -> ScriptFactory:
    """Send an honest worker's response with one part replaced."""
    assert old in HEAD
    return once(HEAD.replace(old, new) + chunk(OUT + DONE) + LAST_CHUNK, End.CLOSE)


def with_headers(*fields: bytes) -> ScriptFactory:
    """Send an honest worker's response with more headers."""
    return replaced(b"\r\n\r\n", b"\r\n".join([b"", *fields, b"", b""]))


def events(*data: bytes) -> ScriptFactory:
    """Send events in a complete body."""
    return once(HEAD, *map(chunk, data), LAST_CHUNK, End.CLOSE)


def body(data: bytes) -> ScriptFactory:
    """Send data after the head, in place of the chunked body."""
    return once(HEAD + data, End.CLOSE)


def with_length(length: bytes, data: bytes) -> ScriptFactory:
    head = HEAD.replace(b"Transfer-Encoding: chunked", b"Content-Length: " + length)
    return once(head + data, End.CLOSE)


def exit_event(data: bytes) -> bytes:
    return b"event: exit\ndata: " + data + b"\n\n"


def file_event(name: str = "a", data: str = "xyz", size: int = 3) -> bytes:
    encoded = base64.b64encode(data.encode()).decode()
    payload = {"name": name, "size": size, "mode": "0644", "base64": encoded}
    return b"event: file\ndata: " + json.dumps(payload).encode() + b"\n\n"


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
INVALID_FAILURES = [{"name": "\x1b[31m" * 100, "error": "x y"}, 1, {}, {"name": 1, "error": "x"}, [], None]
INVALID_FIELDS = {
    "wall_ms": 10**30, "cpu_ms": -1, "max_rss_kb": "9", "truncated": "yes", "dropped_bytes": 1e300,
    "oom": [1], "signal": "\x1b[31m", "reason": "a\nb", "fly-replay": "app=evil",
}  # fmt: skip

HEADS = [
    ("closes immediately", once(End.CLOSE)),
    ("resets immediately", once(End.RESET)),
    ("an incomplete head", once(HEAD[:60], End.CLOSE)),
    ("another protocol", once(b"SSH-2.0-OpenSSH_9.9\r\n")),
    ("HTTP/1.0", replaced(b"HTTP/1.1", b"HTTP/1.0")),
    ("no version", replaced(b"HTTP/1.1 ", b"")),
    ("negative status", replaced(b"200", b"-200")),
    ("status of eight digits", replaced(b"200", b"99999999")),
    ("status with underscores", replaced(b"200", b"2_0_0")),
    ("status with a sign", replaced(b"200", b"+200")),
    ("status zero", replaced(b"200", b"000")),
    ("status 299", replaced(b"200", b"299")),
    ("status 204", replaced(b"200", b"204")),
    ("a switch of protocols", replaced(b"200 OK", b"101 Switching Protocols\r\nUpgrade: websocket")),
    ("a redirect to a link-local address", replaced(b"200 OK", b"302 Found\r\nLocation: http://169.254.169.254/")),
    ("a redirect of the POST", replaced(b"200 OK", b"307 Go\r\nLocation: http://[fdaa::3]/v1/apps")),
    ("a worker's error page", replaced(b"200 OK", b"503 Busy\r\nfly-replay: app=evil")),
    ("endless interim responses", endless(b"", INTERIM)),
    ("six interim responses", once(INTERIM * 6 + HEAD)),
    ("endless headers", lambda: (STATUS, *(b"x-%d: y\r\n" % number for number in range(3000)))),
    ("sixty-five headers", with_headers(*[b"x: y"] * 65)),
    ("an endless header line", endless(STATUS + b"x: ", b"y" * 1000)),
    ("an endless status line", endless(b"HTTP/1.1 200 ", b"y" * 1000)),
    ("bare line feeds", once(HEAD.replace(b"\r\n", b"\n"), End.CLOSE)),
    ("a folded header", with_headers(b"X: a\r\n fly-replay: app=evil")),
    ("a space before the colon", with_headers(b"fly-replay : app=evil")),
    ("a NUL in a header", with_headers(b"X: a\0b")),
    ("a bare CR in a header", with_headers(b"X: a\rfly-replay: app=evil")),
    ("a header without a colon", with_headers(b"hello")),
    ("a header name that is not a token", with_headers(b"fly(replay): app=evil")),
    ("chunked and a length", with_headers(b"Content-Length: 5")),
    ("chunked twice", with_headers(b"Transfer-Encoding: chunked")),
    ("two lengths", with_length(b"5\r\nContent-Length: 6", b"")),
    ("a negative length", with_length(b"-1", b"")),
    ("a hexadecimal length", with_length(b"0x10", b"")),
    ("a length of 400 digits", with_length(b"1" * 400, b"")),
    ("an unknown coding", replaced(b"chunked", b"gzip, chunked")),
    ("a decompression bomb", once(HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n" + chunk(BOMB))),
    ("the content type of a replay", replaced(b"text/event-stream", b"application/vnd.fly.replay+json")),
    ("two content types", with_headers(b"Content-Type: text/html")),
    ("the format that was not requested", once(RAW + chunk(b"\nexit: 0\n") + LAST_CHUNK, End.CLOSE)),
    ("another machine's name", with_headers(b"Worker: 0123456789abcd")),
]  # fmt: skip

BAD, NOT_STARTED, LATE, LOST, LIMIT, TIMEOUT, FINE = Outcome

CASES = [
    *(Case(name, script, BAD) for name, script in HEADS),
    Case("the script could not be started",
         replaced(b"200 OK", b"500 Oh\r\nfly-replay: app=evil"), NOT_STARTED),
    Case("no response", once(), LATE),
    Case("a head without its end", once(HEAD[:-2]), LATE),
    Case("a head, byte by byte", slowly(STATUS, b"X: y\r\n"), LATE),
    # Harmless: the coordinator does not forward the hostile part.
    Case("five interim responses", once(INTERIM * 5 + HEAD + chunk(DONE) + LAST_CHUNK), FINE, ""),
    Case("headers for Fly's proxy",
         with_headers(b"fly-replay: app=evil", b"fly-replay-cache: /*"), FINE, "out"),
    Case("cookies and other headers",
         with_headers(b"Set-Cookie: a=b", b"Location: /", b"Alt-Svc: x"), FINE, "out"),
    Case("an unusual reason phrase", replaced(b"OK", b"<script>alert(1)</script>"), FINE, "out"),
    Case("headers named by Connection", with_headers(b"Connection: content-type, worker"), FINE, "out"),
    Case("a trailer for Fly's proxy", body(chunk(OUT + DONE) + b"0\r\nfly-replay: app=evil\r\n\r\n"),
         FINE, "out"),
    Case("a second response", body(chunk(DONE) + LAST_CHUNK + INTERIM + HEAD + chunk(OUT)), FINE, ""),
    Case("more than its Content-Length", with_length(b"%d" % len(DONE), DONE + OUT), FINE, ""),
    Case("an end by close", once(ENDLESS + OUT + DONE, End.CLOSE), FINE, "out"),
    Case("a reset after the exit",
         lambda: (HEAD + chunk(OUT + DONE), deferLater(reactor, 0.2), End.RESET), FINE, "out"),
    Case("invalid fields in the exit",
         events(exit_event(json.dumps({"code": 3, **INVALID_FIELDS}).encode())), FINE, ""),
    Case("line ends of every kind", events(STRING + b'\xe2\x80\xa8\\r\\n\\u0000\xc2\x85"\n\n', DONE),
         FINE, "\u2028\r\n\0\x85"),
    Case("chunks of one byte", once(RAW + TINY + chunk(b"\nexit: 3\n") + LAST_CHUNK),
         FINE, "x" * 50_000, raw=True),
    # Framing.
    Case("a chunk of 2**64", body(chunk(OUT) + b"f" * 16 + b"\r\n"), LOST, "out"),
    Case("a chunk size with a sign", body(chunk(OUT) + b"-1\r\n" + OUT), LOST, "out"),
    Case("a chunk size with 0x", body(chunk(OUT) + b"0x5\r\n" + OUT), LOST, "out"),
    Case("a chunk without a size", body(chunk(OUT) + b"\r\n" + OUT), LOST, "out"),
    Case("a chunk longer than its size", body(chunk(OUT) + b"1\r\n" + OUT), LOST, "out"),
    Case("bare line feeds in chunks", body(chunk(OUT) + b"1\nx\n"), LOST, "out"),
    Case("an endless chunk extension", endless(HEAD + chunk(OUT) + b"1;", b"x" * 1000), LOST, "out"),
    Case("endless chunk extensions", endless(HEAD, b"4;" + b"x" * 90 + b"\r\n: \n\n\r\n"), LOST, ""),
    Case("endless trailers", endless(HEAD + chunk(OUT) + b"0\r\n", b"x: y\r\n"), LOST, "out"),
    Case("an invalid trailer", body(chunk(DONE) + b"0\r\nfly-replay : app=evil\r\n\r\n"), LOST, ""),
    Case("less than its Content-Length", with_length(b"1000", OUT), LOST, "out"),
    Case("an incomplete chunk", body(chunk(OUT) + b"5\r\nab"), LOST, "out"),
    Case("no last chunk", body(chunk(OUT)), LOST, "out"),
    Case("no exit event", events(OUT), LOST, "out"),
    Case("an early end by close", once(ENDLESS + OUT, End.CLOSE), LOST, "out"),
    Case("a reset", once(HEAD + chunk(OUT) + chunk(b"event: "), End.RESET), LOST),
    Case("raw output that ends by close", once(ENDLESS_RAW + b"x\nexit: 0\n", End.CLOSE),
         LOST, "x\nexit: 0\n", raw=True),
    Case("a raw exit without the last chunk", once(RAW + chunk(b"x\nexit: 0\n"), End.CLOSE),
         LOST, "x\nexit: 0\n", raw=True),
    Case("a raw exit in the middle", once(RAW + chunk(b"\nexit: 0\n") + chunk(b"x") + LAST_CHUNK, End.CLOSE),
         LOST, "\nexit: 0\nx", raw=True),
    # Events.
    Case("an event of 100 MB", endless(HEAD, chunk(b"x" * 50_000)), LOST, ""),
    Case("a string of 100 MB", endless(HEAD + chunk(STRING), chunk(b"x" * 50_000)), LOST, ""),
    Case("endless comments", endless(HEAD, chunk(b": \n\n" * 10_000)), LOST, ""),
    Case("endless blank lines", endless(HEAD, chunk(b"\n" * 50_000)), LOST, ""),
    Case("nested lists", events(OUT, b"event: stdout\ndata: " + b"[" * 100_000 + b"\n\n"), LOST, "out"),
    Case("a nested exit", events(OUT, exit_event(b'{"a":' * 50_000 + b"0" + b"}" * 50_000)), LOST, "out"),
    Case("an exit of many fields", events(OUT, exit_event(b'{"code": 0, "x": [' + b"[]," * 100_000 + b"0]}")),
         LOST, "out"),
    Case("a CR in data", events(OUT, b'event: stdout\ndata: "a\r"\n\n'), LOST, "out"),
    Case("CRLF in events", events(OUT, OUT.replace(b"\n", b"\r\n")), LOST, "out"),
    Case("two data lines", events(OUT, b'event: stdout\ndata: "a"\ndata: "b"\n\n'), LOST, "out"),
    Case("an unknown event", events(OUT, b'event: fly-replay\ndata: "app=evil"\n\n'), LOST, "out"),
    Case("an unknown field", events(OUT, b'id: 1\nevent: stdout\ndata: "a"\n\n'), LOST, "out"),
    Case("output that is not a string", events(OUT, b'event: stdout\ndata: {"a": 1}\n\n'), LOST, "out"),
    Case("output that is not JSON", events(OUT, b"event: stdout\ndata: out\n\n"), LOST, "out"),
    Case("output that is not UTF-8", events(OUT, b'event: stdout\ndata: "\xff"\n\n'), LOST, "out"),
    Case("half a surrogate pair", events(OUT, b'event: stdout\ndata: "\\ud800"\n\n'), LOST, "out"),
    Case("output after the exit", events(OUT, exit_event(b'{"code": 0}'), OUT), LOST, "out"),
    Case("two exits", events(OUT, exit_event(b'{"code": 0}'), exit_event(b'{"code": 0}')), LOST, "out"),
    Case("an exit, then garbage", events(OUT, exit_event(b'{"code": 0}'), b"garbage\n\n"), LOST, "out"),
    Case("an invalid exit code", events(OUT, exit_event(b'{"code": 256}')), LOST, "out"),
    Case("an exit without a code", events(OUT, exit_event(b"{}")), LOST, "out"),
    # Files.
    Case("a file that was not requested", events(OUT, file_event(), DONE), LOST, "out"),
    *(
        Case(name, events(OUT, *sent), LOST, "out", outputs=True)
        for name, sent in [
            ("another file", [file_event("b")]),
            ("a file above the directory", [file_event("../a")]),
            ("a file with an absolute path", [file_event("/etc/passwd")]),
            ("a file through dots", [file_event("d/..")]),
            ("a file with a control character", [file_event("d/\x1b[2J")]),
            ("a hidden file", [file_event("d/.bashrc")]),
            ("a path of 100 kB", [file_event("d/" + "x" * 100_000)]),
            ("a file twice", [file_event(), file_event()]),
            ("a file that is not finished", [file_event(size=9), file_event("d/x")]),
            ("more than the size of a file", [file_event(size=2)]),
            ("a piece of 300 kB", [file_event(data="x" * 300_000, size=300_000)]),
            ("a file that is not an object", [b'event: file\ndata: "a"\n\n']),
            ("a file that is not base64", [file_event().replace(b"eHl6", b"eHl")]),
            ("a file of a thousand nested lists", [b"event: file\ndata: " + b"[" * 100_000 + b"\n\n"]),
            ("output after a file", [file_event(), OUT]),
            ("1001 files", [b"".join(file_event(f"d/{number}", "", 0) for number in range(1001))]),
        ]
    ),
    Case("files without end",
         lambda: chain([HEAD], (chunk(file_event(f"d/{number}", "x" * 9000, 9000)) for number in count())),
         LIMIT, outputs=True),
    Case("invalid output errors",
         events(exit_event(json.dumps({"code": 3, "output_errors": INVALID_FAILURES}).encode())),
         FINE, "", outputs=True),
    # Above the limits of size and time.
    Case("endless output", endless(HEAD, chunk(STRING + b"x" * 8192 + b'"\n\n')),
         LIMIT, "x" * MAX_OUTPUT),
    Case("endless raw output", endless(RAW, chunk(b"x" * 8192)),
         LIMIT, "x" * (MAX_OUTPUT + 64), raw=True),
    Case("endless escapes", endless(HEAD, chunk(STRING + b"\\u0078" * 8192 + b'"\n\n')),
         LIMIT, "x" * MAX_OUTPUT),
    Case("events of one byte", endless(HEAD, chunk(STRING + b'x"\n\n') * 2000), LIMIT, "x" * MAX_OUTPUT,
         slow=True),
    Case("empty events", endless(HEAD, chunk(STRING + b'"\n\n') * 2000), LIMIT, "", slow=True),
    Case("a wide string", events(STRING + "\U0001f600".encode() + b"x" * 500_000 + b'"\n\n'), LIMIT, ""),
    Case("silence in the body", once(HEAD + chunk(OUT)), TIMEOUT, "out"),
    Case("silence after the exit", once(HEAD + chunk(OUT + DONE)), TIMEOUT, "out"),
    Case("a body, byte by byte", slowly(HEAD + chunk(OUT), chunk(b":")), TIMEOUT, "out"),
]  # fmt: skip

HEADERS = {
    "cache-control", "connection", "content-encoding", "content-length", "content-type", "coord", "date",
    "run-id", "server", "transfer-encoding", "worker", "x-accel-buffering", "x-content-type-options",
}  # fmt: skip


def read(received: bytes, *, raw: bool) -> tuple[str, str]:
    """Return the outcome and the output of the response; fail unless it is one complete response."""
    response, content = parse_response(received)
    assert {name.lower() for name, _ in response.getheaders()} <= HEADERS, response.getheaders()
    assert b"evil" not in received
    assert response.reason in ("OK", "Bad Gateway", "Gateway Time-out"), response.reason
    if response.status != 200:
        assert response.getheader("content-type") == "text/plain; charset=utf-8"
        return f"{response.status} {content.decode().removesuffix(chr(10))}", ""
    if raw:
        assert response.getheader("content-type") == "application/octet-stream"
        output, separator, outcome = content.decode().rpartition("\nexit: ")
        assert separator, content[-80:]
        return outcome.removesuffix("\n"), output
    assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
    *output_events, (name, exit_) = parse_events(content)
    assert name == "exit"
    assert "exit" not in dict(output_events)
    assert set(exit_) <= {"code", "reason", "wall_ms"}, exit_
    outcome = f"{exit_['code']} {exit_.get('reason', '')}".strip()
    return outcome, "".join(data for name, data in output_events if name != "file")


async def run(harness: Harness, case: Case) -> None:
    """Run one case, and check the properties that all cases have in common."""
    harness.worker.responses[case.request_body] = case.script
    spent = Spent(harness.coordinator)
    fields = ["Content-Type: application/json"] if case.outputs else []
    path = "/run?raw=1" if case.raw else "/run"
    received, seconds = await harness.request(post(path, case.request_body, *fields))
    outcome, output = read(received, raw=case.raw)
    assert outcome == case.outcome.value
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
            # The first requests include imports and one-time allocations, which are not the cost of a case.
            for path in ("/run", "/run?raw=1", "/run"):
                await harness.request(post(path, b"honest"))
            for case in CASES:
                if case.slow == (max_req_time == SLOW_REQ_TIME):
                    with subtests.test(case.name):
                        await run(harness, case)


def delayed_response() -> Script:
    """Send the head of an honest worker's response 0.3 s after the request."""
    return [deferLater(reactor, 0.3), HEAD, chunk(OUT)]


@pytest_twisted.ensureDeferred
async def test_a_missing_response_is_a_failure_for_short_timeouts_too() -> None:
    payload = b'{"script": "true", "timeout": "10ms"}'
    request = post("/run", payload, "Content-Type: application/json")
    async with start_harness(MAXREQTIME="1s") as harness:
        harness.worker.responses[b'{"script":"true","timeout":"10ms"}'] = once(b"")
        received, seconds = await harness.request(request)
        assert read(received, raw=False) == (Outcome.LATE.value, "")
        assert MIN_GRACE - 0.1 <= seconds < MIN_GRACE + TOLERANCE
        harness.worker.responses[b'{"script":"true","timeout":"10ms"}'] = delayed_response
        received, _ = await harness.request(request)
        assert read(received, raw=False)[0] == Outcome.TIMEOUT.value
