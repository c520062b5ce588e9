"""
Tests of the client's requests and the emulator's responses against Fly's published schema and documentation.

Client and emulator share a codec, so that neither detects an error in it. Here the messages are recorded on
the wire, parsed by h11, and validated by jsonschema against `data/machines_schema.json`. And the client reads
the responses in `data/fly_responses.json`, which come from Fly's documentation and from other clients.
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
    RejectedError,
    State,
)
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.machines.fly import FlyMachines
from tests.support.hostile_worker import LoopbackTestCase, reactor
from tests.support.machines_contract import CONFIG
from tests.support.paths import ROOT
from tests.support.waiting import wait_until
from tests.unit.machines.test_fly import M, ScriptedServerTestCase, response

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from twisted.python.failure import Failure

DATA = ROOT / "tests" / "data"
SPEC: dict[str, Any] = json.loads((DATA / "machines_schema.json").read_text(encoding="utf-8"))

_SERVER = "/v1"
_NONCE = "fly-machine-lease-nonce"

_STANDARD = {"host", "authorization", "accept", "accept-encoding", "connection", "content-length"}
_STANDARD |= {"content-type", "user-agent"}

# What the schema omits, with the source of each item.

# Fly's page on the machines resource, on leases; superfly/fly-go, flaps/flaps_machines.go.
_TAKES_NONCE = {"delete {}", "post {}/start", "post {}/stop", "post {}/suspend"}
# The new name of `instance_id`, missing in this copy of the schema: superfly/docs, api/machines/openapi.json.
_NEWER = {"Machine": {"version": {"type": "string"}}}
# The schema omits the envelope of a lease: superfly/docs, reference/machines/
# _machines_lease_create_resp.erb; superfly/fly-go, machine_types.go, MachineLease.
_ENVELOPED = {"get {}/lease", "post {}/lease"}
# The status is also 200 if a lease is refreshed: superfly/bfaas, machines/lease.go.
_ALSO_200 = {"post {}/lease"}
_NO_SCHEMA: dict[str, dict[str, Any]] = {
    # superfly/docs, reference/machines/_machines_start_resp.erb
    "post {}/start": {
        "previous_state": {"type": "string"},
        "migrated": {"type": "boolean"},
        "new_host": {"type": "string"},
    },
    # superfly/docs, reference/machines/_machines_lease_release_resp.erb
    "delete {}/lease": {"status": {"const": "success"}, "data": {"const": {"ok": True}}},
}
_OK = {"ok": {"const": True}}
_ERRORS = {400, 401, 404, 408, 409, 412, 429}
# superfly/docs, reference/machines/_lease_resp.erb
_LEASE_ERROR = {"status": {"const": "error"}, "message": {"type": "string"}, "code": {"type": "string"}}


def strict(schema: Any) -> Any:
    """Return a schema that rejects properties that it does not define."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if isinstance(result.get("properties"), dict) and "type" in result:
        result.setdefault("additionalProperties", False)
    return result


def components() -> dict[str, Any]:
    schemas = deepcopy(SPEC["components"]["schemas"])
    for name, properties in _NEWER.items():
        schemas[name]["properties"].update(properties)
    return {"schemas": strict(schemas)}


COMPONENTS = components()


