"""A Machines API that fails on demand, and records its calls."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from bfaas.machines.api import Lease, Machine, MachineConfig, MachinesAPI, State, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from twisted.internet.interfaces import IReactorTime


class Fault:
    """What happens to one call. The base class makes the call as it is."""

    async def apply(self, call: Callable[[], Coroutine[Deferred[Any], Any, Any]], /) -> Any:
        return await call()


class Refuse(Fault):
    """The call fails without an effect."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def apply(self, _: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        raise self.error


class LoseResponse(Fault):
    """The call takes effect, but its response is lost."""

    async def apply(self, call: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        await call()
        raise UnavailableError("the response is lost")


class Hang(Fault):
    """The call has no effect and never returns."""

    async def apply(self, _: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        await Deferred()


class Slow(Fault):
    """The call is delayed."""

    def __init__(self, clock: IReactorTime, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds

    async def apply(self, call: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        await deferLater(self.clock, self.seconds)
        return await call()


class Twice(Fault):
    """The call takes effect twice, and returns the second response."""

    async def apply(self, call: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        await call()
        return await call()


class ForwardingMachines(MachinesAPI):
    """A Machines API that passes the name and the arguments of each call to `_call`."""

    def _call(self, method: str, *arguments: Any) -> Awaitable[Any]:
        raise NotImplementedError

    async def create(
        self, name: str, region: str, config: MachineConfig, lease_ttl: int
    ) -> tuple[Machine, Lease]:
        created: tuple[Machine, Lease] = await self._call("create", name, region, config, lease_ttl)
        return created

    async def list(self) -> list[Machine]:
        machines: list[Machine] = await self._call("list")
        return machines

    async def get(self, machine_id: str) -> Machine:
        machine: Machine = await self._call("get", machine_id)
        return machine

    async def start(self, machine_id: str, nonce: str | None) -> bool:
        is_stale: bool = await self._call("start", machine_id, nonce)
        return is_stale

    async def stop(self, machine_id: str, nonce: str | None) -> None:
        await self._call("stop", machine_id, nonce)

    async def suspend(self, machine_id: str, nonce: str | None) -> None:
        await self._call("suspend", machine_id, nonce)

    async def wait(self, machine: Machine, state: State, timeout: float) -> None:
        await self._call("wait", machine, state, timeout)

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        await self._call("destroy", machine_id, nonce)

    async def acquire_lease(self, machine_id: str, ttl: int, description: str) -> Lease:
        lease: Lease = await self._call("acquire_lease", machine_id, ttl, description)
        return lease

    async def refresh_lease(self, machine_id: str, nonce: str, ttl: int) -> Lease:
        lease: Lease = await self._call("refresh_lease", machine_id, nonce, ttl)
        return lease

    async def get_lease(self, machine_id: str) -> Lease:
        lease: Lease = await self._call("get_lease", machine_id)
        return lease

    async def release_lease(self, machine_id: str, nonce: str) -> None:
        await self._call("release_lease", machine_id, nonce)


class FaultyMachines(ForwardingMachines):
    """
    Forwards calls to an API with faults, and records them.

    `faults` has the faults of the next calls of each method. `always` has the fault of all other calls of a
    method, or of any method under "*".
    """

    def __init__(self, api: MachinesAPI) -> None:
        self.api = api
        self.calls: list[tuple[str, Any]] = []
        self.faults: dict[str, deque[Fault]] = {}
        self.always: dict[str, Fault] = {}

    def next(self, method: str, *faults: Fault) -> None:
        self.faults.setdefault(method, deque()).extend(faults)

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.calls)

    async def _call(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, arguments[0] if arguments else None))
        due = self.faults.get(method)
        fault = due.popleft() if due else self.always.get(method, self.always.get("*", Fault()))
        return await fault.apply(lambda: getattr(self.api, method)(*arguments))
