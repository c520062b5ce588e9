"""
Fly without machines: the Machines API over machines in memory, and one worker that answers for all of them.

It tells that it is ready, and begins each run with a word and then says nothing for ever. Run as a program.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.service import MultiService
from twisted.application.strports import service as listening
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from bfaas import wire
from bfaas.logs import LOG_FORMAT
from bfaas.machines.memory import MemoryMachines
from bfaas.machines.routes import MachinesServer
from bfaas.process import RoleOptions, prepare, run_role
from bfaas.site import tell

if TYPE_CHECKING:
    from twisted.application.service import IService
    from twisted.web.server import Request


class Worker(Resource):
    """Answers for whichever machine is asked."""

    isLeaf = True

    def render(self, request: Request) -> Any:
        """Be ready, or begin a run."""
        if request.path == wire.HEALTH_PATH.encode():
            return tell(request, "ok")
        request.setHeader("Content-Type", wire.Format.EVENTS.value)
        request.setHeader(wire.WORKER, request.getHeader(wire.FORCE_INSTANCE) or "")
        request.write(wire.run_writer(wire.Format.EVENTS).output(wire.Stream.STDOUT, b"hello\n"))
        return NOT_DONE_YET


class Options(RoleOptions):
    """Where to listen."""

    optParameters: ClassVar = [
        ["listen", "l", None, "Endpoint of the API."],
        ["workers", "w", None, "Endpoint of the worker."],
        LOG_FORMAT,
    ]


def make_service(options: Options, reactor: Any) -> IService:
    """Compose it."""
    prepare(reactor)
    service = MultiService()
    api = MachinesServer(MemoryMachines(reactor, time.time), "workers", None)
    for endpoint, resource in ((options["listen"], api.app.resource()), (options["workers"], Worker())):
        listening(endpoint, Site(resource, reactor=reactor), reactor).setServiceParent(service)
    return service


if __name__ == "__main__":
    run_role(Options(), make_service)