def violations(document: Any, schema: dict[str, Any]) -> list[str]:
    """Return the violations of a schema by a document."""
    validator = Draft202012Validator({**strict(schema), "components": COMPONENTS})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def exactly(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


class Exchange(NamedTuple):
    """A request and its response, as they were on the wire."""

    request: h11.Request
    body: bytes
    response: h11.Response
    response_body: bytes

    @property
    def operation(self) -> tuple[str, dict[str, Any]]:
        """The short name of the operation, and its definition in the schema."""
        method, path = self.request.method.decode().lower(), urlsplit(self.request.target.decode()).path
        assert path.startswith(_SERVER), path
        for template, operations in SPEC["paths"].items():
            pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
            if method in operations and re.fullmatch(pattern, path.removeprefix(_SERVER)):
                name = template.removeprefix("/apps/{app_name}/machines").lstrip("/")
                name = name.replace("{machine_id}", "{}")
                return f"{method} {name}".strip(), operations[method]
        raise AssertionError(f"no such operation: {method} {path}")

    def request_violations(self) -> Iterator[str]:
        """Yield the violations of the schema by the request."""
        name, operation = self.operation
        parameters = operation.get("parameters", [])
        declared = {(item["in"], item["name"]): item["schema"] for item in parameters}
        for key, value in parse_qsl(urlsplit(self.request.target.decode()).query, keep_blank_values=True):
            schema = declared.get(("query", key))
            if schema is None:
                yield f"{name}: unknown parameter {key}"
            else:
                typed = json.loads(value) if schema["type"] in ("integer", "boolean") else value
                yield from (f"{name}: {key}: {violation}" for violation in violations(typed, schema))
        names = [key.decode() for key, _ in self.request.headers]
        if len(set(names)) != len(names):
            yield f"{name}: a header is sent twice: {names}"
        for key in set(names) - _STANDARD:
            if ("header", key) not in declared and not (key == _NONCE and name in _TAKES_NONCE):
                yield f"{name}: unknown header {key}"
        yield from self._body_violations(name, operation)

    def _body_violations(self, name: str, operation: dict[str, Any]) -> Iterator[str]:
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
        yield from (f"{name}: {violation}" for violation in violations(json.loads(self.body), schema))

    def response_violations(self) -> Iterator[str]:
        """Yield the violations by the response of the schema, or of the documentation if that has none."""
        name, operation = self.operation
        status = self.response.status_code
        headers = {key.decode(): value.decode() for key, value in self.response.headers}
        if not headers.get("content-type", "").startswith("application/json"):
            yield f"{name}: content-type {headers.get('content-type')}"
        document = json.loads(self.response_body)
        declared = operation["responses"].get("201" if name in _ALSO_200 and status == 200 else str(status))
        if declared is None:
            if status not in _ERRORS:
                yield f"{name}: status {status}"
            is_lease = name.endswith("/lease") and status == 409
            schema = exactly(_LEASE_ERROR) if is_lease else {"$ref": "#/components/schemas/ErrorResponse"}
            yield from (f"{name} {status}: {violation}" for violation in violations(document, schema))
            return
        schema = declared.get("content", {}).get("application/json", {}).get("schema")
        if schema is None:
            schema = exactly(_NO_SCHEMA.get(name, _OK))
        elif name in _ENVELOPED:
            schema = exactly({"status": {"const": "success"}, "data": schema})
        yield from (f"{name} {status}: {violation}" for violation in violations(document, schema))


class _Forward(portforward.ProxyClient):
    peer: Any

    def dataReceived(self, data: bytes) -> None:
        self.peer.received += data
        super().dataReceived(data)


class _ForwardFactory(portforward.ProxyClientFactory):
    protocol = _Forward


class _Recording(portforward.ProxyServer):
    factory: Any
    clientProtocolFactory = _ForwardFactory

    def connectionMade(self) -> None:
        self.sent, self.received = b"", b""
        self.is_open = True
        self.factory.peers.append(self)
        super().connectionMade()

    def dataReceived(self, data: bytes) -> None:
        self.sent += data
        super().dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.is_open = False
        super().connectionLost(reason)

    def exchange(self) -> Exchange:
        """Parse the bytes of this connection: one request and one response."""
        server, client = h11.Connection(h11.SERVER), h11.Connection(h11.CLIENT)
        request, body = _parse(server, self.sent)
        assert isinstance(request, h11.Request)
        client.send(h11.Request(method=request.method, target=request.target, headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        response, response_body = _parse(client, self.received)
        assert isinstance(response, h11.Response)
        return Exchange(request, body, response, response_body)


class Recorder(portforward.ProxyFactory):
    """Forwards connections to a port, and records their bytes."""

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
    def test_schema_is_valid(self) -> None:
        validate(SPEC)

    def test_violations_are_found(self) -> None:
        machine = {"id": 1, "host_status": "well", "events": [{"timestamp": True}], "nonces": "a"}
        create = {"config": {"env": {"A": 1}, "restart": {"policy": "never"}, "images": "i"}, "ttl": 1}
        found = [
            *violations(machine, {"$ref": "#/components/schemas/Machine"}),
            *violations(create, {"$ref": "#/components/schemas/CreateMachineRequest"}),
        ]

        paths = {violation.partition(":")[0] for violation in found}
        expected = {"$", "$.id", "$.host_status", "$.events[0].timestamp"}
        expected |= {"$.config", "$.config.env.A", "$.config.restart.policy"}
        self.assertEqual(expected, paths, found)
        for name in ("'nonces'", "'ttl'", "'images'"):
            self.assertTrue(any(name in violation for violation in found), found)


class WireTests(LoopbackTestCase):
    def setUp(self) -> None:
        self.machines = EmulatedMachines(reactor, reactor.seconds, timing=Timing(boot=0.02, stop=0.01))
        self.addCleanup(lambda: Deferred.fromCoroutine(self.machines.shutdown()))
        server = MachinesServer(self.machines, "workers", "FlyV1 fm2_a,fm2_b")
        site = BoundedSite(reactor, server.app.resource(), 1 << 20)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))
        self.recorder = Recorder(self.listen(site))
        self.port = self.listen(self.recorder)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(self.is_closed)))

    def is_closed(self) -> bool:
        return not any(peer.is_open for peer in self.recorder.peers)

    def client(self, token: str = "fm2_a,fm2_b", app: str = "workers") -> FlyMachines:
        url = f"http://127.0.0.1:{self.port}"
        return FlyMachines(reactor, single_use_agent(reactor), Random(1), url, app, token)

    async def expect(self, error: type[MachinesError], work: Coroutine[Deferred[Any], Any, Any]) -> None:
        try:
            await work
        except error:
            return
        raise self.failureException(f"{error.__name__} not raised")

    async def do_everything(self) -> None:
        """Make every call of the client, and provoke each kind of error."""
        client = self.client()
        machine, lease = await client.create("m", "ams", CONFIG, 60)
        await client.wait(machine, State.STARTED, 10)
        await client.list()
        await client.get(machine.id)
        await client.suspend(machine.id, lease.nonce)
        await client.wait(machine, State.SUSPENDED, 10)
        await client.start(machine.id, lease.nonce)
        await client.wait(machine, State.STARTED, 10)
        await client.get_lease(machine.id)
        await client.refresh_lease(machine.id, lease.nonce, 90)
        await self.expect(NameTakenError, client.create("m", "ams", CONFIG, 60))
        for call in (client.start, client.stop, client.suspend, client.destroy):
            await self.expect(LeaseHeldError, call(machine.id, None))
            await self.expect(NotFoundError, call("0" * 14, None))
        await self.expect(LeaseHeldError, client.acquire_lease(machine.id, 60, "d"))
        await self.expect(NotFoundError, client.get("0" * 14))
        await self.expect(NotFoundError, client.wait(replace(machine, id="0"), State.STARTED, 1))
        await client.stop(machine.id, lease.nonce)
        await client.wait(machine, State.STOPPED, 10)
        await self.expect(NotReadyError, client.suspend(machine.id, lease.nonce))
        await self.expect(MachinesError, client.wait(machine, State.STARTED, 5))
        await client.release_lease(machine.id, lease.nonce)
        await self.expect(NotFoundError, client.get_lease(machine.id))
        lease = await client.acquire_lease(machine.id, 60, "d")
        await client.destroy(machine.id, lease.nonce)
        await client.wait(machine, State.DESTROYED, 10)
        await self.expect(RejectedError, self.client("other").list())
        await self.expect(NotFoundError, self.client(app="none").list())

    async def test_requests_and_responses_follow_the_schema(self) -> None:
        await self.do_everything()

        exchanges = [peer.exchange() for peer in self.recorder.peers]
        for exchange in exchanges:
            self.assertEqual([], [*exchange.request_violations(), *exchange.response_violations()], exchange)
        used = {exchange.operation[0] for exchange in exchanges}
        published = {
            f"{method} {path.removeprefix('/apps/{app_name}/machines').lstrip('/')}".strip()
            for path, operations in SPEC["paths"].items()
            for method in operations
            if "metadata" not in path
        }
        self.assertEqual({name.replace("{machine_id}", "{}") for name in published}, used)
        self.assertLessEqual(
            {200, 201, 401, 404, 408, 409, 412}, {exchange.response.status_code for exchange in exchanges}
        )

    async def test_rate_limit_response_follows_the_schema(self) -> None:
        limited = EmulatedMachines(reactor, reactor.seconds, rate_limited=True)
        site = BoundedSite(reactor, MachinesServer(limited, "workers", None).app.resource(), 1 << 20)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))
        self.recorder.port = self.listen(site)
        client = self.client()
        for _ in range(4):
            try:
                await client.create("", "ams", CONFIG, 60)
            except RateLimitedError:
                break
            except MachinesError:
                pass  # the emulator chose a name, which is not the requested one
        [*_, last] = [peer.exchange() for peer in self.recorder.peers]

        self.assertEqual(429, last.response.status_code)
        self.assertEqual([], list(last.response_violations()))


