"""Scripts for clients, the outcomes of their requests, and a proxy that counts deliveries to workers."""

from __future__ import annotations

import enum
import re
from collections import Counter
from typing import TYPE_CHECKING

from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.protocols import portforward

from bfaas.http.strict_agent import IncompleteResponseError

if TYPE_CHECKING:
    from tests.support.responses import Response

ENDLESS = "sleep 1000"

# The script contains the number of its request, and detects files of an earlier run on its machine.
SCRIPT = "# request {number};\ntest -e used && echo DIRTY; touch used; {work}; echo done; exit {code}"
WORK = ("true", "sleep 0.3", "seq 1 20000", "sleep 0.1 & true", "echo err >&2", "sleep 0.8", ENDLESS)

_NUMBER = re.compile(rb"# request (\d+);")
CUT = (ConnectError, ConnectionClosed, IncompleteResponseError)


class Ending(enum.Enum):
    """The outcomes of a request."""

    WHOLE = "a response with the exit of its script"
    TIMEOUT = "a response that ends with a timeout"
    LOST = "a response that ends with a lost worker"
    REFUSED = "an error in one line"
    CUT = "a connection lost with its coordinator"


class _CountingProxy(portforward.ProxyServer):
    factory: DeliveryCounter

    def connectionMade(self) -> None:
        super().connectionMade()
        self.received = b""
        self.counted: set[int] = set()

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        new = {int(number) for number in _NUMBER.findall(self.received)} - self.counted
        self.factory.sent.update(new)
        self.counted |= new
        super().dataReceived(data)


class DeliveryCounter(portforward.ProxyFactory):
    """A proxy between the coordinators and the workers that counts how often each script is sent."""

    noisy = False
    protocol = _CountingProxy

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.sent: Counter[int] = Counter()


def ending(response: Response, work: str, code: int) -> Ending:
    """Return the outcome of a complete response."""
    if response.status != 200:
        assert response.status in (502, 503, 504), response
        assert re.fullmatch(rb"[^\n]+\n", response.body), response
        return Ending.REFUSED
    exit_ = response.exit
    if "reason" not in exit_:
        assert work != ENDLESS, response
        assert exit_["code"] == code, response
        assert response.output("stdout").endswith("done\n"), response
        return Ending.WHOLE
    ended = {("timeout", 124): Ending.TIMEOUT, ("worker-lost", 125): Ending.LOST}
    return ended[exit_["reason"], exit_["code"]]
