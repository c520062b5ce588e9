"""Free ports of the loopback interface."""

from __future__ import annotations

import socket
from random import SystemRandom

_PORTS = range(10_000, 32_768)
"""Ports below Linux's ephemeral range: no outgoing connection uses one between its choice and its use."""

_random = SystemRandom()  # hypothesis seeds the random module


def free_port() -> int:
    """Choose a port of 127.0.0.1 that is not in use."""
    while True:
        port = _random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
