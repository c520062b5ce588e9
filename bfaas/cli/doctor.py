"""
What `bfaas doctor` does: try each thing that a coordinator with these settings depends on, in its order.

The last of them is a script on a machine, made for that under a pool's name of its own, so that no
coordinator takes it for one of its machines; where it is left behind, its lease runs out and any coordinator
destroys it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from random import SystemRandom
from typing import TYPE_CHECKING, Any, TypeVar

from OpenSSL.SSL import Error as TLSError
from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.error import ConnectionRefusedError as RefusedConnectionError
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogLevel, formatEvent, globalLogPublisher
from twisted.web.http_headers import Headers
from zope.interface import provider

from bfaas.coordinator.worker_client import WorkerClient
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.client import (
    BytesProducer,
    abort_body,
    pooled_agent,
    read_body,
    single_use_agent,
    wait_for_response,
)
from bfaas.http.endpoints import CertificateError, describe, root_cause
from bfaas.machines.api import (
    CapacityError,
    MachinesError,
    NotFoundError,
    RateLimitedError,
    State,
    UnavailableError,
)
from bfaas.machines.codec import WORKER_PORT
from bfaas.machines.fly import FlyMachines
from bfaas.machines.local.host import HostError, examine_host
from bfaas.machines.local.processes import LocalMachines
from bfaas.pooling.config import machine_name, pool_config
from bfaas.pooling.reconciler import destroy_own
from bfaas.protocol import formats
from bfaas.settings import CoordSettings, SettingsError
from bfaas.system.runtime import run_with_reactor
from bfaas.system.stdio import OutputError, write_output

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from twisted.internet.defer import Deferred
    from twisted.logger import LogEvent

    from bfaas.machines.api import Machine, MachinesAPI
    from bfaas.pooling.config import PoolConfig

T = TypeVar("T")

_LIMIT = 60.0
"""Seconds that a step may take where nothing else is said."""

_LOOK_PAUSE = 0.5
_PROBE_LIMIT = 5.0
_MAX_ANSWER = 4096


class CheckFailed(Exception):  # noqa: N818 - it is a finding
    """A check failed: `found` says how, `remedy` what to do about it."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found, remedy)
        self.found = found
        self.remedy = remedy


def run_checks(environ: Mapping[str, str]) -> int:
    """Check everything, a line each; 0 where all is well, 1 where it is not."""
    try:
        settings = CoordSettings.from_environment(environ)
    except SettingsError as error:
        for problem in error.problems:
            _tell("FAIL", "settings", problem)
        _tell("", "", "set these as the README's table of settings says; nothing else was tried")
        return 1
    _tell("ok", "settings", f"a pool of {settings.pool_size}, in {settings.region}")
    return 0 if run_with_reactor(lambda reactor: _examine(reactor, settings)) else 1


async def _examine(reactor: Any, settings: CoordSettings) -> bool:
    fly = settings.fly
    try:
        if fly is None:
            try:
                host = examine_host()
            except HostError as error:
                _tell("FAIL", "host", str(error))
                return False
            sandboxed = host.sandboxed
            missing = "not usable: scripts are not confined; apt-get install bubblewrap"
            _tell("ok" if sandboxed else "warn", "bubblewrap", "found" if sandboxed else missing)
            globalLogPublisher.addObserver(_tell_of_workers)
            local = LocalMachines(reactor, time.time, sandboxed=sandboxed, directory=host.directory)
            try:
                await _try_machine(reactor, settings, local, None)
            finally:
                await local.shutdown()
        else:
            agent, connections = pooled_agent(reactor)
            api = FlyMachines(reactor, agent, SystemRandom(), fly.api.url, fly.api.worker_app, fly.api.token)
            try:
                await _try_api(reactor, settings, api)
                await _try_machine(reactor, settings, api, fly.worker_url)
            finally:
                await connections.closeCachedConnections()
    except CheckFailed as ill:
        _tell("", "", ill.remedy)
        return False
    return True


async def _try_api(reactor: Any, settings: CoordSettings, api: MachinesAPI) -> None:
    assert settings.fly is not None  # noqa: S101 - there is no API on a laptop
    where = settings.fly.api
    machines = await _step(reactor, "API, token, app", _list(api, where.url), {
        NotFoundError: f"WORKER_APP: is {where.worker_app!r} the app, and may FLY_TOKEN see it?",
        UnavailableError: f"FLY_FLAPS_BASE_URL: is {where.url} the API? The default works on Fly alone",
        MachinesError: f"FLY_TOKEN: make another, with `fly tokens create deploy -a {where.worker_app}`",
    })  # fmt: skip
    _tell("ok", "API, token, app", f"{len(machines)} machines in {where.worker_app}")