class DocumentedResponseTests(ScriptedServerTestCase):
    def calls(self, client: FlyMachines, name: str) -> dict[str, Callable[[], Coroutine[Any, Any, Any]]]:
        return {
            "create": lambda: client.create(name, "ord", CONFIG, 60),
            "list": client.list,
            "get": lambda: client.get(M.id),
            "start": lambda: client.start(M.id, None),
            "stop": lambda: client.stop(M.id, None),
            "suspend": lambda: client.suspend(M.id, None),
            "destroy": lambda: client.destroy(M.id, None),
            "wait": lambda: client.wait(M, State.STARTED, 10),
            "get_lease": lambda: client.get_lease(M.id),
            "acquire_lease": lambda: client.acquire_lease(M.id, 60, ""),
            "release_lease": lambda: client.release_lease(M.id, "5c35f65c9f95"),
        }

    def to_json(self, result: Any) -> Any:
        """Return the result of a call in the form of `fly_responses.json`."""
        if isinstance(result, list):
            return [self.to_json(item) for item in result]
        if isinstance(result, tuple):
            machine, lease = result
            return {**self.to_json(machine), "nonce": lease.nonce, "expires_at": lease.expires_at}
        if isinstance(result, Machine | Lease):
            return {key: value for key, value in vars(result).items() if key != "url"}
        return result

    async def test_documented_responses_are_decoded(self) -> None:
        for case in json.loads((DATA / "fly_responses.json").read_text(encoding="utf-8")):
            client = self.client(response(case["status"], case["body"]))
            call = self.calls(client, "aged-thunder-7371")[case["call"]]
            try:
                result = self.to_json(await call())
            except MachinesError as error:
                self.assertEqual(case.get("error"), type(error).__name__, case["source"])
            else:
                self.assertNotIn("error", case, case["source"])
                self.assertEqual(case["read"], result, case["source"])
