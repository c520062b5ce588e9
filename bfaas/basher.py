"""
The worker: takes one authenticated script in its life, runs it, streams its output, then ends.

`twistd bfaas-basher`, or `python -m bfaas.basher` without twistd's start-up.

A machine boots for every run, and somebody may wait for it. So it listens as soon as it can, and what only a
run needs (`bfaas.worker.app`, klein) is loaded once it has told that it listens.
"""

from __future__ import annotations

if __name__ == "__main__":
    import gc
    import sys

    from bfaas.system.startup import prepare_role

    prepare_role("bfaas-basher")
    # Imports leave next to no garbage; looking for it takes some 10 ms.
    gc.disable()
    # A worker speaks no TLS. Twisted can do without; with it, the reactor takes a third longer to load.
    sys.modules["OpenSSL"] = sys.modules["ssl"] = None  # type: ignore[assignment]  # how to say "not here"

import gc
import os
import time
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.web.resource import Resource

from bfaas.http.server import MAX_CONNECTIONS, BoundedSite, text_response
from bfaas.protocol import formats
from bfaas.settings import BasherSettings
from bfaas.system import process_tree
from bfaas.system.confinement import check_programs
from bfaas.system.listener import Listener
from bfaas.system.logs import LOG_FORMAT, with_logging
from bfaas.system.runtime import (
    RoleOptions,
    check_options,
    configure_reactor,
    max_connections,
    run_service,
    settings_or_exit,
    stop_at_end_of_input,
)
from bfaas.system.startup import StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.application.service import IService
    from twisted.internet.interfaces import IReactorTime
    from twisted.web.server import Request

    from bfaas.worker.app import WorkerApp


class LazyResource(Resource):
    """
    Stands before a resource that takes its time to load, and tells meanwhile that we listen.

    It is loaded behind the answer to the first `GET /healthz`, after which a run is to be expected; or for
    the first request that is anything else.
    """

    isLeaf = True

    def __init__(self, clock: IReactorTime, load: Callable[[], Resource], machine_id: str) -> None:
        super().__init__()
        self._clock = clock
        self._load = load
        self._machine_id = machine_id
        self._loaded: Resource | None = None

    def render(self, request: Request) -> Any:
        """Answer that we listen, or have the resource answer."""
        if self._loaded is None and (request.method, request.path) == (b"GET", formats.HEALTH_PATH.encode()):
            request.notifyFinish().addBoth(self._answered)
            request.setHeader(formats.WORKER, self._machine_id)
            return text_response(request, "ok")
        return self._resource().render(request)

    def _answered(self, _: object) -> None:
        # The reactor sends what was written at the end of its next turn: load in the one after that.
        self._clock.callLater(0, self._clock.callLater, 0, self._resource)

    def _resource(self) -> Resource:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


class Worker(Service):
    """The worker as a service: listens until its run is over and delivered, then stops the reactor."""

    _FLUSH_LIMIT = 60.0

    def __init__(self, reactor: Any, settings: BasherSettings, endpoint: str) -> None:
        self._reactor = reactor
        self._settings = settings
        self._runner: WorkerApp | None = None
        front = LazyResource(reactor, self._load, settings.machine_id)
        most = min(MAX_CONNECTIONS, max_connections())
        self._site = BoundedSite(reactor, front, settings.max_body, max_connections=most)
        self._listener = Listener(reactor, "--listen", endpoint, self._site)

    def _load(self) -> Resource:
        try:
            resource = self._load_runner()
        except Exception:
            # It has told that it listens, but it cannot run anything: a machine that stops is soon seen.
            self._end()
            raise
        # All of this stays, so nobody needs to look for garbage in it.
        gc.freeze()
        gc.enable()
        return resource

    def _load_runner(self) -> Resource:
        from bfaas.worker.app import WorkerApp  # noqa: PLC0415 - see above

        self._runner = WorkerApp(self._reactor, self._settings, time.time, self._end)
        resource: Resource = self._runner.app.resource()
        # The first look for a route sorts them all, and imports an encoding.
        self._runner.app.url_map.bind("localhost").match(formats.HEALTH_PATH)
        return resource

    def startService(self) -> None:
        """Begin to listen; raise `StartError` where that cannot be."""
        try:
            os.chdir(self._settings.home)
        except (OSError, ValueError) as error:
            raise StartError(f"HOME: {error}") from None
        process_tree.become_subreaper()
        process_tree.set_non_dumpable()
        super().startService()
        self._listener.startService()

    def stopService(self) -> Deferred[None]:
        """Stop listening, kill what runs, deliver what was written."""
        return Deferred.fromCoroutine(self._stop())

    def _end(self) -> None:
        if self.running:
            self._reactor.callLater(0, self._reactor.stop)

    async def _stop(self) -> None:
        super().stopService()
        # First of all: a signal may have been sent to the script as well, whose end is not its own then.
        ended = None if self._runner is None else Deferred.fromCoroutine(self._runner.stop())
        await self._listener.stopService()
        if ended is not None:
            await ended
        # A client that reads slowly still gets everything, for as long as its run may take.
        await self._site.drain(self._settings.max_req_time or self._FLUSH_LIMIT)


class Options(RoleOptions):
    """Command-line options of the worker; everything else is in its environment."""

    role = "bfaas-basher"

    optParameters: ClassVar = [
        ["listen", "l", "tcp:8001:interface=0.0.0.0", "Endpoint to take requests on (IPv4: Fly's proxy)."],
        LOG_FORMAT,
    ]
    optFlags: ClassVar = [["exit-on-stdin-eof", None, "Stop and kill the run when standard input ends."]]


def makeService(options: Options, reactor: Any = None) -> IService:
    """Compose the worker from the environment. Raise, or exit, with one line where it cannot be."""
    if reactor is None:
        check_options(options)
        from twisted.internet import reactor  # noqa: PLC0415 - the role was chosen, so the reactor was too
    settings = settings_or_exit("bfaas-basher", BasherSettings.from_environment)
    check_programs()
    configure_reactor(reactor)
    if options["exit-on-stdin-eof"]:
        stop_at_end_of_input(reactor)
    return with_logging(Worker(reactor, settings, options["listen"]), options, reactor)


if __name__ == "__main__":
    run_service(Options(), makeService)
