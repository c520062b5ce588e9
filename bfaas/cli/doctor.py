"""
`bfaas doctor`: check, in order, everything that a coordinator with these settings depends on.

The last check runs a script on a machine that is created for it. That machine belongs to the pool `doctor`,
so no coordinator uses it. If it is left behind, any coordinator destroys it after its lease.
"""

from __future__ import annotations

import os
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

from bfaas.cli.machines import format_count
from bfaas.coordinator.access import AccessControl
from bfaas.coordinator.worker_client import WorkerClient
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.client import abort_body, pooled_agent, read_body, send_request, single_use_agent
from bfaas.http.endpoints import CertificateError, describe, root_cause, unix_path
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
from bfaas.machines.local.containers import PULL_TIMEOUT, compose_container_machines
from bfaas.machines.local.engine import EngineError, examine_engine
from bfaas.machines.local.host import HostError, examine_host
from bfaas.machines.local.processes import LocalMachines
from bfaas.pooling.config import machine_name, pool_config
from bfaas.pooling.reconciler import destroy_own
from bfaas.protocol import formats
from bfaas.settings import CoordSettings, SettingsError
from bfaas.system.runtime import run_with_reactor
from bfaas.system.startup import StartError
from bfaas.system.stdio import OutputError, write_output

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from twisted.internet.defer import Deferred
    from twisted.logger import LogEvent

    from bfaas.machines.api import Machine, MachinesAPI
    from bfaas.pooling.config import PoolConfig
    from bfaas.settings import DockerSettings

T = TypeVar("T")

_CHECK_TIMEOUT = 60.0
"""Seconds that a check may take by default."""

_CONTAINERS_NAMESPACE = "bfaas.machines.local.containers"

_POLL_PERIOD = 0.5
_PROBE_TIMEOUT = 5.0
_MAX_RESPONSE = 4096


class CheckFailed(Exception):  # noqa: N818 - it is a finding
    """A check failed: `finding` is what was found, `remedy` what to do about it."""

    def __init__(self, finding: str, remedy: str) -> None:
        super().__init__(finding, remedy)
        self.finding = finding
        self.remedy = remedy


def run_checks(environ: Mapping[str, str]) -> int:
    """Run all checks and print one line for each. Return the exit code: 0 if all passed, otherwise 1."""
    try:
        settings = CoordSettings.from_environment(environ)
    except SettingsError as error:
        for problem in error.problems:
            _report("FAIL", "settings", problem)
        _report_remedy("set these as docs/configuration.md describes; no other check was run")
        return 1
    _report("ok", "settings", f"a pool of {settings.pool_size} in region {settings.region}")
    if settings.access is not None:
        try:
            AccessControl(settings.access, time.time)
        except StartError as error:
            _report("FAIL", "access tokens", str(error))
            _report_remedy("replace the file as docs/configuration.md describes; no other check was run")
            return 1
        _report("ok", "access tokens", "clients need one of them")
    return 0 if run_with_reactor(lambda reactor: _check_all(reactor, settings)) else 1


async def _check_all(reactor: Any, settings: CoordSettings) -> bool:
    fly = settings.fly
    try:
        if settings.docker is not None:
            await _check_containers(reactor, settings, settings.docker)
        elif fly is None:
            try:
                host = examine_host()
            except HostError as error:
                _report("FAIL", "host", str(error))
                return False
            if host.sandboxed:
                _report("ok", "bubblewrap", "found")
            else:
                _report("warn", "bubblewrap", f"{host.sandbox_obstacle}: scripts are not confined")
            globalLogPublisher.addObserver(_report_worker_log)
            local = LocalMachines(reactor, time.time, sandboxed=host.sandboxed, directory=host.directory)
            try:
                await _check_machine(reactor, settings, local, None)
            finally:
                await local.shutdown()
        else:
            agent, connections = pooled_agent(reactor)
            api = FlyMachines(reactor, agent, SystemRandom(), fly.api.url, fly.api.worker_app, fly.api.token)
            try:
                await _check_api(reactor, settings, api)
                await _check_machine(reactor, settings, api, fly.worker_url)
            finally:
                await connections.closeCachedConnections()
    except CheckFailed as failure:
        _report_remedy(failure.remedy)
        return False
    return True


