from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from bfaas.machines.api import MachineConfig, RateLimitedError, UnavailableError
from bfaas.pooling.reconciler import Reconciler, destroy_own
from bfaas.pooling.scheduler import Inspected, Scheduler, StandbyAction
from tests.support.faults import Hang, Refuse, Slow
from tests.unit.pooling.parts import PartsCase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bfaas.machines.api import Lease, Machine
    from bfaas.pooling.slot import Slot

INTERVAL = 300.0
DOWN = Refuse(UnavailableError("500"))


class RecordingScheduler(Scheduler):
    """Records what the reconciler reports."""

    def __init__(self) -> None:
        self.reports: list[Sequence[Inspected]] = []

    def next_action(self, slot: Slot) -> StandbyAction:
        raise NotImplementedError

    def reconcile(self, machines: Sequence[Inspected]) -> None:
        self.reports.append(machines)

    def rebalance(self) -> None:
        raise NotImplementedError


class ReconcilerTests(PartsCase):
    def setUp(self) -> None:
        super().setUp()
        self.scheduler = RecordingScheduler()
        self.reconciler = Reconciler(
            self.api,
            self.clock,
            Random(1),
            replace(self.config, reconcile_interval=INTERVAL),
            self.backoff,
            self.scheduler,
        )

    def create(self, name: str, ttl: int = 300) -> Machine:
        machine, _ = self.result_of(self.machines.create(name, "r", MachineConfig("i"), ttl), within=0)
        return machine

    def names(self) -> list[str]:
        return [machine.name for machine in self.existing()]

    def test_own_machines_are_inspected_and_reported(self) -> None:
        self.advance(1)
        own, failing = self.create("worker-p-1"), self.create("worker-p-2")
        self.create("worker-q-1")
        self.create("postgres-1")
        self.api.always["get"] = Slow(self.clock, 0.1)
        self.api.next("get", Slow(self.clock, 0.1), DOWN)
        self.result_of(self.reconciler.reconcile_once(), within=20)

        [report] = self.scheduler.reports
        self.assertEqual([own.id, failing.id], [inspected.listed.id for inspected in report])
        self.assertEqual(own.id, report[0].details.id if report[0].details else None)
        self.assertIsNone(report[1].details)

    def test_machine_that_is_gone_is_not_reported(self) -> None:
        machine = self.create("worker-p-1", ttl=0)
        self.api.next("get", Slow(self.clock, 1.0))
        reconciling = self.start(self.reconciler.reconcile_once())
        self.result_of(self.machines.destroy(machine.id, None))
        self.advance(5)

        self.assertIs(True, self.successResultOf(reconciling))
        self.assertEqual([[]], self.scheduler.reports)

    def test_other_pools_lose_machines_without_a_lease_only(self) -> None:
        self.create("worker-q-1", ttl=0)
        self.create("worker-q-2")
        self.create("worker-r-1")
        self.create("postgres-1", ttl=0)
        self.result_of(self.reconciler.reconcile_once(), within=20)

        self.assertEqual(["worker-q-2", "worker-r-1", "postgres-1"], self.names())

    def test_lease_that_appears_a_moment_later_protects_the_machine(self) -> None:
        machine = self.create("worker-q-1", ttl=0)
        reconciling = self.start(self.reconciler.reconcile_once())
        self.advance(5)
        lease: Lease = self.result_of(self.machines.acquire_lease(machine.id, 300, "adopted"))
        self.advance(20)

        self.successResultOf(reconciling)
        self.assertEqual((["worker-q-1"], 12), (self.names(), len(lease.nonce)))

    def test_three_leased_machines_suffice_for_a_pool(self) -> None:
        for number in range(20):
            self.create(f"worker-q-{number}")
        self.result_of(self.reconciler.reconcile_once())

        self.assertEqual(3, self.api.count("get_lease"))

    def test_one_call_that_fails_does_not_stop_the_others(self) -> None:
        for number in range(5):
            self.create(f"worker-q-{number}", ttl=0)
        self.api.next("get_lease", DOWN)
        self.api.next("destroy", DOWN)
        self.result_of(self.reconciler.reconcile_once(), within=30)

        self.assertEqual(2, len(self.names()))

    def test_slow_machine_does_not_hold_up_the_others(self) -> None:
        for number in range(40):
            self.create(f"worker-p-{number}")
        self.api.always["get"] = Slow(self.clock, 0.5)
        self.api.next("get", Slow(self.clock, 10.0))
        reconciling = self.start(self.reconciler.reconcile_once())
        self.advance(3)
        self.assertEqual(40, self.api.count("get"))
        self.assertNoResult(reconciling)
        self.advance(8)

        self.successResultOf(reconciling)

    def test_ten_calls_run_at_a_time(self) -> None:
        for number in range(25):
            self.create(f"worker-p-{number}")
        self.api.always["get"] = Slow(self.clock, 1.0)
        self.start(self.reconciler.reconcile_once())
        for calls in (10, 20, 25):
            self.assertEqual(calls, self.api.count("get"))
            self.advance(1.0)

    def test_cancellation_starts_no_other_call(self) -> None:
        for number in range(25):
            self.create(f"worker-p-{number}")
        self.api.always["get"] = Hang()
        reconciling = self.start(self.reconciler.reconcile_once())
        self.assertEqual(10, self.api.count("get"))
        reconciling.addErrback(lambda _: None)
        reconciling.cancel()

        self.successResultOf(reconciling)
        self.assertEqual(10, self.api.count("get"))

    def test_reconciliations_follow_each_other_after_an_interval(self) -> None:
        self.reconciler.start()
        self.assertEqual(1, len(self.scheduler.reports))
        self.advance(0.8 * INTERVAL - 1)
        self.assertEqual(1, len(self.scheduler.reports))
        self.advance(0.4 * INTERVAL + 2)
        self.assertEqual(2, len(self.scheduler.reports))

        self.reconciler.close()
        self.assert_no_timers()

    def test_failed_reconciliation_is_retried_soon(self) -> None:
        self.api.next("list", DOWN, DOWN)
        self.reconciler.start()
        self.assertEqual((False, []), (self.reconciler.api_reachable, self.scheduler.reports))
        self.advance(1)

        self.assertEqual((True, 1), (self.reconciler.api_reachable, len(self.scheduler.reports)))
        self.reconciler.close()

    def test_rate_limited_api_is_reachable(self) -> None:
        self.create("worker-q-1")
        self.api.next("get_lease", Refuse(RateLimitedError("429")))
        self.result_of(self.reconciler.reconcile_once())

        self.assertTrue(self.reconciler.api_reachable)

    def test_check_lists_the_machines_and_nothing_more(self) -> None:
        self.reconciler.start()
        self.api.always["list"] = DOWN
        self.reconciler.check_soon()
        self.advance(1)
        self.assertFalse(self.reconciler.api_reachable)
        del self.api.always["list"]
        self.advance(30)

        self.assertTrue(self.reconciler.api_reachable)
        self.assertEqual(1, len(self.scheduler.reports))
        self.reconciler.close()

    def test_destroy_all_own_returns_when_none_is_left(self) -> None:
        self.create("worker-p-1")
        self.create("worker-p-2", ttl=0)
        self.create("worker-q-1")
        self.api.next("destroy", DOWN)
        self.api.next("list", DOWN)
        destroying = self.start(self.reconciler.destroy_all_own())
        self.advance(1.5)
        self.assertNoResult(destroying)
        self.advance(5)

        self.successResultOf(destroying)
        self.assertEqual(["worker-q-1"], self.names())

    def test_destroy_own_uses_the_lease_and_accepts_that_the_machine_is_gone(self) -> None:
        machine = self.create("worker-p-1")
        for _ in range(2):
            self.result_of(destroy_own(self.api, machine))

        self.assertEqual([], self.names())
