"""
HTTP routes of the emulated Machines API: its URLs, status codes and error texts.

With it, a coordinator on a laptop runs the same code as on Fly. The texts are those that clients of the real
API have recorded.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from klein import Klein
from twisted.internet.defer import Deferred, FailureGroup, race
from werkzeug.exceptions import HTTPException

from bfaas.http.server import read_body
from bfaas.machines.api import (
    CapacityError,
    EndedError,
    LeaseHeldError,
    Machine,
    MachineConfig,
    MachinesAPI,
    MachinesError,
    NameTakenError,
    NotFoundError,
    NotReadyError,
    RateLimitedError,
    State,
    WaitTimeoutError,
)
from bfaas.machines.codec import DecodeError, decode_config, encode_lease, encode_machine

if TYPE_CHECKING:
    from twisted.python.failure import Failure
    from twisted.web.server import Request

# Not imported from bfaas.machines.fly: if a value is wrong in that client, tests against the emulator fail.
_NONCE_HEADER = "fly-machine-lease-nonce"
_SCHEMES = ("bearer", "flyv1")  # case-insensitive: RFC 9110, 11.1
_ROOT = "/v1/apps/<app>/machines"

_WAITABLE = ("started", "stopped", "suspended", "destroyed", "failed", "settled")
_SETTLED = (State.STARTED, State.STOPPED, State.SUSPENDED, State.DESTROYED, State.FAILED)
_MAX_WAIT = 60  # seconds
_DESTROYABLE = (State.STOPPED, State.SUSPENDED, State.FAILED, State.CREATED)


class ServedMachines(MachinesAPI, Protocol):
    """Machines that the emulator can serve: they also have readable configs and writable metadata."""

    def config_of(self, machine_id: str) -> MachineConfig:
        """Return the configuration of a machine. Raises `NotFoundError`."""
        ...

    def set_metadata(self, machine_id: str, key: str, value: str | None) -> None:
        """Set one key of a machine's metadata; None removes it. Raises `NotFoundError`."""
        ...


class BadRequestError(Exception):
    """The request is malformed; the response is 400."""


