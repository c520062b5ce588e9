"""The client of the Machines API over emulated machines, without a network; its calls are counted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater

from bfaas.machines.api import (
    Machine,
    MachinesError,
    RateLimitedError,
    State,
    UnavailableError,
    WaitTimeoutError,
)
from bfaas.machines.codec import decode_config
from bfaas.machines.emulator.rate_limits import RateLimiter
from bfaas.machines.fly import FlyMachines

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from random import Random

    from twisted.internet.interfaces import IReactorTime

    from bfaas.machines.emulator.state import EmulatedMachines


class CallLog:
    """
    The calls to the API of one app, by second and by machine.

    `enforced` is whether calls beyond Fly's rate limits are rejected, or only counted.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._limits = RateLimiter(clock)
        self.enforced = True
        self.by_second: Counter[tuple[int, str]] = Counter()
        self.by_machine: Counter[tuple[str, str]] = Counter()
        self.names: dict[str, str] = {}
        self.destroyed: dict[str, float] = {}

    def count(self, action: str, machine_id: str) -> None:
        """Count a call. Raises `RateLimitedError` if it exceeds the limit."""
        second = int(self._clock.seconds())
        self.by_second[second, "all"] += 1
        self.by_second[second, action] += 1
        self.by_machine[action, machine_id] += 1
        try:
            self._limits.acquire(action, machine_id)
        except RateLimitedError:
            self.by_second[second, "rejected"] += 1
            self.by_second[second, f"rejected {action}"] += 1
            if self.enforced:
                raise

    def record(self, action: str, machine_id: str, result: Any) -> None:
        """Record the machines that a call has created or destroyed."""
        if action == "create":
            machine: Machine = result[0]
            self.names[machine.id] = machine.name
        elif action == "destroy":
            self.destroyed.setdefault(machine_id, self._clock.seconds())

    def existing(self) -> list[tuple[str, str]]:
        """Return the existing machines as (id, name)."""
        return [(key, name) for key, name in self.names.items() if key not in self.destroyed]


class _Call(NamedTuple):
    machine_id: str
    nonce: str | None
    body: dict[str, Any]
    query: dict[str, list[str]]


class CountingMachines(FlyMachines):
    """`FlyMachines` with all its retries; the round trip of each call takes `latency` seconds."""

    def __init__(
        self, clock: IReactorTime, random: Random, machines: EmulatedMachines, calls: CallLog, latency: float
    ) -> None:
        no_agent: Any = None
        super().__init__(clock, no_agent, random, "", "app", "token")
        self._emulated = machines
        self._calls = calls
        self._one_way = latency / 2

    async def list(self) -> list[Machine]:
        """Return the machines, without the conversion to JSON."""
        machines: list[Machine] = await self._call("GET", "", lambda result: result)
        return machines

    async def _call_once(
        self,
        method: str,
        path: str,
        read: Callable[[Any], Any],  # noqa: ARG002 - there is nothing to decode
        nonce: str | None,
        body: Any,
    ) -> Any:
        split = urlsplit(path.removeprefix(self._machines))
        _, machine_id, verb = (split.path + "//").split("/")[:3]
        action, do = _ACTIONS[method, verb or ("machine" if machine_id else "machines")]
        call = _Call(machine_id, nonce, body or {}, parse_qs(split.query))
        if action == "lease":
            action = "refresh lease" if nonce else "acquire lease"
        await deferLater(self._clock, self._one_way)
        error: MachinesError | None = None
        result: Any = None
        try:
            self._calls.count(action, machine_id)
            result = await do(self._emulated, call)
            self._calls.record(action, machine_id, result)
        except CancelledError:
            raise
        except WaitTimeoutError as timeout:
            error = UnavailableError(str(timeout))  # as the client decodes a 408
        except MachinesError as raised:
            error = raised
        await deferLater(self._clock, self._one_way)
        try:
            if error is not None:
                raise error
        finally:
            error = None  # breaks the reference cycle with its traceback
        return result


async def _create(machines: EmulatedMachines, call: _Call) -> tuple[Machine, str]:
    body = call.body
    config = decode_config(body["config"])
    machine, lease = await machines.create(body["name"], body["region"], config, body["lease_ttl"])
    return machine, lease.nonce


async def _start(machines: EmulatedMachines, call: _Call) -> dict[str, Any]:
    return {"migrated": await machines.start(call.machine_id, call.nonce)}


async def _wait(machines: EmulatedMachines, call: _Call) -> dict[str, Any]:
    [state], [seconds] = call.query["state"], call.query["timeout"]
    await machines.wait(await machines.get(call.machine_id), State(state), float(seconds))
    return {"ok": True}


async def _lease(machines: EmulatedMachines, call: _Call) -> Any:
    if call.nonce is not None:
        return await machines.refresh_lease(call.machine_id, call.nonce, call.body["ttl"])
    return await machines.acquire_lease(call.machine_id, call.body["ttl"], call.body["description"])


_ACTIONS: dict[tuple[str, str], tuple[str, Callable[[EmulatedMachines, _Call], Coroutine[Any, Any, Any]]]] = {
    ("GET", "machines"): ("list", lambda machines, _: machines.list()),
    ("POST", "machines"): ("create", _create),
    ("GET", "machine"): ("get", lambda machines, call: machines.get(call.machine_id)),
    ("DELETE", "machine"): ("destroy", lambda machines, call: machines.destroy(call.machine_id, call.nonce)),
    ("POST", "start"): ("start", _start),
    ("POST", "stop"): ("stop", lambda machines, call: machines.stop(call.machine_id, call.nonce)),
    ("POST", "suspend"): ("suspend", lambda machines, call: machines.suspend(call.machine_id, call.nonce)),
    ("GET", "wait"): ("wait", _wait),
    ("GET", "lease"): ("get lease", lambda machines, call: machines.get_lease(call.machine_id)),
    ("POST", "lease"): ("lease", _lease),
    ("DELETE", "lease"): (
        "release lease",
        lambda machines, call: machines.release_lease(call.machine_id, call.nonce or ""),
    ),
}
"""By method and path: the name of Fly's action for rate limits, and its implementation."""