async def _list(api: MachinesAPI, url: str) -> list[Machine]:
    """List the app's machines. Raises `CheckFailed` where there is no connection to the API."""
    try:
        return await api.list()
    except UnavailableError as error:
        remedy = _connection_remedy(error, url)
        if remedy is None:
            raise
        if isinstance(root_cause(error), DNSLookupError):
            remedy += ". The default is known on Fly alone; elsewhere it is https://api.machines.dev"
        raise CheckFailed(str(error), f"FLY_FLAPS_BASE_URL: {remedy}") from error


def _connection_remedy(error: BaseException, url: str) -> str | None:
    """Return what to do about a connection that was not made; None for other errors."""
    cause = root_cause(error)
    if isinstance(cause, DNSLookupError):
        return f"is the name in {url} right, and does this host's resolver (/etc/resolv.conf) know it?"
    if isinstance(cause, CertificateError):
        return (
            f"is {url} the right name? Is its issuer among this host's trusted ones (ca-certificates, or "
            "SSL_CERT_FILE), and this host's clock right?"
        )
    if isinstance(cause, TLSError):
        return f"does {url} speak TLS there? If not, it begins with http://"
    if isinstance(cause, RefusedConnectionError):
        return f"is the port in {url} right? The host is there, but nothing listens"
    if isinstance(cause, ConnectError):
        return f"is the host in {url} right? It cannot be reached: look at the network and at firewalls"
    return None


async def _try_machine(
    reactor: Any, settings: CoordSettings, api: MachinesAPI, worker_url: str | None
) -> None:
    pool = pool_config(replace(settings, machine_id="doctor"))
    name = machine_name(pool.name, SystemRandom())
    machine: Machine | None = None
    try:
        machine = await _step(reactor, "image, region", _create(api, name, pool), {
            RateLimitedError: "too many machines were made lately: try again in a minute",
            UnavailableError: "the API does not answer: try again, and look at https://status.flyio.net",
            CapacityError: f"FLY_REGION: no room in {pool.region}; another, or WORKER_CPUS, WORKER_MEMORY_MB",
            MachinesError:
                f"WORKER_IMAGE: is there {pool.template.image}? FLY_REGION: is there {pool.region}?",
        }, pool.timeouts.create)  # fmt: skip
        await _step(reactor, "start", _until_started(reactor, api, machine), {
            UnavailableError: "the API fails at times: try again",
            MachinesError: "somebody destroyed the machine: try again",
            DeadlineExceededError: f"WORKER_IMAGE: {pool.template.image} takes too long to fetch or to start",
        }, pool.timeouts.create)  # fmt: skip
        _tell("ok", "image, region", f"{machine.id} started from {pool.template.image}")
        url = machine.url or worker_url
        assert url is not None  # noqa: S101 - a machine on Fly is reached through its app's proxy
        proxy = WorkerClient(reactor, worker_url, settings.max_output)
        await _step(reactor, "worker", _until_ready(reactor, proxy, api, machine, url, pool.timeouts.ready), {
            MachinesError: "the API fails at times: try again",
        })  # fmt: skip
        await _step(reactor, "script", _run_script(reactor, settings, machine, url), {
            Exception: f"WORKER_URL: is {url} the workers' app? WORKER_IMAGE: is it of this version?",
        })  # fmt: skip
        _tell("ok", "worker", f"ran a script at {url}")
    finally:
        await _remove(api, name, machine)


async def _create(api: MachinesAPI, name: str, pool: PoolConfig) -> Machine:
    try:
        machine, _ = await api.create(name, pool.region, pool.machine_config, pool.lease_ttl)
    except MachinesError as error:
        if error.call is not None and error.call.status in (401, 403):
            remedy = "FLY_TOKEN: it may look, but not make machines; `fly tokens create deploy` may"
            raise CheckFailed(str(error), remedy) from error
        raise
    return machine


async def _until_started(reactor: Any, api: MachinesAPI, machine: Machine) -> None:
    """Wait until it has started. It is looked at, for one that has failed would be waited for in vain."""
    while (state := (await api.get(machine.id)).state) is not State.STARTED:
        if state in (State.FAILED, State.STOPPED, State.DESTROYED):
            raise _dead(machine, state)
        await deferLater(reactor, _LOOK_PAUSE)