async def _check_containers(reactor: Any, settings: CoordSettings, docker: DockerSettings) -> None:
    """Check the engine, its limits, the runtime and the image, and run a script in a container."""
    globalLogPublisher.addObserver(_report_worker_log)
    try:
        info = examine_engine(docker.engine)
        containers = compose_container_machines(reactor, time.time, docker, "doctor", os.environ)
    except (EngineError, HostError) as error:
        _report("FAIL", "engine", str(error))
        raise CheckFailed(
            str(error), "is Docker or Podman installed and running? See docs/configuration.md"
        ) from None
    _report("ok", "engine", f"{info.name}, API {info.api_version}, at {docker.engine.host}")
    try:
        runtime = docker.runtime or info.default_runtime
        if docker.runtime and not info.has_runtime(docker.runtime):
            finding = f"the engine has no runtime {docker.runtime}, but {', '.join(info.runtimes)}"
            _report("FAIL", "runtime", finding)
            raise CheckFailed(
                finding, "WORKER_RUNTIME: install it, and name it in the engine's configuration"
            )
        _report("ok", "runtime", runtime or "the engine's default")
        on_image: dict[type[Exception], str] = {
            EngineError: "WORKER_IMAGE: `make images` builds it; one of a private registry is pulled by hand"
        }
        image_id = await _check(reactor, "image", containers.wait_for_image(), on_image, PULL_TIMEOUT)
        _report("ok", "image", f"{docker.worker_image} is {image_id}")
        await _check_machine(reactor, settings, containers, None)
    finally:
        await containers.shutdown()


async def _check_api(reactor: Any, settings: CoordSettings, api: MachinesAPI) -> None:
    assert settings.fly is not None  # noqa: S101 - local machines have no API
    app, url = settings.fly.api.worker_app, settings.fly.api.url
    remedies: dict[type[Exception], str] = {
        NotFoundError: f"WORKER_APP: is {app!r} the app, and may FLY_TOKEN access it?",
        UnavailableError: f"FLY_FLAPS_BASE_URL: is {url} the API? The default works on Fly only",
        MachinesError: f"FLY_TOKEN: create another with `fly tokens create deploy -a {app}`",
    }
    machines = await _check(reactor, "API, token, app", _list(api, url), remedies)
    _report("ok", "API, token, app", f"{format_count(len(machines))} in {app}")


async def _list(api: MachinesAPI, url: str) -> list[Machine]:
    """List the app's machines. Raise `CheckFailed` if the API cannot be connected to."""
    try:
        return await api.list()
    except UnavailableError as error:
        remedy = _connection_remedy(error, url)
        if remedy is None:
            raise
        if isinstance(root_cause(error), DNSLookupError):
            remedy += " The default exists on Fly only; elsewhere use https://api.machines.dev"
        raise CheckFailed(str(error), f"FLY_FLAPS_BASE_URL: {remedy}") from error


def _connection_remedy(error: BaseException, url: str) -> str | None:
    """Return what to do about a connection that failed, or None for other errors."""
    cause = root_cause(error)
    if isinstance(cause, DNSLookupError):
        return f"is the name in {url} right, and does this host's resolver (/etc/resolv.conf) know it?"
    if isinstance(cause, CertificateError):
        return (
            f"is {url} the right name? Does this host trust its issuer (ca-certificates, or SSL_CERT_FILE), "
            "and is this host's clock right?"
        )
    if isinstance(cause, TLSError):
        return f"does {url} use TLS? If not, the URL begins with http://"
    if isinstance(cause, RefusedConnectionError):
        return f"is the port in {url} right? The host is reachable, but nothing listens on the port"
    if isinstance(cause, ConnectError):
        return f"is the host in {url} right? It is not reachable: check the network and firewalls"
    return None


