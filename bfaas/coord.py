"""
The coordinator: takes scripts from anyone, runs each on a worker of its own, within its time.

`twistd bfaas-coord`.
"""

from __future__ import annotations

import gc
import json
import time
from math import ceil
from random import SystemRandom
from typing import TYPE_CHECKING, Any, ClassVar

from klein import Klein
from twisted.application.service import MultiService
from twisted.application.strports import service as listening
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.usage import Options as UsageOptions

from bfaas import wire
from bfaas.answer import Answer
from bfaas.ask import asked
from bfaas.browser import foreign_page
from bfaas.clients import Shares, client_of
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.exchange import lasting_agent
from bfaas.logs import LOG_FORMAT, logged
from bfaas.machines.api import MachineConfig
from bfaas.machines.fly import FlyMachines
from bfaas.machines.local import LocalMachines, find_sandbox
from bfaas.member import Phase, PoolSettings, lease_ttl
from bfaas.page import serve_page
from bfaas.pool import Pool, PoolClosedError
from bfaas.process import prepare, room_for_connections, settings_or_exit
from bfaas.proxy import Proxy, WorkerError
from bfaas.runs import Run, Runs
from bfaas.settings import CoordSettings
from bfaas.site import MAX_CONNECTIONS, BoundedSite, RefusalError, answer_errors_in_text, tell

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from twisted.application.service import IService
    from twisted.internet.interfaces import IReactorTime
    from twisted.web.server import Request

    from bfaas.ask import Ask
    from bfaas.machines.api import Machine, MachinesAPI
    from bfaas.pool import Allocation


MAX_REPLAYED = 1_000_000
"""Bytes of a request's body that Fly's proxy replays at the most."""

REPLAYED = "bfaas-replayed"


