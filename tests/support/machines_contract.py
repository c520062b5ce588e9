"""Tests that every `MachinesAPI` has to pass. A test case for each implementation inherits them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

from bfaas.machines.api import (
    Lease,
    LeaseHeldError,
    Machine,
    MachineConfig,
    MachinesAPI,
    NameTakenError,
    NotFoundError,
    State,
    WaitTimeoutError,
)
from bfaas.tokens import genkey
from tests.support.hostile_worker import LoopbackTestCase

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from twisted.internet.defer import Deferred

T = TypeVar("T")

# Local machines run a worker, which needs the key of its coordinator.
CONFIG = MachineConfig("basher:1", {"PUBLIC": genkey().public}, {"pool_id": "p//i", "other": "ü"})
TTL = 60
GONE = (State.DESTROYING, State.DESTROYED)


class MachinesContract(LoopbackTestCase):
    """
    Subclasses set `api`, without machines.

    By default, time is real; leases expire by a wall clock that `pass_time` advances.
    """

    api: MachinesAPI
    skew = 0.0

    def wall(self) -> float:
        return time.time() + self.skew

    def pass_time(self, seconds: float) -> None:
        self.skew += seconds

    async def settle(self, work: Coroutine[Deferred[Any], Any, T]) -> T:
        """Await a call that takes time; subclasses with a simulated clock advance it."""
        return await work

    async def create(self, name: str = "m") -> tuple[Machine, Lease]:
        return await self.settle(self.api.create(name, "ams", CONFIG, TTL))

    async def reach(self, machine: Machine, state: State) -> None:
        await self.settle(self.api.wait(machine, state, 20))
        self.assertIs(state, (await self.settle(self.api.get(machine.id))).state)

    async def started(self, name: str = "m") -> tuple[Machine, str]:
        machine, lease = await self.create(name)
        await self.reach(machine, State.STARTED)
        return machine, lease.nonce

    async def error(self, error: type[Exception], work: Coroutine[Deferred[Any], Any, Any]) -> Any:
        try:
            await self.settle(work)
        except error as raised:
            return raised
        raise self.failureException(f"{error.__name__} not raised")

    def assert_near(self, expected: float, actual: float) -> None:
        self.assertLess(abs(expected - actual), 30, (expected, actual))

    async def test_created_machine_is_leased_and_starts(self) -> None:
        machine, lease = await self.create()
        await self.reach(machine, State.STARTED)

        [listed] = await self.api.list()
        for each in (machine, listed, await self.api.get(machine.id)):
            self.assertEqual(
                (machine.id, "m", "ams", machine.instance_id),
                (each.id, each.name, each.region, each.instance_id),
            )
            self.assert_near(self.wall(), each.created_at)
            if each is not listed:
                self.assertEqual((CONFIG.image, CONFIG.metadata), (each.image, each.metadata))
        self.assertIs(State.STARTED, listed.state)
        self.assertEqual(lease.nonce, (await self.api.get_lease(machine.id)).nonce)
        self.assert_near(machine.created_at + TTL, lease.expires_at)

    async def test_name_is_taken_until_its_machine_is_destroyed(self) -> None:
        machine, lease = await self.create()
        other, _ = await self.create("other")

        taken = await self.error(NameTakenError, self.api.create("m", "lhr", CONFIG, TTL))
        self.assertEqual(machine.id, taken.machine_id)
        await self.settle(self.api.destroy(machine.id, lease.nonce))
        successor, _ = await self.create()

        self.assertNotEqual(machine.id, successor.id)
        self.assertEqual({other.id, successor.id}, {machine.id for machine in await self.api.list()})

    async def test_leased_machine_cannot_be_changed_without_the_nonce(self) -> None:
        machine, nonce = await self.started()

        for wrong in (None, "0" * 12):
            for change in (self.api.start, self.api.stop, self.api.suspend, self.api.destroy):
                await self.error(LeaseHeldError, change(machine.id, wrong))
        await self.error(LeaseHeldError, self.api.acquire_lease(machine.id, TTL, "mine"))
        await self.error(LeaseHeldError, self.api.refresh_lease(machine.id, "0" * 12, TTL))

        self.assertIs(State.STARTED, (await self.api.get(machine.id)).state)
        self.assertEqual(nonce, (await self.api.get_lease(machine.id)).nonce)

    async def test_refreshed_lease_keeps_its_nonce_and_expires_later(self) -> None:
        machine, lease = await self.create()

        refreshed = await self.api.refresh_lease(machine.id, lease.nonce, 10 * TTL)

        self.assertEqual(lease.nonce, refreshed.nonce)
        self.assert_near(lease.expires_at + 9 * TTL, refreshed.expires_at)
        self.pass_time(5 * TTL)
        await self.error(LeaseHeldError, self.api.stop(machine.id, None))
        self.assertEqual(lease.nonce, (await self.api.get_lease(machine.id)).nonce)

    async def test_released_lease_can_be_acquired_with_another_nonce(self) -> None:
        machine, first = await self.create()

        await self.api.release_lease(machine.id, first.nonce)
        await self.error(NotFoundError, self.api.get_lease(machine.id))
        second = await self.api.acquire_lease(machine.id, TTL, "for a test")

        self.assertNotEqual(first.nonce, second.nonce)
        current = await self.api.get_lease(machine.id)
        self.assertEqual((second.nonce, "for a test"), (current.nonce, current.description))
        await self.error(LeaseHeldError, self.api.stop(machine.id, first.nonce))

    async def test_expired_lease_does_not_exist(self) -> None:
        machine, first = await self.create()
        self.pass_time(TTL + 1)

        await self.error(NotFoundError, self.api.get_lease(machine.id))
        await self.error(LeaseHeldError, self.api.refresh_lease(machine.id, first.nonce, TTL))
        second = await self.api.acquire_lease(machine.id, TTL, "")
        await self.error(LeaseHeldError, self.api.destroy(machine.id, first.nonce))
        await self.api.destroy(machine.id, second.nonce)

    async def test_machine_stops_and_starts_again(self) -> None:
        machine, nonce = await self.started()

        for _ in range(2):
            await self.api.start(machine.id, nonce)  # no effect on a started machine
            await self.api.stop(machine.id, nonce)
            await self.reach(machine, State.STOPPED)
            await self.api.stop(machine.id, nonce)
            await self.reach(machine, State.STOPPED)
            await self.api.start(machine.id, nonce)
            await self.reach(machine, State.STARTED)

    async def test_suspended_machine_starts_or_stops(self) -> None:
        machine, nonce = await self.started()

        await self.api.suspend(machine.id, nonce)
        await self.reach(machine, State.SUSPENDED)
        await self.api.start(machine.id, nonce)
        await self.reach(machine, State.STARTED)
        await self.api.suspend(machine.id, nonce)
        await self.reach(machine, State.SUSPENDED)
        await self.api.stop(machine.id, nonce)
        await self.reach(machine, State.STOPPED)

    async def test_machine_can_be_destroyed_in_any_state(self) -> None:
        new, lease = await self.create("new")
        machines = [
            (new, lease.nonce),
            *[await self.started(name) for name in ("started", "stopped", "suspended")],
        ]
        await self.api.stop(machines[2][0].id, machines[2][1])
        await self.reach(machines[2][0], State.STOPPED)
        await self.api.suspend(machines[3][0].id, machines[3][1])
        await self.reach(machines[3][0], State.SUSPENDED)

        for machine, nonce in machines:
            await self.api.destroy(machine.id, nonce)
            await self.settle(self.api.wait(machine, State.DESTROYED, 20))

        self.assertEqual([], await self.api.list())
        for machine, nonce in machines:
            for change in (self.api.destroy, self.api.stop):
                await self.error(NotFoundError, change(machine.id, nonce))
            await self.error(NotFoundError, self.api.wait(machine, State.STARTED, 5))
            self.assertIn((await self.api.get(machine.id)).state, GONE)

    async def test_missing_machine_is_not_found(self) -> None:
        _, lease = await self.create()
        absent = "0" * 14
        for work in (
            self.api.get(absent),
            self.api.get_lease(absent),
            self.api.stop(absent, lease.nonce),
            self.api.acquire_lease(absent, TTL, ""),
        ):
            await self.error(NotFoundError, work)

    async def test_wait_for_a_state_that_is_not_reached_times_out(self) -> None:
        machine, _ = await self.started()

        await self.error(WaitTimeoutError, self.api.wait(machine, State.STOPPED, 0.2))
