"""
The Machines API over HTTP, without sockets: the real client against the emulator's routes.

The faults of `network.py` apply; in addition, responses are truncated, wrong or not JSON.
"""

from __future__ import annotations

import json
import re
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionLost
from twisted.python.failure import Failure
from twisted.web._newclient import Response, ResponseNeverReceived
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent
from zope.interface import implementer

from bfaas.machines.api import MachinesError
from bfaas.machines.emulator.routes import MachinesServer
from tests.simulation.worker import BodyCollector, Connection

if TYPE_CHECKING:
    from tests.simulation.nodes import Node
    from tests.simulation.world import World

_PATH = re.compile(r"/v1/apps/(\w+)/machines(?:/(\w+)(?:/(\w+))?)?")
_ROUTES = {
    ("GET", 0): "list",
    ("POST", 0): "create",
    ("GET", 1): "get",
    ("DELETE", 1): "destroy",
    ("GET", "lease"): "get_lease",
    ("POST", "lease"): "acquire_lease",
    ("DELETE", "lease"): "release_lease",
}


class _Request:
    """The part of a `twisted.web` request that the routes use."""

    def __init__(self, uri: bytes, headers: Headers, body: bytes) -> None:
        split = urlsplit(uri)
        self.path = split.path
        self.args = parse_qs(split.query)
        self.content = BytesIO(body)
        self.code = 200
        self._headers = headers

    def getHeader(self, name: str) -> str | None:
        values = self._headers.getRawHeaders(name)
        return values[0] if values else None

    def setHeader(self, name: str, value: str) -> None:
        """Ignore it: the client under test reads no such header."""

    def setResponseCode(self, code: int) -> None:
        self.code = code


def _without_required_fields(body: bytes) -> bytes:
    """Remove the fields that a response about one machine or lease must have."""
    document = json.loads(body or b"{}")
    if isinstance(document, dict):
        for field in ("id", "status"):
            document.pop(field, None)
    return json.dumps(document).encode()


@implementer(IAgent)
class RoutesAgent:
    """An agent that calls the routes directly, and damages some responses."""

    def __init__(self, world: World, node: Node, network: Any) -> None:
        self._world = world
        self._node = node
        self._server = MachinesServer(network, "workers", "t")

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: Any = None
    ) -> Deferred[Any]:
        body = BodyCollector()
        if bodyProducer is not None:
            bodyProducer.startProducing(body)
        request = _Request(uri, headers or Headers(), body.data)
        handling = Deferred.fromCoroutine(self._handle(method.decode(), request))
        response: Deferred[Any] = Deferred(lambda _: handling.cancel())

        def respond(result: Any) -> None:
            if isinstance(result, Failure):
                if not result.check(CancelledError):
                    self._world.oracle.report(f"16: a route fails: {result.getTraceback()}")
            elif not response.called:
                response.callback(self._response(request.code, result))

        handling.addBoth(respond)
        return response

    async def _handle(self, method: str, request: _Request) -> bytes:
        match = _PATH.fullmatch(request.path.decode())
        assert match is not None, request.path
        app, machine_id, verb = match.groups()
        name = _ROUTES.get((method, verb or int(machine_id is not None)), verb)
        arguments = {"app": app} if machine_id is None else {"app": app, "machine_id": machine_id}
        try:
            body: bytes = await getattr(self._server, str(name))(request, **arguments)
        except MachinesError:
            body = self._server.machines_error(request, Failure())
        return body

    def _response(self, code: int, body: bytes) -> Any:
        """Build the response, or one that the network has damaged."""
        world = self._world
        if world.fault("http-reset"):
            return Failure(ResponseNeverReceived([Failure(ConnectionLost())]))
        if world.fault("http-html"):
            code, body = world.random.choice([200, 502, 302]), b"<html><body>Bad gateway</body></html>"
        elif world.fault("http-truncated"):
            body = body[: int(world.random.random() * len(body))]
        elif world.fault("http-wrong-json"):
            body = world.random.choice([b"{}", b'{"data": {}}', b"0", _without_required_fields(body)])
        headers = Headers({"fly-request-id": ["01-ams"]})
        response = Response._construct((b"HTTP", 1, 1), code, b"", headers, Connection(lambda: None), None)
        response._bodyDataReceived(body)
        response._bodyDataFinished()
        return response
