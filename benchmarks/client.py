"""A client that costs next to nothing: each request on a blocking socket of its own, read into one buffer."""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

_PIECE = 1 << 20
_TAIL = 80
_PATIENCE = 120.0


class Heard(NamedTuple):
    """An answer: ms from before the connection to its body's first byte, and to its end; size; last bytes."""

    first_ms: float
    end_ms: float
    size: int
    tail: bytes

    def check(self, mark: bytes) -> Heard:
        """Raise `RuntimeError` unless it ends as it should."""
        if mark not in self.tail:
            raise RuntimeError(f"an answer that ends with {self.tail!r}")
        return self


def get(path: str) -> bytes:
    """Write a request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def post(script: str, query: str = "", *headers: str) -> bytes:
    """Write a request to run a script."""
    lines = ["Host: localhost", "Connection: close", f"Content-Length: {len(script)}", *headers]
    return "\r\n".join([f"POST /run{query} HTTP/1.1", *lines, "", script]).encode()


def begin(port: int, request: bytes) -> socket.socket:
    """Send a request, and leave the rest to the caller."""
    connection = socket.create_connection(("127.0.0.1", port), _PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(request)
    return connection


def ask(port: int, request: bytes) -> Heard:
    """Send a request, read the answer to its end. Raises `RuntimeError` unless it is 200."""
    buffer = bytearray(_PIECE)
    began = time.perf_counter()
    with begin(port, request) as connection:
        start = read_to_body(connection)
        first_at = time.perf_counter()
        size, tail = len(start), start[-_TAIL:]
        while read := connection.recv_into(buffer):
            size += read
            tail = (tail + buffer[max(0, read - _TAIL) : read])[-_TAIL:]
    return Heard(1000 * (first_at - began), 1000 * (time.perf_counter() - began), size, tail)


def read_to_body(connection: socket.socket) -> bytes:
    """Read until some of the body is there. Raises `RuntimeError` unless the answer is 200."""
    heard = b""
    while not heard.partition(b"\r\n\r\n")[2]:
        piece = connection.recv(65536)
        if not piece:
            break
        heard += piece
    if not heard.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"an answer that begins with {heard[:200]!r}")
    return heard