class MachinesServer:
    """The API of one app. Requests need `token`; if that is None, any token is accepted."""

    app = Klein()

    def __init__(self, machines: ServedMachines, app_name: str, token: str | None) -> None:
        self._machines = machines
        self._app_name = app_name
        self._tokens = _tokens(token) if token else None

    @app.handle_errors(MachinesError)
    def machines_error(self, request: Any, failure: Failure) -> bytes:
        """Send the status and the text of an error, as the API does."""
        error = failure.value
        assert isinstance(error, MachinesError)  # noqa: S101 - Klein dispatches on the type
        status, text = next((status, text) for kind, status, text in _ERRORS if isinstance(error, kind))
        message = text.format(error=error)
        if request.path.endswith(b"/lease") and isinstance(error, LeaseHeldError):
            return self._reply(request, {"status": "error", "message": message, "code": "invalid"}, status)
        return self._reply(request, {"error": message}, status)

    @app.handle_errors(BadRequestError, DecodeError)
    def bad_request(self, request: Any, failure: Failure) -> bytes:
        """Respond with 400."""
        return self._reply(request, {"error": f"invalid_argument: {failure.value}"}, 400)

    @app.handle_errors(PermissionError)
    def unauthorized(self, request: Any, failure: Failure) -> bytes:  # noqa: ARG002 - Klein's signature
        """Respond with 401."""
        return self._reply(request, {"error": "Authenticate: token validation error"}, 401)

    @app.handle_errors(HTTPException)
    def no_route(self, request: Any, failure: Failure) -> bytes:  # noqa: ARG002 - Klein's signature
        """Respond with 404 to an unknown path, in plain text as the API does."""
        request.setResponseCode(404)
        request.setHeader("Content-Type", "text/plain; charset=utf-8")
        return b"404 page not found"

    def _authorize(self, request: Request, app: str) -> None:
        """Check the token and the app's name. Raises `PermissionError` or `NotFoundError`."""
        scheme, _, rest = (request.getHeader("Authorization") or "").strip().partition(" ")
        given = _tokens(rest) if scheme.lower() in _SCHEMES else frozenset()
        if not given or (self._tokens is not None and not given <= self._tokens):
            raise PermissionError
        if app != self._app_name:
            raise NotFoundError("app not found")

    def _reply(self, request: Request, document: object, status: int = 200) -> bytes:
        request.setResponseCode(status)
        request.setHeader("Content-Type", "application/json; charset=utf-8")
        request.setHeader("fly-request-id", f"{secrets.token_hex(13).upper()}-local")
        return b"" if status == 204 else json.dumps(document).encode()  # noqa: PLR2004 - no content

    @app.route(_ROOT, methods=["GET"])
    async def list(self, request: Request, app: str) -> bytes:
        """Return the machines, filtered by region, state and metadata."""
        self._authorize(request, app)
        states = set(_query(request, "state").split(",")) - {""}
        region = _query(request, "region")
        metadata_filter = {
            _text(name).removeprefix("metadata."): _text(values[-1])
            for name, values in request.args.items()
            if name.startswith(b"metadata.")
        }
        summary = _query(request, "summary") == "true"
        documents = [
            encode_machine(machine, None if summary else self._machines.config_of(machine.id))
            for machine in await self._machines.list()
            if (not states or machine.state in states)
            and (not region or machine.region == region)
            and all(machine.metadata.get(key) == value for key, value in metadata_filter.items())
        ]
        return self._reply(request, documents)

    @app.route(_ROOT, methods=["POST"])
    async def create(self, request: Request, app: str) -> bytes:
        """Create a machine."""
        self._authorize(request, app)
        payload = _json(request)
        config = decode_config(payload.get("config"))
        name = payload.get("name") or f"local-machine-{secrets.randbelow(10_000):04}"
        ttl = payload.get("lease_ttl") or 0
        if not isinstance(name, str) or not isinstance(ttl, int) or ttl < 0:
            raise BadRequestError("json: cannot unmarshal name or lease_ttl")
        region = payload.get("region") or "local"
        machine, lease = await self._machines.create(name, str(region), config, ttl)
        document = self._encode(machine)
        if ttl:
            document["nonce"] = lease.nonce
        return self._reply(request, document)

    @app.route(f"{_ROOT}/<machine_id>", methods=["GET"])
    async def get(self, request: Request, app: str, machine_id: str) -> bytes:
        """Return one machine."""
        self._authorize(request, app)
        return self._reply(request, self._encode(await self._machines.get(machine_id)))

    @app.route(f"{_ROOT}/<machine_id>", methods=["DELETE"])
    async def destroy(self, request: Request, app: str, machine_id: str) -> bytes:
        """Destroy a machine; a running machine only with `force`."""
        self._authorize(request, app)
        forced = "true" in (_query(request, "force"), _query(request, "kill"))
        if not forced and (await self._machines.get(machine_id)).state not in _DESTROYABLE:
            raise NotReadyError(
                "unable to destroy machine, not currently stopped, suspended, failed or created"
            )
        await self._machines.destroy(machine_id, _nonce(request))
        return self._reply(request, {"ok": True})

    @app.route(f"{_ROOT}/<machine_id>/start", methods=["POST"])
    async def start(self, request: Request, app: str, machine_id: str) -> bytes:
        """Start a machine."""
        self._authorize(request, app)
        before = await self._machines.get(machine_id)
        is_stale = await self._machines.start(machine_id, _nonce(request))
        migrated = is_stale and before.state is not State.STARTED
        new_host = "local" if migrated else ""
        return self._reply(
            request, {"previous_state": before.state, "migrated": migrated, "new_host": new_host}
        )

    @app.route(f"{_ROOT}/<machine_id>/stop", methods=["POST"])
    async def stop(self, request: Request, app: str, machine_id: str) -> bytes:
        """Stop a machine, without a grace period: signal and timeout are validated and ignored."""
        self._authorize(request, app)
        _check_stop(_json(request))
        await self._machines.stop(machine_id, _nonce(request))
        return self._reply(request, {"ok": True})

    @app.route(f"{_ROOT}/<machine_id>/suspend", methods=["POST"])
    async def suspend(self, request: Request, app: str, machine_id: str) -> bytes:
        """Suspend a machine."""
        self._authorize(request, app)
        await self._machines.suspend(machine_id, _nonce(request))
        return self._reply(request, {"ok": True})

    @app.route(f"{_ROOT}/<machine_id>/wait", methods=["GET"])
    async def wait(self, request: Request, app: str, machine_id: str) -> bytes:
        """Wait 1 to 60 seconds until a machine, or a version of it, is in one of the given states."""
        self._authorize(request, app)
        words = ",".join(map(_text, request.args.get(b"state", [b"started"]))).split(",")
        if not set(words) <= set(_WAITABLE):
            raise BadRequestError("invalid WaitMachineRequest.State")
        timeout = _query(request, "timeout") or str(_MAX_WAIT)
        if not re.fullmatch("[0-9]{1,3}", timeout) or not 1 <= int(timeout) <= _MAX_WAIT:
            raise BadRequestError("invalid WaitMachineRequest.Timeout: value must be inside range [1s, 1m0s]")
        machine = await self._machines.get(machine_id)
        version = _query(request, "version") or _query(request, "instance_id") or machine.instance_id
        machine = replace(machine, instance_id=version)
        states = [state for word in words for state in (_SETTLED if word == "settled" else [State(word)])]
        waits = [self._machines.wait(machine, state, float(timeout)) for state in states]
        try:
            await race([Deferred.fromCoroutine(wait) for wait in waits])
        except FailureGroup as group:
            if not any(failure.check(WaitTimeoutError, EndedError) for failure in group.failures):
                group.failures[0].raiseException()
            now = (await self._machines.get(machine_id)).state
            raise WaitTimeoutError(f"{','.join(words)}, currently {now}") from None
        now = (await self._machines.get(machine_id)).state
        return self._reply(request, {"ok": True, "state": now, "version": machine.instance_id})

    @app.route(f"{_ROOT}/<machine_id>/lease", methods=["GET"])
    async def get_lease(self, request: Request, app: str, machine_id: str) -> bytes:
        """Return the lease, with its nonce."""
        self._authorize(request, app)
        return self._reply(request, encode_lease(await self._machines.get_lease(machine_id)))

    @app.route(f"{_ROOT}/<machine_id>/lease", methods=["POST"])
    async def acquire_lease(self, request: Request, app: str, machine_id: str) -> bytes:
        """Acquire a lease, or extend the one whose nonce the request has."""
        self._authorize(request, app)
        payload = _json(request)
        ttl = payload.get("ttl") or _query(request, "ttl")
        if isinstance(ttl, str) and re.fullmatch("[0-9]{1,9}", ttl):
            ttl = int(ttl)
        if not isinstance(ttl, int) or ttl <= 0:
            raise BadRequestError("a lease needs a ttl in seconds")
        nonce = _nonce(request)
        if nonce is not None:
            lease = await self._machines.refresh_lease(machine_id, nonce, ttl)
            return self._reply(request, encode_lease(lease))
        description = str(payload.get("description") or "")
        lease = await self._machines.acquire_lease(machine_id, ttl, description)
        return self._reply(request, encode_lease(lease), 201)

    @app.route(f"{_ROOT}/<machine_id>/lease", methods=["DELETE"])
    async def release_lease(self, request: Request, app: str, machine_id: str) -> bytes:
        """Release a lease."""
        self._authorize(request, app)
        nonce = _nonce(request)
        if nonce is None:
            raise BadRequestError("missing lease nonce")
        await self._machines.release_lease(machine_id, nonce)
        return self._reply(request, {"status": "success", "data": {"ok": True}})

    # Metadata can be changed without the lease, because machines change their own.

    @app.route(f"{_ROOT}/<machine_id>/metadata", methods=["GET"])
    async def get_metadata(self, request: Request, app: str, machine_id: str) -> bytes:
        """Return all keys."""
        self._authorize(request, app)
        return self._reply(request, dict((await self._machines.get(machine_id)).metadata))

    @app.route(f"{_ROOT}/<machine_id>/metadata", methods=["PATCH", "PUT"])
    async def patch_metadata(self, request: Request, app: str, machine_id: str) -> bytes:
        """Merge keys; null or an empty value removes one."""
        self._authorize(request, app)
        changes = _json(request).get("metadata")
        if not isinstance(changes, dict):
            raise BadRequestError("metadata is required")
        for key, value in changes.items():
            self._machines.set_metadata(machine_id, key, str(value) if value else None)
        return self._reply(request, None, 204)

    @app.route(f"{_ROOT}/<machine_id>/metadata/<key>", methods=["GET"])
    async def get_metadata_key(self, request: Request, app: str, machine_id: str, key: str) -> bytes:
        """Return one key."""
        self._authorize(request, app)
        metadata = (await self._machines.get(machine_id)).metadata
        if key not in metadata:
            raise NotFoundError("metadata key not found")
        return self._reply(request, {"value": metadata[key]})

    @app.route(f"{_ROOT}/<machine_id>/metadata/<key>", methods=["POST"])
    async def set_metadata_key(self, request: Request, app: str, machine_id: str, key: str) -> bytes:
        """Set one key."""
        self._authorize(request, app)
        value = _json(request).get("value")
        if not isinstance(value, str):
            raise BadRequestError("value is required")
        self._machines.set_metadata(machine_id, key, value)
        return self._reply(request, None, 204)

    @app.route(f"{_ROOT}/<machine_id>/metadata/<key>", methods=["DELETE"])
    async def delete_metadata_key(self, request: Request, app: str, machine_id: str, key: str) -> bytes:
        """Remove one key."""
        self._authorize(request, app)
        self._machines.set_metadata(machine_id, key, None)
        return self._reply(request, None, 204)

    def _encode(self, machine: Machine) -> dict[str, Any]:
        return encode_machine(machine, self._machines.config_of(machine.id))


