"""
The client's requests and the emulator's answers, against what Fly publishes and documents.

They share the code that writes and reads documents, so neither shows what the other gets wrong. Here what
they send is taken from the wire, parsed by h11, and validated by jsonschema against
`data/machines_schema.json`; and the client reads the answers of `data/fly_answers.json`, which are from Fly's
documents and other clients.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import h11
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from twisted.internet.defer import Deferred
from twisted.internet.protocol import connectionDone
from twisted.protocols import portforward
from twisted.trial.unittest import SynchronousTestCase

from bfaas.http.client import single_use_agent
from bfaas.http.server import BoundedSite
from bfaas.machines.api import (
    Lease,
    LeaseHeldError,
    Machine,
    MachinesError,
    NameTakenError,
    NotFoundError,
    NotReadyError,
    RateLimitedError,
    RefusedError,
    State,
)
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.machines.fly import FlyMachines
from tests.support.hostile_worker import LoopbackTestCase, reactor
from tests.support.machines_contract import CONFIG
from tests.support.paths import ROOT
from tests.support.waiting import wait_until
from tests.unit.machines.test_fly import LiarTestCase, M, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from twisted.python.failure import Failure

DATA = ROOT / "tests" / "data"
SPEC: dict[str, Any] = json.loads((DATA / "machines_schema.json").read_text(encoding="utf-8"))

_SERVER = "/v1"
_NONCE = "fly-machine-lease-nonce"

_STANDARD = {"host", "authorization", "accept", "accept-encoding", "connection", "content-length"}
_STANDARD |= {"content-type", "user-agent"}

# What the schema does not say, and where it is said instead.

# Fly's page on the machines resource, on leases; superfly/fly-go, flaps/flaps_machines.go.
_TAKES_NONCE = {"delete {}", "post {}/start", "post {}/stop", "post {}/suspend"}
# The new name of `instance_id`, newer than this copy of the schema: superfly/docs, api/machines/openapi.json.
_NEWER = {"Machine": {"version": {"type": "string"}}}
# The schema shows a lease without the envelope in which it comes: superfly/docs, reference/machines/
# _machines_lease_create_resp.erb; superfly/fly-go, machine_types.go, MachineLease.
_ENVELOPED = {"get {}/lease", "post {}/lease"}
# Seen as 200 too where a lease is refreshed: superfly/bfaas, machines/lease.go.
_ALSO_200 = {"post {}/lease"}
_NO_SCHEMA: dict[str, dict[str, Any]] = {
    # superfly/docs, reference/machines/_machines_start_resp.erb
    "post {}/start": {
        "previous_state": {"type": "string"},
        "migrated": {"type": "boolean"},
        "new_host": {"type": "string"},
    },
    # the same, _machines_lease_release_resp.erb
    "delete {}/lease": {"status": {"const": "success"}, "data": {"const": {"ok": True}}},
}
_OK = {"ok": {"const": True}}
_ERRORS = {400, 401, 404, 408, 409, 412, 429}
# superfly/docs, reference/machines/_lease_resp.erb
_LEASE_ERROR = {"status": {"const": "error"}, "message": {"type": "string"}, "code": {"type": "string"}}


def strict(schema: Any) -> Any:
    """Return a schema that takes no property that it does not name."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "type" in made:
        made.setdefault("additionalProperties", False)
    return made


def components() -> dict[str, Any]:
    made = deepcopy(SPEC["components"]["schemas"])
    for name, properties in _NEWER.items():
        made[name]["properties"].update(properties)
    return {"schemas": strict(made)}


COMPONENTS = components()


def faults(told: Any, schema: dict[str, Any]) -> list[str]:
    """Return what is wrong with a document."""
    validator = Draft202012Validator({**strict(schema), "components": COMPONENTS})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(told)]


