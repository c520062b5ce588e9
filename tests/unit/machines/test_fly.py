"""Tests of the client of Fly's Machines API: against the emulator, and against scripted servers."""

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
    RejectedError,
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
    def test_scheme_follows_from_the_token(self) -> None:
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


def response(status: int, document: object, *headers: str) -> list[bytes | Deferred[None] | End]:
    """Return a script that sends a response with JSON, or with the given bytes, and closes the connection."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = [f"HTTP/1.1 {status} Reason", f"Content-Length: {len(body)}", *headers, "", ""]
    return ["\r\n".join(lines).encode() + body, End.CLOSE]


class SkippingClock(Clock):
    """Skips delays, and records how long they were; timeouts need `advance`."""

    def __init__(self) -> None:
        super().__init__()
        self.delays: list[float] = []

    def callLater(
        self,
        delay: float,
        callable: Callable[..., object],  # noqa: A002 - the signature of Clock
        *args: object,
        **kw: object,
    ) -> IDelayedCall:
        if getattr(callable, "__func__", None) is Deferred.callback:
            self.delays.append(delay)
            reactor.callLater(0, self.advance, delay)
        return super().callLater(delay, callable, *args, **kw)


class ScriptedServerTestCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.clock = SkippingClock()

    def client(self, *scripts: Iterable[bytes | Deferred[None] | End]) -> FlyMachines:
        self.server, url = self.serve_script(*scripts)
        return FlyMachines(self.clock, single_use_agent(reactor), Random(1), url, "workers", "t")

    def request_lines(self) -> list[str]:
        """Return the method and target of each request."""
        requests = [peer.request() for peer in self.server.peers]
        return [request[0][0].removesuffix(" HTTP/1.1") for request in requests if request]

    async def error(
        self, error: type[MachinesError], work: Coroutine[Deferred[Any], Any, Any]
    ) -> MachinesError:
        try:
            await work
        except error as raised:
            self.assertIs(error, type(raised))
            return raised
        raise self.failureException(f"{error.__name__} not raised")


class RetryTests(ScriptedServerTestCase):
    async def test_safe_call_is_retried_with_growing_delays(self) -> None:
        client = self.client(
            response(429, {"error": "rate limit exceeded"}),
            response(500, b"oops"),
            response(200, b"<html>"),
            response(408, {"error": "deadline_exceeded: upstream"}),
            [End.RESET],
            [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", End.CLOSE],
            response(200, OK),
        )

        await client.stop(M.id, "abcdefabcdef")

        requests = [peer.request() for peer in self.server.peers]
        self.assertEqual(7, len(requests))
        for request in requests:
            assert request is not None
            head, body = request
            self.assertEqual(f"POST {PATH}/stop HTTP/1.1", head[0])
            self.assertIn("fly-machine-lease-nonce: abcdefabcdef", [line.lower() for line in head])
            self.assertIn("Authorization: Bearer t", head)
            self.assertEqual({"signal": "SIGKILL", "timeout": "1s"}, json.loads(body))
        for failures, delay in enumerate(self.clock.delays):
            self.assertTrue(0.05 <= delay / 2**failures <= 0.1, self.clock.delays)
        self.assertEqual([], self.clock.getDelayedCalls())

    async def test_retries_end_at_the_timeout(self) -> None:
        raised = await self.error(UnavailableError, self.client(response(502, b"bad gateway")).get(M.id))

        assert raised.call is not None
        self.assertEqual(502, raised.call.status)
        self.assertTrue(5 <= self.clock.seconds() <= 15, self.clock.seconds())

    async def test_response_that_is_nested_too_deeply_is_an_api_error(self) -> None:
        nested = b"[" * 100_000
        for status in (200, 500):
            client = self.client(response(status, nested))
            await self.error(UnavailableError, client.acquire_lease(M.id, 60, "mine"))

    async def test_acquire_is_not_retried_if_it_may_have_succeeded(self) -> None:
        client = self.client(response(429, b"slow down"), response(500, b"oops"), response(200, LEASE))

        await self.error(UnavailableError, client.acquire_lease(M.id, 60, "mine"))

        self.assertEqual([f"POST {PATH}/lease"] * 2, self.request_lines())

    async def test_create_is_never_retried(self) -> None:
        client = self.client(response(429, b"slow down"))

        await self.error(RateLimitedError, client.create("m", "ams", CONFIG, 60))

        self.assertEqual([f"POST {PATH.rpartition('/')[0]}"], self.request_lines())

    async def test_rejected_call_is_not_retried(self) -> None:
        cases: list[tuple[int, object, type[MachinesError]]] = [
            (400, {"error": "invalid_argument: no"}, RejectedError),
            (401, b"no", RejectedError),
            (404, {"error": "machine not found"}, NotFoundError),
            (409, {"error": "machine ID 1 lease currently held by a@b, expires at x"}, LeaseHeldError),
            (409, {"status": "error", "message": "Lease currently held by a@b"}, LeaseHeldError),
            (409, {"error": "aborted: machine still attempting to start, please try again"}, NotReadyError),
            (409, {"error": "aborted: could not reserve resource for machine"}, CapacityError),
            (422, {"error": "insufficient_capacity", "status": "insufficient_capacity"}, CapacityError),
            (422, {"error": None}, RejectedError),
            (412, {"error": "failed_precondition: machine getting replaced"}, NotReadyError),
            (409, {"error": "unique machine name violation, machine ID 12ab already exists"}, NameTakenError),
        ]
        client = self.client(*(response(status, document) for status, document, _ in cases))

        for number, (_, _, error) in enumerate(cases, 1):
            await self.error(error, client.start(M.id, None))
            self.assertEqual(number, len(self.server.peers))
        self.assertEqual([], self.clock.delays)

    async def test_error_has_the_call_and_an_excerpt_of_the_response(self) -> None:
        document = {"error": "no  such\n thing " + "x" * 1000}
        raised = await self.error(
            NotFoundError, self.client(response(404, document, "fly-request-id: 01ABC-ams")).get(M.id)
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

    async def test_redirect_is_not_followed(self) -> None:
        elsewhere, url = self.serve_script(response(200, MACHINE))

        await self.error(UnavailableError, self.client(response(307, b"", f"Location: {url}")).get(M.id))

        self.assertEqual([], elsewhere.peers)


class TimeoutTests(ScriptedServerTestCase):
    async def test_call_without_a_response_ends_at_its_timeout(self) -> None:
        incomplete: list[bytes] = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"]
        for sent in incomplete:
            for timeout, make_call in ((15, lambda client: client.get(M.id)), (60, self.create)):
                client = self.client([sent])
                call = Deferred.fromCoroutine(make_call(client))
                call.addErrback(lambda failure: failure.value)
                peer = await self.server.requested.get()
                self.clock.advance(timeout - 0.1)
                self.assertFalse(call.called)

                self.clock.advance(0.2)
                error = await call

                self.assertIs(UnavailableError, type(error))
                self.assertTrue(error.call.path.startswith("/v1/apps/workers/machines"), error.call)
                self.assertIs(None, error.call.status)
                await peer.receive_all()

    def create(self, client: FlyMachines) -> Coroutine[Deferred[Any], Any, Any]:
        return client.create("m", "ams", CONFIG, 60)

    async def test_cancelling_a_call_closes_its_connection(self) -> None:
        for sent in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"):
            call = Deferred.fromCoroutine(self.client([sent]).get(M.id))
            peer = await self.server.requested.get()
            call.cancel()

            await self.assertFailure(call, CancelledError)
            await peer.receive_all()
            self.assertEqual([], self.clock.getDelayedCalls())


class DecodingTests(ScriptedServerTestCase):
    async def test_unknown_null_and_missing_fields_of_a_machine_are_accepted(self) -> None:
        unusual: dict[str, Any] = {
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
        minimal = {"id": "2", "name": "n", "state": "stopped"}
        client = self.client(
            response(200, unusual),
            response(200, [unusual, None, {"id": "3"}, "x", minimal]),
            response(200, None),
        )

        machine = await client.get("1")

        self.assertEqual(
            Machine("1", "n", State.UNKNOWN, "", "i", {"a": "b", "c": ""}, "01V", machine.created_at), machine
        )
        self.assertEqual(1767323045, int(machine.created_at))
        empty = Machine("2", "n", State.STOPPED, "", "", {}, "", 0.0)
        self.assertEqual([machine, empty], await client.list())
        self.assertEqual([], await client.list())

    async def test_response_without_a_required_field_is_an_error(self) -> None:
        cases: list[tuple[object, Callable[[FlyMachines], Coroutine[Any, Any, Any]]]] = [
            ({"id": "1", "name": "n"}, lambda client: client.get("1")),
            ({"machines": []}, lambda client: client.list()),
            (LEASE["data"], lambda client: client.get_lease("1")),
            ({**LEASE, "status": "error"}, lambda client: client.acquire_lease("1", 60, "")),
            ({**LEASE, "data": {"expires_at": 1}}, lambda client: client.get_lease("1")),
            (MACHINE, lambda client: client.create("m", "ams", CONFIG, 60)),
            (
                {**MACHINE, "nonce": "a", "name": "other"},
                lambda client: client.create("m", "ams", CONFIG, 60),
            ),
            ([], lambda client: client.stop("1", None)),
        ]
        for document, call in cases:
            with self.subTest(document=document):
                await self.error(UnavailableError, call(self.client(response(200, document))))

    async def test_refreshed_lease_with_another_nonce_is_an_error(self) -> None:
        client = self.client(response(201, LEASE))

        self.assertEqual("abcdefabcdef", (await client.refresh_lease(M.id, "abcdefabcdef", 60)).nonce)
        await self.error(LeaseHeldError, client.refresh_lease(M.id, "0" * 12, 60))

    async def test_taken_name_is_reported_with_the_id_of_the_machine(self) -> None:
        document = {
            "error": "already_exists: unique machine name violation, machine ID 12ab already exists with .."
        }
        client = self.client(
            response(500, b""),
            response(409, document),
            response(409, {"error": "unique machine name violation"}),
        )

        await self.error(UnavailableError, client.create("m", "ams", CONFIG, 60))  # not repeated
        for machine_id in ("12ab", None):
            raised = await self.error(NameTakenError, client.create("m", "ams", CONFIG, 60))
            assert isinstance(raised, NameTakenError)
            self.assertEqual(machine_id, raised.machine_id)
        self.assertEqual(["POST /v1/apps/workers/machines"] * 3, self.request_lines())


class WaitTests(ScriptedServerTestCase):
    async def test_wait_continues_until_this_version_reaches_the_state(self) -> None:
        client = self.client(
            response(200, {"ok": False}),
            response(200, MACHINE),
            response(200, {"ok": True, "version": "01G"}),
            response(200, {**MACHINE, "state": "starting"}),
            response(408, {"error": "deadline_exceeded"}),
            response(200, {**MACHINE, "state": "created"}),
            response(503, b"oops"),
            response(429, b"slow down"),
            response(200, {"ok": True, "state": "started", "version": "01H"}),
        )

        await client.wait(M, State.STARTED, 100)

        wait = f"GET {PATH}/wait?state=started&timeout=10&instance_id=01H"
        self.assertEqual([*3 * [wait, f"GET {PATH}"], *3 * [wait]], self.request_lines())
        self.assertEqual([], self.clock.getDelayedCalls())

    async def test_long_wait_is_split_into_calls_that_the_api_accepts(self) -> None:
        client = self.client([])
        waiting = Deferred.fromCoroutine(self.error(WaitTimeoutError, client.wait(M, State.STOPPED, 90.5)))
        peer = await self.server.requested.get()
        self.clock.advance(60)
        peer.transport.write(response(408, {"error": "deadline_exceeded"})[0])
        peer = await self.server.requested.get()
        peer.transport.write(response(200, MACHINE)[0])
        peer = await self.server.requested.get()
        self.clock.advance(31)

        await waiting
        await peer.receive_all()
        waits = [line for line in self.request_lines() if "timeout=" in line]
        seconds = [int(line.partition("timeout=")[2].partition("&")[0]) for line in waits]
        self.assertEqual(60, seconds[0])
        self.assertIn(seconds[1], range(28, 32))
        self.assertEqual(2, len(seconds))

    async def test_wait_pauses_after_calls_that_return_at_once(self) -> None:
        client = self.client(*[response(408, {"error": "deadline_exceeded"}), response(200, MACHINE)] * 100)

        await self.error(WaitTimeoutError, client.wait(M, State.STOPPED, 20))

        self.assertGreaterEqual(2 * len(self.clock.delays) + 2, len(self.server.peers))
        *pauses, last = self.clock.delays
        self.assertTrue(all(0.05 <= pause <= 2.5 for pause in pauses), self.clock.delays)
        self.assertLessEqual(last, 2.5)
        self.assertAlmostEqual(20, self.clock.seconds())

    async def test_wait_fails_if_the_machine_has_stopped_or_failed(self) -> None:
        for wanted, state in (
            (State.STARTED, "stopped"),
            (State.STARTED, "failed"),
            (State.STARTED, "launch_failed"),
            (State.SUSPENDED, "stopped"),
            (State.STOPPED, "failed"),
        ):
            document = {"error": f"deadline_exceeded: machine failed to reach desired state, {wanted}, .."}
            for status in (408, 412):
                client = self.client(response(status, document), response(200, {**MACHINE, "state": state}))
                await self.error(EndedError, client.wait(M, wanted, 20))
                self.assertEqual(2, len(self.server.peers))
        self.assertLess(self.clock.seconds(), 1)

    async def test_wait_for_another_state_fails_if_the_machine_is_destroyed(self) -> None:
        for gone in ("destroying", "destroyed"):
            client = self.client(
                response(408, {}), response(200, {**MACHINE, "state": gone}), response(200, OK)
            )
            await self.error(NotFoundError, client.wait(M, State.STARTED, 20))
            await client.wait(M, State.DESTROYED, 20)
        client = self.client(response(408, {}), response(404, {"error": "machine not found"}))
        await self.error(NotFoundError, client.wait(M, State.STARTED, 20))
        client = self.client(response(408, {}), response(404, {"error": "machine not found"}))
        await client.wait(M, State.DESTROYED, 20)

    async def test_wait_continues_with_the_current_version(self) -> None:
        replaced: list[list[bytes | Deferred[None] | End]] = [
            response(408, {"error": "deadline_exceeded"}),
            response(412, {"error": "failed_precondition: machine getting replaced"}),
            response(409, {"error": "aborted: machine is currently replaced"}),
            response(200, {"ok": True, "state": "started", "version": "01J"}),
        ]
        for first in replaced:
            client = self.client(
                first,
                response(200, {**MACHINE, "state": "replacing", "instance_id": "01J"}),
                response(200, {"ok": True, "state": "started", "version": "01J"}),
            )
            await client.wait(M, State.STARTED, 20)
            self.assertTrue(self.request_lines()[-1].endswith("instance_id=01J"), self.request_lines())

    async def test_failed_get_does_not_end_a_wait(self) -> None:
        client = self.client(
            response(408, {"error": "deadline_exceeded"}),
            *[response(200, b"<html>")] * 2,
            response(200, {**MACHINE, "state": "starting"}),
            response(200, OK),
        )

        await client.wait(M, State.STARTED, 20)

        self.assertEqual(5, len(self.server.peers))

    async def test_start_returns_whether_the_known_machine_is_stale(self) -> None:
        for fields, stale in {
            (("previous_state", "stopped"), ("migrated", False), ("new_host", "")): False,
            (("previous_state", "stopped"), ("migrated", True), ("new_host", "c1")): True,
            (("previous_state", "stopped"), ("migrated", None), ("new_host", "c1")): True,
            (("previous_state", "started"), ("migrated", False)): True,
            (("previous_state", "suspended"),): False,
            (("ok", True),): False,
            (): False,
        }.items():
            self.assertIs(stale, await self.client(response(200, dict(fields))).start(M.id, None), fields)

    async def test_missing_machine_counts_as_destroyed(self) -> None:
        client = self.client(response(404, {"error": "machine not found"}))

        await client.wait(M, State.DESTROYED, 10)
        await self.error(NotFoundError, client.wait(M, State.STOPPED, 10))

    async def test_rejected_wait_ends(self) -> None:
        client = self.client(response(400, {"error": "invalid_argument"}))

        await self.error(RejectedError, client.wait(M, State.STOPPED, 10))
