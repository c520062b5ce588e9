"""
Hostile clients: the single outcome of each request, and the part of it that reaches a worker.

Each case also bounds the cost to the coordinator, and checks that the next request is served.
"""

from __future__ import annotations

import enum
import gzip
import io
import json
import tarfile
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
"""Below the default: on a busy host, 1 MiB in tiny chunks takes longer than the limit for a request."""
OVERSIZED_LENGTH = b"Content-Length: %d\r\n" % (MAX_BODY + 1)
TOO_LARGE = f"413 the body is larger than {MAX_BODY} bytes"
LATE = "408 the request was not complete within 15 s"
NOT_FOUND = "404 not found"
NOT_ALLOWED = "405 method not allowed"
NOT_SUPPORTED = "501 method not supported"
NO_TARGET = "400 the request target is neither a path nor a URL that matches Host"
ENCODED = "415 Content-Encoding is not supported: send the body uncompressed"
FORM_DATA = "415 the body is form data: send the script itself, or send it as text/plain"
FINE = "0"
TIMEOUT = "124 timeout"
CUT = "cut off"


class Action(enum.Enum):
    """Actions of a client other than sending data and closing its connection."""

    PAUSE = enum.auto()
    RESUME = enum.auto()
    HALF_CLOSE = enum.auto()


Steps = Iterable["bytes | Deferred[None] | End | Action"]
ScriptFactory = Callable[[], Steps]


@dataclass(frozen=True)
class Case:
    """The behaviour of a client, its outcome, and the number of runs that reach a worker."""

    name: str
    steps: ScriptFactory
    outcome: str
    runs: int = 0


START = b"POST /run HTTP/1.1\r\nHost: localhost\r\n"
LENGTH = b"Content-Length: 5\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = post("/run", b"evil")
RUN = post("/run", b"harmless")
PERSISTENT = RUN.replace(b"Connection: close\r\n", b"")


def once(*script: bytes | Deferred[None] | End | Action) -> ScriptFactory:
    """Send data, and wait until the connection is closed."""
    return lambda: script


def with_headers(*fields: bytes, body: bytes = b"hello") -> ScriptFactory:
    """Request a run with these headers, followed by a smuggled request."""
    return once(START + b"".join(fields) + b"\r\n" + body + SMUGGLED)


def chunks(body: bytes) -> ScriptFactory:
    return with_headers(CHUNKED, body=body)