def exactly(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


class Exchange(NamedTuple):
    """A request and its answer, as they were on the wire."""

    request: h11.Request
    body: bytes
    response: h11.Response
    answer: bytes

    @property
    def operation(self) -> tuple[str, dict[str, Any]]:
        """The operation's short name, and what the schema says of it."""
        method, path = self.request.method.decode().lower(), urlsplit(self.request.target.decode()).path
        assert path.startswith(_SERVER), path
        for template, operations in SPEC["paths"].items():
            pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
            if method in operations and re.fullmatch(pattern, path.removeprefix(_SERVER)):
                name = template.removeprefix("/apps/{app_name}/machines").lstrip("/")
                name = name.replace("{machine_id}", "{}")
                return f"{method} {name}".strip(), operations[method]
        raise AssertionError(f"no such operation: {method} {path}")

    def request_faults(self) -> Iterator[str]:
        """Tell what of the request is not as the schema has it."""
        name, operation = self.operation
        declared = {(each["in"], each["name"]): each["schema"] for each in operation.get("parameters", [])}
        for key, value in parse_qsl(urlsplit(self.request.target.decode()).query, keep_blank_values=True):
            schema = declared.get(("query", key))
            if schema is None:
                yield f"{name}: unknown parameter {key}"
            else:
                read = json.loads(value) if schema["type"] in ("integer", "boolean") else value
                yield from (f"{name}: {key}: {fault}" for fault in faults(read, schema))
        names = [key.decode() for key, _ in self.request.headers]
        if len(set(names)) != len(names):
            yield f"{name}: a header is sent twice: {names}"
        for key in set(names) - _STANDARD:
            if ("header", key) not in declared and not (key == _NONCE and name in _TAKES_NONCE):
                yield f"{name}: unknown header {key}"
        yield from self._body_faults(name, operation)

    def _body_faults(self, name: str, operation: dict[str, Any]) -> Iterator[str]:
        headers = {key.decode(): value.decode() for key, value in self.request.headers}
        if not re.fullmatch(r"(Bearer|FlyV1) [!-~]+", headers.get("authorization", "")):
            yield f"{name}: authorization"
        content = operation.get("requestBody", {}).get("content")
        if content is None:
            if self.body:
                yield f"{name}: has a body: {self.body!r}"
            return
        if headers.get("content-type") != "application/json":
            yield f"{name}: content-type {headers.get('content-type')}"
        schema = content["application/json"]["schema"]
        yield from (f"{name}: {fault}" for fault in faults(json.loads(self.body), schema))

    def answer_faults(self) -> Iterator[str]:
        """Tell what of the answer is not as the schema has it, or the documents where it says nothing."""
        name, operation = self.operation
        status = self.response.status_code
        headers = {key.decode(): value.decode() for key, value in self.response.headers}
        if not headers.get("content-type", "").startswith("application/json"):
            yield f"{name}: content-type {headers.get('content-type')}"
        told = json.loads(self.answer)
        listed = operation["responses"].get("201" if name in _ALSO_200 and status == 200 else str(status))
        if listed is None:
            if status not in _ERRORS:
                yield f"{name}: status {status}"
            is_lease = name.endswith("/lease") and status == 409
            schema = exactly(_LEASE_ERROR) if is_lease else {"$ref": "#/components/schemas/ErrorResponse"}
            yield from (f"{name} {status}: {fault}" for fault in faults(told, schema))
            return
        schema = listed.get("content", {}).get("application/json", {}).get("schema")
        if schema is None:
            schema = exactly(_NO_SCHEMA.get(name, _OK))
        elif name in _ENVELOPED:
            schema = exactly({"status": {"const": "success"}, "data": schema})
        yield from (f"{name} {status}: {fault}" for fault in faults(told, schema))


class _Forward(portforward.ProxyClient):
    peer: Any

    def dataReceived(self, data: bytes) -> None:
        self.peer.heard += data
        super().dataReceived(data)


class _ForwardFactory(portforward.ProxyClientFactory):
    protocol = _Forward


class _Recording(portforward.ProxyServer):
    factory: Any
    clientProtocolFactory = _ForwardFactory

    def connectionMade(self) -> None:
        self.said, self.heard, self.is_open = b"", b"", True
        self.factory.peers.append(self)
        super().connectionMade()

    def dataReceived(self, data: bytes) -> None:
        self.said += data
        super().dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.is_open = False
        super().connectionLost(reason)

    def exchange(self) -> Exchange:
        """Parse what went over this connection, which was one request and one answer."""
        server, client = h11.Connection(h11.SERVER), h11.Connection(h11.CLIENT)
        request, body = _parse(server, self.said)
        assert isinstance(request, h11.Request)
        client.send(h11.Request(method=request.method, target=request.target, headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        response, answer = _parse(client, self.heard)
        assert isinstance(response, h11.Response)
        return Exchange(request, body, response, answer)


class Recorder(portforward.ProxyFactory):
    """Passes connections on to a port, and keeps what goes over them."""

    protocol = _Recording

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.peers: list[_Recording] = []


def _parse(connection: h11.Connection, data: bytes) -> tuple[object, bytes]:
    connection.receive_data(data)
    connection.receive_data(b"")
    head, body = connection.next_event(), b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage), event
    return head, body


class SpecTests(SynchronousTestCase):
    def test_the_schema_is_one(self) -> None:
        validate(SPEC)

    def test_what_is_wrong_is_found(self) -> None:
        machine = {"id": 1, "host_status": "well", "events": [{"timestamp": True}], "nonces": "a"}
        wrong = {"config": {"env": {"A": 1}, "restart": {"policy": "never"}, "images": "i"}, "ttl": 1}
        found = [
            *faults(machine, {"$ref": "#/components/schemas/Machine"}),
            *faults(wrong, {"$ref": "#/components/schemas/CreateMachineRequest"}),
        ]

        places = {fault.partition(":")[0] for fault in found}
        expected = {"$", "$.id", "$.host_status", "$.events[0].timestamp"}
        expected |= {"$.config", "$.config.env.A", "$.config.restart.policy"}
        self.assertEqual(expected, places, found)
        for name in ("'nonces'", "'ttl'", "'images'"):
            self.assertTrue(any(name in fault for fault in found), found)


class WireTests(LoopbackTestCase):
    def setUp(self) -> None:
        self.machines = EmulatedMachines(reactor, reactor.seconds, timing=Timing(boot=0.02, stop=0.01))
        self.addCleanup(lambda: Deferred.fromCoroutine(self.machines.shutdown()))
        server = MachinesServer(self.machines, "workers", "FlyV1 fm2_a,fm2_b")
        site = BoundedSite(reactor, server.app.resource(), 1 << 20)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))
        self.recorder = Recorder(self.listen(site))
        self.port = self.listen(self.recorder)
        closed = lambda: not any(peer.is_open for peer in self.recorder.peers)  # noqa: E731
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(closed)))

    def fly(self, token: str = "fm2_a,fm2_b", app: str = "workers") -> FlyMachines:
        url = f"http://127.0.0.1:{self.port}"
        return FlyMachines(reactor, single_use_agent(reactor), Random(1), url, app, token)

    async def refused(self, error: type[MachinesError], work: Coroutine[Deferred[Any], Any, Any]) -> None:
        try:
            await work
        except error:
            return
        raise self.failureException(f"{error.__name__} not raised")

    async def do_everything(self) -> None:
        """Make every call that the client has, and have each refused in each way that it can be."""
        fly = self.fly()
        machine, lease = await fly.create("m", "ams", CONFIG, 60)
        await fly.wait(machine, State.STARTED, 10)
        await fly.list()
        await fly.get(machine.id)
        await fly.suspend(machine.id, lease.nonce)
        await fly.wait(machine, State.SUSPENDED, 10)
        await fly.start(machine.id, lease.nonce)
        await fly.wait(machine, State.STARTED, 10)
        await fly.get_lease(machine.id)
        await fly.refresh_lease(machine.id, lease.nonce, 90)
        await self.refused(NameTakenError, fly.create("m", "ams", CONFIG, 60))
        for call in (fly.start, fly.stop, fly.suspend, fly.destroy):
            await self.refused(LeaseHeldError, call(machine.id, None))
            await self.refused(NotFoundError, call("0" * 14, None))
        await self.refused(LeaseHeldError, fly.acquire_lease(machine.id, 60, "d"))
        await self.refused(NotFoundError, fly.get("0" * 14))
        await self.refused(NotFoundError, fly.wait(replace(machine, id="0"), State.STARTED, 1))
        await fly.stop(machine.id, lease.nonce)
        await fly.wait(machine, State.STOPPED, 10)
        await self.refused(NotReadyError, fly.suspend(machine.id, lease.nonce))
        await self.refused(MachinesError, fly.wait(machine, State.STARTED, 5))
        await fly.release_lease(machine.id, lease.nonce)
        await self.refused(NotFoundError, fly.get_lease(machine.id))
        taken = await fly.acquire_lease(machine.id, 60, "d")
        await fly.destroy(machine.id, taken.nonce)
        await fly.wait(machine, State.DESTROYED, 10)
        await self.refused(RefusedError, self.fly("other").list())
        await self.refused(NotFoundError, self.fly(app="none").list())

    async def test_requests_and_answers_are_as_fly_has_them(self) -> None:
        await self.do_everything()

        exchanges = [peer.exchange() for peer in self.recorder.peers]
        for exchange in exchanges:
            self.assertEqual([], [*exchange.request_faults(), *exchange.answer_faults()], exchange)
        asked = {exchange.operation[0] for exchange in exchanges}
        there = {
            f"{method} {path.removeprefix('/apps/{app_name}/machines').lstrip('/')}".strip()
            for path, operations in SPEC["paths"].items()
            for method in operations
            if "metadata" not in path
        }
        self.assertEqual({name.replace("{machine_id}", "{}") for name in there}, asked)
        self.assertLessEqual(
            {200, 201, 401, 404, 408, 409, 412}, {each.response.status_code for each in exchanges}
        )

    async def test_a_refusal_for_haste_is_as_fly_has_it(self) -> None:
        limited = EmulatedMachines(reactor, reactor.seconds, rate_limited=True)
        site = BoundedSite(reactor, MachinesServer(limited, "workers", None).app.resource(), 1 << 20)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))
        self.recorder.port = self.listen(site)
        fly = self.fly()
        for _ in range(4):
            try:
                await fly.create("", "ams", CONFIG, 60)
            except RateLimitedError:
                break
            except MachinesError:
                pass  # without a name it is given one
        [*_, last] = [peer.exchange() for peer in self.recorder.peers]

        self.assertEqual(429, last.response.status_code)
        self.assertEqual([], list(last.answer_faults()))


