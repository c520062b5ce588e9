"""
The Machines API over emulated machines, and one worker that serves requests for all of them.

The worker is always ready. It starts each run with a line of output and never ends it. Run as a program.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.service import MultiService
from twisted.application.strports import service as listening
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from bfaas.http.server import text_response
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines
from bfaas.protocol import formats
from bfaas.system.runtime import RoleOptions, configure_reactor, run_service

if TYPE_CHECKING:
    from twisted.application.service import IService
    from twisted.web.server import Request


class Worker(Resource):
    """A worker for all machines: it names the machine of the request in its response."""

    isLeaf = True

    def render(self, request: Request) -> Any:
        """Respond to a probe, or start a run."""
        if request.path == formats.HEALTH_PATH.encode():
            return text_response(request, "ok")
        request.setHeader("Content-Type", formats.Format.EVENTS.value)
        request.setHeader(formats.WORKER, request.getHeader(formats.FORCE_INSTANCE) or "")
        request.write(formats.run_writer(formats.Format.EVENTS).output(formats.Stream.STDOUT, b"hello\n"))
        return NOT_DONE_YET


class Options(RoleOptions):
    """The endpoints."""

    role = "shared_worker"
    optParameters: ClassVar = [
        ["listen", "l", None, "Endpoint of the Machines API."],
        ["workers", "w", None, "Endpoint of the worker."],
    ]


def make_service(options: Options, reactor: Any) -> IService:
    """Compose the service."""
    configure_reactor(reactor)
    service = MultiService()
    api = MachinesServer(EmulatedMachines(reactor, time.time), "workers", None)
    for endpoint, resource in ((options["listen"], api.app.resource()), (options["workers"], Worker())):
        listening(endpoint, Site(resource, reactor=reactor), reactor).setServiceParent(service)
    return service


if __name__ == "__main__":
    run_service(Options(), make_service)