_ERRORS: list[tuple[type[MachinesError], int, str]] = [
    (NameTakenError, 409, "already_exists: {error}"),
    (LeaseHeldError, 409, "{error}"),
    (CapacityError, 409, "aborted: could not reserve resource for machine: {error}"),
    (NotReadyError, 412, "failed_precondition: {error}"),
    (NotFoundError, 404, "{error}"),
    (WaitTimeoutError, 408, "deadline_exceeded: machine failed to reach desired state, {error}"),
    (EndedError, 408, "deadline_exceeded: machine failed to reach desired state, {error}"),
    (RateLimitedError, 429, "rate limit exceeded"),
    (MachinesError, 503, "{error}"),
]


def _query(request: Request, name: str) -> str:
    values: list[bytes] = request.args.get(name.encode(), [b""])
    return _text(values[-1])


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _nonce(request: Request) -> str | None:
    return request.getHeader(_NONCE_HEADER)


def _tokens(text: str) -> frozenset[str]:
    """Return the tokens of a comma-separated list that may begin with their scheme."""
    words = text.split()
    while words and words[0].lower() in _SCHEMES:
        words.pop(0)
    return frozenset("".join(words).split(",")) - {""}


def _json(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body; an empty object without a body."""
    try:
        payload = json.loads(read_body(request) or b"{}")
    except (ValueError, RecursionError) as error:
        raise BadRequestError(str(error)) from None
    if not isinstance(payload, dict):
        raise BadRequestError("json: cannot unmarshal into an object")
    return payload


def _check_stop(payload: dict[str, Any]) -> None:
    signals = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGTERM")
    if payload.get("signal", "SIGTERM") not in signals:
        raise BadRequestError("invalid signal")
    if not isinstance(payload.get("timeout", ""), str):
        raise BadRequestError("json: cannot unmarshal number into Go struct field timeout of type string")