def endless(start: bytes, more: bytes) -> ScriptFactory:
    """Send data, then repeat other data without end."""

    def script() -> Steps:
        yield start
        yield from repeat(more * max(1, 60_000 // len(more)))

    return script


def slowly(start: bytes, more: bytes) -> ScriptFactory:
    """Send data, then repeat other data, one byte every half second."""

    def script() -> Steps:
        yield start
        for index in range(1000):
            yield deferLater(reactor, 0.5)
            yield more[index % len(more) :][:1]

    return script


def request_line(method: bytes, target: bytes) -> ScriptFactory:
    return once(
        b"%b %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
        % (method, target)
    )


def form(*parts: bytes, end: bytes = b"--B--\r\n") -> ScriptFactory:
    """Send a form of parts from `part`."""
    return once(post("/run", b"".join(parts) + end, "Content-Type: multipart/form-data; boundary=B"))


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--B\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"


def archive(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"") -> bytes:
    """Return a part with a tar archive of one member."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, len(data)
        tar.addfile(member, io.BytesIO(data))
    return part("tar", packed.getvalue() if not data else gzip.compress(packed.getvalue()))


def as_json(**fields: object) -> ScriptFactory:
    body = json.dumps({"script": "harmless", **fields}).encode()
    return once(post("/run", body, "Content-Type: application/json"))


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


MALFORMED_REQUESTS = [
    ("Content-Length, then chunked", with_headers(LENGTH, CHUNKED)),
    ("chunked, then Content-Length", with_headers(CHUNKED, LENGTH)),
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
    ("a header that is not UTF-8", with_headers(b"fly-replay-src: \xff\r\n", LENGTH)),
    ("two Host headers", with_headers(b"Host: other\r\n", LENGTH)),
    ("no Host header", once(b"POST /run HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello" + SMUGGLED)),
    ("sixty-five headers", with_headers(*[b"X: y\r\n"] * 65)),
    ("endless headers", endless(START, b"X: y\r\n")),
    ("an endless header line", endless(START + b"X: ", b"y" * 1000)),
    ("an endless request line", endless(b"POST /", b"y" * 1000)),
    ("chunks in HTTP/1.0", once((START + CHUNKED).replace(b"1.1", b"1.0") + b"\r\n" + LAST_CHUNK + SMUGGLED)),
    ("a chunk size with 0x", chunks(b"0x5\r\nhello\r\n" + LAST_CHUNK)),
    ("a chunk size with a sign", chunks(b"-1\r\nhello\r\n" + LAST_CHUNK)),
    ("a chunk longer than its size", chunks(b"4\r\nhello\r\n" + LAST_CHUNK)),
    ("a chunk with a bare LF", chunks(b"5\nhello\r\n" + LAST_CHUNK)),
    ("an endless chunk extension", endless(START + CHUNKED + b"\r\n5;", b"x" * 1000)),
    ("endless trailers", endless(START + CHUNKED + b"\r\n0\r\n", b"x: y\r\n")),
    ("HTTP/0.9", once(b"POST /run\r\n" + SMUGGLED)),
    ("HTTP/2", once(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")),
    ("TLS", once(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 500)),
    ("another protocol", once(b"SSH-2.0-OpenSSH_9.9\r\n")),
    ("garbage", once(bytes(range(256)) * 64)),
    ("endless zeros", endless(b"", b"\0")),
    ("endless line ends", endless(b"", b"\r\n")),
]  # fmt: skip

SCRIPT = part("script", b"harmless")
INCOMPLETE = "400 the body is not a complete multipart form"
NO_PATH = "it must be a relative path without empty components, . and .."
NO_FILE = "is neither a regular file nor a directory"

INVALID_FORMS = [
    ("a file with a path", [part("file", b"", "../a")],
     'file: "../a" has a path: send a tar part instead'),
    ("a file above the directory", [part("file", b"", "..")], f'files: "..": {NO_PATH}'),
    ("a file with a line break in its name", [part("file", b"", "a\rb")],
     "a file part has no filename"),
    ("a file twice", [part("file", b"", "a")] * 2, 'duplicate file "a"'),
    ("2000 parts", [part("env", b"A=")] * 2000, 'duplicate variable "A"'),
    ("2000 files", [part("file", b"", f"{number}") for number in range(1999)], "more than 1000 files"),
    ("an archive with an absolute path", [archive("/etc/passwd")], f'files: "/etc/passwd": {NO_PATH}'),
    ("an archive with a path above", [archive("a/../../b")], f'files: "a/../../b": {NO_PATH}'),
    ("an archive with a symbolic link", [archive("a", tarfile.SYMTYPE, "/")], f'tar: "a" {NO_FILE}'),
    ("an archive with a hard link", [archive("a", tarfile.LNKTYPE, "/etc/passwd")], f'tar: "a" {NO_FILE}'),
    ("an archive with a device", [archive("a", tarfile.BLKTYPE)], f'tar: "a" {NO_FILE}'),
    ("an archive with a FIFO", [archive("a", tarfile.FIFOTYPE)], f'tar: "a" {NO_FILE}'),
    ("a bomb", [archive("a", data=bytes(200 << 20))],
     f"tar: larger than {MAX_BODY} bytes uncompressed"),
    ("an archive of garbage", [part("tar", b"harmless" * 100)], "tar: it is not a tar archive, or damaged"),
]  # fmt: skip

INVALID_JSON: list[tuple[str, dict[str, object], str]] = [
    ("a file that is not base64", {"files": {"a": {"base64": "x"}}},
     'files: "a" is not base64 (RFC 4648, section 4)'),
    ("a setuid file", {"files": {"a": {"base64": "", "mode": "4755"}}},
     'files: "a": mode is not a string such as "0644"'),
    ("a path of NUL", {"files": {"a\0": ""}},
     r'files: "a\u0000": it contains a control character or is not UTF-8'),
    ("a path of 17 components", {"files": {"a/" * 16 + "b": ""}},
     f'files: "{"a/" * 16}b": it has more than 16 components'),
    ("a file that is a directory", {"files": {"a": "", "a/b": ""}},
     "files: a path is invalid: it is both a file and a directory"),
    ("a pattern of an absolute path", {"outputs": ["/etc/*"]}, f'outputs: "/etc/*": {NO_PATH}'),
    ("a pattern of wildcards", {"outputs": ["**/" * 3 + "*"]},
     'outputs: "**/**/**/*": it has more than 2 components **'),
    ("21 patterns", {"outputs": ["a"] * 21}, "outputs: more than 20 patterns"),
]  # fmt: skip

ENDLESS = post("/run", b"endless")
MANY = START + CHUNKED + b"Connection: close\r\n\r\n" + b"".join(chunk(b"#") for _ in range(20_000))

CASES = [
    *(Case(name, steps, MALFORMED) for name, steps in MALFORMED_REQUESTS),
    # Above the size limit.
    Case("a large body", once(post("/run", b"x" * MAX_BODY + b"x")), TOO_LARGE),
    Case("an announced large body", with_headers(OVERSIZED_LENGTH, body=b""), TOO_LARGE),
    Case("an announced vast body", with_headers(b"Content-Length: 999999999999999999\r\n"), TOO_LARGE),
    Case("a large body with 100-continue",
         with_headers(b"Expect: 100-continue\r\n", OVERSIZED_LENGTH, body=b""), TOO_LARGE),
    Case("a large body in chunks", chunks(chunk(b"x" * MAX_BODY) + chunk(b"x") + LAST_CHUNK), TOO_LARGE),
    Case("a chunk of 2**64", chunks(b"f" * 16 + b"\r\n" + b"x" * MAX_BODY), TOO_LARGE),
    Case("endless chunks", endless(START + CHUNKED + b"\r\n", chunk(b"x")), TOO_LARGE),
    Case("an endless body", endless(START + b"Content-Length: 1048576000\r\n\r\n", b"x" * 1000),
         TOO_LARGE),
    # Other than POST /run.
    Case("GET", request_line(b"GET", b"/run"), NOT_ALLOWED),
    Case("OPTIONS", request_line(b"OPTIONS", b"/run"), NOT_ALLOWED),
    Case("TRACE", request_line(b"TRACE", b"/run"), NOT_ALLOWED),
    Case("HEAD", request_line(b"HEAD", b"/run"), "405 "),
    Case("a method in lower case", request_line(b"post", b"/run"), NOT_SUPPORTED),
    Case("CONNECT", request_line(b"CONNECT", b"169.254.169.254:80"), NOT_SUPPORTED),
    Case("the target *", request_line(b"POST", b"*"), NO_TARGET),
    Case("the URL of another host", request_line(b"POST", b"http://169.254.169.254/run"), NO_TARGET),
    # Bodies and paths that are not supported.
    Case("a compressed body", once(post("/run", b"evil", "Content-Encoding: br")), ENCODED),
    Case("two content types",
         once(post("/run", b"evil", "Content-Type: text/plain", "Content-Type: text/plain")),
         "400 more than one Content-Type"),
    Case("a form", once(post("/run", b"script=evil&x=1", f"Content-Type: {FORM}")), FORM_DATA),
    Case("an unknown expectation", once(post("/run", b"evil", "Expect: evil")),
         "417 the only supported expectation is 100-continue"),
    Case("a path with two slashes", request_line(b"POST", b"//run"), NOT_FOUND),
    Case("a path with dot segments", request_line(b"POST", b"/run/../run"), NOT_FOUND),
    Case("a path that is not UTF-8", request_line(b"POST", b"/run%ff"), NOT_FOUND),
    Case("a POST to a GET path", request_line(b"POST", b"/healthz"), NOT_ALLOWED),
    # Files.
    *(Case(name, form(SCRIPT, *parts), f"400 {message}") for name, parts, message in INVALID_FORMS),
    Case("a form without an end", form(SCRIPT, end=b""), INCOMPLETE),
    Case("a form of boundaries", form(end=b"--B\r\n" * (MAX_BODY // 6)), INCOMPLETE),
    Case("a form of headers", form(b"--B\r\n" + b"a: b\r\n" * 40_000), INCOMPLETE),
    Case("a form with a large body", form(SCRIPT, part("file", b"x" * MAX_BODY, "a")), TOO_LARGE),
    *(Case(name, as_json(**fields), f"400 {message}") for name, fields, message in INVALID_JSON),
    # At most one run.
    Case("a pipelined request", once(PERSISTENT + SMUGGLED), FINE, 1),
    Case("a hundred pipelined requests", once(PERSISTENT + SMUGGLED * 100), FINE, 1),
    Case("pipelined requests during the response",
         lambda: (ENDLESS, deferLater(reactor, 0.2), *[SMUGGLED * 500] * 200), CUT, 1),
    Case("headers with secrets, and headers for Fly's proxy", with_secrets, FINE, 1),
    Case("HTTP/1.0", once(RUN.replace(b"1.1", b"1.0") + SMUGGLED), FINE, 1),
    Case("a query of 3000 fields", once(post("/run?" + "&a=b" * 2000 + "&%%%=" * 1000, b"harmless")),
         FINE, 1),
    Case("a cookie of 7500 cookies", once(post("/run", b"harmless", "Cookie: " + "a;" * 7500)), FINE, 1),
    Case("chunks of one byte", once(MANY + LAST_CHUNK), FINE, 1),
    Case("a trailer for Fly's proxy",
         once(MANY + b"0\r\nfly-replay: app=evil\r\n\r\n"), FINE, 1),
    Case("half a request, then a close", once(RUN[:-1], End.CLOSE), CUT),
    Case("half a head, then a reset", once(RUN[:30], End.RESET), CUT),
    Case("a reset during the response", lambda: (ENDLESS, deferLater(reactor, 0.2), End.RESET), CUT, 1),
    Case("a close during the response", lambda: (ENDLESS, deferLater(reactor, 0.2), End.CLOSE), CUT, 1),
    Case("a half-close during the response",
         lambda: (ENDLESS, deferLater(reactor, 0.2), Action.HALF_CLOSE), CUT, 1),
    Case("half a request, then a half-close", once(RUN[:-1], Action.HALF_CLOSE), CUT),
    Case("reads nothing until the deadline",
         lambda: (Action.PAUSE, ENDLESS, deferLater(reactor, MAX_REQ_TIME + 1), Action.RESUME), TIMEOUT, 1),
]  # fmt: skip

SLOW = [
    Case("a head, byte by byte", slowly(b"", START + b"X: " + b"y" * 1000), LATE),
    Case("a body, byte by byte", slowly(START + b"Content-Length: 1000\r\n\r\n", b"x"), LATE),
    Case("chunks, byte by byte", slowly(START + CHUNKED + b"\r\n", chunk(b"x")), LATE),
    Case("an incomplete head", once(START), LATE),
    Case("an incomplete body", once(START + LENGTH + b"\r\nhell"), LATE),
    Case("100-continue without a body", once(START + LENGTH + b"Expect: 100-continue\r\n\r\n"), LATE),
    Case("bare line feeds", once((START + LENGTH).replace(b"\r", b"") + b"\nhello"), LATE),
    Case("trailers, byte by byte", slowly(START + CHUNKED + b"\r\n0\r\n", b"x: y\r\n"), LATE),
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
    response, content = parse_response(received, method)
    if response.status != 200:
        assert response.getheader("content-type") == "text/plain; charset=utf-8"
        return f"{response.status} {content.decode().removesuffix(chr(10))}"
    name, exit_ = parse_events(content)[-1]
    assert name == "exit"
    return f"{exit_['code']} {exit_.get('reason', '')}".strip()


async def attack(harness: Harness, case: Case) -> tuple[str, float]:
    """Execute the steps of a case; return the outcome and the duration in seconds."""
    started = time.monotonic()
    peer = await harness.call(b"")
    for step in takewhile(lambda _: peer.end is None, case.steps()):
        if isinstance(step, bytes):
            await peer.send(step)
        elif step is Action.PAUSE:
            peer.transport.pauseProducing()
        elif step is Action.RESUME:
            peer.transport.resumeProducing()
        elif step is Action.HALF_CLOSE:
            peer.transport.loseWriteConnection()
        elif step is End.CLOSE:
            peer.transport.loseConnection()
        elif step is End.RESET:
            peer.transport.abortConnection()
        elif not isinstance(step, Action | End):
            await step
    received = await Deadline(reactor, PATIENCE).run(peer.receive_all())
    seconds = time.monotonic() - started
    return CUT if case.outcome == CUT else read(received, "HEAD" if case.name == "HEAD" else "POST"), seconds


def check_runs(harness: Harness, before: int, scripts: int) -> None:
    """Check the number of runs since `before`; they contain no header or text of the hostile client."""
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
    """Run one case, and check the properties that all cases have in common."""
    before, machines = len(harness.worker.runs), len(harness.worker.peers)
    spent = Spent(harness.coordinator)
    outcome, seconds = await attack(harness, case)
    assert outcome == case.outcome
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
        # The first requests include imports and one-time allocations, which are not the cost of a case.
        for body in (b"x" * MAX_BODY, b"honest", b"honest"):
            await harness.request(post("/run", body))
        for step in form(part("file", b"x" * (MAX_BODY // 2), "a"))():
            assert isinstance(step, bytes)
            await harness.request(step)
        for case in CASES:
            with subtests.test(case.name):
                await run(harness, case)


@pytest_twisted.ensureDeferred
async def test_slow_requests_are_not_served_and_do_not_delay_others(subtests: pytest.Subtests) -> None:
    async with start_harness() as harness:
        await serve(harness)
        before = len(harness.worker.runs)
        spent = Spent(harness.coordinator)
        outcomes: dict[str, tuple[str, float]] = {}

        async def record(case: Case) -> None:
            outcomes[case.name] = await attack(harness, case)

        async def honest() -> None:
            for _ in range(10):
                await serve(harness)

        await together([*map(record, SLOW), honest()])
        for case in SLOW:
            with subtests.test(case.name):
                outcome, seconds = outcomes[case.name]
                assert outcome == case.outcome
                assert Channel.REQUEST_TIMEOUT - 0.5 < seconds < Channel.REQUEST_TIMEOUT + TOLERANCE
        check_runs(harness, before, 10)
        assert spent.memory <= MAX_MEMORY
        assert spent.lines <= MAX_LINES + 10


@pytest_twisted.ensureDeferred
async def test_cross_origin_requests_use_no_machine() -> None:
    coordinator = await start_coordinator()
    host = f"127.0.0.1:{coordinator.port}"
    page = f"Host: {host}"
    try:
        harness = Harness(coordinator, Worker())
        for fields, message in {
            (page, "Origin: http://evil.example"): "cross-origin requests are not allowed",
            (page, "Origin: null"): "cross-origin requests are not allowed",
            (page, "Sec-Fetch-Site: cross-site"): "cross-site requests are not allowed",
            ("Host: evil.example",): "the Host header is not a loopback name",
        }.items():
            request = post("/run", b"echo hello", *fields[1:]).replace(b"Host: localhost", fields[0].encode())
            received, _ = await harness.request(request)
            assert read(received) == f"403 {message}"
        assert coordinator.workers() == []
        same_origin = post("/run", b"echo hello", f"Origin: http://{host}", "Sec-Fetch-Site: same-origin")
        received, _ = await harness.request(same_origin.replace(b"Host: localhost", page.encode()))
        assert read(received) == FINE
        await harness.close()
    finally:
        assert await stop(coordinator) == 0, coordinator.program.output.decode()
