"""The way from a coordinator to the Machines API, on which calls and answers are lost, late and refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from bfaas.machines.api import (
    CapacityError,
    Lease,
    Machine,
    MachineConfig,
    MachinesAPI,
    MachinesError,
    NotFoundError,
    RateLimitedError,
    RefusedError,
    State,
    UnavailableError,
)

if TYPE_CHECKING:
    from tests.sim.nodes import Node
    from tests.sim.world import World

_GUARDED = ("start", "stop", "suspend", "destroy", "acquire_lease", "refresh_lease", "release_lease")


class Network:
    """The Machines API, as one coordinator sees it."""

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node

    def _call(self, method: str, *arguments: Any) -> Deferred[Any]:
        """Send a call; what becomes of it is chance. Cancelling it does not call it back."""
        world, node = self._world, self._node
        waits: list[Deferred[Any]] = []
        answer: Deferred[Any] = Deferred(lambda _: waits[0].cancel() if waits else None)
        world.ledger.called(node, method)
        delay = world.latency()
        error, answered = self._trouble(method)
        if error is not None and not answered:  # told at once, and never done
            world.note(str(node), method, _short(arguments), repr(error))
            world.clock.call_later(2 * delay, self._tell, answer, Failure(error))
            return answer
        if world.fault("hangs"):
            world.note(str(node), method, _short(arguments), "hangs")
            return answer
        if world.fault("late-call"):
            delay += world.random.uniform(0.5, 25.0)
        if error is not None and world.fault("zombie-call"):  # told as failed, done long after
            world.clock.call_later(2 * delay, self._tell, answer, Failure(error))
            delay += world.random.uniform(0.1, 25.0)
        world.clock.call_later(delay, self._arrive, answer, waits, method, arguments, error)
        return answer

    def _trouble(self, method: str) -> tuple[MachinesError | None, bool]:
        """Choose an error, if any, and whether it is one that comes although the call is done."""
        world = self._world
        if world.outage:
            return UnavailableError("503 outage"), False
        if world.denied and method not in ("wait", "get"):
            return RefusedError("401 token validation error"), False
        for fault, error in (
            ("500", UnavailableError("500")),
            ("garbage", UnavailableError("<html>")),
            ("reset", UnavailableError("connection reset")),
            ("429", RateLimitedError("429")),
        ):
            if world.fault(fault):
                return error, False
        if method == "create" and world.fault("no-capacity"):
            return CapacityError("insufficient resources"), False
        if world.fault("lost-answer"):
            return UnavailableError("the answer is lost"), True
        return None, False

    def _arrive(
        self,
        answer: Deferred[Any],
        waits: list[Deferred[Any]],
        method: str,
        arguments: tuple[Any, ...],
        error: MachinesError | None,
    ) -> None:
        world = self._world
        if answer.called and method == "wait":
            return  # nobody waits any more
        if method in ("get", "wait") and self._is_hidden(arguments[0]):
            self._answer(answer, Failure(NotFoundError("machine not found")), None)
            return
        if method == "list" and world.fault("stale-list"):
            self._answer(answer, world.stale_list(), error)
            return
        work = Deferred.fromCoroutine(self._do(method, arguments))
        if method == "wait":
            waits.append(work)
        work.addBoth(lambda result: self._answer(answer, result, error))

    async def _do(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Have the call done, and keep the books."""
        world, node = self._world, self._node
        before = world.machines.find(arguments[0]) if method in _GUARDED else None
        lease = world.machines.lease_of(arguments[0]) if before else None
        used = node.uses(arguments[0]) if before else False
        try:
            result = await getattr(world.machines, method)(*arguments)
        except CancelledError:
            raise
        except MachinesError as error:
            world.note(str(node), method, _short(arguments), repr(error))
            raise
        world.note(str(node), method, _short(arguments))
        if before is not None:
            world.ledger.changed(node, method, before, lease, used=used)
            if method in ("acquire_lease", "refresh_lease"):
                world.ledger.records[before.id].leased_by = node
        if isinstance(result, Lease):
            world.ledger.nonces.add(result.nonce)
        if method == "create":
            world.ledger.nonces.add(result[1].nonce)
            world.ledger.created(node, result[0])
        return result

    def _is_hidden(self, asked: Machine | str) -> bool:
        """Tell a machine that is so new that the API does not find it at once."""
        machine = self._world.machines.find(asked.id if isinstance(asked, Machine) else asked)
        return (
            machine is not None
            and machine.created_at > self._world.wall() - 0.5
            and self._world.fault("hidden-when-new")
        )

    def _answer(self, answer: Deferred[Any], result: Any, error: MachinesError | None) -> None:
        world = self._world
        if isinstance(result, Failure) and result.check(CancelledError):
            return
        delay = world.latency()
        if error is not None:
            result = Failure(error)
        elif world.fault("hangs-after"):
            return
        elif world.fault("late-answer"):
            delay += world.random.uniform(0.5, 25.0)
        world.clock.call_later(delay, self._tell, answer, result)

    def _tell(self, answer: Deferred[Any], result: Any) -> None:
        def tell() -> None:
            if not answer.called:
                answer.callback(result)

        self._node.clock.deliver(tell)

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

    async def start(self, machine_id: str, nonce: str | None) -> None:
        await self._call("start", machine_id, nonce)

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


def _short(arguments: tuple[Any, ...]) -> str:
    """Tell what a call was about."""
    told = [argument.id if isinstance(argument, Machine) else argument for argument in arguments]
    return " ".join(str(argument) for argument in told if isinstance(argument, str | float))


_check: type[MachinesAPI] = Network
