"""
Fly's Machines API over HTTP, with treq: https://fly.io/docs/machines/api/machines-resource/.

Answers are read leniently where fields are unknown, null or missing, and strictly where we rely on them.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlencode

from treq.client import HTTPClient
from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from bfaas.backoff import BackoffSchedule
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.client import BytesProducer, Towards, read_body, wait_for_response
from bfaas.http.endpoints import CertificateError, describe, root_cause
from bfaas.machines.api import (
    Call,
    CapacityError,
    EndedError,
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
    has_ended,
)
from bfaas.machines.codec import (
    DecodeError,
    decode_created_machine,
    decode_lease,
    decode_list,
    decode_machine,
    decode_object,
    encode_config,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random

    from twisted.internet.interfaces import IReactorTime
    from twisted.web.iweb import IAgent

T = TypeVar("T")

NONCE_HEADER = "fly-machine-lease-nonce"

_CALL_LIMIT = 15.0  # seconds for a call that needs no waiting, its repetitions included
_CREATE_LIMIT = 60.0  # a create waits for a host
_WAIT_SLICE = 60  # the API refuses to wait longer
_START_SLICE = 10  # a start whose answer was lost may have made another version, which this wait does not see
_NOT_REACHED = (408, 409, 412)
_GONE = (State.DESTROYING, State.DESTROYED)
_MAX_ANSWER = 16 << 20  # bytes; a list of ten thousand machines has about five million
_EXCERPT = 300
_RETRY_BACKOFF = BackoffSchedule(initial=0.1, maximum=5.0)
_MAX_WAIT_PAUSE = 2.5  # seconds between two waits, spread evenly: most often a slice is over, none has failed


_SCHEMES = {"flyv1": "FlyV1", "bearer": "Bearer"}
_MACAROONS = ("fm1r", "fm1a", "fm2")


class _Response(NamedTuple):
    status: int
    body: bytes
    request_id: str | None


def authorization(token: str) -> str:
    """
    Return the value of the `Authorization` header for a token, or for several separated by commas.

    As in superfly/fly-go, tokens/tokens.go, macaroons are sent under `FlyV1`, without the other tokens. Other
    tokens keep their scheme; the default is `Bearer`.
    """
    scheme = "Bearer"
    words = token.split()
    while words and words[0].lower() in _SCHEMES:
        scheme = _SCHEMES[words.pop(0).lower()]
    tokens = [each for each in "".join(words).split(",") if each]
    if macaroons := [each for each in tokens if each.partition("_")[0] in _MACAROONS]:
        return f"FlyV1 {','.join(macaroons)}"
    return f"{scheme} {','.join(tokens)}"


class FlyMachines(MachinesAPI):
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
        self._agent = Towards(agent, base_url)
        self._random = random
        self._machines = f"/v1/apps/{app}/machines"
        self._authorization = authorization(token)

    async def create(
        self, name: str, region: str, config: MachineConfig, lease_ttl: int
    ) -> tuple[Machine, Lease]:
        """Make a machine, leased at once. Not repeated: whoever asked must know of a lost answer."""
        asked = {"name": name, "region": region, "lease_ttl": lease_ttl, "config": encode_config(config)}
        machine, nonce = await self._call(
            "POST", "", decode_created_machine, body=asked, limit=_CREATE_LIMIT, retry_on=()
        )
        if machine.name != name:
            raise UnavailableError(f"asked to create {name}, the API tells of {machine.name}")
        return machine, Lease(nonce, machine.created_at + lease_ttl)

    async def list(self) -> list[Machine]:
        """
        Tell every machine of the app that is not destroyed; the answer may be stale.

        In summary, which leaves configurations out: ten thousand machines are five million bytes, not twenty.
        """
        machines = []
        for item in await self._call("GET", "?summary=true", decode_list):
            try:
                machines.append(decode_machine(item))
            except DecodeError as error:
                self._log.warn("a machine in the list makes no sense: {error}", error=error)
        return machines

    async def get(self, machine_id: str) -> Machine:
        """Look at one machine."""
        return await self._call("GET", f"/{machine_id}", decode_machine)

    async def start(self, machine_id: str, nonce: str | None) -> bool:
        """Start it. Return True if it migrated, or had started before: `get` tells its version then."""
        told = await self._call("POST", f"/{machine_id}/start", decode_object, nonce)
        had_started = told.get("previous_state") in (State.STARTING, State.STARTED)
        return told.get("migrated") is True or bool(told.get("new_host")) or had_started

    async def stop(self, machine_id: str, nonce: str | None) -> None:
        """Stop it, without grace."""
        # Fly waits for the end of a process at least this long; SIGKILL ends it at once.
        asked = {"signal": "SIGKILL", "timeout": "1s"}
        await self._call("POST", f"/{machine_id}/stop", decode_object, nonce, asked)

    async def suspend(self, machine_id: str, nonce: str | None) -> None:
        """Freeze it."""
        await self._call("POST", f"/{machine_id}/suspend", decode_object, nonce)

    async def wait(self, machine: Machine, state: State, timeout: float) -> None:
        """
        Wait, in slices that the API allows.

        The API answers 408 when a slice is over, when it is slow itself, and at once when the machine has
        ended; and nothing that counts when the machine has another version by now. `get` tells them apart.
        """
        deadline = Deadline(self._clock, timeout)
        path, version = f"/{machine.id}/wait", machine.instance_id
        longest = _START_SLICE if state is State.STARTED else _WAIT_SLICE
        while remaining := deadline.remaining:
            seconds = min(longest, max(1, ceil(remaining)))
            query = {"state": state.value, "timeout": str(seconds)}
            if version:
                query["instance_id"] = version
            try:
                told = await deadline.run(
                    self._call(
                        "GET",
                        f"{path}?{urlencode(query)}",
                        decode_object,
                        limit=seconds + _CALL_LIMIT,
                        retry_on=(RateLimitedError,),
                    )
                )
            except DeadlineExceededError:
                break
            except NotFoundError:
                if state is State.DESTROYED:
                    return
                raise
            except (UnavailableError, NotReadyError) as error:
                self._log.debug("again: {error}", error=error)
                is_doubtful = error.call is not None and error.call.status in _NOT_REACHED
            else:
                if told.get("ok") is True and (told.get("version") or version) == version:
                    return
                is_doubtful = True
            if is_doubtful and deadline.remaining:
                version = await self._inspect(machine.id, state, deadline) or version
            await deferLater(self._clock, self._random.uniform(0.05, _MAX_WAIT_PAUSE))
        raise WaitTimeoutError(f"machine {machine.id} is not {state} after {timeout:g} s")

    async def _inspect(self, machine_id: str, wanted: State, deadline: Deadline) -> str:
        """Return the version of a machine that is to reach a state; empty where it is not known."""
        try:
            machine = await deadline.run(self.get(machine_id))
        except (UnavailableError, DeadlineExceededError) as error:
            self._log.debug("cannot inspect {id}: {error}", id=machine_id, error=error)
            return ""
        except NotFoundError:
            if wanted is State.DESTROYED:
                return ""  # the next wait finds it so
            raise
        if has_ended(machine.state, wanted):
            raise EndedError(f"machine {machine_id} is {machine.state} and will not be {wanted}")
        if machine.state in _GONE and wanted is not State.DESTROYED:
            raise NotFoundError(f"machine {machine_id} is {machine.state}")
        return machine.instance_id

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """Destroy it, in whatever state it is."""
        await self._call("DELETE", f"/{machine_id}?force=true", decode_object, nonce)

    async def acquire_lease(self, machine_id: str, ttl: int, description: str) -> Lease:
        """Take a free lease. Not repeated: had it been ours, the second call would find it held."""
        asked = {"ttl": ttl, "description": description}
        path = f"/{machine_id}/lease"
        return await self._call("POST", path, decode_lease, body=asked, retry_on=(RateLimitedError,))

    async def refresh_lease(self, machine_id: str, nonce: str, ttl: int) -> Lease:
        """Extend our lease."""
        lease = await self._call("POST", f"/{machine_id}/lease", decode_lease, nonce, {"ttl": ttl})
        if lease.nonce != nonce:
            raise LeaseHeldError(f"the lease on {machine_id} had run out: this is another")
        return lease

    async def get_lease(self, machine_id: str) -> Lease:
        """Tell the lease in force."""
        return await self._call("GET", f"/{machine_id}/lease", decode_lease)

    async def release_lease(self, machine_id: str, nonce: str) -> None:
        """Give our lease back."""
        await self._call("DELETE", f"/{machine_id}/lease", decode_object, nonce)

    async def _call(
        self,
        method: str,
        path: str,
        read: Callable[[Any], T],
        nonce: str | None = None,
        body: Mapping[str, Any] | None = None,
        *,
        limit: float = _CALL_LIMIT,
        retry_on: tuple[type[UnavailableError], ...] = (UnavailableError,),
    ) -> T:
        """Make a call, again after errors that are worth it, and read its answer. Raises `MachinesError`."""
        path = self._machines + path
        deadline = Deadline(self._clock, limit)
        last: UnavailableError | None = None
        failures = 0
        while True:
            try:
                return await deadline.run(self._call_once(method, path, read, nonce, body))
            except DeadlineExceededError as error:
                before = f"; before that: {last}" if last else ""
                raise UnavailableError(f"{method} {path}: {error}{before}", Call(method, path)) from last
            except UnavailableError as error:
                last = error
                if not isinstance(error, retry_on) or _RETRY_BACKOFF.delay(failures) > deadline.remaining:
                    raise
                if isinstance(root_cause(error), CertificateError):
                    raise  # it is the same a moment later
                self._log.debug("again: {error}", error=error)
            await deferLater(self._clock, _RETRY_BACKOFF.delay(failures, self._random))
            failures += 1

    async def _call_once(
        self,
        method: str,
        path: str,
        read: Callable[[Any], T],
        nonce: str | None,
        body: Mapping[str, Any] | None,
    ) -> T:
        try:
            answer = await self._send(method, path, nonce, body)
        except CancelledError:
            raise
        except Exception as error:
            raise UnavailableError(f"{method} {path}: {describe(error)}", Call(method, path)) from error
        call = Call(method, path, answer.status, request_id=answer.request_id)
        if not 200 <= answer.status < 300:  # noqa: PLR2004 - success
            raise _error(replace(call, excerpt=_excerpt(answer.body)), answer.body)
        try:
            return read(json.loads(answer.body))
        except (ValueError, DecodeError) as error:
            # Without what it says: an answer may hold a nonce.
            raise UnavailableError(f"{method} {path}: {answer.status} {error}", call) from None

    async def _send(
        self, method: str, path: str, nonce: str | None, body: Mapping[str, Any] | None
    ) -> _Response:
        headers = Headers({"Authorization": [self._authorization], "Accept": ["application/json"]})
        if nonce is not None:
            headers.setRawHeaders(NONCE_HEADER, [nonce])
        if body is not None:
            headers.setRawHeaders("Content-Type", ["application/json"])
        data = None if body is None else json.dumps(body).encode()
        # A client of its own for each call: no cookie outlives it.
        client = HTTPClient(self._agent, data_to_body_producer=BytesProducer)
        response = await wait_for_response(
            client.request(
                method, Towards.ANYWHERE + path, headers=headers, data=data,
                allow_redirects=False, unbuffered=True,
                reactor=self._clock,  # type: ignore[arg-type]  # only asked for a timeout, which we do not give
            )
        )  # fmt: skip
        names = response.headers.getRawHeaders("fly-request-id", [None])
        return _Response(response.code, await read_body(response, _MAX_ANSWER), names[0])


def _excerpt(body: bytes) -> str:
    return " ".join(body[: 4 * _EXCERPT].decode("utf-8", "replace").split())[:_EXCERPT]


_NAME_TAKEN = re.compile(r"unique machine name violation(?:, machine ID (\w+))?")
_LEASE = re.compile(r"\blease\b", re.IGNORECASE)
_CAPACITY = ("insufficient_capacity", "volume_placement_capacity")
_NO_ROOM = re.compile(r"insufficient|could not (?:reserve|find)|no capacity")


def _error(call: Call, body: bytes) -> MachinesError:
    """Choose the error by status first; the text only refines it (superfly/fly-go, flaps/flaps_error.go)."""
    try:
        told = decode_object(json.loads(body))
    except (ValueError, DecodeError):
        told = {}
    said = told.get("message") or told.get("error")
    text = said if isinstance(said, str) else call.excerpt
    message = f"{call.method} {call.path}: {call.status} {text} (fly-request-id {call.request_id})"
    status = call.status or 0
    kind: type[MachinesError]
    if status == 409 and (taken := _NAME_TAKEN.search(text)):  # noqa: PLR2004 - conflict
        return NameTakenError(message, taken[1], call)
    has_no_room = told.get("status") in _CAPACITY or (status in (409, 422) and _NO_ROOM.search(text))
    if has_no_room:
        kind = CapacityError
    elif status == 409 and _LEASE.search(text):  # noqa: PLR2004 - conflict
        kind = LeaseHeldError
    elif status in (409, 412):
        kind = NotReadyError
    elif status == 404:  # noqa: PLR2004 - not found
        kind = NotFoundError
    elif status == 429:  # noqa: PLR2004 - too many requests
        kind = RateLimitedError
    elif status < 400 or status == 408 or status >= 500:  # noqa: PLR2004 - not the API's, or its own error
        kind = UnavailableError
    else:
        kind = RefusedError
    return kind(message, call)