async def _check_machine(
    reactor: Any, settings: CoordSettings, api: MachinesAPI, worker_url: str | None
) -> None:
    """Create a machine, run a script on it, and destroy it."""
    pool = pool_config(replace(settings, machine_id="doctor"))
    image, region = pool.template.image, pool.region
    on_create: dict[type[Exception], str] = {
        RateLimitedError: "too many machines were created recently: try again in a minute",
        UnavailableError: "the API does not respond: try again, and see https://status.flyio.net",
        CapacityError: (
            f"FLY_REGION: no capacity in {region}; use another, or lower WORKER_CPUS or WORKER_MEMORY_MB"
        ),
        MachinesError: f"WORKER_IMAGE: does {image} exist? FLY_REGION: does {region} exist?",
    }
    on_start: dict[type[Exception], str] = {
        UnavailableError: "the API fails intermittently: try again",
        MachinesError: "the machine was destroyed during the check: try again",
        DeadlineExceededError: f"WORKER_IMAGE: {image} takes too long to download or to start",
    }
    name = machine_name(pool.name, SystemRandom())
    machine: Machine | None = None
    try:
        create = _create(api, name, pool)
        machine = await _check(reactor, "image, region", create, on_create, pool.timeouts.create)
        started = _wait_until_started(reactor, api, machine)
        await _check(reactor, "start", started, on_start, pool.timeouts.create)
        _report("ok", "image, region", f"{machine.id} started from {image}")
        url = machine.url or worker_url
        assert url is not None  # noqa: S101 - a machine on Fly is reached through its app's proxy
        client = WorkerClient(reactor, worker_url, settings.max_output)
        ready = _wait_until_ready(reactor, client, api, machine, url, pool.timeouts.ready)
        await _check(reactor, "worker", ready, {MachinesError: "the API fails intermittently: try again"})
        remedy = f"WORKER_URL: is {url} the workers' app? WORKER_IMAGE: is it of this version?"
        script = _run_script(reactor, settings, machine, url)
        await _check(reactor, "script", script, {Exception: remedy})
        _report("ok", "worker", f"ran a script at {unix_path(url)}")
    finally:
        await _remove(api, name, machine)


async def _create(api: MachinesAPI, name: str, pool: PoolConfig) -> Machine:
    try:
        machine, _ = await api.create(name, pool.region, pool.machine_config, pool.lease_ttl)
    except MachinesError as error:
        if error.call is not None and error.call.status in (401, 403):
            remedy = "FLY_TOKEN: it may list machines, but not create them; `fly tokens create deploy` may"
            raise CheckFailed(str(error), remedy) from error
        raise
    return machine


async def _wait_until_started(reactor: Any, api: MachinesAPI, machine: Machine) -> None:
    """Poll until the machine has started; the API's own wait does not end early for a failed machine."""
    while (state := (await api.get(machine.id)).state) is not State.STARTED:
        if state in (State.FAILED, State.STOPPED, State.DESTROYED):
            raise _not_running(machine, state)
        await deferLater(reactor, _POLL_PERIOD)


async def _wait_until_ready(
    reactor: Any, client: WorkerClient, api: MachinesAPI, machine: Machine, url: str, timeout: float
) -> None:
    """Wait until the worker responds. Raise `CheckFailed` with the reason if it does not in time."""
    try:
        await Deadline(reactor, timeout).run(client.wait_until_ready(machine))
    except DeadlineExceededError:
        pass
    else:
        return
    state = (await api.get(machine.id)).state
    if state is not State.STARTED:
        raise _not_running(machine, state)
    headers = Headers({formats.FORCE_INSTANCE: [machine.id]})
    probe = send_request(single_use_agent(reactor), "GET", url, formats.HEALTH_PATH, headers)
    try:
        response = await Deadline(reactor, _PROBE_TIMEOUT).run(probe)
    except CancelledError:
        raise
    except Exception as error:
        remedy = (
            f"WORKER_URL: {url} cannot be reached; does the workers' app have an address "
            "(`fly ips allocate-v6 --private`, with `--org` of the coordinators if they are in another one)?"
        )
        if connection_remedy := _connection_remedy(error, url):
            remedy += f" Otherwise: {connection_remedy}"
        raise CheckFailed(describe(error), remedy) from error
    abort_body(response)
    if response.code < 500:  # noqa: PLR2004 - a server's own errors
        [date, *_] = response.headers.getRawHeaders("date", ["missing"])
        finding = f"it responds, but as another machine or with another time: its Date is {date}"
        raise CheckFailed(finding, "is this host's clock right, within 5 s?")
    remedy = f"WORKER_URL: is {url} the workers' app? WORKER_IMAGE: does it listen on port {WORKER_PORT}?"
    raise CheckFailed(f"status {response.code} after {timeout:g} s", remedy)


