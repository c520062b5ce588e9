"""What holds for machines of every kind; a test case for each kind inherits it."""

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

# A machine with a body runs a worker, which wants to know its coordinator's key.
CONFIG = MachineConfig("basher:1", {"PUBLIC": genkey().public}, {"pool_id": "p//i", "other": "ü"})
TTL = 60
GONE = (State.DESTROYING, State.DESTROYED)


class MachinesContract(LoopbackTestCase):
    """Has an `api` of no machines; by itself, time is real and leases end by a wall clock that can be set."""

    api: MachinesAPI
    skew = 0.0

    def wall(self) -> float:
        return time.time() + self.skew

    def pass_time(self, seconds: float) -> None:
        self.skew += seconds

    async def settle(self, work: Coroutine[Deferred[Any], Any, T]) -> T:
        """Wait for something that takes time."""
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

    async def refused(self, error: type[Exception], work: Coroutine[Deferred[Any], Any, Any]) -> Any:
        try:
            await self.settle(work)
        except error as raised:
            return raised
        raise self.failureException(f"{error.__name__} not raised")

    def assert_near(self, expected: float, told: float) -> None:
        self.assertLess(abs(expected - told), 30, (expected, told))

    async def test_a_machine_is_created_leased_and_starts_by_itself(self) -> None:
        machine, lease = await self.create()
        await self.reach(machine, State.STARTED)

        [listed] = await self.api.list()
        for told in (machine, listed, await self.api.get(machine.id)):
            self.assertEqual(
                (machine.id, "m", "ams", machine.instance_id),
                (told.id, told.name, told.region, told.instance_id),
            )
            self.assert_near(self.wall(), told.created_at)
            if told is not listed:
                self.assertEqual((CONFIG.image, CONFIG.metadata), (told.image, told.metadata))
        self.assertIs(State.STARTED, listed.state)
        self.assertEqual(lease.nonce, (await self.api.get_lease(machine.id)).nonce)
        self.assert_near(machine.created_at + TTL, lease.expires_at)

    async def test_a_name_is_taken_while_its_machine_lives(self) -> None:
        machine, lease = await self.create()
        other, _ = await self.create("other")

        taken = await self.refused(NameTakenError, self.api.create("m", "lhr", CONFIG, TTL))
        self.assertEqual(machine.id, taken.machine_id)
        await self.settle(self.api.destroy(machine.id, lease.nonce))
        heir, _ = await self.create()

        self.assertNotEqual(machine.id, heir.id)
        self.assertEqual({other.id, heir.id}, {machine.id for machine in await self.api.list()})

    async def test_a_lease_guards_a_machine_from_all_who_do_not_know_its_nonce(self) -> None:
        machine, nonce = await self.started()

        for wrong in (None, "0" * 12):
            for change in (self.api.start, self.api.stop, self.api.suspend, self.api.destroy):
                await self.refused(LeaseHeldError, change(machine.id, wrong))
        await self.refused(LeaseHeldError, self.api.acquire_lease(machine.id, TTL, "mine"))
        await self.refused(LeaseHeldError, self.api.refresh_lease(machine.id, "0" * 12, TTL))

        self.assertIs(State.STARTED, (await self.api.get(machine.id)).state)
        self.assertEqual(nonce, (await self.api.get_lease(machine.id)).nonce)

    async def test_a_refreshed_lease_keeps_its_nonce_and_lasts_longer(self) -> None:
        machine, lease = await self.create()

        refreshed = await self.api.refresh_lease(machine.id, lease.nonce, 10 * TTL)

        self.assertEqual(lease.nonce, refreshed.nonce)
        self.assert_near(lease.expires_at + 9 * TTL, refreshed.expires_at)
        self.pass_time(5 * TTL)
        await self.refused(LeaseHeldError, self.api.stop(machine.id, None))
        self.assertEqual(lease.nonce, (await self.api.get_lease(machine.id)).nonce)

    async def test_a_lease_that_was_given_back_can_be_taken_under_another_nonce(self) -> None:
        machine, first = await self.create()

        await self.api.release_lease(machine.id, first.nonce)
        await self.refused(NotFoundError, self.api.get_lease(machine.id))
        second = await self.api.acquire_lease(machine.id, TTL, "for a test")

        self.assertNotEqual(first.nonce, second.nonce)
        told = await self.api.get_lease(machine.id)
        self.assertEqual((second.nonce, "for a test"), (told.nonce, told.description))
        await self.refused(LeaseHeldError, self.api.stop(machine.id, first.nonce))

    async def test_a_lease_that_has_run_out_is_none(self) -> None:
        machine, first = await self.create()
        self.pass_time(TTL + 1)

        await self.refused(NotFoundError, self.api.get_lease(machine.id))
        await self.refused(LeaseHeldError, self.api.refresh_lease(machine.id, first.nonce, TTL))
        second = await self.api.acquire_lease(machine.id, TTL, "")
        await self.refused(LeaseHeldError, self.api.destroy(machine.id, first.nonce))
        await self.api.destroy(machine.id, second.nonce)

    async def test_a_machine_stops_and_starts_again(self) -> None:
        machine, nonce = await self.started()

        for _ in range(2):
            await self.api.start(machine.id, nonce)  # it runs: nothing to do
            await self.api.stop(machine.id, nonce)
            await self.reach(machine, State.STOPPED)
            await self.api.stop(machine.id, nonce)
            await self.reach(machine, State.STOPPED)
            await self.api.start(machine.id, nonce)
            await self.reach(machine, State.STARTED)

    async def test_a_suspended_machine_starts_or_stops(self) -> None:
        machine, nonce = await self.started()

        await self.api.suspend(machine.id, nonce)
        await self.reach(machine, State.SUSPENDED)
        await self.api.start(machine.id, nonce)
        await self.reach(machine, State.STARTED)
        await self.api.suspend(machine.id, nonce)
        await self.reach(machine, State.SUSPENDED)
        await self.api.stop(machine.id, nonce)
        await self.reach(machine, State.STOPPED)

    async def test_a_machine_is_destroyed_in_whatever_state_it_is(self) -> None:
        new, lease = await self.create("new")
        doomed = [(new, lease.nonce), *[await self.started(name) for name in ("runs", "stops", "suspends")]]
        await self.api.stop(doomed[2][0].id, doomed[2][1])
        await self.reach(doomed[2][0], State.STOPPED)
        await self.api.suspend(doomed[3][0].id, doomed[3][1])
        await self.reach(doomed[3][0], State.SUSPENDED)

        for machine, nonce in doomed:
            await self.api.destroy(machine.id, nonce)
            await self.settle(self.api.wait(machine, State.DESTROYED, 20))

        self.assertEqual([], await self.api.list())
        for machine, nonce in doomed:
            for change in (self.api.destroy, self.api.stop):
                await self.refused(NotFoundError, change(machine.id, nonce))
            await self.refused(NotFoundError, self.api.wait(machine, State.STARTED, 5))
            self.assertIn((await self.api.get(machine.id)).state, GONE)

    async def test_nothing_is_found_where_there_is_no_machine(self) -> None:
        _, lease = await self.create()
        absent = "0" * 14
        for work in (
            self.api.get(absent),
            self.api.get_lease(absent),
            self.api.stop(absent, lease.nonce),
            self.api.acquire_lease(absent, TTL, ""),
        ):
            await self.refused(NotFoundError, work)

    async def test_a_wait_for_a_state_that_is_not_reached_ends(self) -> None:
        machine, _ = await self.started()

        await self.refused(WaitTimeoutError, self.api.wait(machine, State.STOPPED, 0.2))