class Coordinator:
    """
    The coordinator's resource.

    `wall` tells the time that tickets are signed with, in seconds since the epoch.
    """

    app = Klein()
    answer_errors_in_text(app)
    serve_page(app)
    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        settings: CoordSettings,
        pool: Pool,
        proxy: Proxy,
        wall: Callable[[], float],
        runs: Runs,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._pool = pool
        self._proxy = proxy
        self._wall = wall
        self._runs = runs
        self._draining = False
        self._shares = Shares(settings.max_per_client)

    @app.route(wire.RUN_PATH, methods=["POST"])
    async def run(self, request: Request) -> None:
        """
        Run the script that is the body, or in it, on a machine from the pool.

        A request of a script counts as any other: among those of the address that it comes from.
        """
        run_id = self._runs.new_id()
        request.setHeader(wire.RUN_ID, run_id)
        ask = asked(request)
        if self._draining:
            raise self._refusal(503, "shutting down")
        client = client_of(request, on_fly=self._settings.fly is not None)
        if not self._shares.take(client):
            raise self._refusal(429, "too many requests of yours are under way")
        run = self._runs.begin(run_id, client)
        try:
            self._replay_elsewhere(request, ask)
            allocation = await self._allocate(client)
            self._runs.served(run, allocation.machine.id)
            try:
                await self._answer(request, ask, run, allocation.machine)
            finally:
                allocation.release()
        except RefusalError as refusal:
            run.ending = str(refusal.code)
            raise
        finally:
            self._shares.give_back(client)
            self._runs.end(run)

    @app.route(wire.HEALTH_PATH, methods=["GET"])
    def healthz(self, request: Request) -> bytes:
        """Tell that we are alive."""
        return tell(request, "ok")

    @app.route("/readyz", methods=["GET"])
    def readyz(self, request: Request) -> bytes:
        """Tell whether a run that came now would find a machine, as far as we know; 503 and why if not."""
        trouble = "shutting down" if self._draining else self._pool.trouble
        if trouble is not None:
            raise RefusalError(503, trouble)
        return tell(request, "ready")

    @app.route("/status", methods=["GET"])
    def status(self, request: Request) -> bytes:
        """Tell, as JSON, what the pool and the line look like, and what became of the latest runs."""
        settings, pool = self._settings, self._pool
        phases = {phase.value: count for phase in Phase if (count := pool.count(phase))}
        told = {
            "pool": {
                "name": settings.machine_id, "size": settings.pool_size, "standby": settings.standby,
                "machines": phases,
            },
            "queue": {
                "waiting": pool.waiting, "limit": settings.max_queue,
                "expected_wait_ms": round(1000 * pool.expected_wait),
            },
            "max_req_time_ms": round(1000 * settings.max_req_time),
            "draining": self._draining,
            "runs": self._runs.status(),
        }  # fmt: skip
        return tell(request, json.dumps(told), "application/json")

    async def drain(self) -> None:
        """Take no more runs, and wait until those that are under way have ended."""
        self._draining = True
        await self._runs.until_gone()

    async def _allocate(self, client: str) -> Allocation:
        settings = self._settings
        if self._pool.next_in_line > settings.max_queue:
            raise self._refusal(503, "too many requests are waiting")
        try:
            return await Deadline(self._clock, settings.max_wait).run(self._pool.allocate(client))
        except DeadlineExceededError:
            raise self._refusal(503, f"no worker within {settings.max_wait:g} s") from None
        except PoolClosedError:
            raise self._refusal(503, "shutting down") from None

    def _replay_elsewhere(self, request: Request, ask: Ask) -> None:
        """
        Where that is wanted, let Fly's proxy take the request to a coordinator that may have a machine.

        Once: the proxy tells the next coordinator in `fly-replay-src` the state that this one gave it.
        """
        settings = self._settings
        if not settings.replay or ask.size > MAX_REPLAYED or self._pool.next_in_line == 0:
            return
        source = request.getHeader(b"fly-replay-src") or b""
        if f"state={REPLAYED}".encode() not in [part.strip() for part in source.split(b";")]:
            raise RefusalError(
                503, "no worker here; trying elsewhere", {"fly-replay": f"elsewhere=true;state={REPLAYED}"}
            )

    def _refusal(self, code: int, line: str) -> RefusalError:
        """
        Refuse a request, and tell its client when to come back: in whole seconds, at least one.

        By then all who wait now should have been served, by what the pool expects; and if it is wrong, they
        have given up after `MAXWAIT`, and the last to be served has had its `MAXREQTIME`.
        """
        longest = self._settings.max_wait + self._settings.max_req_time
        retry = max(1, ceil(min(self._pool.expected_wait, longest)))
        return RefusalError(code, line, {"Retry-After": str(retry)})

    async def _answer(self, request: Request, ask: Ask, run: Run, machine: Machine) -> None:
        """Relay one run within its time; whatever happens, the answer has one ending."""
        settings = self._settings
        started = self._clock.seconds()
        deadline = Deadline(self._clock, ask.limit(settings.max_req_time))
        format_ = wire.requested_format(request.args, request.getHeader("Accept") or "")
        answer = Answer(request, format_, self._clock)
        headers = {wire.WORKER: machine.id, wire.COORD: settings.machine_id}
        ticket = settings.signer.sign(machine.id, self._wall())
        try:
            relay = self._proxy.relay(machine, ticket, run.id, ask, format_, answer, headers)
            exit_ = await deadline.run(relay)
            run.ending = exit_.reason or f"exit {exit_.code}"
        except DeadlineExceededError:
            run.ending = wire.Reason.TIMEOUT
            if not answer.begun:
                raise RefusalError(504, "the worker did not answer in time") from None
            answer.end(wire.Exit.because(wire.Reason.TIMEOUT, self._since(started)))
        except WorkerError as error:
            self._log.warn(
                "run {run}: {machine} failed: {error}", run=run.id, machine=machine.id, error=error
            )
            raise RefusalError(502, "the worker failed") from None
        finally:
            answer.close()
            run.answered, run.bytes = answer.begun_at, answer.bytes_written

    def _since(self, moment: float) -> int:
        """Milliseconds since then."""
        return round(1000 * (self._clock.seconds() - moment))


