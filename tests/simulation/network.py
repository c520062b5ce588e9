"""The network between a coordinator and the Machines API: it loses, delays and rejects calls."""

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
    RejectedError,
    UnavailableError,
)
from bfaas.pooling.config import pool_of
from tests.support.faults import ForwardingMachines

if TYPE_CHECKING:
    from tests.simulation.nodes import Node
    from tests.simulation.world import World

_LEASED_METHODS = ("start", "stop", "suspend", "destroy", "acquire_lease", "refresh_lease", "release_lease")


class _Call:
    """An API call on its way. `faults` befall it where they apply."""

    def __init__(self, world: World, method: str, arguments: tuple[Any, ...], faults: frozenset[str]) -> None:
        self.method = method
        self.arguments = arguments
        self.client: object = None  # of the run that the calling coordinator has on the machine
        self.execution: Deferred[Any] | None = None
        self.response: Deferred[Any] = Deferred(self._cancel)
        self._world = world
        self._faults = faults

    def has_fault(self, fault: str) -> bool:
        """Return whether a fault befalls the call, and count it."""
        if fault not in self._faults or not self._world.chaos:
            return False
        self._world.fault_counts[fault] += 1
        return True

    def respond(self, result: Any) -> None:
        """Give the caller a result, unless it has one or has cancelled the call."""
        if not self.response.called:
            self.response.callback(result)

    def _cancel(self, _: object) -> None:
        if self.method == "wait" and self.execution is not None:
            self.execution.cancel()


class Network(ForwardingMachines):
    """The Machines API as one coordinator reaches it."""

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node

    def _call(self, method: str, *arguments: Any) -> Deferred[Any]:
        """Send a call, with random faults. Cancelling does not prevent its execution."""
        world, node = self._world, self._node
        call = _Call(world, method, arguments, world.call_faults())
        call.client = node.client_on(arguments[0]) if arguments else None
        world.oracle.on_call(node, method)
        delay = world.latency()
        error = self._immediate_error(call)
        if error is not None:
            world.log(node, method, _summary(arguments), repr(error))
            world.clock.call_later(2 * delay, self._deliver, call, Failure(error))
            return call.response
        if call.has_fault("hangs"):
            world.log(node, method, _summary(arguments), "hangs")
            return call.response
        if call.has_fault("late-call"):
            delay += world.random.uniform(0.5, 25.0)
        if call.has_fault("late-execution"):  # reported as failed, executed much later
            reset = Failure(UnavailableError("connection reset"))
            world.clock.call_later(2 * delay, self._deliver, call, reset)
            delay += world.random.uniform(0.1, 25.0)
        world.clock.call_later(delay, self._arrive, call)
        return call.response

    def _immediate_error(self, call: _Call) -> MachinesError | None:
        """Choose the error of a call that is not executed."""
        world = self._world
        if world.outage:
            return UnavailableError("503 outage")
        if world.unauthorized and call.method not in ("wait", "get"):
            return RejectedError("401 token validation error")
        for fault, error in (
            ("500", UnavailableError("500")),
            ("garbage", UnavailableError("<html>")),
            ("reset", UnavailableError("connection reset")),
            ("429", RateLimitedError("429")),
        ):
            if call.has_fault(fault):
                return error
        if call.method == "create" and call.has_fault("no-capacity"):
            return CapacityError("insufficient resources")
        return None

    def _arrive(self, call: _Call) -> None:
        method, arguments = call.method, call.arguments
        if call.response.called and method == "wait":
            return
        if method in ("get", "wait") and self._is_new(arguments[0]) and call.has_fault("hidden-when-new"):
            self._send_response(call, Failure(NotFoundError("machine not found")))
            return
        if method == "list" and call.has_fault("stale-list"):
            self._send_response(call, self._world.stale_list())
            return
        if method == "destroy" and self._is_orphaned(arguments[0]) and call.has_fault("lease-taken"):
            self._world.machines.lease_to_operator(arguments[0], 30)
        call.execution = Deferred.fromCoroutine(self._execute(call))
        call.execution.addBoth(lambda result: self._send_response(call, result))

    async def _execute(self, call: _Call) -> Any:
        """Execute a call, and report its effect to the oracle."""
        world, node, method, arguments = self._world, self._node, call.method, call.arguments
        before = world.machines.find(arguments[0]) if method in _LEASED_METHODS else None
        in_use = before is not None and call.client is not None and node.client_on(before.id) is call.client
        lease = world.machines.lease_of(arguments[0]) if before else None
        try:
            result = await getattr(world.machines, method)(*arguments)
        except CancelledError:
            raise
        except MachinesError as error:
            world.log(node, method, _summary(arguments), repr(error))
            if isinstance(error, NameTakenError) and call.has_fault("conflict-without-id"):
                raise NameTakenError("unique machine name violation", None) from error
            raise
        world.log(node, method, _summary(arguments))
        if before is not None:
            world.oracle.on_changed(node, method, before, lease, in_use=in_use)
            if method in ("acquire_lease", "refresh_lease"):
                world.oracle.records[before.id].leased_by = node
        if isinstance(result, Lease):
            world.oracle.nonces.add(result.nonce)
        if method == "create":
            world.oracle.nonces.add(result[1].nonce)
            world.oracle.on_created(node, result[0])
        return result

    def _is_new(self, machine_or_id: Machine | str) -> bool:
        """Return whether a machine is so new that the API may not find it yet."""
        machine_id = machine_or_id.id if isinstance(machine_or_id, Machine) else machine_or_id
        machine = self._world.machines.find(machine_id)
        return machine is not None and machine.created_at > self._world.wall() - 0.5

    def _is_orphaned(self, machine_id: str) -> bool:
        """Return whether a machine has no lease, and its pool no coordinator."""
        world = self._world
        machine = world.machines.find(machine_id)
        if machine is None or world.machines.lease_of(machine_id) is not None:
            return False
        return all(node.is_gone for node in world.nodes if node.pool_name == pool_of(machine.name))

    def _send_response(self, call: _Call, result: Any) -> None:
        world = self._world
        if isinstance(result, Failure) and result.check(CancelledError):
            return
        delay = world.latency()
        if call.has_fault("lost-response"):
            result = Failure(UnavailableError("the response is lost"))
        elif call.has_fault("hangs-after-execution"):
            return
        elif call.has_fault("late-response"):
            delay += world.random.uniform(0.5, 25.0)
        world.clock.call_later(delay, self._deliver, call, result)

    def _deliver(self, call: _Call, result: Any) -> None:
        """Deliver a response; the coordinator may crash or be paused just before."""
        if not self._node.clock.dead:
            if call.has_fault("crash-at-response"):
                self._world.replace(self._node, crash=True)
            elif call.has_fault("pause-at-response"):
                self._world.pause(self._node)
        self._node.clock.deliver(call.respond, result)

    def config_of(self, machine_id: str) -> MachineConfig:
        return self._world.machines.config_of(machine_id)


def _summary(arguments: tuple[Any, ...]) -> str:
    """Format the arguments that identify a call for the history."""
    values = [argument.id if isinstance(argument, Machine) else argument for argument in arguments]
    return " ".join(str(value) for value in values if isinstance(value, str | float))
