from __future__ import annotations

from typing import NamedTuple

from twisted.trial.unittest import SynchronousTestCase

from bfaas.machines.api import MachineConfig
from bfaas.pooling.config import PoolConfig
from bfaas.pooling.plan import Action, Constraints, Create, SlotState, Wake, plan
from bfaas.pooling.slot import Phase

SIZE = 4
CREATE = Create()


def slot(name: str, phase: Phase, lease_end: float = 0.0) -> SlotState:
    return SlotState(name, phase, lease_end)


CREATING = SlotState("c", Phase.CREATING, create_pending=True)
CREATION_UNKNOWN = SlotState("c", Phase.CREATING, create_pending=False)
SUSPENDING = SlotState("s", Phase.SUSPENDED, parked=False)
RUNNING = [slot(f"r{number}", Phase.RUNNING) for number in range(SIZE)]


class Case(NamedTuple):
    name: str
    slots: list[SlotState]
    queue_length: int
    expected: list[Action]
    standby: int = 0
    shortage: int = 0
    constraints: Constraints = Constraints()


CASES = [
    Case("nothing to do", [], 0, []),
    # New machines.
    Case("a request needs a machine", [], 1, [CREATE]),
    Case("each request needs one", [], 3, [CREATE, CREATE, CREATE]),
    Case("no more than the pool's size", [], 6, [CREATE] * SIZE, shortage=2),
    Case("a used machine occupies its slot", RUNNING[:3], 2, [CREATE], shortage=1),
    Case("a full pool creates none", RUNNING, 1, [], shortage=1),
    Case("a pool above its size creates none", [*RUNNING, slot("x", Phase.ADOPTING)], 2, [], shortage=1),
    Case("a machine being created is on its way", [CREATING], 1, []),
    Case("a machine being adopted is on its way", [slot("a", Phase.ADOPTING)], 1, []),
    Case("a machine being started is on its way", [slot("a", Phase.STARTING)], 1, []),
    Case("a machine being destroyed is not", [slot("a", Phase.DESTROYING)], 1, [CREATE]),
    Case("a machine being stopped is not", [slot("a", Phase.STOPPING)], 1, [CREATE]),
    # Stopped machines.
    Case("a stopped machine is started", [slot("a", Phase.STOPPED)], 1, [Wake("a")]),
    Case("stopped machines before new ones", [slot("a", Phase.STOPPED)], 2, [Wake("a"), CREATE]),
    Case("without requests they remain stopped", [slot("a", Phase.STOPPED)], 0, []),
    Case(
        "the longest lease first",
        [slot("a", Phase.STOPPED, 10.0), slot("b", Phase.STOPPED, 30.0), slot("c", Phase.STOPPED, 20.0)],
        2,
        [Wake("b"), Wake("c")],
    ),
    # Ready and suspended machines.
    Case("a ready machine serves", [slot("a", Phase.READY)], 1, [Wake("a")]),
    Case("no more than there are requests", [slot("a", Phase.READY), slot("b", Phase.READY)], 1, [Wake("a")]),
    Case("ready machines before stopped", [slot("a", Phase.STOPPED), slot("b", Phase.READY)], 1, [Wake("b")]),
    Case("a suspended machine is resumed", [slot("a", Phase.SUSPENDED)], 1, [Wake("a")]),
    Case("ready before suspended", [slot("a", Phase.SUSPENDED), slot("b", Phase.READY)], 1, [Wake("b")]),
    Case("a machine that resumes counts", [slot("a", Phase.RESUMING), slot("b", Phase.SUSPENDED)], 1, []),
    Case("though others start, it is resumed", [CREATING, slot("a", Phase.SUSPENDED)], 1, [Wake("a")]),
    Case("suspended before being suspended", [SUSPENDING, slot("a", Phase.SUSPENDED)], 1, [Wake("a")]),
    Case(
        "all kinds at once",
        [slot("s", Phase.STOPPED), slot("p", Phase.SUSPENDED), slot("r", Phase.READY)],
        4,
        [Wake("r"), Wake("p"), Wake("s"), CREATE],
    ),
    # Standby.
    Case("standby machines are created", [], 0, [CREATE, CREATE], standby=2),
    Case("or started", [slot("a", Phase.STOPPED)], 0, [Wake("a"), CREATE], standby=2),
    Case("a ready one counts", [slot("a", Phase.READY)], 0, [CREATE], standby=2),
    Case("a suspended one counts", [slot("a", Phase.SUSPENDED)], 0, [CREATE], standby=2),
    Case("a used one is replaced", [slot("a", Phase.READY)], 1, [Wake("a"), CREATE], standby=1),
    Case("requests come on top", [], 1, [CREATE, CREATE], standby=1),
    # Constraints.
    Case(
        "nothing is created before the machines are known",
        [],
        2,
        [],
        shortage=2,
        constraints=Constraints(machines_known=False),
    ),
    Case(
        "but they are used",
        [slot("a", Phase.STOPPED)],
        1,
        [Wake("a")],
        constraints=Constraints(machines_known=False),
    ),
    Case(
        "nothing is created after a failure",
        [],
        2,
        [],
        shortage=2,
        constraints=Constraints(create_backoff=True),
    ),
    Case(
        "stopped machines are started then",
        [slot("a", Phase.STOPPED)],
        2,
        [Wake("a")],
        shortage=1,
        constraints=Constraints(create_backoff=True),
    ),
    Case(
        "but not for standby",
        [slot("a", Phase.STOPPED)],
        0,
        [],
        standby=1,
        constraints=Constraints(create_backoff=True),
    ),
    Case(
        "failed standbys pause standby only",
        [],
        1,
        [CREATE],
        standby=2,
        constraints=Constraints(standby_backoff=True),
    ),
    Case(
        "at the rate limit one is created",
        [],
        3,
        [CREATE],
        shortage=2,
        constraints=Constraints(rate_limited=True),
    ),
    Case(
        "while it is pending no other is",
        [CREATING],
        3,
        [],
        shortage=2,
        constraints=Constraints(rate_limited=True),
    ),
    Case(
        "an unknown outcome is not pending",
        [CREATION_UNKNOWN],
        3,
        [CREATE],
        shortage=1,
        constraints=Constraints(rate_limited=True),
    ),
    Case(
        "nor does a full pool create one",
        RUNNING,
        1,
        [],
        shortage=1,
        constraints=Constraints(rate_limited=True),
    ),
]


class PlanTests(SynchronousTestCase):
    def test_plan_of_each_case(self) -> None:
        for case in CASES:
            config = PoolConfig(
                name="p",
                size=SIZE,
                region="r",
                template=MachineConfig("i"),
                max_req_time=10.0,
                lease_ttl=300,
                standby=case.standby,
            )

            actions, shortage = plan(case.slots, case.queue_length, config, case.constraints)

            self.assertEqual((case.expected, case.shortage), (list(actions), shortage), case.name)

    def test_plan_after_its_actions_has_no_actions(self) -> None:
        """The actions suffice: with each of them carried out, nothing remains to be done."""
        config = PoolConfig("p", SIZE, "r", MachineConfig("i"), 10.0, 300, standby=1)
        slots = [slot("a", Phase.STOPPED), slot("b", Phase.READY), slot("c", Phase.SUSPENDED)]
        actions, _ = plan(slots, 2, config, Constraints())
        self.assertEqual((Wake("b"), Wake("c"), Wake("a")), actions)

        after = [slot("a", Phase.STARTING), slot("b", Phase.RUNNING), slot("c", Phase.RESUMING)]

        self.assertEqual(((), 0), plan(after, 1, config, Constraints()))
