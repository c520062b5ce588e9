"""
Fly's Machines API over HTTP, with treq: https://fly.io/docs/machines/api/machines-resource/.

Answers are read leniently where fields are unknown, null or missing, and strictly where we rely on them.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode

from treq.client import HTTPClient
from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from bfaas.deadline import Deadline, DeadlineExceededError, sleep
from bfaas.exchange import BytesProducer, head, read
from bfaas.machines.api import (
    Call,
    CapacityError,
    Lease,
    LeaseHeldError,
    Machine,
    MachineConfig,
    MachinesAPI,
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

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from twisted.internet.interfaces import IReactorTime
    from twisted.web.iweb import IAgent

NONCE = "fly-machine-lease-nonce"
WORKER_PORT = 8001

_CALL_LIMIT = 15.0  # seconds for a call that needs no waiting, its repetitions included
_CREATE_LIMIT = 60.0  # a create waits for a host
_WAIT_SLICE = 60  # the API refuses to wait longer
_MAX_ANSWER = 16 << 20  # bytes; a list of a thousand machines is about two million
_EXCERPT = 300
_PAUSES = (0.1, 5.0)


class _Answer(NamedTuple):
    status: int
    body: bytes
    request_id: str | None


def authorization(token: str) -> str:
    """
    Make the header's value from a token.

    One that carries its scheme goes out as it is; a macaroon's is `FlyV1`, any other's `Bearer`
    (superfly/fly-go, tokens/tokens.go).
    """
    token = " ".join(token.split())
    if token.startswith(("FlyV1 ", "Bearer ")):
        return token
    return f"FlyV1 {token}" if token.startswith(("fm1", "fm2")) else f"Bearer {token}"


class FlyMachines:
    """
    The machines of one Fly app.

    A call is repeated, with growing jittered pauses and within its limit, when that is safe and it was
    not answered, or answered with 408, 429, 5xx or something that is not JSON.
    """

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, agent: IAgent, random: Random, base_url: str, app: str, token: str
    ) -> None:
        self._clock = clock
        self._agent = agent
        self._random = random
        self._base = base_url.rstrip("/")
        self._machines = f"/v1/apps/{app}/machines"
        self._authorization = authorization(token)

    async def create(
        self, name: str, region: str, config: MachineConfig, lease_ttl: int
    ) -> tuple[Machine, Lease]:
        """Make a machine, leased at once. Repeated where needed: two machines never have the same name."""
        asked = {"name": name, "region": region, "lease_ttl": lease_ttl, "config": config_to_json(config)}
        told = await self._call("POST", "", body=asked, limit=_CREATE_LIMIT)
        machine = _machine(told)
        nonce = told.get("nonce")
        if machine.name != name or not isinstance(nonce, str) or not nonce:
            raise UnavailableError(f"the answer to the creation of {name} tells another name, or no nonce")
        return machine, Lease(nonce, machine.created_at + lease_ttl)

    async def list(self) -> list[Machine]:
        """Tell every machine of the app that is not destroyed; the answer may be stale."""
        told = await self._call("GET", "", kind=list)
        machines = []
        for item in told:
            try:
                machines.append(_machine(item))
            except UnavailableError as error:
                self._log.warn("a machine in the list makes no sense: {error}", error=error)
        return machines

    async def get(self, machine_id: str) -> Machine:
        """Look at one machine."""
        return _machine(await self._call("GET", f"/{machine_id}"))

    async def start(self, machine_id: str, nonce: str | None) -> None:
        """Start it."""
        await self._call("POST", f"/{machine_id}/start", nonce)

    async def stop(self, machine_id: str, nonce: str | None) -> None:
        """Stop it, without grace."""
        # Fly waits for the end of a process at least this long; SIGKILL ends it at once.
        await self._call("POST", f"/{machine_id}/stop", nonce, {"signal": "SIGKILL", "timeout": "1s"})

    async def suspend(self, machine_id: str, nonce: str | None) -> None:
        """Freeze it."""
        await self._call("POST", f"/{machine_id}/suspend", nonce)

    async def wait(self, machine: Machine, state: State, timeout: float) -> None:
        """Wait, in slices that the API allows."""
        deadline = Deadline(self._clock, timeout)
        path = f"/{machine.id}/wait"
        while remaining := deadline.remaining:
            seconds = min(_WAIT_SLICE, max(1, ceil(remaining)))
            query = {"state": state.value, "timeout": str(seconds)}
            if machine.instance_id:
                query["instance_id"] = machine.instance_id
            try:
                told = await deadline.run(
                    self._call("GET", f"{path}?{urlencode(query)}", limit=seconds + _CALL_LIMIT, repeat=False)
                )
            except DeadlineExceededError:
                break
            except NotFoundError:
                if state is State.DESTROYED:
                    return
                raise
            except UnavailableError as error:
                # 408 is how it says that the slice is over; anything else deserves a pause.
                if error.call is None or error.call.status != 408:  # noqa: PLR2004 - request timeout
                    await sleep(self._clock, self._random.uniform(*_PAUSES) / 2)
                continue
            version = told.get("version") or machine.instance_id
            if told.get("ok") is True and version == machine.instance_id:
                return
            await sleep(self._clock, self._random.uniform(*_PAUSES) / 2)
        raise WaitTimeoutError(f"machine {machine.id} is not {state} after {timeout:g} s")

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """Destroy it, in whatever state it is."""
        await self._call("DELETE", f"/{machine_id}?force=true", nonce)

    async def acquire_lease(self, machine_id: str, ttl: int, description: str) -> Lease:
        """Take a free lease. Not repeated: had it been ours, the second call would find it held."""
        asked = {"ttl": ttl, "description": description}
        return _lease(await self._call("POST", f"/{machine_id}/lease", body=asked, repeat=False))

    async def refresh_lease(self, machine_id: str, nonce: str, ttl: int) -> Lease:
        """Extend our lease."""
        lease = _lease(await self._call("POST", f"/{machine_id}/lease", nonce, {"ttl": ttl}))
        if lease.nonce != nonce:
            raise LeaseHeldError(f"the lease on {machine_id} had run out: this is another")
        return lease

    async def get_lease(self, machine_id: str) -> Lease:
        """Tell the lease in force."""
        return _lease(await self._call("GET", f"/{machine_id}/lease"))

    async def release_lease(self, machine_id: str, nonce: str) -> None:
        """Give our lease back."""
        await self._call("DELETE", f"/{machine_id}/lease", nonce)

    async def _call(
        self,
        method: str,
        path: str,
        nonce: str | None = None,
        body: Mapping[str, Any] | None = None,
        *,
        limit: float = _CALL_LIMIT,
        repeat: bool = True,
        kind: type = dict,
    ) -> Any:
        """Make a call, and read its answer as JSON of a kind. Raises `MachinesError`."""
        deadline = Deadline(self._clock, limit)
        pause, longest = _PAUSES
        while True:
            try:
                return await deadline.run(self._call_once(method, path, nonce, body, kind))
            except DeadlineExceededError as error:
                raise UnavailableError(f"{method} {path}: {error}", Call(method, path)) from None
            except UnavailableError as error:
                if not (repeat or isinstance(error, RateLimitedError)) or pause > deadline.remaining:
                    raise
                self._log.debug("again: {error}", error=error)
            await sleep(self._clock, self._random.uniform(0.5, 1.0) * pause)
            pause = min(2 * pause, longest)

    async def _call_once(
        self, method: str, path: str, nonce: str | None, body: Mapping[str, Any] | None, kind: type
    ) -> Any:
        path = self._machines + path
        try:
            answer = await self._send(method, path, nonce, body)
        except CancelledError:
            raise
        except Exception as error:
            raise UnavailableError(f"{method} {path}: {error!r}", Call(method, path)) from error
        call = Call(method, path, answer.status, _excerpt(answer.body), answer.request_id)
        if not 200 <= answer.status < 300:  # noqa: PLR2004 - success
            raise _error(call, answer.body)
        try:
            told = json.loads(answer.body)
        except ValueError:
            told = None
        if not isinstance(told, kind):
            raise UnavailableError(f"{method} {path}: not the JSON it should be: {call.excerpt}", call)
        return told

    async def _send(
        self, method: str, path: str, nonce: str | None, body: Mapping[str, Any] | None
    ) -> _Answer:
        headers = Headers({"Authorization": [self._authorization], "Accept": ["application/json"]})
        if nonce is not None:
            headers.setRawHeaders(NONCE, [nonce])
        if body is not None:
            headers.setRawHeaders("Content-Type", ["application/json"])
        data = None if body is None else json.dumps(body).encode()
        # A client of its own for each call: no cookie outlives it.
        client = HTTPClient(self._agent, data_to_body_producer=BytesProducer)
        response = await head(
            client.request(
                method, self._base + path, headers=headers, data=data, allow_redirects=False, unbuffered=True,
                reactor=self._clock,  # type: ignore[arg-type]  # only asked for a timeout, which we do not give
            )
        )  # fmt: skip
        names = response.headers.getRawHeaders("fly-request-id", [None])
        return _Answer(response.code, await read(response, _MAX_ANSWER), names[0])


def config_to_json(config: MachineConfig) -> dict[str, Any]:
    """
    Write a machine's config.

    It is never started, stopped or restarted but by us: not by traffic, not at its end. The service is
    what the app's proxy reaches it by.
    """
    return {
        "image": config.image,
        "env": dict(config.env),
        "metadata": dict(config.metadata),
        "guest": {"cpu_kind": "shared", "cpus": config.cpus, "memory_mb": config.memory_mb},
        "restart": {"policy": "no"},
        "auto_destroy": False,
        "stop_config": {"signal": "SIGKILL", "timeout": "1s"},
        "services": [
            {
                "protocol": "tcp",
                "internal_port": WORKER_PORT,
                "autostart": False,
                "autostop": "off",
                "ports": [{"port": 80, "handlers": ["http"]}],
            }
        ],
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _machine(told: object) -> Machine:
    fields = _object(told)
    config = _object(fields.get("config")) or _object(fields.get("incomplete_config"))
    if not (_text(fields.get("id")) and _text(fields.get("name")) and _text(fields.get("state"))):
        raise UnavailableError(f"a machine without id, name or state: {_excerpt(json.dumps(told).encode())}")
    return Machine(
        id=fields["id"],
        name=fields["name"],
        state=State(fields["state"]),
        region=_text(fields.get("region")),
        image=_text(config.get("image")),
        metadata={key: _text(value) for key, value in _object(config.get("metadata")).items()},
        instance_id=_text(fields.get("instance_id")) or _text(fields.get("version")),
        created_at=_moment(fields.get("created_at")),
    )


def _moment(told: object) -> float:
    """Read an RFC 3339 time as seconds since the epoch; 0 where it is none."""
    try:
        return datetime.fromisoformat(_text(told)).timestamp()
    except ValueError:
        return 0.0


def _lease(told: dict[str, Any]) -> Lease:
    """Read a lease, which is wrapped in `data` (the published schema shows it without)."""
    fields = _object(told.get("data"))
    nonce, expires_at = fields.get("nonce"), fields.get("expires_at")
    if told.get("status") != "success" or not _text(nonce) or not isinstance(expires_at, int | float):
        raise UnavailableError("an answer that is no lease")
    return Lease(_text(nonce), expires_at, _text(fields.get("owner")), _text(fields.get("description")))


def _excerpt(body: bytes) -> str:
    return " ".join(body[: 4 * _EXCERPT].decode("utf-8", "replace").split())[:_EXCERPT]


_NAME_TAKEN = re.compile(r"unique machine name violation(?:, machine ID (\w+))?")
_NO_ROOM = re.compile(r"insufficient|could not (?:reserve|find)|no capacity")


def _error(call: Call, body: bytes) -> MachinesError:
    """Choose the error by status first; the text only refines it (superfly/fly-go, flaps/flaps_error.go)."""
    try:
        told = _object(json.loads(body))
    except ValueError:
        told = {}
    text = _text(told.get("message")) or _text(told.get("error")) or call.excerpt
    message = f"{call.method} {call.path}: {call.status} {text} (fly-request-id {call.request_id})"
    status = call.status or 0
    kind: type[MachinesError]
    if status == 409 and (taken := _NAME_TAKEN.search(text)):  # noqa: PLR2004 - conflict
        return NameTakenError(message, taken[1], call)
    if status in (409, 422) and _NO_ROOM.search(text):
        kind = CapacityError
    elif status == 409 and "lease" in text:  # noqa: PLR2004 - conflict
        kind = LeaseHeldError
    elif status in (409, 412):
        kind = NotReadyError
    elif status == 404:  # noqa: PLR2004 - not found
        kind = NotFoundError
    elif status == 429:  # noqa: PLR2004 - too many requests
        kind = RateLimitedError
    elif status == 408 or status >= 500:  # noqa: PLR2004 - the server's own errors
        kind = UnavailableError
    else:
        kind = RefusedError
    return kind(message, call)


_check: type[MachinesAPI] = FlyMachines
