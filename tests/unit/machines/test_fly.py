"""The client of Fly's Machines API: against its stand-in, and against servers that lie."""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from bfaas.http.client import single_use_agent
from bfaas.http.server import BoundedSite
from bfaas.machines.api import (
    CapacityError,
    EndedError,
    LeaseHeldError,
    Machine,
    MachinesError,
    NameTakenError,
    NotFoundError,
    NotReadyError,
    RateLimitedError,
    RefusedError,
    State,
    UnavailableError,
    WaitTimeoutError,
)
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.machines.fly import FlyMachines, authorization
from tests.support import machines_contract
from tests.support.hostile_worker import End, LoopbackTestCase, reactor
from tests.support.machines_contract import CONFIG
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from twisted.internet.interfaces import IDelayedCall

MACHINE = {"id": "3d8d413b29d089", "name": "m", "state": "started", "instance_id": "01H", "config": {}}
M = Machine("3d8d413b29d089", "m", State.STARTED, "ams", "i", {}, "01H", 0.0)
LEASE = {"status": "success", "data": {"nonce": "abcdefabcdef", "expires_at": 1_700_000_000}}
OK = {"ok": True}
PATH = f"/v1/apps/workers/machines/{M.id}"


class FlyMachinesContract(machines_contract.MachinesContract):
    def setUp(self) -> None:
        machines = EmulatedMachines(reactor, self.wall, timing=Timing(boot=0.02, stop=0.01))
        self.addCleanup(lambda: Deferred.fromCoroutine(machines.shutdown()))
        site = BoundedSite(reactor, MachinesServer(machines, "workers", "t").app.resource(), 1 << 20)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))
        url = f"http://127.0.0.1:{self.listen(site)}"
        self.api = FlyMachines(reactor, single_use_agent(reactor), Random(1), url, "workers", "t")


class AuthorizationTests(SynchronousTestCase):
    def test_the_scheme_is_that_of_the_token(self) -> None:
        for token, expected in {
            "FlyV1 fm2_abc,fm2_def": "FlyV1 fm2_abc,fm2_def",
            "Bearer abc": "Bearer abc",
            "fm1r_abc": "FlyV1 fm1r_abc",
            "fm2_abc,fo1_def": "FlyV1 fm2_abc",
            "fo1_abc": "Bearer fo1_abc",
            "fo1_abc, fo1_def": "Bearer fo1_abc,fo1_def",
            "fm1a_abc,\n fm2_def,": "FlyV1 fm1a_abc,fm2_def",
            "Bearer fm2_abc": "FlyV1 fm2_abc",
            "flyv1 fm2_abc": "FlyV1 fm2_abc",
            "FlyV1 FlyV1 abc": "FlyV1 abc",
            " FlyV1\tfm2_abc\n": "FlyV1 fm2_abc",
        }.items():
            self.assertEqual(expected, authorization(token))


def answer(status: int, told: object, *headers: str) -> list[bytes | Deferred[None] | End]:
    """Answer with JSON, or with bytes as they are."""
    body = told if isinstance(told, bytes) else json.dumps(told).encode()
    lines = [f"HTTP/1.1 {status} Told", f"Content-Length: {len(body)}", *headers, "", ""]
    return ["\r\n".join(lines).encode() + body, End.CLOSE]


