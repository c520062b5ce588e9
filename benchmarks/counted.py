"""The client of the Machines API, with machines in memory instead of a network; what it asks is counted."""

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


class Book:
    """
    What was asked of the API of one app: how often in each second, and of which machine.

    `enforced` says whether calls beyond Fly's limits are refused, or only counted.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._limits = RateLimiter(clock)
        self.enforced = True
        self.asked: Counter[tuple[int, str]] = Counter()
        self.of_machine: Counter[tuple[str, str]] = Counter()
        self.names: dict[str, str] = {}
        self.destroyed: dict[str, float] = {}

    def take(self, action: str, machine_id: str) -> None:
        """Note a call. Raises `RateLimitedError` for one too many."""
        second = int(self._clock.seconds())
        self.asked[second, "all"] += 1
        self.asked[second, action] += 1
        self.of_machine[action, machine_id] += 1
        try:
            self._limits.acquire(action, machine_id)
        except RateLimitedError:
            self.asked[second, "refused"] += 1
            self.asked[second, f"refused {action}"] += 1
            if self.enforced:
                raise

    def note(self, action: str, machine_id: str, result: Any) -> None:
        """Note which machines there are, by what was done: their names, and when they were destroyed."""
        if action == "create":
            machine: Machine = result[0]
            self.names[machine.id] = machine.name
        elif action == "destroy":
            self.destroyed.setdefault(machine_id, self._clock.seconds())

    def there(self) -> list[tuple[str, str]]:
        """Tell the machines that there are, each its id and its name."""
        return [(key, name) for key, name in self.names.items() if key not in self.destroyed]


class _Call(NamedTuple):
    machine_id: str
    nonce: str | None
    body: dict[str, Any]
    query: dict[str, list[str]]


class CountedMachines(FlyMachines):
    """`FlyMachines` with all its repetitions; each call takes `latency` seconds there and back."""

    def __init__(
        self, clock: IReactorTime, random: Random, there: EmulatedMachines, book: Book, latency: float
    ) -> None:
        no_agent: Any = None
        super().__init__(clock, no_agent, random, "", "app", "token")
        self._there = there
        self._book = book
        self._one_way = latency / 2

    async def list(self) -> list[Machine]:
        """Tell the machines, without a detour over JSON."""
        machines: list[Machine] = await self._call("GET", "", lambda told: told)
        return machines

    async def _call_once(
        self,
        method: str,
        path: str,
        read: Callable[[Any], Any],  # noqa: ARG002 - nothing has to be read
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
        failed: MachinesError | None = None
        result: Any = None
        try:
            self._book.take(action, machine_id)
            result = await do(self._there, call)
            self._book.note(action, machine_id, result)
        except CancelledError:
            raise
        except WaitTimeoutError as error:
            failed = UnavailableError(str(error))  # as which the client reads a 408
        except MachinesError as error:
            failed = error
        await deferLater(self._clock, self._one_way)
        try:
            if failed is not None:
                raise failed
        finally:
            failed = None  # its traceback leads here: a circle
        return result


async def _create(there: EmulatedMachines, call: _Call) -> tuple[Machine, str]:
    asked = call.body
    config = decode_config(asked["config"])
    machine, lease = await there.create(asked["name"], asked["region"], config, asked["lease_ttl"])
    return machine, lease.nonce


async def _wait(there: EmulatedMachines, call: _Call) -> dict[str, Any]:
    [state], [seconds] = call.query["state"], call.query["timeout"]
    await there.wait(await there.get(call.machine_id), State(state), float(seconds))
    return {"ok": True}


async def _lease(there: EmulatedMachines, call: _Call) -> Any:
    if call.nonce is not None:
        return await there.refresh_lease(call.machine_id, call.nonce, call.body["ttl"])
    return await there.acquire_lease(call.machine_id, call.body["ttl"], call.body["description"])


_ACTIONS: dict[tuple[str, str], tuple[str, Callable[[EmulatedMachines, _Call], Coroutine[Any, Any, Any]]]] = {
    ("GET", "machines"): ("list", lambda there, _: there.list()),
    ("POST", "machines"): ("create", _create),
    ("GET", "machine"): ("get", lambda there, call: there.get(call.machine_id)),
    ("DELETE", "machine"): ("destroy", lambda there, call: there.destroy(call.machine_id, call.nonce)),
    ("POST", "start"): ("start", lambda there, call: there.start(call.machine_id, call.nonce)),
    ("POST", "stop"): ("stop", lambda there, call: there.stop(call.machine_id, call.nonce)),
    ("POST", "suspend"): ("suspend", lambda there, call: there.suspend(call.machine_id, call.nonce)),
    ("GET", "wait"): ("wait", _wait),
    ("GET", "lease"): ("get lease", lambda there, call: there.get_lease(call.machine_id)),
    ("POST", "lease"): ("lease", _lease),
    ("DELETE", "lease"): (
        "release lease",
        lambda there, call: there.release_lease(call.machine_id, call.nonce or ""),
    ),
}
"""What Fly calls an action, and how it is done."""