class DocumentedAnswers(LiarTestCase):
    def calls(self, fly: FlyMachines, name: str) -> dict[str, Callable[[], Coroutine[Any, Any, Any]]]:
        return {
            "create": lambda: fly.create(name, "ord", CONFIG, 60),
            "list": fly.list,
            "get": lambda: fly.get(M.id),
            "start": lambda: fly.start(M.id, None),
            "stop": lambda: fly.stop(M.id, None),
            "suspend": lambda: fly.suspend(M.id, None),
            "destroy": lambda: fly.destroy(M.id, None),
            "wait": lambda: fly.wait(M, State.STARTED, 10),
            "get_lease": lambda: fly.get_lease(M.id),
            "acquire_lease": lambda: fly.acquire_lease(M.id, 60, ""),
            "release_lease": lambda: fly.release_lease(M.id, "5c35f65c9f95"),
        }

    def read(self, result: Any) -> Any:
        """Return what was read of an answer, as JSON has it."""
        if isinstance(result, list):
            return [self.read(each) for each in result]
        if isinstance(result, tuple):
            machine, lease = result
            return {**self.read(machine), "nonce": lease.nonce, "expires_at": lease.expires_at}
        if isinstance(result, Machine | Lease):
            return {key: value for key, value in vars(result).items() if key != "url"}
        return result

    async def test_they_are_read_as_they_are_meant(self) -> None:
        for case in json.loads((DATA / "fly_answers.json").read_text(encoding="utf-8")):
            fly = self.fly(answer(case["status"], case["body"]))
            call = self.calls(fly, "aged-thunder-7371")[case["call"]]
            try:
                found = self.read(await call())
            except MachinesError as error:
                self.assertEqual(case.get("error"), type(error).__name__, case["source"])
            else:
                self.assertNotIn("error", case, case["source"])
                self.assertEqual(case["read"], found, case["source"])
