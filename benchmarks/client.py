"""A minimal HTTP client: each request on a blocking socket of its own, received into one buffer."""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

_BUFFER_SIZE = 1 << 20
_TAIL_SIZE = 80
_TIMEOUT = 120.0


Server = int | tuple[str, int]
"""A port on this host, or a host and a port."""


class Response(NamedTuple):
    """
    A response that was received.

    `first_ms` and `end_ms` are the milliseconds from before the connection to the first byte of the body and
    to its end; `size` is the length of the body, `tail` its last bytes.
    """

    first_ms: float
    end_ms: float
    size: int
    tail: bytes

    def check(self, marker: bytes) -> Response:
        """Return the response. Raises `RuntimeError` unless the marker is in its tail."""
        if marker not in self.tail:
            raise RuntimeError(f"a response that ends with {self.tail!r}")
        return self


def get(path: str) -> bytes:
    """Encode a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def post(script: str, query: str = "", *headers: str, host: str = "localhost") -> bytes:
    """Encode a request to run a script."""
    lines = [f"Host: {host}", "Connection: close", f"Content-Length: {len(script)}", *headers]
    return "\r\n".join([f"POST /run{query} HTTP/1.1", *lines, "", script]).encode()


def open_request(server: Server, request: bytes) -> socket.socket:
    """Send a request; return its connection, from which nothing is read yet."""
    address = ("127.0.0.1", server) if isinstance(server, int) else server
    connection = socket.create_connection(address, _TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(request)
    return connection


def fetch(server: Server, request: bytes) -> Response:
    """Send a request, and read the response to its end. Raises `RuntimeError` unless its status is 200."""
    buffer = bytearray(_BUFFER_SIZE)
    started_at = time.perf_counter()
    with open_request(server, request) as connection:
        start = read_to_body(connection)
        first_at = time.perf_counter()
        size, tail = len(start), start[-_TAIL_SIZE:]
        while count := connection.recv_into(buffer):
            size += count
            tail = (tail + buffer[max(0, count - _TAIL_SIZE) : count])[-_TAIL_SIZE:]
    end_at = time.perf_counter()
    return Response(1000 * (first_at - started_at), 1000 * (end_at - started_at), size, tail)


def read_to_body(connection: socket.socket) -> bytes:
    """Read until part of the body has arrived. Raises `RuntimeError` unless the status is 200."""
    received = b""
    while not received.partition(b"\r\n\r\n")[2]:
        data = connection.recv(65536)
        if not data:
            break
        received += data
    if not received.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"a response that starts with {received[:200]!r}")
    return received
