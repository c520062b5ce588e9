"""
The part of Fly's proxy that a coordinator uses: requests to an app go to the machine that they name.

See https://fly.io/docs/networking/dynamic-request-routing/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from bfaas.http.client import BodyReceiver, BytesProducer, wait_for_response
from bfaas.http.server import error_response, read_body
from bfaas.machines.api import MachinesAPI, NotFoundError, State

if TYPE_CHECKING:
    from twisted.web.iweb import IAgent

FORCE_INSTANCE = "fly-force-instance-id"

# What is of one connection alone (RFC 9110, 7.6.1), or tells its framing.
_HOP_BY_HOP = {
    b"connection", b"content-length", b"keep-alive", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
}  # fmt: skip


class FlyProxy(Resource):
    """Passes each request to the started machine that its header names, and the answer back as it comes."""

    isLeaf = True
    _log = Logger()

    def __init__(self, machines: MachinesAPI, agent: IAgent) -> None:
        super().__init__()
        self._machines = machines
        self._agent = agent

    def render(self, request: Request) -> int:
        """Begin to pass a request on; one that goes away is let go."""
        passing = Deferred.fromCoroutine(self._pass_on(request))
        request.notifyFinish().addErrback(lambda _: passing.cancel())
        passing.addErrback(lambda failure: failure.trap(CancelledError) and None)
        passing.addErrback(lambda failure: self._log.failure("in passing a request on", failure))
        return NOT_DONE_YET

    async def _pass_on(self, request: Request) -> None:
        if not request.uri.startswith(b"/"):  # behind an address, "@elsewhere" would lead elsewhere
            request.write(error_response(request, 400, "a request names a path"))
            request.finish()
            return
        address = await self._address(request.getHeader(FORCE_INSTANCE))
        if address is None:
            request.write(error_response(request, 503, "no such machine is started"))
            request.finish()
            return
        try:
            response = await wait_for_response(
                self._agent.request(
                    request.method,
                    address.encode() + request.uri,
                    Headers(dict(_passed(request.requestHeaders))),
                    BytesProducer(read_body(request)),
                )
            )
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001 - a machine that boots does not listen yet
            request.write(error_response(request, 502, "the machine does not answer"))
            request.finish()
            return
        await self._answer(request, response)

    async def _address(self, machine_id: str | None) -> str | None:
        if machine_id is None:
            return None
        try:
            machine = await self._machines.get(machine_id)
        except NotFoundError:
            return None
        if machine.state is not State.STARTED or machine.url is None:
            return None
        split = urlsplit(machine.url)
        return f"{split.scheme}://{split.netloc}"

    async def _answer(self, request: Request, response: Any) -> None:
        request.setResponseCode(response.code)
        for name, values in _passed(response.headers):
            request.responseHeaders.setRawHeaders(name, values)
        request.responseHeaders.addRawHeader("Via", "1.1 fly.io")

        def begin(producer: Any) -> None:
            request.write(b"")
            request.registerProducer(producer, True)

        received = BodyReceiver(request.write, begin)
        response.deliverBody(received)
        try:
            await received.done
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001 - however it broke off, the client is to see that it did
            request.unregisterProducer()
            transport: Any = request.transport
            transport.abortConnection()
        else:
            request.unregisterProducer()
            request.finish()


def _passed(headers: Headers) -> list[tuple[bytes, list[bytes]]]:
    """Choose the headers that go on to the next hop."""
    named = {
        word.strip().lower()
        for value in headers.getRawHeaders(b"connection", [])
        for word in value.split(b",")
    }
    return [
        (name, list(values))
        for name, values in headers.getAllRawHeaders()
        if name.lower() not in _HOP_BY_HOP | named | {b"host"}
    ]
