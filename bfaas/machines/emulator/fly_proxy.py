"""
The part of Fly's proxy that a coordinator uses: it forwards a request to the machine that a header names.

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

from bfaas.deadline import ignore_cancellation
from bfaas.http.client import BodyReceiver, BytesProducer, wait_for_response
from bfaas.http.server import error_response, read_body
from bfaas.machines.api import NotFoundError, State

if TYPE_CHECKING:
    from twisted.python.failure import Failure
    from twisted.web.iweb import IAgent

    from bfaas.machines.emulator.state import EmulatedMachines

# Not imported from bfaas.protocol.formats: if the name is wrong in the coordinator, end-to-end tests against
# the emulator fail.
_FORCE_INSTANCE = "fly-force-instance-id"

# Headers of one connection (RFC 9110, 7.6.1) or of its framing.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


class FlyProxy(Resource):
    """Forwards each request to the started machine that its header names, and streams the response back."""

    isLeaf = True
    _log = Logger()

    def __init__(self, machines: EmulatedMachines, agent: IAgent) -> None:
        super().__init__()
        self._machines = machines
        self._agent = agent

    def render(self, request: Request) -> int:
        """Forward a request, until its client disconnects."""
        forwarding = Deferred.fromCoroutine(self._forward(request))
        request.notifyFinish().addErrback(lambda _: forwarding.cancel())
        forwarding.addErrback(ignore_cancellation)
        forwarding.addErrback(self._abort, request)
        return NOT_DONE_YET

    def _abort(self, failure: Failure, request: Request) -> None:
        self._log.failure("while forwarding a request", failure)
        _abort_connection(request)

    async def _forward(self, request: Request) -> None:
        if not request.uri.startswith(b"/"):  # appended to an address, "@host/path" would lead to that host
            self._send_error(request, 400, "the request target is not a path")
            return
        address = self._address(request.getHeader(_FORCE_INSTANCE))
        if address is None:
            self._send_error(request, 503, "no such machine is started")
            return
        try:
            # Without treq, which would change Content-Encoding in the response.
            response = await wait_for_response(
                self._agent.request(
                    request.method,
                    address.encode() + request.uri,
                    Headers(dict(_end_to_end(request.requestHeaders))),
                    BytesProducer(read_body(request)),
                )
            )
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001 - any failure means 502, such as that the worker does not listen yet
            self._send_error(request, 502, "the machine does not respond")
            return
        await self._send_response(request, response)

    def _send_error(self, request: Request, status: int, message: str) -> None:
        request.write(error_response(request, status, message))
        request.finish()

    def _address(self, machine_id: str | None) -> str | None:
        """Return the scheme and authority of a started machine's URL; None if it cannot be reached."""
        if machine_id is None:
            return None
        try:
            machine = self._machines.look_up(machine_id)
        except NotFoundError:
            return None
        if machine.state is not State.STARTED or machine.url is None:
            return None
        split = urlsplit(machine.url)
        return f"{split.scheme}://{split.netloc}"

    async def _send_response(self, request: Request, response: Any) -> None:
        request.setResponseCode(response.code)
        for name, values in _end_to_end(response.headers):
            request.responseHeaders.setRawHeaders(name, values)
        request.responseHeaders.addRawHeader("Via", "1.1 fly.io")

        def begin(producer: Any) -> None:
            request.write(b"")
            request.registerProducer(producer, True)

        receiver = BodyReceiver(request.write, begin)
        response.deliverBody(receiver)
        try:
            await receiver.done
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001 - the client has to see every incomplete response as incomplete
            request.unregisterProducer()
            _abort_connection(request)
        else:
            request.unregisterProducer()
            request.finish()


def _abort_connection(request: Request) -> None:
    transport: Any = request.transport
    if transport is not None:
        transport.abortConnection()


def _end_to_end(headers: Headers) -> list[tuple[bytes, list[bytes]]]:
    """Return the headers to forward."""
    connection_options = {
        option.strip().lower()
        for value in headers.getRawHeaders(b"connection", [])
        for option in value.split(b",")
    }
    return [
        (name, list(values))
        for name, values in headers.getAllRawHeaders()
        if name.lower() not in _HOP_BY_HOP | connection_options | {b"host"}
    ]
