"""
A client that attacks: what it says, the one ending that this has, and what reaches a worker of it.

Each case also shows what it costs the coordinator, and that the next request is served.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat, takewhile
from typing import TYPE_CHECKING

import pytest_twisted
from twisted.internet.task import deferLater

from bfaas.deadline import Deadline
from bfaas.http.channel import Channel
from bfaas.http.media_type import FORM
from tests.e2e.coordinator import PATIENCE, reactor, start_coordinator, stop, together
from tests.e2e.hostile import MAX_LINES, MAX_MEMORY, Harness, Spent, Worker, start_harness
from tests.support.hostile_worker import LAST_CHUNK, End, chunk, post
from tests.support.responses import parse_events, parse_response

if TYPE_CHECKING:
    import pytest
    from twisted.internet.defer import Deferred
MAX_REQ_TIME = 2.5
TOLERANCE = 15.0
"""Tolerated delay on a busy machine, in seconds."""

MALFORMED = "400 malformed request, or request head too large"
MAX_BODY = 256 * 1024
"""Less than the default: on a busy host, a mebibyte in tiny chunks takes longer than a request may."""
ONE_TOO_MANY = b"Content-Length: %d\r\n" % (MAX_BODY + 1)
TOO_LARGE = f"413 the body is larger than {MAX_BODY} bytes"
LATE = "408 the request was not complete within 15 s"
NOT_FOUND = "404 not found"
NOT_ALLOWED = "405 method not allowed"
NOT_SUPPORTED = "501 method not supported"
NO_TARGET = "400 the request target is neither a path nor a URL that matches Host"
CODED = "415 Content-Encoding is not supported: send the body uncompressed"
FORM_FOUND = "415 the body is form data: send the script itself, or send it as text/plain"
FINE = "0"
TIMEOUT = "124 timeout"
CUT = "cut off"


class Act(enum.Enum):
    """What a client does beside sending data and closing its connection."""

    PAUSE = enum.auto()
    RESUME = enum.auto()
    HALF_CLOSE = enum.auto()


Steps = Iterable["bytes | Deferred[None] | End | Act"]
ScriptFactory = Callable[[], Steps]


@dataclass(frozen=True)
class Case:
    """What a client sends, its outcome, and the number of scripts that workers get to run."""

    name: str
    says: ScriptFactory
    ending: str
    runs: int = 0


START = b"POST /run HTTP/1.1\r\nHost: there\r\n"
LENGTH = b"Content-Length: 5\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = post("/run", b"evil")
RUN = post("/run", b"harmless")
LASTING = RUN.replace(b"Connection: close\r\n", b"")


def once(*script: bytes | Deferred[None] | End | Act) -> ScriptFactory:
    """Send data, and wait for the end."""
    return lambda: script


def with_headers(*fields: bytes, body: bytes = b"hello") -> ScriptFactory:
    """Request a run with these headers, and smuggle another request behind it."""
    return once(START + b"".join(fields) + b"\r\n" + body + SMUGGLED)


def chunks(body: bytes) -> ScriptFactory:
    return with_headers(CHUNKED, body=body)


def endless(start: bytes, more: bytes) -> ScriptFactory:
    """Send data, then other data without end."""

    def script() -> Steps:
        yield start
        yield from repeat(more * max(1, 60_000 // len(more)))

    return script


def slowly(start: bytes, more: bytes) -> ScriptFactory:
    """Send data, then other data again and again, one byte each half second."""

    def script() -> Steps:
        yield start
        for at in range(1000):
            yield deferLater(reactor, 0.5)
            yield more[at % len(more) :][:1]

    return script


def asks(method: bytes, target: bytes) -> ScriptFactory:
    return once(
        b"%b %b HTTP/1.1\r\nHost: there\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
        % (method, target)
    )


def with_secrets() -> Steps:
    fields = [
        "Authorization: evil", "Cookie: evil=1", "Proxy-Authorization: evil", "Forwarded: for=evil",
        "X-Forwarded-For: 6.6.6.6, evil", "Via: 1.1 evil", "Fly-Client-IP: 6.6.6.6",
        "fly-force-instance-id: evil", "fly-replay: app=evil", "fly-prefer-region: evil",
        "fly-replay-src: instance=evil;state=bfaas-replayed", "Keep-Alive: timeout=evil",
        "Connection: fly-force-instance-id, authorization, host, content-length", "Upgrade: evil",
        "Worker: evil", "Coord: evil", "Referer: http://evil/", "User-Agent: evil",
        "TE: trailers, evil", "Accept-Encoding: gzip, evil", "Content-Type: application/evil", "X-Evil: 1",
    ]  # fmt: skip
    return [post("/run?evil=1", b"harmless", *fields)]


REFUSED = [
    ("a length and chunks", with_headers(LENGTH, CHUNKED)),
    ("chunks and a length", with_headers(CHUNKED, LENGTH)),
    ("two lengths", with_headers(LENGTH, b"Content-Length: 50\r\n")),
    ("a length twice", with_headers(LENGTH, LENGTH)),
    ("a length of 5000 digits", with_headers(b"Content-Length: " + b"1" * 5000 + b"\r\n")),
    ("a negative length", with_headers(b"Content-Length: -1\r\n")),
    ("an unknown coding", with_headers(b"Transfer-Encoding: xchunked\r\n")),
    ("an identity coding", with_headers(b"Transfer-Encoding: identity\r\n", LENGTH)),
    ("a space before the colon", with_headers(b"Transfer-Encoding : chunked\r\n", LENGTH)),
    ("a folded header", with_headers(b"X: a\r\n ", CHUNKED)),
    ("a bare CR", with_headers(b"X: a\r", CHUNKED)),
    ("a bare LF", with_headers(b"X: a\n", CHUNKED)),
    ("a NUL in a header", with_headers(b"X: a\0\r\n", LENGTH)),
    ("a header that is no UTF-8", with_headers(b"fly-replay-src: \xff\r\n", LENGTH)),
    ("two hosts", with_headers(b"Host: elsewhere\r\n", LENGTH)),
    ("no host", once(b"POST /run HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello" + SMUGGLED)),
    ("sixty-five headers", with_headers(*[b"X: y\r\n"] * 65)),
    ("headers without end", endless(START, b"X: y\r\n")),
    ("a header line without end", endless(START + b"X: ", b"y" * 1000)),
    ("a request line without end", endless(b"POST /", b"y" * 1000)),
    ("chunks in HTTP/1.0", once((START + CHUNKED).replace(b"1.1", b"1.0") + b"\r\n" + LAST_CHUNK + SMUGGLED)),
    ("a chunk in C", chunks(b"0x5\r\nhello\r\n" + LAST_CHUNK)),
    ("a signed chunk", chunks(b"-1\r\nhello\r\n" + LAST_CHUNK)),
    ("a chunk longer than its size", chunks(b"4\r\nhello\r\n" + LAST_CHUNK)),
    ("a chunk with a bare LF", chunks(b"5\nhello\r\n" + LAST_CHUNK)),
    ("an extension without end", endless(START + CHUNKED + b"\r\n5;", b"x" * 1000)),
    ("trailers without end", endless(START + CHUNKED + b"\r\n0\r\n", b"x: y\r\n")),
    ("HTTP/0.9", once(b"POST /run\r\n" + SMUGGLED)),
    ("HTTP/2", once(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")),
    ("TLS", once(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 500)),
    ("another protocol", once(b"SSH-2.0-OpenSSH_9.9\r\n")),
    ("garbage", once(bytes(range(256)) * 64)),
    ("zeros without end", endless(b"", b"\0")),
    ("line ends without end", endless(b"", b"\r\n")),
]  # fmt: skip

ENDLESS = post("/run", b"endless")
MANY = START + CHUNKED + b"Connection: close\r\n\r\n" + b"".join(chunk(b"#") for _ in range(20_000))

CASES = [
    *(Case(name, says, MALFORMED) for name, says in REFUSED),
    # Too much.
    Case("a large body", once(post("/run", b"x" * MAX_BODY + b"x")), TOO_LARGE),
    Case("a large body that is announced", with_headers(ONE_TOO_MANY, body=b""), TOO_LARGE),
    Case("a vast body that is announced", with_headers(b"Content-Length: 999999999999999999\r\n"), TOO_LARGE),
    Case("a large body that asks first",
         with_headers(b"Expect: 100-continue\r\n", ONE_TOO_MANY, body=b""), TOO_LARGE),
    Case("a large body in chunks", chunks(chunk(b"x" * MAX_BODY) + chunk(b"x") + LAST_CHUNK), TOO_LARGE),
    Case("a chunk of 2**64", chunks(b"f" * 16 + b"\r\n" + b"x" * MAX_BODY), TOO_LARGE),
    Case("chunks without end", endless(START + CHUNKED + b"\r\n", chunk(b"x")), TOO_LARGE),
    Case("a body without end", endless(START + b"Content-Length: 1048576000\r\n\r\n", b"x" * 1000),
         TOO_LARGE),
    # Other than POST /run.
    Case("GET", asks(b"GET", b"/run"), NOT_ALLOWED),
    Case("OPTIONS", asks(b"OPTIONS", b"/run"), NOT_ALLOWED),
    Case("TRACE", asks(b"TRACE", b"/run"), NOT_ALLOWED),
    Case("HEAD", asks(b"HEAD", b"/run"), "405 "),
    Case("in lower case", asks(b"post", b"/run"), NOT_SUPPORTED),
    Case("a tunnel", asks(b"CONNECT", b"169.254.169.254:80"), NOT_SUPPORTED),
    Case("everything", asks(b"POST", b"*"), NO_TARGET),
    Case("a proxy", asks(b"POST", b"http://169.254.169.254/run"), NO_TARGET),
    # Not a script.
    Case("a compressed body", once(post("/run", b"evil", "Content-Encoding: br")), CODED),
    Case("two types", once(post("/run", b"evil", "Content-Type: text/plain", "Content-Type: text/plain")),
         "400 more than one Content-Type"),
    Case("a form", once(post("/run", b"script=evil&x=1", f"Content-Type: {FORM}")), FORM_FOUND),
    Case("an expectation", once(post("/run", b"evil", "Expect: evil")),
         "417 the only supported expectation is 100-continue"),
    Case("two slashes", asks(b"POST", b"//run"), NOT_FOUND),
    Case("a path that climbs", asks(b"POST", b"/run/../run"), NOT_FOUND),
    Case("a path that is no UTF-8", asks(b"POST", b"/run%ff"), NOT_FOUND),
    Case("a path of a worker, the wrong way", asks(b"POST", b"/healthz"), NOT_ALLOWED),
    # One run, and nothing more.
    Case("another request behind", once(LASTING + SMUGGLED), FINE, 1),
    Case("a hundred requests behind", once(LASTING + SMUGGLED * 100), FINE, 1),
    Case("requests without end while it is answered",
         lambda: (ENDLESS, deferLater(reactor, 0.2), *[SMUGGLED * 500] * 200), CUT, 1),
    Case("secrets, and words to Fly's proxy", with_secrets, FINE, 1),
    Case("HTTP/1.0", once(RUN.replace(b"1.1", b"1.0") + SMUGGLED), FINE, 1),
    Case("a query of 3000 fields", once(post("/run?" + "&a=b" * 2000 + "&%%%=" * 1000, b"harmless")),
         FINE, 1),
    Case("a cookie of 7500 cookies", once(post("/run", b"harmless", "Cookie: " + "a;" * 7500)), FINE, 1),
    Case("a body of one byte a chunk", once(MANY + LAST_CHUNK), FINE, 1),
    Case("a trailer for Fly's proxy",
         once(MANY + b"0\r\nfly-replay: app=evil\r\n\r\n"), FINE, 1),
    Case("half a request", once(RUN[:-1], End.CLOSE), CUT),
    Case("half a head", once(RUN[:30], End.RESET), CUT),
    Case("a reset", lambda: (ENDLESS, deferLater(reactor, 0.2), End.RESET), CUT, 1),
    Case("a departure", lambda: (ENDLESS, deferLater(reactor, 0.2), End.CLOSE), CUT, 1),
    Case("a departure by half", lambda: (ENDLESS, deferLater(reactor, 0.2), Act.HALF_CLOSE), CUT, 1),
    Case("half a request by half", once(RUN[:-1], Act.HALF_CLOSE), CUT),
    Case("reads nothing until its time is over",
         lambda: (Act.PAUSE, ENDLESS, deferLater(reactor, MAX_REQ_TIME + 1), Act.RESUME), TIMEOUT, 1),
]  # fmt: skip

SLOW = [
    Case("a byte of a head at a time", slowly(b"", START + b"X: " + b"y" * 1000), LATE),
    Case("a byte of a body at a time", slowly(START + b"Content-Length: 1000\r\n\r\n", b"x"), LATE),
    Case("a chunk of a byte at a time", slowly(START + CHUNKED + b"\r\n", chunk(b"x")), LATE),
    Case("a head that does not end", once(START), LATE),
    Case("a body that does not end", once(START + LENGTH + b"\r\nhell"), LATE),
    Case("a body that is awaited", once(START + LENGTH + b"Expect: 100-continue\r\n\r\n"), LATE),
    Case("bare line feeds", once((START + LENGTH).replace(b"\r", b"") + b"\nhello"), LATE),
    Case("trailers at a byte a time", slowly(START + CHUNKED + b"\r\n0\r\n", b"x: y\r\n"), LATE),
]

HEADERS = {
    "accept-encoding", "authorization", "connection", "content-length", "fly-force-instance-id", "host",
    "run-id",
}  # fmt: skip


def read(received: bytes, method: str = "POST") -> str:
    """Return the outcome of the only response; fail if there is not exactly one, complete or cut off."""
    received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert received.count(b"HTTP/1.") == 1, received[:2000]
    assert b"evil" not in received
    answer, content = parse_response(received, method)
    if answer.status != 200:
        assert answer.getheader("content-type") == "text/plain; charset=utf-8"
        return f"{answer.status} {content.decode().removesuffix(chr(10))}"
    name, exit_ = parse_events(content)[-1]
    assert name == "exit"
    return f"{exit_['code']} {exit_.get('reason', '')}".strip()


async def attack(harness: Harness, case: Case) -> tuple[str, float]:
    """Act as the case does; return the outcome, and the seconds until it."""
    began = time.monotonic()
    peer = await harness.call(b"")
    for step in takewhile(lambda _: peer.end is None, case.says()):
        if isinstance(step, bytes):
            await peer.send(step)
        elif step is Act.PAUSE:
            peer.transport.pauseProducing()
        elif step is Act.RESUME:
            peer.transport.resumeProducing()
        elif step is Act.HALF_CLOSE:
            peer.transport.loseWriteConnection()
        elif step is End.CLOSE:
            peer.transport.loseConnection()
        elif step is End.RESET:
            peer.transport.abortConnection()
        elif not isinstance(step, Act | End):
            await step
    received = await Deadline(reactor, PATIENCE).run(peer.receive_all())
    seconds = time.monotonic() - began
    return CUT if case.ending == CUT else read(received, "HEAD" if case.name == "HEAD" else "POST"), seconds


def check_runs(harness: Harness, before: int, scripts: int) -> None:
    """Assert that workers got so many more scripts, and no headers or text of the hostile client."""
    runs = harness.worker.runs[before:]
    assert len(runs) == scripts, runs
    for lines, body in runs:
        assert {line.partition(":")[0].lower() for line in lines[1:]} == HEADERS, lines
        assert lines[0] in ("POST /run HTTP/1.1", "POST /run?raw=1 HTTP/1.1")
        assert "evil" not in "".join(lines)
        assert b"evil" not in body


async def serve(harness: Harness) -> None:
    received, _ = await harness.request(post("/run", b"honest"))
    assert read(received) == FINE


async def run(harness: Harness, case: Case) -> None:
    """Run one case, and check what must hold for every case."""
    before, machines = len(harness.worker.runs), len(harness.worker.peers)
    spent = Spent(harness.coordinator)
    ending, seconds = await attack(harness, case)
    assert ending == case.ending
    assert seconds < MAX_REQ_TIME + TOLERANCE
    check_runs(harness, before, case.runs)
    assert case.runs or len(harness.worker.peers) == machines
    await serve(harness)
    assert spent.memory <= MAX_MEMORY
    assert spent.lines <= MAX_LINES, harness.coordinator.program.output[-3000:].decode()


@pytest_twisted.ensureDeferred
async def test_each_hostile_request_has_one_outcome_and_a_bounded_cost(subtests: pytest.Subtests) -> None:
    async with start_harness(MAXREQTIME=f"{MAX_REQ_TIME}s", MAXBODY=str(MAX_BODY)) as harness:
        harness.worker.endless.add(b"endless")
        # Imports and one-time allocations are not a case's cost.
        for body in (b"x" * MAX_BODY, b"honest", b"honest"):
            await harness.request(post("/run", body))
        for case in CASES:
            with subtests.test(case.name):
                await run(harness, case)


@pytest_twisted.ensureDeferred
async def test_slow_requests_are_not_served_and_do_not_delay_others(subtests: pytest.Subtests) -> None:
    async with start_harness() as harness:
        await serve(harness)
        before = len(harness.worker.runs)
        spent = Spent(harness.coordinator)
        endings: dict[str, tuple[str, float]] = {}

        async def note(case: Case) -> None:
            endings[case.name] = await attack(harness, case)

        async def honest() -> None:
            for _ in range(10):
                await serve(harness)

        await together([*map(note, SLOW), honest()])
        for case in SLOW:
            with subtests.test(case.name):
                ending, seconds = endings[case.name]
                assert ending == case.ending
                assert Channel.REQUEST_TIMEOUT - 0.5 < seconds < Channel.REQUEST_TIMEOUT + TOLERANCE
        check_runs(harness, before, 10)
        assert spent.memory <= MAX_MEMORY
        assert spent.lines <= MAX_LINES + 10


@pytest_twisted.ensureDeferred
async def test_cross_origin_requests_use_no_machine() -> None:
    coordinator = await start_coordinator()
    here = f"127.0.0.1:{coordinator.port}"
    page = f"Host: {here}"
    try:
        harness = Harness(coordinator, Worker())
        for fields, line in {
            (page, "Origin: http://evil.example"): "cross-origin requests are not allowed",
            (page, "Origin: null"): "cross-origin requests are not allowed",
            (page, "Sec-Fetch-Site: cross-site"): "cross-site requests are not allowed",
            ("Host: evil.example",): "the Host header is not a loopback name",
        }.items():
            request = post("/run", b"echo hello", *fields[1:]).replace(b"Host: localhost", fields[0].encode())
            received, _ = await harness.request(request)
            assert read(received) == f"403 {line}"
        assert coordinator.workers() == []
        own = post("/run", b"echo hello", f"Origin: http://{here}", "Sec-Fetch-Site: same-origin")
        received, _ = await harness.request(own.replace(b"Host: localhost", page.encode()))
        assert read(received) == FINE
        await harness.hang_up()
    finally:
        assert await stop(coordinator) == 0, coordinator.program.output.decode()
