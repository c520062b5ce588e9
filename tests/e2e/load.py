"""Scripts for clients, the outcomes of their requests, and a proxy that counts deliveries to workers."""

from __future__ import annotations

import enum
import re
from collections import Counter
from typing import TYPE_CHECKING

from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.protocols import portforward

from bfaas.http.strict_agent import IncompleteResponseError
from tests.support.responses import Response

if TYPE_CHECKING:
    from collections.abc import Container

    from tests.e2e.coordinator import Running

ENDLESS = "sleep 1000"

# The script contains the number of its request, and detects files of an earlier run on its machine.
_SCRIPT = "# request {number};\ntest -e used && echo DIRTY; touch used; {work}; echo done; exit {code}"
WORK = ("true", "sleep 0.3", "seq 1 20000", "sleep 0.1 & true", "echo err >&2", "sleep 0.8", ENDLESS)

_NUMBER = re.compile(rb"# request (\d+);")
_CUT = (ConnectError, ConnectionClosed, IncompleteResponseError)


class Outcome(enum.Enum):
    """The outcomes of a request."""

    COMPLETE = "a response with the exit of its script"
    TIMEOUT = "a response that ends with a timeout"
    LOST = "a response that ends with a lost worker"
    REJECTED = "an error message of one line"
    CUT = "a connection that the coordinator lost"


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


async def run_script(
    running: Running, number: int, work: str, code: int, killed: Container[Running]
) -> Outcome:
    """Send a script; return the outcome, which must be an allowed one: only killed coordinators cut."""
    script, pieces = _SCRIPT.format(number=number, work=work, code=code), list[bytes]()
    try:
        exchange = await running.begin(script, take=pieces.append)
        await exchange.end()
    except _CUT as error:
        if running not in killed:
            raise AssertionError(f"request {number} was cut: {error!r}") from error
        outcome = Outcome.CUT
    else:
        outcome = _outcome_of(Response(exchange.status, exchange.headers, b"".join(pieces)), work, code)
    assert b"DIRTY" not in b"".join(pieces), f"request {number}: {pieces}"
    return outcome


def _outcome_of(response: Response, work: str, code: int) -> Outcome:
    """Return the outcome of a complete response."""
    if response.status != 200:
        assert response.status in (502, 503, 504), response
        assert re.fullmatch(rb"[^\n]+\n", response.body), response
        return Outcome.REJECTED
    exit_ = response.exit
    if "reason" not in exit_:
        assert work != ENDLESS, response
        assert exit_["code"] == code, response
        assert response.output("stdout").endswith("done\n"), response
        return Outcome.COMPLETE
    outcomes = {("timeout", 124): Outcome.TIMEOUT, ("worker-lost", 125): Outcome.LOST}
    return outcomes[exit_["reason"], exit_["code"]]