class CoordService(MultiService):
    """The coordinator as a service: on stopping it drains, then closes its pool."""

    FLUSH_LIMIT = 5.0

    def __init__(
        self,
        coordinator: Coordinator,
        site: BoundedSite,
        listener: IService,
        pool: Pool,
        shut_down_machines: Callable[[], Awaitable[object]],
    ) -> None:
        super().__init__()
        self._coordinator = coordinator
        self._site = site
        self._pool = pool
        self._shut_down_machines = shut_down_machines
        listener.setServiceParent(self)

    def startService(self) -> None:
        """Begin to take requests, and to look after the pool's machines."""
        super().startService()
        self._pool.start()

    def stopService(self) -> Deferred[None]:
        """Stop listening, let running requests end, deliver their answers, close the pool."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        await MultiService.stopService(self)
        # Requests that wait in line are told now; the pool waits for machines that are in use.
        closing = Deferred.fromCoroutine(self._pool.close())
        await self._coordinator.drain()
        await self._site.drain(self.FLUSH_LIMIT)
        await closing
        await self._shut_down_machines()


class Options(UsageOptions):
    """Command-line options of the coordinator; everything else is in its environment."""

    optParameters: ClassVar = [
        ["listen", "l", None, "Endpoint to take requests on; tcp:8000, on a laptop on loopback alone."],
        LOG_FORMAT,
    ]


def makeService(options: Options, reactor: Any = None) -> IService:
    """Compose the coordinator from the environment."""
    if reactor is None:
        from twisted.internet import reactor  # noqa: PLC0415 - the role was chosen, so the reactor was too
    settings = settings_or_exit("bfaas-coord", CoordSettings.from_environment)
    prepare(reactor)
    # What is there by then stays: looking through all of it for garbage, again and again, takes long enough
    # to make deadlines late.
    reactor.callWhenRunning(gc.freeze)
    random, fly = SystemRandom(), settings.fly
    machines: MachinesAPI
    if fly is None:
        machines = local = LocalMachines(reactor, time.time, sandboxed=find_sandbox())
        shut_down, worker_url, endpoint = local.shutdown, None, "tcp:8000:interface=127.0.0.1"
    else:
        agent, connections = lasting_agent(reactor)
        machines = FlyMachines(reactor, agent, random, fly.api.url, fly.api.worker_app, fly.api.token)
        shut_down, worker_url, endpoint = connections.closeCachedConnections, fly.worker_url, "tcp:8000"
    proxy = Proxy(reactor, worker_url, settings.max_output)
    pool = Pool(machines, proxy.wait_until_ready, reactor, random, pool_settings(settings))
    coordinator = Coordinator(reactor, settings, pool, proxy, time.time, Runs(reactor, time.time, random))
    most = min(MAX_CONNECTIONS, room_for_connections())
    site = BoundedSite(
        reactor, coordinator.app.resource(), settings.max_body, max_connections=most,
        # On Fly all connections come from its proxy; on a laptop some come from pages in a browser.
        max_per_address=most if fly else most // 2, guard=None if fly else foreign_page,
    )  # fmt: skip
    listener = listening(options["listen"] or endpoint, site, reactor)
    service = CoordService(coordinator, site, listener, pool, shut_down)
    return logged(service, options["log-format"])


def pool_settings(settings: CoordSettings) -> PoolSettings:
    """Say what machines the pool makes: their environment tells a worker whom to trust, and its limits."""
    environment = {
        "PUBLIC": settings.signer.public,
        "MAXREQTIME": f"{settings.max_req_time:.9f}s",
        "MAXBODY": str(settings.max_body),
        "MAXOUTPUT": str(settings.max_output),
    }
    return PoolSettings(
        name=settings.machine_id,
        size=settings.pool_size,
        region=settings.region,
        config=MachineConfig(
            image=settings.fly.worker_image if settings.fly else "local",
            env=environment,
            cpus=settings.worker_cpus,
            memory_mb=settings.worker_memory_mb,
        ),
        max_req_time=settings.max_req_time,
        lease_ttl=lease_ttl(settings.max_req_time),
        standby=settings.standby,
        suspends=settings.standby_suspended,
    )
