"""
The worker: runs one authenticated script, streams its output, then exits.

Started by `twistd bfaas-basher`, or by `python -m bfaas.basher`, which skips twistd's start-up; or forked by
`python -m bfaas.basher --fork-server` (see `bfaas.worker.fork_server`).

A machine boots for each run while a client may be waiting. So the worker listens as early as possible, and
loads what only a run needs (`bfaas.worker.app`, klein) after its first health check response.
"""

from __future__ import annotations

if __name__ == "__main__":
    import gc
    import sys

    from bfaas.system import lean_imports
    from bfaas.system.startup import prepare_role

    prepare_role("bfaas-basher")
    # Imports create almost no garbage, and collections during them take about 10 ms.
    gc.disable()
    lean_imports.install()

import gc
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.web.resource import Resource

from bfaas.http.server import MAX_CONNECTIONS, BoundedSite, text_response
from bfaas.protocol import formats
from bfaas.settings import BasherSettings
from bfaas.system import process_tree
from bfaas.system.confinement import Confinement, check_programs
from bfaas.system.listener import Listener
from bfaas.system.logs import with_logging
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
    from collections.abc import Callable, Mapping

    from twisted.application.service import IService
    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.web.server import Request

    from bfaas.worker.app import WorkerApp


class LazyResource(Resource):
    """
    A resource that is loaded on first use, and that answers health checks before it is loaded.

    It is loaded after the response to the first `GET /healthz`, since a run is then likely to follow, or for
    the first request of any other kind.
    """

    isLeaf = True

    def __init__(
        self,
        clock: IReactorTime,
        load: Callable[[], Resource],
        machine_id: str,
        on_request: Callable[[], None],
    ) -> None:
        super().__init__()
        self._on_request = on_request
        self._clock = clock
        self._load = load
        self._machine_id = machine_id
        self._loaded: Resource | None = None

    def render(self, request: Request) -> Any:
        """Answer a health check, or pass the request to the loaded resource."""
        self._on_request()
        if self._loaded is None and (request.method, request.path) == (b"GET", formats.HEALTH_PATH.encode()):
            request.notifyFinish().addBoth(self._on_response_finished)
            request.setHeader(formats.WORKER, self._machine_id)
            return text_response(request, "ok")
        return self._resource().render(request)

    def _on_response_finished(self, _: object) -> None:
        # The reactor sends the response at the end of its next iteration: load in the one after that.
        self._clock.callLater(0, self._clock.callLater, 0, self._resource)

    def _resource(self) -> Resource:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


