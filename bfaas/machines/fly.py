"""Client of Fly's Machines API, over HTTP with treq: https://fly.io/docs/machines/api/machines-resource/."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlencode

from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from bfaas.backoff import BackoffSchedule
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.client import read_body, send_request
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
    RejectedError,
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

_CALL_TIMEOUT = 15.0  # seconds for a call that does not wait for a machine, including its retries
_CREATE_TIMEOUT = 60.0  # seconds; a create call waits for a host
_MAX_WAIT = 60  # seconds; the API rejects longer waits
# Seconds. A start whose response was lost may have changed the machine's version. A wait for the old version
# does not return when the new one starts, so the machine is inspected more often.
_MAX_START_WAIT = 10
_NOT_REACHED = (408, 409, 412)  # statuses of a wait that did not see the state
_GONE = (State.DESTROYING, State.DESTROYED)
_MAX_RESPONSE = 16 << 20  # bytes; a list of ten thousand machines has about five million
_MAX_EXCERPT = 300  # characters
_RETRY_BACKOFF = BackoffSchedule(initial=0.1, maximum=5.0)
# Minimum and maximum seconds between two calls of one wait, chosen at random. They do not grow, because the
# first of the calls usually has not failed but timed out.
_WAIT_PAUSES = (0.05, 2.5)

_SCHEMES = {"flyv1": "FlyV1", "bearer": "Bearer"}
_MACAROON_PREFIXES = ("fm1r", "fm1a", "fm2")


class _Response(NamedTuple):
    status: int
    body: bytes
    request_id: str | None


def authorization(token: str) -> str:
    """
    Return the value of the `Authorization` header for a token, or for several tokens separated by commas.

    As in superfly/fly-go, tokens/tokens.go, macaroons are sent in the scheme `FlyV1`, without the other
    tokens. Other tokens keep their scheme; the default is `Bearer`.
    """
    scheme = "Bearer"
    words = token.split()
    while words and words[0].lower() in _SCHEMES:
        scheme = _SCHEMES[words.pop(0).lower()]
    tokens = [each for each in "".join(words).split(",") if each]
    if macaroons := [each for each in tokens if each.partition("_")[0] in _MACAROON_PREFIXES]:
        return f"FlyV1 {','.join(macaroons)}"
    return f"{scheme} {','.join(tokens)}"


class FlyMachines(MachinesAPI):
    """
    Machines of one Fly app.

    Calls that are safe to repeat are retried, with jittered exponential backoff and within their timeout, if
    there is no response, its status is 408, 429 or 5xx, or its body is not what the API sends.
    """

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, agent: IAgent, random: Random, base_url: str, app: str, token: str
    ) -> None:
        self._clock = clock
        self._agent = agent
        self._base_url = base_url
        self._random = random
        self._machines = f"/v1/apps/{app}/machines"
        self._authorization = authorization(token)

    async def create(
        self, name: str, region: str, config: MachineConfig, lease_ttl: int
    ) -> tuple[Machine, Lease]:
        """
        Create a machine with a lease.

        Never retried: after a lost response the machine may exist, which the caller has to check.
        """
        payload = {"name": name, "region": region, "lease_ttl": lease_ttl, "config": encode_config(config)}
        machine, nonce = await self._call(
            "POST", "", decode_created_machine, body=payload, timeout=_CREATE_TIMEOUT, retry_on=()
        )
        if machine.name != name:
            raise UnavailableError(f"the API created {machine.name} instead of {name}")
        return machine, Lease(nonce, machine.created_at + lease_ttl)

    async def list(self) -> list[Machine]:
        """
        Return every machine of the app that is not destroyed.

        Summaries have no configurations: ten thousand machines have five million bytes in place of twenty.
        """
        machines = []
        for item in await self._call("GET", "?summary=true", decode_list):
            try:
                machines.append(decode_machine(item))
            except DecodeError as error:
                self._log.warn("ignoring a malformed machine in the list: {error}", error=error)
        return machines

    async def get(self, machine_id: str) -> Machine:
        """Return one machine."""
        return await self._call("GET", f"/{machine_id}", decode_machine)

    async def start(self, machine_id: str, nonce: str | None) -> bool:
        """Start or resume a machine. Return True if it migrated or had started before."""
        fields = await self._call("POST", f"/{machine_id}/start", decode_object, nonce)
        had_started = fields.get("previous_state") in (State.STARTING, State.STARTED)
        return fields.get("migrated") is True or bool(fields.get("new_host")) or had_started

    async def stop(self, machine_id: str, nonce: str | None) -> None:
        """Begin to stop a machine with SIGKILL."""
        # The shortest timeout that the API accepts. SIGKILL ends the process at once anyway.
        payload = {"signal": "SIGKILL", "timeout": "1s"}
        await self._call("POST", f"/{machine_id}/stop", decode_object, nonce, payload)

    async def suspend(self, machine_id: str, nonce: str | None) -> None:
        """Begin to suspend a machine."""
        await self._call("POST", f"/{machine_id}/suspend", decode_object, nonce)

    async def wait(self, machine: Machine, state: State, timeout: float) -> None:
        """
        Wait until a machine reaches the state, by several calls of at most 60 s each.

        The API sends 408 when the time is over, when it is slow itself, and also at once when the machine has
        stopped. If the machine has another version now, no response is conclusive. So after an inconclusive
        response, inspect the machine, and continue with its current version.
        """
        deadline = Deadline(self._clock, timeout)
        path, version = f"/{machine.id}/wait", machine.instance_id
        max_seconds = _MAX_START_WAIT if state is State.STARTED else _MAX_WAIT
        while remaining := deadline.remaining:
            seconds = min(max_seconds, max(1, ceil(remaining)))
            query = {"state": state.value, "timeout": str(seconds)}
            if version:
                query["instance_id"] = version
            try:
                fields = await deadline.run(
                    self._call(
                        "GET",
                        f"{path}?{urlencode(query)}",
                        decode_object,
                        timeout=seconds + _CALL_TIMEOUT,
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
                self._log.debug("retrying: {error}", error=error)
                inconclusive = error.call is not None and error.call.status in _NOT_REACHED
            else:
                if fields.get("ok") is True and (fields.get("version") or version) == version:
                    return
                inconclusive = True
            if inconclusive and deadline.remaining:
                version = await self._inspect(machine.id, state, deadline) or version
            pause = min(self._random.uniform(*_WAIT_PAUSES), deadline.remaining)
            await deferLater(self._clock, pause)
        raise WaitTimeoutError(f"machine {machine.id} is not {state} after {timeout:g} s")

    async def _inspect(self, machine_id: str, wanted: State, deadline: Deadline) -> str:
        """
        Return the current version of a machine that should reach a state; empty if the API fails.

        Raises `EndedError` or `NotFoundError` if the machine will not reach the state.
        """
        try:
            machine = await deadline.run(self.get(machine_id))
        except (UnavailableError, DeadlineExceededError) as error:
            self._log.debug("cannot inspect {id}: {error}", id=machine_id, error=error)
            return ""
        except NotFoundError:
            if wanted is State.DESTROYED:
                return ""  # the next wait call reports it
            raise
        if has_ended(machine.state, wanted):
            raise EndedError(f"machine {machine_id} is {machine.state} and will not be {wanted}")
        if machine.state in _GONE and wanted is not State.DESTROYED:
            raise NotFoundError(f"machine {machine_id} is {machine.state}")
        return machine.instance_id

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """Destroy a machine in any state."""
        await self._call("DELETE", f"/{machine_id}?force=true", decode_object, nonce)

    async def acquire_lease(self, machine_id: str, ttl: int, description: str) -> Lease:
        """
        Acquire the lease on a machine.

        Retried only after 429: if the response of a successful call was lost, a second call would fail with
        our own lease.
        """
        payload = {"ttl": ttl, "description": description}
        path = f"/{machine_id}/lease"
        return await self._call("POST", path, decode_lease, body=payload, retry_on=(RateLimitedError,))

    async def refresh_lease(self, machine_id: str, nonce: str, ttl: int) -> Lease:
        """Extend our lease."""
        lease = await self._call("POST", f"/{machine_id}/lease", decode_lease, nonce, {"ttl": ttl})
        if lease.nonce != nonce:
            raise LeaseHeldError(f"the lease on {machine_id} had expired; the API made another")
        return lease

    async def get_lease(self, machine_id: str) -> Lease:
        """Return the lease in force."""
        return await self._call("GET", f"/{machine_id}/lease", decode_lease)

    async def release_lease(self, machine_id: str, nonce: str) -> None:
        """Release our lease."""
        await self._call("DELETE", f"/{machine_id}/lease", decode_object, nonce)

    async def _call(
        self,
        method: str,
        path: str,
        decode: Callable[[Any], T],
        nonce: str | None = None,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float = _CALL_TIMEOUT,
        retry_on: tuple[type[UnavailableError], ...] = (UnavailableError,),
    ) -> T:
        """Make a call, with retries, and decode its response. Raises `MachinesError`."""
        path = self._machines + path
        deadline = Deadline(self._clock, timeout)
        previous: UnavailableError | None = None
        failures = 0
        while True:
            try:
                return await deadline.run(self._call_once(method, path, decode, nonce, body))
            except DeadlineExceededError as error:
                before = f"; before that: {previous}" if previous else ""
                raise UnavailableError(f"{method} {path}: {error}{before}", Call(method, path)) from previous
            except UnavailableError as error:
                previous = error
                if not isinstance(error, retry_on) or _RETRY_BACKOFF.delay(failures) > deadline.remaining:
                    raise
                if isinstance(root_cause(error), CertificateError):
                    raise  # a retry would see the same certificate
                self._log.debug("retrying: {error}", error=error)
            await deferLater(self._clock, _RETRY_BACKOFF.delay(failures, self._random))
            failures += 1

    async def _call_once(
        self,
        method: str,
        path: str,
        decode: Callable[[Any], T],
        nonce: str | None,
        body: Mapping[str, Any] | None,
    ) -> T:
        try:
            response = await self._send(method, path, nonce, body)
        except CancelledError:
            raise
        except Exception as error:
            raise UnavailableError(f"{method} {path}: {describe(error)}", Call(method, path)) from error
        call = Call(method, path, response.status, request_id=response.request_id)
        if not 200 <= response.status < 300:  # noqa: PLR2004 - success
            raise _response_error(replace(call, excerpt=_excerpt(response.body)), response.body)
        try:
            return decode(json.loads(response.body))
        except (ValueError, RecursionError, DecodeError) as error:
            # Without an excerpt of the body, which may contain a nonce.
            raise UnavailableError(f"{method} {path}: {response.status} {error}", call) from None

    async def _send(
        self, method: str, path: str, nonce: str | None, body: Mapping[str, Any] | None
    ) -> _Response:
        headers = Headers({"Authorization": [self._authorization], "Accept": ["application/json"]})
        if nonce is not None:
            headers.setRawHeaders(NONCE_HEADER, [nonce])
        if body is not None:
            headers.setRawHeaders("Content-Type", ["application/json"])
        data = None if body is None else json.dumps(body).encode()
        response = await send_request(self._agent, method, self._base_url, path, headers, data)
        request_ids = response.headers.getRawHeaders("fly-request-id", [None])
        return _Response(response.code, await read_body(response, _MAX_RESPONSE), request_ids[0])


def _excerpt(body: bytes) -> str:
    return " ".join(body[: 4 * _MAX_EXCERPT].decode("utf-8", "replace").split())[:_MAX_EXCERPT]


_NAME_TAKEN = re.compile(r"unique machine name violation(?:, machine ID (\w+))?")
_LEASE = re.compile(r"\blease\b", re.IGNORECASE)
_CAPACITY_STATUSES = ("insufficient_capacity", "volume_placement_capacity")
_NO_CAPACITY = re.compile(r"insufficient|could not (?:reserve|find)|no capacity")


def _response_error(call: Call, body: bytes) -> MachinesError:
    """
    Return the error for a response without success.

    The HTTP status decides; the text only refines it (superfly/fly-go, flaps/flaps_error.go).
    """
    try:
        fields = decode_object(json.loads(body))
    except (ValueError, RecursionError, DecodeError):
        fields = {}
    reported = fields.get("message") or fields.get("error")
    text = reported if isinstance(reported, str) else call.excerpt
    message = f"{call.method} {call.path}: {call.status} {text} (fly-request-id {call.request_id})"
    status = call.status or 0
    kind: type[MachinesError]
    if status == 409 and (taken := _NAME_TAKEN.search(text)):  # noqa: PLR2004 - conflict
        return NameTakenError(message, taken[1], call)
    if fields.get("status") in _CAPACITY_STATUSES or (status in (409, 422) and _NO_CAPACITY.search(text)):
        kind = CapacityError
    elif status == 409 and _LEASE.search(text):  # noqa: PLR2004 - conflict
        kind = LeaseHeldError
    elif status in (409, 412):
        kind = NotReadyError
    elif status == 404:  # noqa: PLR2004 - not found
        kind = NotFoundError
    elif status == 429:  # noqa: PLR2004 - too many requests
        kind = RateLimitedError
    elif status < 400 or status == 408 or status >= 500:  # noqa: PLR2004 - a proxy's, or a server error
        kind = UnavailableError
    else:
        kind = RejectedError
    return kind(message, call)
