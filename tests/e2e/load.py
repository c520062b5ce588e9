"""What clients send, the ways in which that may end, and how often it is sent on to workers."""

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

# Tells which request it is of, and if it is not the first in this machine since it was wiped.
SCRIPT = "# request {number};\ntest -e used && echo DIRTY; touch used; {work}; echo done; exit {code}"
WORK = ("true", "sleep 0.3", "seq 1 20000", "sleep 0.1 & true", "echo err >&2", "sleep 0.8", ENDLESS)

_NUMBER = re.compile(rb"# request (\d+);")
CUT = (ConnectError, ConnectionClosed, IncompleteResponseError)


class Ending(enum.Enum):
    """The ways in which a request may end."""

    WHOLE = "an answer with its script's exit"
    TIMEOUT = "an answer that ends with a timeout"
    LOST = "an answer that ends with a lost worker"
    REFUSED = "an error of one line"
    CUT = "a connection that died with its coordinator"


class _Seen(portforward.ProxyServer):
    factory: Witness

    def connectionMade(self) -> None:
        super().connectionMade()
        self.read = b""
        self.noted: set[int] = set()

    def dataReceived(self, data: bytes) -> None:
        self.read += data
        new = {int(number) for number in _NUMBER.findall(self.read)} - self.noted
        self.factory.sent.update(new)
        self.noted |= new
        super().dataReceived(data)


class Witness(portforward.ProxyFactory):
    """Stands between the coordinators and the workers: counts how often each script is sent."""

    noisy = False
    protocol = _Seen

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.sent: Counter[int] = Counter()


def ending(answer: Response, work: str, code: int) -> Ending:
    """Tell how a request ended that was answered: with an exit, or with an error."""
    if answer.status != 200:
        assert answer.status in (502, 503, 504), answer
        assert re.fullmatch(rb"[^\n]+\n", answer.body), answer
        return Ending.REFUSED
    told = answer.exit
    if "reason" not in told:
        assert work != ENDLESS, answer
        assert told["code"] == code, answer
        assert answer.output("stdout").endswith("done\n"), answer
        return Ending.WHOLE
    ended = {("timeout", 124): Ending.TIMEOUT, ("worker-lost", 125): Ending.LOST}
    return ended[told["reason"], told["code"]]
