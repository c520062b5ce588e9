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
    MachinesError,
    NameTakenError,
    NotFoundError,
    RateLimitedError,
    RefusedError,
    UnavailableError,
)
from bfaas.pooling.config import pool_of
from tests.support.faults import CallingMachines

if TYPE_CHECKING:
    from tests.simulation.nodes import Node
    from tests.simulation.world import World

_GUARDED = ("start", "stop", "suspend", "destroy", "acquire_lease", "refresh_lease", "release_lease")


class _Call:
    """A call on its way. `strikes` are the faults that befall it, where they apply."""

    def __init__(
        self, world: World, method: str, arguments: tuple[Any, ...], strikes: frozenset[str]
    ) -> None:
        self.method = method
        self.arguments = arguments
        self.user: object = None  # the request that the machine serves, of the coordinator that asks
        self.work: Deferred[Any] | None = None
        self.answer: Deferred[Any] = Deferred(self._cancel)
        self._world = world
        self._strikes = strikes

    def is_struck(self, fault: str) -> bool:
        if fault not in self._strikes or not self._world.chaos:
            return False
        self._world.marks[fault] += 1
        return True

    def tell(self, result: Any) -> None:
        if not self.answer.called:
            self.answer.callback(result)

    def _cancel(self, _: object) -> None:
        if self.method == "wait" and self.work is not None:
            self.work.cancel()


class Network(CallingMachines):
    """The Machines API, as one coordinator sees it."""

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node

    def _call(self, method: str, *arguments: Any) -> Deferred[Any]:
        """Send a call; what becomes of it is chance. Cancelling it does not call it back."""
        world, node = self._world, self._node
        call = _Call(world, method, arguments, world.strikes())
        call.user = node.user_of(arguments[0]) if arguments else None
        world.ledger.called(node, method)
        delay = world.latency()
        refusal = self._refusal(call)
        if refusal is not None:
            world.note(str(node), method, _short(arguments), repr(refusal))
            world.clock.call_later(2 * delay, self._tell, call, Failure(refusal))
            return call.answer
        if call.is_struck("hangs"):
            world.note(str(node), method, _short(arguments), "hangs")
            return call.answer
        if call.is_struck("late-call"):
            delay += world.random.uniform(0.5, 25.0)
        if call.is_struck("zombie-call"):  # told as failed, done long after
            world.clock.call_later(2 * delay, self._tell, call, Failure(UnavailableError("connection reset")))
            delay += world.random.uniform(0.1, 25.0)
        world.clock.call_later(delay, self._arrive, call)
        return call.answer

    def _refusal(self, call: _Call) -> MachinesError | None:
        """Choose the error of a call that is not done."""
        world = self._world
        if world.outage:
            return UnavailableError("503 outage")
        if world.denied and call.method not in ("wait", "get"):
            return RefusedError("401 token validation error")
        for fault, error in (
            ("500", UnavailableError("500")),
            ("garbage", UnavailableError("<html>")),
            ("reset", UnavailableError("connection reset")),
            ("429", RateLimitedError("429")),
        ):
            if call.is_struck(fault):
                return error
        if call.method == "create" and call.is_struck("no-capacity"):
            return CapacityError("insufficient resources")
        return None

    def _arrive(self, call: _Call) -> None:
        method, arguments = call.method, call.arguments
        if call.answer.called and method == "wait":
            return  # nobody waits any more
        if method in ("get", "wait") and self._is_new(arguments[0]) and call.is_struck("hidden-when-new"):
            self._answer(call, Failure(NotFoundError("machine not found")))
            return
        if method == "list" and call.is_struck("stale-list"):
            self._answer(call, self._world.stale_list())
            return
        if method == "destroy" and self._is_nobodys(arguments[0]) and call.is_struck("lease-taken"):
            self._world.machines.lend(arguments[0], 30)
        call.work = Deferred.fromCoroutine(self._do(call))
        call.work.addBoth(lambda result: self._answer(call, result))

    async def _do(self, call: _Call) -> Any:
        """Have the call done, and keep the books."""
        world, node, method, arguments = self._world, self._node, call.method, call.arguments
        before = world.machines.find(arguments[0]) if method in _GUARDED else None
        used = before is not None and call.user is not None and node.user_of(before.id) is call.user
        lease = world.machines.lease_of(arguments[0]) if before else None
        try:
            result = await getattr(world.machines, method)(*arguments)
        except CancelledError:
            raise
        except MachinesError as error:
            world.note(str(node), method, _short(arguments), repr(error))
            if isinstance(error, NameTakenError) and call.is_struck("nameless"):
                raise NameTakenError("unique machine name violation", None) from error
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

    def _is_new(self, asked: Machine | str) -> bool:
        """Tell a machine that is so new that the API may not find it yet."""
        machine = self._world.machines.find(asked.id if isinstance(asked, Machine) else asked)
        return machine is not None and machine.created_at > self._world.wall() - 0.5

    def _is_nobodys(self, machine_id: str) -> bool:
        """Tell a machine whose lease has run out, of a pool that nobody runs any more."""
        world = self._world
        machine = world.machines.find(machine_id)
        if machine is None or world.machines.lease_of(machine_id) is not None:
            return False
        return all(node.is_gone for node in world.nodes if node.pool_name == pool_of(machine.name))

    def _answer(self, call: _Call, result: Any) -> None:
        world = self._world
        if isinstance(result, Failure) and result.check(CancelledError):
            return
        delay = world.latency()
        if call.is_struck("lost-answer"):
            result = Failure(UnavailableError("the answer is lost"))
        elif call.is_struck("hangs-after"):
            return
        elif call.is_struck("late-answer"):
            delay += world.random.uniform(0.5, 25.0)
        world.clock.call_later(delay, self._tell, call, result)

    def _tell(self, call: _Call, result: Any) -> None:
        """Give the coordinator its answer; or let it come to grief just then."""
        if not self._node.clock.dead:
            if call.is_struck("crash-at-answer"):
                self._world.replace(self._node, crash=True)
            elif call.is_struck("pause-at-answer"):
                self._world.pause(self._node)
        self._node.clock.deliver(call.tell, result)

    def config_of(self, machine_id: str) -> MachineConfig:
        return self._world.machines.config_of(machine_id)


def _short(arguments: tuple[Any, ...]) -> str:
    """Tell what a call was about."""
    told = [argument.id if isinstance(argument, Machine) else argument for argument in arguments]
    return " ".join(str(argument) for argument in told if isinstance(argument, str | float))