async def _until_ready(
    reactor: Any, proxy: WorkerClient, api: MachinesAPI, machine: Machine, url: str, limit: float
) -> None:
    """Wait until the worker answers, or find out why it does not."""
    try:
        await Deadline(reactor, limit).run(proxy.wait_until_ready(machine))
    except DeadlineExceededError:
        pass
    else:
        return
    state = (await api.get(machine.id)).state
    if state is not State.STARTED:
        raise _dead(machine, state)
    headers = Headers({formats.FORCE_INSTANCE: [machine.id]})
    asked = single_use_agent(reactor).request(b"GET", f"{url}{formats.HEALTH_PATH}".encode(), headers, None)
    try:
        response = await Deadline(reactor, _PROBE_LIMIT).run(wait_for_response(asked))
    except CancelledError:
        raise
    except Exception as error:
        remedy = (
            f"WORKER_URL: {url} leads nowhere; has the workers' app `fly ips allocate-v6 --private`, with "
            "`--org` of the coordinators where that is another organization?"
        )
        if advice := _connection_remedy(error, url):
            remedy += f" Else: {advice}"
        raise CheckFailed(describe(error), remedy) from error
    abort_body(response)
    if response.code < 500:  # noqa: PLR2004 - a server's own errors
        dates = response.headers.getRawHeaders("date", ["nothing"])
        raise CheckFailed(
            f"it answers, and says that it is {dates[0]}", "is this host's clock right, within 5 s?"
        )
    remedy = f"WORKER_URL: is {url} the workers' app? WORKER_IMAGE: does it listen on port {WORKER_PORT}?"
    raise CheckFailed(f"status {response.code} after {limit:g} s", remedy)


def _dead(machine: Machine, state: State) -> CheckFailed:
    """Say that a machine does not run; what a local worker said before its end has been told."""
    if machine.url:
        return CheckFailed(
            f"machine {machine.id} is {state}", "its worker does not start, or ends: see above"
        )
    remedy = "WORKER_IMAGE: it does not start, or ends; look at `fly logs` of the workers' app"
    return CheckFailed(f"machine {machine.id} is {state}", remedy)


async def _run_script(reactor: Any, settings: CoordSettings, machine: Machine, url: str) -> None:
    headers = Headers({
        formats.AUTHORIZATION: [settings.signer.sign(machine.id, time.time())],
        formats.FORCE_INSTANCE: [machine.id],
    })  # fmt: skip
    target = f"{url}{formats.RUN_PATH}?raw=1".encode()
    asked = single_use_agent(reactor).request(b"POST", target, headers, BytesProducer(b"echo well"))
    response = await wait_for_response(asked)
    said = await read_body(response, _MAX_ANSWER)
    if said != b"well\n\nexit: 0\n":
        raise ValueError(f"{response.code} {said[:200]!r}")
    if response.headers.getRawHeaders(formats.WORKER, [machine.id]) != [machine.id]:
        raise ValueError("another machine than the one that was made has run it")


async def _step(
    reactor: Any,
    what: str,
    work: Coroutine[Deferred[Any], Any, T],
    remedies: Mapping[type[Exception], str],
    limit: float = _LIMIT,
) -> T:
    """Do one thing, in its time; tell a failure, and raise the remedy for the first kind that it is of."""
    try:
        return await Deadline(reactor, limit).run(work)
    except CancelledError:
        raise
    except CheckFailed as ill:
        failure = ill
    except Exception as error:  # noqa: BLE001 - each is a finding
        found = str(error) or type(error).__name__
        kinds = (remedy for kind, remedy in remedies.items() if isinstance(error, kind))
        failure = CheckFailed(found, next(kinds, "it took too long: try again"))
    _tell("FAIL", what, " ".join(failure.found.split()))
    raise failure


async def _remove(api: MachinesAPI, name: str, machine: Machine | None) -> None:
    """Destroy the machine that was made; of a creation that was not answered too, if it was done."""
    try:
        there = [machine] if machine else [other for other in await api.list() if other.name == name]
        for made in there:
            await destroy_own(api, made)
    except MachinesError as error:
        _tell("warn", "cleaning", f"{name} may be left, until its lease runs out: {error}")


@provider(ILogObserver)
def _tell_of_workers(event: LogEvent) -> None:
    if event["log_level"] >= LogLevel.warn and event["log_namespace"].startswith("bfaas.machines."):
        with suppress(BrokenPipeError, OutputError):  # the next line will raise it, where it is not logged
            _tell("warn", "log", formatEvent(event))


def _tell(how: str, what: str, line: str) -> None:
    write_output(f"{how:4}  {f'{what}: ' if what else '-> '}{line}\n")