class HastyClock(Clock):
    """Keeps limits, but lets pauses pass at once, and notes how long they were."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def callLater(
        self,
        delay: float,
        callable: Callable[..., object],  # noqa: A002 - the clock's own signature
        *args: object,
        **kw: object,
    ) -> IDelayedCall:
        if getattr(callable, "__func__", None) is Deferred.callback:
            self.pauses.append(delay)
            reactor.callLater(0, self.advance, delay)
        return super().callLater(delay, callable, *args, **kw)


class LiarTestCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.clock = HastyClock()

    def fly(self, *scripts: Iterable[bytes | Deferred[None] | End]) -> FlyMachines:
        self.liar, url = self.lie(*scripts)
        return FlyMachines(self.clock, single_use_agent(reactor), Random(1), url, "workers", "t")

    def asked(self) -> list[str]:
        """The request lines that came, without their protocol."""
        requests = [peer.request() for peer in self.liar.peers]
        return [request[0][0].removesuffix(" HTTP/1.1") for request in requests if request]

    async def refused(
        self, error: type[MachinesError], work: Coroutine[Deferred[Any], Any, Any]
    ) -> MachinesError:
        try:
            await work
        except error as raised:
            self.assertIs(error, type(raised))
            return raised
        raise self.failureException(f"{error.__name__} not raised")


class RepetitionTests(LiarTestCase):
    async def test_what_is_safe_is_repeated_with_growing_pauses(self) -> None:
        fly = self.fly(
            answer(429, {"error": "rate limit exceeded"}),
            answer(500, b"oops"),
            answer(200, b"<html>"),
            answer(408, {"error": "deadline_exceeded: upstream"}),
            [End.RESET],
            [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", End.CLOSE],
            answer(200, OK),
        )

        await fly.stop(M.id, "abcdefabcdef")

        requests = [peer.request() for peer in self.liar.peers]
        self.assertEqual(7, len(requests))
        for request in requests:
            assert request is not None
            head, body = request
            self.assertEqual(f"POST {PATH}/stop HTTP/1.1", head[0])
            self.assertIn("fly-machine-lease-nonce: abcdefabcdef", [line.lower() for line in head])
            self.assertIn("Authorization: Bearer t", head)
            self.assertEqual({"signal": "SIGKILL", "timeout": "1s"}, json.loads(body))
        for doubled, pause in enumerate(self.clock.pauses):
            self.assertTrue(0.05 <= pause / 2**doubled <= 0.1, self.clock.pauses)
        self.assertEqual([], self.clock.getDelayedCalls())

    async def test_repetitions_end_with_the_limit(self) -> None:
        raised = await self.refused(UnavailableError, self.fly(answer(502, b"bad gateway")).get(M.id))

        assert raised.call is not None
        self.assertEqual(502, raised.call.status)
        self.assertTrue(5 <= self.clock.seconds() <= 15, self.clock.seconds())

    async def test_a_lease_that_may_have_been_taken_is_not_asked_for_again(self) -> None:
        fly = self.fly(answer(429, b"slow down"), answer(500, b"oops"), answer(200, LEASE))

        await self.refused(UnavailableError, fly.acquire_lease(M.id, 60, "mine"))

        self.assertEqual([f"POST {PATH}/lease"] * 2, self.asked())

    async def test_a_creation_is_not_asked_for_again_even_at_the_limit(self) -> None:
        fly = self.fly(answer(429, b"slow down"))

        await self.refused(RateLimitedError, fly.create("m", "ams", CONFIG, 60))

        self.assertEqual([f"POST {PATH.rpartition('/')[0]}"], self.asked())

    async def test_what_was_refused_is_not_asked_for_again(self) -> None:
        cases: list[tuple[int, object, type[MachinesError]]] = [
            (400, {"error": "invalid_argument: no"}, RefusedError),
            (401, b"no", RefusedError),
            (404, {"error": "machine not found"}, NotFoundError),
            (409, {"error": "machine ID 1 lease currently held by a@b, expires at x"}, LeaseHeldError),
            (409, {"status": "error", "message": "Lease currently held by a@b"}, LeaseHeldError),
            (409, {"error": "aborted: machine still attempting to start, please try again"}, NotReadyError),
            (409, {"error": "aborted: could not reserve resource for machine"}, CapacityError),
            (422, {"error": "insufficient_capacity", "status": "insufficient_capacity"}, CapacityError),
            (422, {"error": None}, RefusedError),
            (412, {"error": "failed_precondition: machine getting replaced"}, NotReadyError),
            (409, {"error": "unique machine name violation, machine ID 12ab already exists"}, NameTakenError),
        ]
        fly = self.fly(*(answer(status, told) for status, told, _ in cases))

        for number, (_, _, error) in enumerate(cases, 1):
            await self.refused(error, fly.start(M.id, None))
            self.assertEqual(number, len(self.liar.peers))
        self.assertEqual([], self.clock.pauses)

    async def test_an_error_tells_what_was_asked_and_answered(self) -> None:
        long = {"error": "no  such\n thing " + "x" * 1000}
        raised = await self.refused(
            NotFoundError, self.fly(answer(404, long, "fly-request-id: 01ABC-ams")).get(M.id)
        )

        call = raised.call
        assert call is not None
        self.assertEqual(
            ("GET", PATH, 404, "01ABC-ams"), (call.method, call.path, call.status, call.request_id)
        )
        self.assertTrue(call.excerpt.startswith('{"error": "no such'), call.excerpt)
        self.assertEqual(300, len(call.excerpt))
        for part in ("GET", PATH, "404", "01ABC-ams"):
            self.assertIn(part, str(raised))

    async def test_a_redirection_is_not_followed(self) -> None:
        elsewhere, url = self.lie(answer(200, MACHINE))

        await self.refused(UnavailableError, self.fly(answer(307, b"", f"Location: {url}")).get(M.id))

        self.assertEqual([], elsewhere.peers)


class LimitTests(LiarTestCase):
    async def test_a_call_that_hangs_ends_with_its_limit(self) -> None:
        started: list[bytes] = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"]
        for said in started:
            for limit, ask in ((15, lambda fly: fly.get(M.id)), (60, self.create)):
                fly = self.fly([said])
                asking = Deferred.fromCoroutine(ask(fly))
                asking.addErrback(lambda failure: failure.value)
                peer = await self.liar.asked.get()
                self.clock.advance(limit - 0.1)
                self.assertFalse(asking.called)

                self.clock.advance(0.2)
                error = await asking

                self.assertIs(UnavailableError, type(error))
                self.assertTrue(error.call.path.startswith("/v1/apps/workers/machines"), error.call)
                self.assertIs(None, error.call.status)
                await peer.hear_out()

    def create(self, fly: FlyMachines) -> Coroutine[Deferred[Any], Any, Any]:
        return fly.create("m", "ams", CONFIG, 60)

    async def test_cancelling_a_call_closes_its_connection(self) -> None:
        for said in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"):
            asking = Deferred.fromCoroutine(self.fly([said]).get(M.id))
            peer = await self.liar.asked.get()
            asking.cancel()

            await self.assertFailure(asking, CancelledError)
            await peer.hear_out()
            self.assertEqual([], self.clock.getDelayedCalls())


class ReadingTests(LiarTestCase):
    async def test_what_is_unknown_null_or_missing_in_a_machine_is_borne(self) -> None:
        odd: dict[str, Any] = {
            "id": "1",
            "name": "n",
            "state": "hibernating",
            "region": None,
            "config": None,
            "incomplete_config": {"image": "i", "metadata": {"a": "b", "c": None}, "new": [1]},
            "version": "01V",
            "created_at": "2026-01-02T03:04:05.123456789Z",
            "events": None,
            "checks": {"not": "an array"},
            "new": {"deep": [None]},
        }
        bare = {"id": "2", "name": "n", "state": "stopped"}
        fly = self.fly(answer(200, odd), answer(200, [odd, None, {"id": "3"}, "x", bare]), answer(200, None))

        machine = await fly.get("1")

        self.assertEqual(
            Machine("1", "n", State.UNKNOWN, "", "i", {"a": "b", "c": ""}, "01V", machine.created_at), machine
        )
        self.assertEqual(1767323045, int(machine.created_at))
        empty = Machine("2", "n", State.STOPPED, "", "", {}, "", 0.0)
        self.assertEqual([machine, empty], await fly.list())
        self.assertEqual([], await fly.list())

    async def test_an_answer_that_lacks_what_we_rely_on_is_none(self) -> None:
        asked: list[tuple[object, Callable[[FlyMachines], Coroutine[Any, Any, Any]]]] = [
            ({"id": "1", "name": "n"}, lambda fly: fly.get("1")),
            ({"machines": []}, lambda fly: fly.list()),
            (LEASE["data"], lambda fly: fly.get_lease("1")),
            ({**LEASE, "status": "error"}, lambda fly: fly.acquire_lease("1", 60, "")),
            ({**LEASE, "data": {"expires_at": 1}}, lambda fly: fly.get_lease("1")),
            (MACHINE, lambda fly: fly.create("m", "ams", CONFIG, 60)),
            ({**MACHINE, "nonce": "a", "name": "other"}, lambda fly: fly.create("m", "ams", CONFIG, 60)),
            ([], lambda fly: fly.stop("1", None)),
        ]
        for told, ask in asked:
            with self.subTest(told=told):
                await self.refused(UnavailableError, ask(self.fly(answer(200, told))))

    async def test_a_refreshed_lease_under_another_nonce_is_another(self) -> None:
        fly = self.fly(answer(201, LEASE))

        self.assertEqual("abcdefabcdef", (await fly.refresh_lease(M.id, "abcdefabcdef", 60)).nonce)
        await self.refused(LeaseHeldError, fly.refresh_lease(M.id, "0" * 12, 60))

    async def test_a_name_that_is_taken_tells_by_whom(self) -> None:
        said = {
            "error": "already_exists: unique machine name violation, machine ID 12ab already exists with .."
        }
        fly = self.fly(
            answer(500, b""), answer(409, said), answer(409, {"error": "unique machine name violation"})
        )

        await self.refused(UnavailableError, fly.create("m", "ams", CONFIG, 60))  # not repeated
        for machine_id in ("12ab", None):
            raised = await self.refused(NameTakenError, fly.create("m", "ams", CONFIG, 60))
            assert isinstance(raised, NameTakenError)
            self.assertEqual(machine_id, raised.machine_id)
        self.assertEqual(["POST /v1/apps/workers/machines"] * 3, self.asked())


class WaitTests(LiarTestCase):
    async def test_a_wait_goes_on_until_the_state_of_this_version_is_told(self) -> None:
        fly = self.fly(
            answer(200, {"ok": False}),
            answer(200, MACHINE),
            answer(200, {"ok": True, "version": "01G"}),
            answer(200, {**MACHINE, "state": "starting"}),
            answer(408, {"error": "deadline_exceeded"}),
            answer(200, {**MACHINE, "state": "created"}),
            answer(503, b"oops"),
            answer(429, b"slow down"),
            answer(200, {"ok": True, "state": "started", "version": "01H"}),
        )

        await fly.wait(M, State.STARTED, 100)

        wait = f"GET {PATH}/wait?state=started&timeout=10&instance_id=01H"
        self.assertEqual([*3 * [wait, f"GET {PATH}"], *3 * [wait]], self.asked())
        self.assertEqual([], self.clock.getDelayedCalls())

    async def test_each_slice_of_a_wait_is_one_that_the_api_takes(self) -> None:
        fly = self.fly([])
        waiting = Deferred.fromCoroutine(self.refused(WaitTimeoutError, fly.wait(M, State.STOPPED, 90.5)))
        peer = await self.liar.asked.get()
        self.clock.advance(60)
        peer.transport.write(answer(408, {"error": "deadline_exceeded"})[0])
        peer = await self.liar.asked.get()
        peer.transport.write(answer(200, MACHINE)[0])
        peer = await self.liar.asked.get()
        self.clock.advance(31)

        await waiting
        await peer.hear_out()
        waits = [line for line in self.asked() if "timeout=" in line]
        seconds = [int(line.partition("timeout=")[2].partition("&")[0]) for line in waits]
        self.assertEqual(60, seconds[0])
        self.assertIn(seconds[1], range(28, 32))
        self.assertEqual(2, len(seconds))

    async def test_an_api_that_says_no_at_once_is_not_asked_without_a_pause(self) -> None:
        fly = self.fly(*[answer(408, {"error": "deadline_exceeded"}), answer(200, MACHINE)] * 100)

        await self.refused(WaitTimeoutError, fly.wait(M, State.STOPPED, 20))

        self.assertGreaterEqual(2 * len(self.clock.pauses) + 2, len(self.liar.peers))
        self.assertTrue(all(0.05 <= pause <= 2.5 for pause in self.clock.pauses), self.clock.pauses)

    async def test_a_machine_that_has_ended_is_not_waited_for(self) -> None:
        for wanted, ended in (
            (State.STARTED, "stopped"),
            (State.STARTED, "failed"),
            (State.STARTED, "launch_failed"),
            (State.SUSPENDED, "stopped"),
            (State.STOPPED, "failed"),
        ):
            told = {"error": f"deadline_exceeded: machine failed to reach desired state, {wanted}, .."}
            for status in (408, 412):
                fly = self.fly(answer(status, told), answer(200, {**MACHINE, "state": ended}))
                await self.refused(EndedError, fly.wait(M, wanted, 20))
                self.assertEqual(2, len(self.liar.peers))
        self.assertLess(self.clock.seconds(), 1)

    async def test_a_machine_that_is_destroyed_is_waited_for_in_no_other_state(self) -> None:
        for gone in ("destroying", "destroyed"):
            fly = self.fly(answer(408, {}), answer(200, {**MACHINE, "state": gone}), answer(200, OK))
            await self.refused(NotFoundError, fly.wait(M, State.STARTED, 20))
            await fly.wait(M, State.DESTROYED, 20)
        fly = self.fly(answer(408, {}), answer(404, {"error": "machine not found"}))
        await self.refused(NotFoundError, fly.wait(M, State.STARTED, 20))
        fly = self.fly(answer(408, {}), answer(404, {"error": "machine not found"}))
        await fly.wait(M, State.DESTROYED, 20)

    async def test_a_machine_of_another_version_by_now_is_waited_for_under_that(self) -> None:
        replaced: list[list[bytes | Deferred[None] | End]] = [
            answer(408, {"error": "deadline_exceeded"}),
            answer(412, {"error": "failed_precondition: machine getting replaced"}),
            answer(409, {"error": "aborted: machine is currently replaced"}),
            answer(200, {"ok": True, "state": "started", "version": "01J"}),
        ]
        for first in replaced:
            fly = self.fly(
                first,
                answer(200, {**MACHINE, "state": "replacing", "instance_id": "01J"}),
                answer(200, {"ok": True, "state": "started", "version": "01J"}),
            )
            await fly.wait(M, State.STARTED, 20)
            self.assertTrue(self.asked()[-1].endswith("instance_id=01J"), self.asked())

    async def test_a_look_that_fails_does_not_end_a_wait(self) -> None:
        fly = self.fly(
            answer(408, {"error": "deadline_exceeded"}),
            *[answer(200, b"<html>")] * 2,
            answer(200, {**MACHINE, "state": "starting"}),
            answer(200, OK),
        )

        await fly.wait(M, State.STARTED, 20)

        self.assertEqual(5, len(self.liar.peers))

    async def test_a_start_tells_whether_the_machine_has_to_be_looked_at(self) -> None:
        for told, stale in {
            (("previous_state", "stopped"), ("migrated", False), ("new_host", "")): False,
            (("previous_state", "stopped"), ("migrated", True), ("new_host", "c1")): True,
            (("previous_state", "stopped"), ("migrated", None), ("new_host", "c1")): True,
            (("previous_state", "started"), ("migrated", False)): True,
            (("previous_state", "suspended"),): False,
            (("ok", True),): False,
            (): False,
        }.items():
            self.assertIs(stale, await self.fly(answer(200, dict(told))).start(M.id, None), told)

    async def test_a_machine_that_is_gone_is_destroyed_and_in_no_other_state(self) -> None:
        fly = self.fly(answer(404, {"error": "machine not found"}))

        await fly.wait(M, State.DESTROYED, 10)
        await self.refused(NotFoundError, fly.wait(M, State.STOPPED, 10))

    async def test_a_wait_that_is_refused_ends(self) -> None:
        fly = self.fly(answer(400, {"error": "invalid_argument"}))

        await self.refused(RefusedError, fly.wait(M, State.STOPPED, 10))