class SilenceTimer:
    """
    Calls `on_silence` once, `limit` seconds after the last request or up to a tenth later.

    The checks are counted, so that time in which this process was paused does not count.
    """

    _CHECKS = 10

    def __init__(self, clock: IReactorTime, limit: float, on_silence: Callable[[], None]) -> None:
        self._clock = clock
        self._period = limit / self._CHECKS
        self._on_silence = on_silence
        self._timer: IDelayedCall | None = None
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._checks_left = self._CHECKS + 1

    def start(self) -> None:
        """Begin to check."""
        self._timer = self._clock.callLater(self._period, self._check)

    def stop(self) -> None:
        """Check no more."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()

    def _check(self) -> None:
        self._checks_left -= 1
        if self._checks_left:
            self.start()
        else:
            self._on_silence()


class Worker(Service):
    """The worker as a service: listens until its run has ended and is delivered, then stops the reactor."""

    _FLUSH_TIMEOUT = 60.0
    """Seconds that responses have to be delivered after shutdown, if runs have no time limit."""

    _log = Logger()

    def __init__(
        self, reactor: Any, settings: BasherSettings, confinement: Confinement, endpoint: str
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._confinement = confinement
        self._app: WorkerApp | None = None
        self._silence = SilenceTimer(reactor, settings.max_silence or math.inf, self._end_of_silence)
        resource = LazyResource(reactor, self._load, settings.machine_id, self._silence.restart)
        connections = min(MAX_CONNECTIONS, max_connections())
        self._site = BoundedSite(reactor, resource, settings.max_body, max_connections=connections)
        self._listener = Listener(reactor, "--listen", endpoint, self._site)

    def _load(self) -> Resource:
        try:
            resource = self._load_app()
        except Exception:
            # It listens but cannot run anything. Exit, so that the coordinator soon sees its machine stop.
            self._stop_reactor()
            raise
        # All of this lives until exit: the garbage collector does not need to traverse it.
        gc.freeze()
        gc.enable()
        return resource

    def _load_app(self) -> Resource:
        from bfaas.worker.app import WorkerApp  # noqa: PLC0415 - loaded after the first health check

        app = WorkerApp(self._reactor, self._settings, self._confinement, time.time, self._stop_reactor)
        self._app = app
        resource: Resource = app.app.resource()
        # The first match sorts the routes and imports an encoding: do that before the run arrives.
        app.app.url_map.bind("localhost").match(formats.HEALTH_PATH)
        return resource

    def startService(self) -> None:
        """Start to listen. Raises `StartError`."""
        try:
            self._own_home()
            os.chdir(self._settings.home)
        except (OSError, ValueError) as error:
            raise StartError(f"HOME: {error}") from None
        process_tree.become_subreaper()
        process_tree.set_non_dumpable()
        super().startService()
        self._listener.startService()
        if self._settings.max_silence is not None:
            self._silence.start()

    def _end_of_silence(self) -> None:
        """Exit, because the coordinator is gone, and no other may ever come. A run has its own time limit."""
        if self._app is None or not self._app.used:
            self._log.warn("no request for {limit:g} s: exiting", limit=self._settings.max_silence)
            self._stop_reactor()

    def _own_home(self) -> None:
        """Give a file system that is mounted as the home, which belongs to root at first, to its user."""
        home, user = self._settings.home, self._confinement.user
        if user is None or home == "/" or not os.path.ismount(home):
            return
        if os.stat(home).st_uid != user.uid:  # noqa: PTH116
            os.chown(home, *user)

    def stopService(self) -> Deferred[None]:
        """Kill the run, stop listening, and wait until all output is delivered."""
        return Deferred.fromCoroutine(self._stop())

    def _stop_reactor(self) -> None:
        if self.running:
            self._reactor.callLater(0, self._reactor.stop)

    async def _stop(self) -> None:
        super().stopService()
        self._silence.stop()
        # First: the script may have died from the same signal, and then its exit must report the shutdown.
        run_ended = None if self._app is None else Deferred.fromCoroutine(self._app.stop())
        await self._listener.stopService()
        if run_ended is not None:
            await run_ended
        # Slow clients have as long as a run may take to receive everything.
        await self._site.drain(self._settings.max_req_time or self._FLUSH_TIMEOUT)


class Options(RoleOptions):
    """Command-line options of the worker; all other settings are environment variables."""

    role = "bfaas-basher"

    optParameters: ClassVar = [
        ["listen", "l", "tcp:8001:interface=0.0.0.0", "Endpoint for requests (IPv4: Fly's proxy)."],
    ]
    optFlags: ClassVar = [["exit-on-stdin-eof", None, "Stop and kill the run when standard input ends."]]


def makeService(options: Options, reactor: Any = None) -> IService:
    """Build the worker from the environment. Raise, or exit with 1, with one line for each error."""
    if reactor is None:
        check_options(options)
        from twisted.internet import reactor  # noqa: PLC0415 - twistd has chosen the reactor by now
    settings, confinement = settings_or_exit(options.role, _load_settings)
    check_programs()
    configure_reactor(reactor)
    if options["exit-on-stdin-eof"]:
        stop_at_end_of_input(reactor)
    return with_logging(Worker(reactor, settings, confinement, options["listen"]), options, reactor)


def _load_settings(environ: Mapping[str, str]) -> tuple[BasherSettings, Confinement]:
    settings = BasherSettings.from_environment(environ)
    return settings, Confinement.resolve(settings.run_as, settings.sandbox)


if __name__ == "__main__":
    if sys.argv[1:] == ["--fork-server"]:
        from bfaas.worker.fork_server import import_everything, serve_forks

        import_everything()
        serve_forks()
    run_service(Options(), makeService)
