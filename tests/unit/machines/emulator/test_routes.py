"""Tests of the emulated Machines API: its status codes, error texts and documents."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from bfaas.http.server import BoundedSite
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.machines.fly import authorization
from tests.support.hostile_worker import LoopbackTestCase
from tests.support.machines_contract import CONFIG
from tests.support.responses import parse_response
from tests.support.waiting import wait_until

EPOCH = 1_700_000_000.0
BASE = "/v1/apps/workers/machines"
JSON = "application/json; charset=utf-8"


class Reply(NamedTuple):
    status: int
    content_type: str
    text: str

    @property
    def document(self) -> Any:
        return json.loads(self.text)


class RoutesTestCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.machines = EmulatedMachines(
            self.clock, lambda: EPOCH + self.clock.seconds(), timing=Timing(boot=1, stop=1)
        )
        site = BoundedSite(
            self.clock, MachinesServer(self.machines, "workers", "fo1_t").app.resource(), 1 << 20
        )
        self.port = self.listen(site)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))

    async def request(
        self,
        line: str,
        payload: object = None,
        *,
        nonce: str | None = None,
        token: str | None = "Bearer fo1_t",
        root: str = BASE,
    ) -> Reply:
        """Send a request, such as `GET /ID?query`."""
        method, _, path = line.partition(" ")
        if payload is None:
            content = b""
        else:
            content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        lines = [f"{method} {root}{path} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"Content-Length: {len(content)}"]
        lines += [f"Authorization: {token}"] if token else []
        lines += [f"fly-machine-lease-nonce: {nonce}"] if nonce else []
        peer = await self.call(self.port, "\r\n".join([*lines, "", ""]).encode() + content)
        response, text = parse_response(await peer.receive_all())
        return Reply(response.status, response.getheader("Content-Type") or "", text.decode())

    async def create(self, name: str, *, ttl: int = 0, **more: Any) -> str:
        payload = {"name": name, "config": {"image": "i", **more}, "region": "ams", "lease_ttl": ttl}
        machine_id: str = (await self.request("POST ", payload)).document["id"]
        return machine_id

    def boot(self) -> None:
        self.clock.pump([0.5, 0.5])

    async def assert_error(
        self, status: int, error: str, line: str, payload: object = None, nonce: str | None = None
    ) -> None:
        reply = await self.request(line, payload, nonce=nonce)
        self.assertEqual(
            (status, JSON, {"error": error}), (reply.status, reply.content_type, reply.document), line
        )


class ErrorTests(RoutesTestCase):
    async def test_token_is_required(self) -> None:
        for token in (None, "", "Bearer", "Bearer other", "fo1_t", "Bearer fo1_t,other", "Basic fo1_t"):
            reply = await self.request("GET ", token=token)
            self.assertEqual(
                (401, "Authenticate: token validation error"), (reply.status, reply.document["error"])
            )

    async def test_scheme_of_a_token_is_case_insensitive(self) -> None:
        for token in ("bearer fo1_t", "BEARER  fo1_t", "flyv1 fo1_t", "FlyV1 fo1_t", "Bearer fo1_t,"):
            self.assertEqual(200, (await self.request("GET ", token=token)).status, token)

    async def test_several_tokens_are_accepted(self) -> None:
        for held in ("FlyV1 fm2_a,fm2_b,fo1_c", " flyv1 fm2_a, fm2_b,\tfo1_c\n", "fo1_c,fm2_b,fm2_a"):
            server = MachinesServer(self.machines, "workers", held)
            site = BoundedSite(self.clock, server.app.resource(), 1 << 20)
            self.port = self.listen(site)
            self.addCleanup(self.close, site)
            for token, status in {
                "FlyV1 fm2_a,fm2_b,fo1_c": 200,
                authorization(held): 200,
                "Bearer fm2_a": 200,
                "FlyV1 fm2_a,fm2_x": 401,
            }.items():
                self.assertEqual(status, (await self.request("GET ", token=token)).status, (held, token))

    def close(self, site: BoundedSite) -> Deferred[object]:
        return Deferred.fromCoroutine(wait_until(lambda: not site.protocols))

    async def test_unknown_route_gets_404_in_plain_text(self) -> None:
        for line, root in (("GET /1/2/3", BASE), ("PUT ", BASE), ("GET /v2", "")):
            reply = await self.request(line, root=root)
            self.assertEqual(
                (404, "text/plain; charset=utf-8", "404 page not found"),
                (reply.status, reply.content_type, reply.text),
            )

    async def test_missing_machine_lease_or_app_gets_404(self) -> None:
        machine_id = await self.create("m")
        for line in (
            "GET /1",
            "POST /1/start",
            "DELETE /1",
            "GET /1/wait",
            "GET /1/metadata",
            "GET /1/lease",
        ):
            await self.assert_error(404, "machine not found", line)
        await self.assert_error(404, "lease not found", f"GET /{machine_id}/lease")
        other = await self.request("GET /v1/apps/other/machines", root="")
        self.assertEqual((404, {"error": "app not found"}), (other.status, other.document))

    async def test_malformed_request_gets_400(self) -> None:
        machine_id = await self.create("m")
        lease = f"POST /{machine_id}/lease"
        for line, payload in (
            ("POST ", b"{"),
            ("POST ", b"[" * 100_000),
            ("POST ", []),
            ("POST ", {"name": "n"}),
            ("POST ", {"config": {"image": "i", "env": {"A": 1}}}),
            ("POST ", {"config": {"image": "i"}, "lease_ttl": "60"}),
            ("POST ", {"config": {"image": "i"}, "lease_ttl": -1}),
            (f"POST /{machine_id}/stop", {"timeout": 1}),
            (f"POST /{machine_id}/stop", {"signal": "SIGSEGV"}),
            (lease, {"ttl": 0}),
            (lease, None),
            (f"{lease}?ttl=soon", None),
            (f"DELETE /{machine_id}/lease", None),
            (f"GET /{machine_id}/wait?state=happy", None),
            (f"GET /{machine_id}/wait?state=%ff", None),
            (f"PATCH /{machine_id}/metadata", {"a": "b"}),
        ):
            reply = await self.request(line, payload)
            self.assertEqual(400, reply.status, (line, payload, reply))
            self.assertTrue(reply.document["error"].startswith("invalid_argument: "), reply.text)
        self.assertEqual([machine_id], [machine["id"] for machine in (await self.request("GET ")).document])

    async def test_wait_is_limited_to_1_to_60_seconds(self) -> None:
        machine_id = await self.create("m")
        error = "invalid WaitMachineRequest.Timeout: value must be inside range [1s, 1m0s]"
        for timeout in ("0", "61", "-1", "60s", "1.5"):
            await self.assert_error(
                400, f"invalid_argument: {error}", f"GET /{machine_id}/wait?timeout={timeout}"
            )

    async def test_taken_name_gets_409_with_the_id_of_the_machine(self) -> None:
        machine_id = await self.create("m")
        error = f"already_exists: unique machine name violation, machine ID {machine_id} already exists"
        error += ' with name "m"'

        await self.assert_error(409, error, "POST ", {"name": "m", "config": {"image": "i"}})

    async def test_held_lease_gets_409(self) -> None:
        machine_id = await self.create("m", ttl=60)
        error = f"machine ID {machine_id} lease currently held by local@tokens.fly.io, "
        error += "expires at 2023-11-14T22:14:20Z"

        for line in ("POST /{}/start", "POST /{}/stop", "POST /{}/suspend", "DELETE /{}?force=true"):
            await self.assert_error(409, error, line.format(machine_id))
            await self.assert_error(409, error, line.format(machine_id), nonce="0" * 12)
        reply = await self.request(f"POST /{machine_id}/lease", {"ttl": 60})
        document = {"status": "error", "message": error, "code": "invalid"}
        self.assertEqual((409, document), (reply.status, reply.document))

    async def test_call_that_the_state_does_not_allow_gets_412(self) -> None:
        machine_id = await self.create("m")
        start = "failed_precondition: unable to start machine from current state: '{}'"
        destroy = "failed_precondition: unable to destroy machine, not currently stopped, "
        destroy += "suspended, failed or created"
        await self.assert_error(412, start.format("created"), f"POST /{machine_id}/start")
        self.boot()
        await self.assert_error(412, destroy, f"DELETE /{machine_id}")
        self.assertEqual({"ok": True}, (await self.request(f"POST /{machine_id}/stop")).document)
        await self.assert_error(412, start.format("stopping"), f"POST /{machine_id}/start")
        self.clock.advance(1)
        self.assertEqual({"ok": True}, (await self.request(f"DELETE /{machine_id}")).document)

    async def test_exceeded_rate_limit_gets_429(self) -> None:
        limited = EmulatedMachines(self.clock, lambda: EPOCH, rate_limited=True)
        site = BoundedSite(self.clock, MachinesServer(limited, "workers", None).app.resource(), 1 << 20)
        self.port = self.listen(site)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))

        self.assertEqual([200] * 3, [(await self.request("GET ")).status for _ in range(3)])
        await self.assert_error(429, "rate limit exceeded", "GET ")
        self.assertEqual(401, (await self.request("GET ", token=None)).status)


class ResponseTests(RoutesTestCase):
    async def test_list_is_filtered(self) -> None:
        a = await self.create("a", metadata={"k": "ü", "l": "1"})
        self.boot()
        b = await self.create("b", metadata={"k": "ü"})
        await self.machines.create("c", "lhr", CONFIG, 0)

        for query, expected in {
            "": ["a", "b", "c"],
            "?region=ams": ["a", "b"],
            "?state=started": ["a"],
            "?state=started,created&region=ams": ["a", "b"],
            "?metadata.k=%C3%BC": ["a", "b"],
            "?metadata.k=%C3%BC&metadata.l=1": ["a"],
            "?metadata.k=%ff": [],
            "?metadata.none=1": [],
        }.items():
            machines = (await self.request(f"GET {query}")).document
            self.assertEqual(expected, [machine["name"] for machine in machines], query)

        full, summary = (
            (await self.request("GET ?state=started")).document[0],
            (await self.request("GET ?summary=true")).document,
        )
        self.assertEqual({"config", "events", "checks", "host_status"}, set(full) - set(summary[0]))
        self.assertEqual([a, b], [machine["id"] for machine in summary[:2]])

    async def test_wait_returns_with_one_of_its_states_or_reports_the_current_one(self) -> None:
        machine_id = await self.create("m")
        path = f"GET /{machine_id}/wait"
        for query, expected in {
            "?timeout=60": "started",
            "?state=stopped,started": "started",
            "?state=stopped&state=suspended": "stopped",
            "?state=settled": "stopped",
        }.items():
            if expected == "stopped":
                await self.request(f"POST /{machine_id}/stop")
            waiting = Deferred.fromCoroutine(self.request(path + query))
            await wait_until(lambda: waiting.called or self.machines._entries[machine_id].watchers)  # noqa: B023
            self.boot()
            reply = await waiting
            version = (await self.machines.get(machine_id)).instance_id
            self.assertEqual(
                (200, {"ok": True, "state": expected, "version": version}), (reply.status, reply.document)
            )
        self.assertEqual([], self.machines._entries[machine_id].watchers)

        expiring = Deferred.fromCoroutine(self.request(f"{path}?state=failed,suspended&timeout=1"))
        await wait_until(lambda: len(self.machines._entries[machine_id].watchers) == 2)
        self.clock.advance(1)
        reply = await expiring
        error = (
            "deadline_exceeded: machine failed to reach desired state, failed,suspended, currently stopped"
        )
        self.assertEqual((408, {"error": error}), (reply.status, reply.document))

    async def test_wait_for_the_start_of_a_stopped_machine_fails_at_once(self) -> None:
        machine_id = await self.create("m")
        starting = Deferred.fromCoroutine(self.request(f"GET /{machine_id}/wait?timeout=60"))
        await wait_until(lambda: len(self.machines._entries[machine_id].watchers) == 1)
        await self.request(f"POST /{machine_id}/stop")
        self.clock.advance(1)
        error = "deadline_exceeded: machine failed to reach desired state, started, currently stopped"
        reply = await starting
        self.assertEqual((408, {"error": error}), (reply.status, reply.document))

        await self.assert_error(408, error, f"GET /{machine_id}/wait?state=started")

    async def test_migrating_start_changes_the_version(self) -> None:
        machine_id = await self.create("m")
        before = (await self.machines.get(machine_id)).instance_id
        await self.request(f"POST /{machine_id}/stop")
        self.clock.pump([1, 1])
        self.machines.migrate_at_start(machine_id)

        started = await self.request(f"POST /{machine_id}/start")

        document = {"previous_state": "stopped", "migrated": True, "new_host": "local"}
        self.assertEqual((200, document), (started.status, started.document))
        self.boot()
        after = (await self.request(f"GET /{machine_id}")).document["instance_id"]
        self.assertNotEqual(before, after)
        for name, version in (("instance_id", after), ("version", after), ("version", "")):
            reply = await self.request(f"GET /{machine_id}/wait?{name}={version}")
            self.assertEqual((200, after), (reply.status, reply.document["version"]))
        stale = Deferred.fromCoroutine(self.request(f"GET /{machine_id}/wait?instance_id={before}&timeout=1"))
        await wait_until(lambda: len(self.machines._entries[machine_id].watchers) == 1)
        self.clock.advance(1)
        self.assertEqual(408, (await stale).status)

    async def test_disconnect_ends_a_wait(self) -> None:
        machine_id = await self.create("m")
        watchers = self.machines._entries[machine_id].watchers
        head = f"GET {BASE}/{machine_id}/wait?state=settled HTTP/1.1\r\nHost: localhost\r\n"
        peer = await self.call(self.port, f"{head}Authorization: Bearer fo1_t\r\n\r\n".encode())
        await wait_until(lambda: len(watchers) == 5)

        peer.transport.abortConnection()

        await wait_until(lambda: not watchers)

    async def test_metadata_is_merged_without_the_lease(self) -> None:
        machine_id = await self.create("m", ttl=60, metadata={"a": "1", "b": "2", "c": "3"})
        path = f"/{machine_id}/metadata"

        for line, payload in (
            (f"PATCH {path}", {"metadata": {"a": None, "b": "", "d": "4"}}),
            (f"PUT {path}", {"metadata": {"e": "5"}}),
            (f"POST {path}/f", {"value": "6"}),
            (f"DELETE {path}/c", None),
        ):
            reply = await self.request(line, payload)
            self.assertEqual((204, ""), (reply.status, reply.text), line)

        self.assertEqual({"d": "4", "e": "5", "f": "6"}, (await self.request(f"GET {path}")).document)
        self.assertEqual({"value": "4"}, (await self.request(f"GET {path}/d")).document)
        await self.assert_error(404, "metadata key not found", f"GET {path}/a")
        machine = (await self.request(f"GET /{machine_id}")).document
        self.assertEqual({"d": "4", "e": "5", "f": "6"}, machine["config"]["metadata"])

    async def test_lease_is_sent_in_an_envelope(self) -> None:
        machine_id = await self.create("m")
        path = f"/{machine_id}/lease"

        acquired = await self.request(f"POST {path}?ttl=60", {"description": "d"})
        nonce = acquired.document["data"]["nonce"]
        refreshed = await self.request(f"POST {path}", {"ttl": 90}, nonce=nonce)
        current = await self.request(f"GET {path}")
        released = await self.request(f"DELETE {path}", nonce=nonce)

        data = {"nonce": nonce, "owner": "local@tokens.fly.io", "description": "d"}
        for reply, status, seconds in ((acquired, 201, 60), (refreshed, 200, 90), (current, 200, 90)):
            document = {"status": "success", "data": {**data, "expires_at": int(EPOCH) + seconds}}
            self.assertEqual((status, document), (reply.status, reply.document))
        self.assertRegex(nonce, "^[0-9a-f]{12}$")
        self.assertEqual(
            (200, {"status": "success", "data": {"ok": True}}), (released.status, released.document)
        )
