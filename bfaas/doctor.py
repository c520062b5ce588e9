"""
What `bfaas doctor` does: try each thing that a coordinator with these settings depends on, in its order.

The last of them is a script on a machine, made for that under a pool's name of its own, so that no
coordinator takes it for one of its machines; where it is left behind, its lease runs out and any coordinator
destroys it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from random import SystemRandom
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError
from twisted.web.http_headers import Headers

from bfaas import wire
from bfaas.coord import pool_settings
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.exchange import BytesProducer, head, lasting_agent, read_body, single_use_agent
from bfaas.machines.api import (
    CapacityError,
    MachinesError,
    NotFoundError,
    RateLimitedError,
    State,
    UnavailableError,
)
from bfaas.machines.fly import FlyMachines
from bfaas.machines.local import LocalMachines, find_sandbox
from bfaas.member import machine_name
from bfaas.process import in_own_reactor
from bfaas.proxy import Proxy
from bfaas.settings import CoordSettings, SettingsError
from bfaas.sweep import destroy_own

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from twisted.internet.defer import Deferred

    from bfaas.machines.api import Machine, MachinesAPI

T = TypeVar("T")

_LIMIT = 60.0
"""Seconds that one step may take; making a machine can mean fetching its image."""

_MAX_ANSWER = 4096


class _Ill(Exception):  # noqa: N818 - it is a finding
    """A check failed; the message says what to do about it."""


def examine(environ: Mapping[str, str]) -> int:
    """Check everything, a line each; 0 where all is well, 1 otherwise."""
    try:
        settings = CoordSettings.from_environment(environ)
    except SettingsError as error:
        for problem in error.problems:
            _tell("FAIL", "settings", problem)
        _tell("", "", "set these as the README's table of settings says; nothing else was tried")
        return 1
    _tell("ok", "settings", f"a pool of {settings.pool_size}, in {settings.region}")
    return 0 if in_own_reactor(lambda reactor: _examine(reactor, settings)) else 1


async def _examine(reactor: Any, settings: CoordSettings) -> bool:
    fly = settings.fly
    try:
        if fly is None:
            sandboxed = find_sandbox()
            missing = "not usable: scripts are not confined; apt-get install bubblewrap"
            _tell("ok" if sandboxed else "warn", "bubblewrap", "found" if sandboxed else missing)
            local = LocalMachines(reactor, time.time, sandboxed=sandboxed)
            try:
                await _try_machine(reactor, settings, local, None)
            finally:
                await local.shutdown()
        else:
            agent, connections = lasting_agent(reactor)
            api = FlyMachines(reactor, agent, SystemRandom(), fly.api.url, fly.api.worker_app, fly.api.token)
            try:
                await _try_api(reactor, settings, api)
                await _try_machine(reactor, settings, api, fly.worker_url)
            finally:
                await connections.closeCachedConnections()
    except _Ill as remedy:
        _tell("", "", str(remedy))
        return False
    return True


async def _try_api(reactor: Any, settings: CoordSettings, api: MachinesAPI) -> None:
    assert settings.fly is not None  # noqa: S101 - there is no API on a laptop
    where = settings.fly.api
    machines = await _step(reactor, "API, token, app", api.list(), {
        NotFoundError: f"WORKER_APP: is {where.worker_app!r} the app, and may FLY_TOKEN see it?",
        UnavailableError: f"FLY_FLAPS_BASE_URL: is {where.url} the API? The default works on Fly alone",
        MachinesError: f"FLY_TOKEN: make another, with `fly tokens create deploy -a {where.worker_app}`",
    })  # fmt: skip
    _tell("ok", "API, token, app", f"{len(machines)} machines in {where.worker_app}")


async def _try_machine(
    reactor: Any, settings: CoordSettings, api: MachinesAPI, worker_url: str | None
) -> None:
    pool = pool_settings(replace(settings, machine_id="doctor"))
    name = machine_name(pool.name, SystemRandom())
    create = api.create(name, pool.region, pool.labelled(), pool.lease_ttl)
    machine, _ = await _step(reactor, "image, region", create, {
        RateLimitedError: "too many machines were made lately: try again in a minute",
        UnavailableError: "the API does not answer: try again, and look at https://status.flyio.net",
        CapacityError: f"FLY_REGION: no room in {pool.region}; try another, or WORKER_CPUS, WORKER_MEMORY_MB",
        MachinesError: f"WORKER_IMAGE: was {pool.config.image} pushed? FLY_REGION: is there a {pool.region}?",
    })  # fmt: skip
    try:
        await _step(reactor, "start", api.wait(machine, State.STARTED, _LIMIT), {
            MachinesError: "WORKER_IMAGE: does it start? Look at `fly logs` of the worker app",
        })  # fmt: skip
        _tell("ok", "image, region", f"{machine.id} started from {pool.config.image}")
        await _try_worker(reactor, settings, await api.get(machine.id), worker_url)
    except MachinesError as error:
        _tell("FAIL", "machine", str(error))
        raise _Ill("the API fails at times: try again") from error
    finally:
        await _remove(api, machine)


async def _try_worker(
    reactor: Any, settings: CoordSettings, machine: Machine, worker_url: str | None
) -> None:
    url = machine.url or worker_url
    proxy = Proxy(reactor, worker_url, settings.max_output)
    await _step(reactor, "worker", proxy.wait_until_ready(machine), {
        DeadlineExceededError: f"WORKER_URL: does {url} lead to the app (`fly ips allocate-v6 --private`),"
        " and does its image listen on the service's port?",
    })  # fmt: skip
    headers = Headers({
        wire.AUTHORIZATION: [settings.signer.sign(machine.id, time.time())],
        wire.FORCE_INSTANCE: [machine.id],
    })  # fmt: skip

    async def run() -> None:
        agent = single_use_agent(reactor)
        target = f"{url}{wire.RUN_PATH}?raw=1".encode()
        response = await head(agent.request(b"POST", target, headers, BytesProducer(b"echo well")))
        said = await read_body(response, _MAX_ANSWER)
        if said != b"well\n\nexit: 0\n":
            raise ValueError(f"{response.code} {said[:200]!r}")

    await _step(reactor, "script", run(), {
        Exception: "the worker does not run scripts: is its image of this version? Look at its log",
    })  # fmt: skip
    _tell("ok", "worker", f"ran a script at {url}")


async def _step(
    reactor: Any, what: str, work: Coroutine[Deferred[Any], Any, T], remedies: Mapping[type[Exception], str]
) -> T:
    """Do one thing, in its time; tell a failure, and raise the remedy for the first kind that it is of."""
    try:
        return await Deadline(reactor, _LIMIT).run(work)
    except CancelledError:
        raise
    except Exception as error:
        _tell("FAIL", what, " ".join(str(error).split()) or type(error).__name__)
        kinds = (remedy for kind, remedy in remedies.items() if isinstance(error, kind))
        raise _Ill(next(kinds, "it took too long: try again")) from error


async def _remove(api: MachinesAPI, machine: Machine) -> None:
    try:
        await destroy_own(api, machine)
    except MachinesError as error:
        _tell("warn", "cleaning", f"{machine.id} is left, until its lease runs out: {error}")


def _tell(how: str, what: str, line: str) -> None:
    sys.stdout.write(f"{how:4}  {f'{what}: ' if what else '-> '}{line}\n")
    sys.stdout.flush()