def _not_running(machine: Machine, state: State) -> CheckFailed:
    """Return the failure for a machine that does not run; the log of a local worker was printed already."""
    finding = f"machine {machine.id} is {state}"
    if machine.url:
        return CheckFailed(finding, "its worker does not start, or exits: see the log lines above")
    remedy = "WORKER_IMAGE: it does not start, or exits; see `fly logs` of the workers' app"
    return CheckFailed(finding, remedy)


async def _run_script(reactor: Any, settings: CoordSettings, machine: Machine, url: str) -> None:
    headers = Headers({
        formats.AUTHORIZATION: [settings.signer.sign(machine.id, time.time())],
        formats.FORCE_INSTANCE: [machine.id],
    })  # fmt: skip
    agent = single_use_agent(reactor)
    response = await send_request(agent, "POST", url, f"{formats.RUN_PATH}?raw=1", headers, b"echo well")
    body = await read_body(response, _MAX_RESPONSE)
    if body != b"well\n\nexit: 0\n":
        raise ValueError(f"{response.code} {body[:200]!r}")
    if response.headers.getRawHeaders(formats.WORKER, [machine.id]) != [machine.id]:
        raise ValueError("the script ran on another machine than the one that was created")


async def _check(
    reactor: Any,
    name: str,
    work: Coroutine[Deferred[Any], Any, T],
    remedies: Mapping[type[Exception], str],
    timeout: float = _CHECK_TIMEOUT,
) -> T:
    """
    Run one check, within `timeout` seconds, and return its result.

    If it fails, print a line and raise `CheckFailed` with the first of `remedies` for the error's type.
    """
    try:
        return await Deadline(reactor, timeout).run(work)
    except CancelledError:
        raise
    except CheckFailed as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - every error is a finding
        finding = str(error) or type(error).__name__
        matching = (remedy for kind, remedy in remedies.items() if isinstance(error, kind))
        failure = CheckFailed(finding, next(matching, "it took too long: try again"))
    _report("FAIL", name, " ".join(failure.finding.split()))
    raise failure


async def _remove(api: MachinesAPI, name: str, machine: Machine | None) -> None:
    """Destroy the machine. Find it by name if no response to its creation was received."""
    try:
        machines = [machine] if machine else [other for other in await api.list() if other.name == name]
        for created in machines:
            await destroy_own(api, created)
    except MachinesError as error:
        _report("warn", "cleanup", f"{name} may remain until its lease expires: {error}")


@provider(ILogObserver)
def _report_worker_log(event: LogEvent) -> None:
    """Report warnings and errors of machines, and the progress of pulling an image."""
    level, namespace = event["log_level"], event["log_namespace"]
    is_progress = namespace == _CONTAINERS_NAMESPACE and level is LogLevel.info
    if is_progress or (level >= LogLevel.warn and namespace.startswith("bfaas.machines.")):
        # An observer's exceptions are lost; the next line raises the same one.
        with suppress(BrokenPipeError, OutputError):
            _report("" if is_progress else "warn", "log", formatEvent(event))


def _report(status: str, check: str, text: str) -> None:
    write_output(f"{status:4}  {check}: {text}\n")


def _report_remedy(text: str) -> None:
    write_output(f"{'':4}  -> {text}\n")
