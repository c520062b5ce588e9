"""
The worker: takes one authenticated script in its life, runs it, streams its output, then ends.

`twistd bfaas-basher`, or `python -m bfaas.basher` without twistd's start-up.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any, ClassVar

from klein import Klein
from twisted.application.service import MultiService
from twisted.application.strports import service as listening
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.usage import Options as UsageOptions

from bfaas import tree, wire
from bfaas.answer import Answer
from bfaas.ask import asked
from bfaas.auth import AuthError
from bfaas.bash import BashRun, script_environment
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.logs import LOG_FORMAT, logged
from bfaas.process import prepare, run_role, settings_or_exit, stop_at_end_of_input
from bfaas.settings import BasherSettings
from bfaas.site import BoundedSite, RefusalError, answer_errors_in_text, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.application.service import IService
    from twisted.web.server import Request

    from bfaas.ask import Ask
    from bfaas.bash import BashReactor


class Basher:
    """
    The worker's resource. `finished` is called once, when its one run is over and answered.

    `wall` tells the time that tickets are checked against, in seconds since the epoch.
    """

    app = Klein()
    answer_errors_in_text(app)
    _log = Logger()
    _REFUSALS_TOLD = 3

    def __init__(
        self,
        reactor: BashReactor,
        settings: BasherSettings,
        wall: Callable[[], float],
        finished: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._wall = wall
        self._finished = finished
        self._refused = 0
        self._used = False
        self._run: BashRun | None = None

    @app.route(wire.HEALTH_PATH, methods=["GET"])
    def healthz(self, request: Request) -> bytes:
        """Tell that we listen."""
        return tell(request, "ok")

    @app.route(wire.RUN_PATH, methods=["POST"])
    async def run(self, request: Request) -> None:
        """Run the script that is the body, or in it."""
        settings = self._settings
        try:
            ticket = request.getHeader(wire.AUTHORIZATION) or ""
            settings.verifier.verify(ticket, settings.machine_id, self._wall())
        except AuthError as error:
            self._tell_refusal(str(error))
            raise RefusalError(401, "unauthorized") from None
        if self._used:
            raise RefusalError(409, "this worker has had its run")
        ask = asked(request)
        format_ = wire.requested_format(request.args, request.getHeader("Accept") or "")
        answer = Answer(request, format_, self._reactor)
        run = BashRun(self._reactor, answer.output, settings.max_output)
        environment = script_environment(settings.home, settings.machine_id, settings.region)
        try:
            self._used = True
            run.start(self._reactor, ask, environment, settings.sandbox, settings.run_as)
            self._run = run
            answer.begin(run, {wire.WORKER: settings.machine_id})
            exit_ = await self._within_time(run, self._limit(ask))
            self._log.info("run {run}: {exit}", run=_run_id(request), exit=exit_)
            answer.end(exit_)
        except OSError as error:
            self._log.error("bash cannot be started: {error}", error=error)
            raise RefusalError(500, "bash cannot be started") from None
        finally:
            answer.close()
            self._finished()

    def _tell_refusal(self, reason: str) -> None:
        """Log the first few: a script can ask its own worker as often as it likes."""
        self._refused += 1
        if self._refused <= self._REFUSALS_TOLD:
            last = " (others will not be told)" if self._refused == self._REFUSALS_TOLD else ""
            self._log.warn("refused a request: {reason}{last}", reason=reason, last=last)

    def _limit(self, ask: Ask) -> float | None:
        """Tell how long a run may take: what was asked for, and no more than any may."""
        most = self._settings.max_req_time
        return ask.timeout if most is None else ask.limit(most)

    async def _within_time(self, run: BashRun, limit: float | None) -> wire.Exit:
        """Wait for the run's end; kill it at the deadline, and at once when nobody waits any more."""
        try:
            if limit is not None:
                try:
                    return await Deadline(self._reactor, limit).run(run.when_ended())
                except DeadlineExceededError:
                    run.kill(wire.Reason.TIMEOUT)
            return await run.when_ended()
        finally:
            run.kill()

    async def stop(self) -> None:
        """Kill what runs, and wait until nothing of it is left."""
        if self._run is not None:
            self._run.kill()
            await self._run.when_ended()


def _run_id(request: Request) -> str:
    """Read what the coordinator calls the run; nothing else that comes in the header is for the log."""
    told = request.getHeader(wire.RUN_ID) or ""
    return told if re.fullmatch("[0-9a-f]{16}", told) else "of no name"


class Worker(MultiService):
    """The worker as a service: listens until its run is over and delivered, then stops the reactor."""

    _FLUSH_LIMIT = 60.0

    def __init__(self, reactor: Any, settings: BasherSettings, endpoint: str) -> None:
        super().__init__()
        self._reactor = reactor
        self._settings = settings
        self._basher = Basher(reactor, settings, time.time, self._end)
        self._site = BoundedSite(reactor, self._basher.app.resource(), settings.max_body)
        listening(endpoint, self._site, reactor).setServiceParent(self)

    def startService(self) -> None:
        """Begin to listen."""
        os.chdir(self._settings.home)
        tree.become_subreaper()
        tree.become_opaque()
        super().startService()

    def stopService(self) -> Deferred[None]:
        """Stop listening, kill what runs, deliver what was written."""
        return Deferred.fromCoroutine(self._stop())

    def _end(self) -> None:
        if self.running:
            self._reactor.callLater(0, self._reactor.stop)

    async def _stop(self) -> None:
        await MultiService.stopService(self)
        await self._basher.stop()
        # A client that reads slowly still gets everything, for as long as its run may take.
        await self._site.drain(self._settings.max_req_time or self._FLUSH_LIMIT)


class Options(UsageOptions):
    """Command-line options of the worker; everything else is in its environment."""

    optParameters: ClassVar = [
        ["listen", "l", "tcp:8001:interface=0.0.0.0", "Endpoint to take requests on (IPv4: Fly's proxy)."],
        LOG_FORMAT,
    ]
    optFlags: ClassVar = [["attached", "a", "End, and kill the run, when standard input ends."]]


def makeService(options: Options, reactor: Any = None) -> IService:
    """Compose the worker from the environment."""
    if reactor is None:
        from twisted.internet import reactor  # noqa: PLC0415 - the role was chosen, so the reactor was too
    settings = settings_or_exit("bfaas-basher", BasherSettings.from_environment)
    prepare(reactor)
    if options["attached"]:
        stop_at_end_of_input(reactor)
    return logged(Worker(reactor, settings, options["listen"]), options["log-format"])


if __name__ == "__main__":
    run_role(Options(), makeService)
