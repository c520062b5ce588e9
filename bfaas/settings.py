"""
The environment, read once into frozen settings.

A value is read without the whitespace around it, and an empty one counts as missing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Self, TypeVar, cast

from bfaas.system.confinement import MissingProgramError, User, find_program
from bfaas.tokens import Signer, Verifier, genkey
from bfaas.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")
N = TypeVar("N", int, float)

_MOCK = "mock"

_MAX_BODY, _MAX_OUTPUT = 1 << 20, 64 << 20
_FLY_IDLE_TIMEOUT = 60.0
"""Seconds of silence after which Fly's proxy ends a connection, where `idle_timeout` is not set."""

_MAX_SUSPENDED_MB = 2048
"""Memory that a machine may have to be suspended (https://fly.io/docs/reference/suspend-resume/)."""

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_URL = re.compile(r"https?://(?:\[(?P<address>[^][/]+)\]|[A-Za-z0-9_.-]+)(?::(?P<port>[0-9]+))?/?")
_MACHINE_ID = re.compile(r"[A-Za-z0-9_-]{1,63}")

_quoted = json.dumps  # one line of ASCII, whatever the value holds


class SettingsError(Exception):
    """What is wrong with an environment: a line for each problem, beginning with the variable's name."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class ApiSettings:
    """What it takes to ask the Machines API about an app."""

    worker_app: str
    url: str
    token: str = field(repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> ApiSettings:
        """Read the settings; raise `SettingsError` with all that is wrong."""
        with _Reader(environ) as read:
            return _api(read, read.required("WORKER_APP", str, "the Fly app whose machines are meant"))


@dataclass(frozen=True)
class FlySettings:
    """What it takes to have workers on Fly: the API, their image, and the URL that leads to them."""

    api: ApiSettings
    worker_image: str
    worker_url: str


@dataclass(frozen=True)
class CoordSettings:
    """
    What a coordinator is told, in seconds and bytes; `fly` is None where workers are local processes.

    `proxy_idle_timeout` is how long the proxy before the coordinator keeps a silent connection; None where
    that is Fly's default, or there is no proxy.
    """

    max_req_time: float
    fly: FlySettings | None
    replay: bool
    signer: Signer
    machine_id: str
    region: str
    pool_size: int
    standby: int
    standby_suspended: bool
    worker_cpus: int
    worker_memory_mb: int
    max_wait: float
    max_queue: int
    max_per_client: int
    max_body: int
    max_output: int
    destroy_on_exit: bool = False
    proxy_idle_timeout: float | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings; raise `SettingsError` with all that is wrong."""
        with _Reader(environ) as read:
            worker_app = read.required("WORKER_APP", str, "a Fly app, or mock for local machines")
            mock = worker_app == _MOCK
            return cls(
                max_req_time=read.required("MAXREQTIME", _positive(parse_duration), "a duration such as 10s"),
                fly=None if mock else _fly(read, worker_app),
                replay=read.optional("FLY_REPLAY", _switch, default=False),
                signer=(
                    read.optional("PRIVATE", Signer, Signer(genkey().private))
                    if mock
                    else read.required("PRIVATE", Signer, "a key that `bfaas genkey` made")
                ),
                machine_id=(
                    read.optional("FLY_MACHINE_ID", _machine_id, _MOCK)
                    if mock
                    else read.required("FLY_MACHINE_ID", _machine_id, "this machine's name")
                ),
                region=(
                    read.optional("FLY_REGION", str, "local")
                    if mock
                    else read.required("FLY_REGION", str, "a region such as ams")
                ),
                pool_size=(pool_size := read.optional("POOLSIZE", _positive(_whole), 2)),
                standby=read.optional("POOL_STANDBY", _at_most(pool_size, "POOLSIZE"), 0),
                standby_suspended=(
                    suspends := read.optional("POOL_STANDBY_STATE", _is_suspended, default=False)
                ),
                worker_cpus=read.optional("WORKER_CPUS", _positive(_whole), 1),
                worker_memory_mb=read.optional(
                    "WORKER_MEMORY_MB",
                    _positive(
                        _at_most(_MAX_SUSPENDED_MB, "Fly suspends") if suspends and not mock else _whole
                    ),
                    256,
                ),
                max_wait=read.optional("MAXWAIT", _positive(parse_duration), 30.0),
                max_queue=read.optional("MAXQUEUE", _natural, 100),
                max_per_client=read.optional("MAXPERCLIENT", _positive(_whole), 20),
                max_body=read.optional("MAXBODY", _positive(parse_size), _MAX_BODY),
                max_output=read.optional("MAXOUTPUT", _positive(parse_size), _MAX_OUTPUT),
                destroy_on_exit=read.optional("POOL_ON_EXIT", _is_destroy, default=False),
                proxy_idle_timeout=read.optional("PROXY_IDLE_TIMEOUT", _positive(parse_duration), None),
            )

    @property
    def idle_timeout_warnings(self) -> tuple[str, ...]:
        """What makes an answer silent for so long that the proxy before us ends it: a line for each."""
        idle = self.proxy_idle_timeout or (_FLY_IDLE_TIMEOUT if self.fly else None)
        lines = (
            ("MAXWAIT", self.max_wait, "a request that waits for a worker"),
            ("MAXREQTIME", self.max_req_time, "a raw answer, which has no heartbeats,"),
        )
        return tuple(
            f"{name} is {seconds:g} s: {what} may be silent for so long, and the proxy closes a connection "
            f"after {idle:g} s of silence (PROXY_IDLE_TIMEOUT; idle_timeout in fly.toml)"
            for name, seconds, what in lines
            if idle is not None and seconds >= idle
        )


@dataclass(frozen=True)
class BasherSettings:
    """
    What a worker is told. Spans of time are in seconds, sizes in bytes.

    `max_req_time` is None where the worker has no limit of its own. `sandbox` are the first words of every
    command that runs a script. `run_as` is None where scripts run as the worker's own user.
    """

    verifier: Verifier
    machine_id: str
    region: str
    max_req_time: float | None
    max_body: int
    max_output: int
    sandbox: tuple[str, ...]
    run_as: User | None
    home: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings; raise `SettingsError` with all that is wrong."""
        with _Reader(environ) as read:
            return cls(
                verifier=read.required(
                    "PUBLIC", Verifier, "the key that goes with the coordinator's PRIVATE"
                ),
                machine_id=read.required("FLY_MACHINE_ID", _machine_id, "this machine's name"),
                region=read.optional("FLY_REGION", str, ""),
                max_req_time=read.optional("MAXREQTIME", _positive(parse_duration), None),
                max_body=read.optional("MAXBODY", _positive(parse_size), _MAX_BODY),
                max_output=read.optional("MAXOUTPUT", _positive(parse_size), _MAX_OUTPUT),
                sandbox=read.optional("SANDBOX", _command, ()),
                run_as=read.optional("RUN_AS", _other_user, None),
                home=read.optional("HOME", str, "/"),
            )


def _fly(read: _Reader, worker_app: str) -> FlySettings:
    return FlySettings(
        api=_api(read, worker_app),
        worker_image=read.required("WORKER_IMAGE", str, "the image that workers run"),
        worker_url=read.optional("WORKER_URL", _url, f"http://{worker_app}.flycast"),
    )


def _api(read: _Reader, worker_app: str) -> ApiSettings:
    return ApiSettings(
        worker_app=worker_app,
        url=read.optional("FLY_FLAPS_BASE_URL", _url, "http://_api.internal:4280"),
        token=read.required("FLY_TOKEN", str, "a token that may manage the worker app"),
    )


class _Reader:
    """
    Reads variables one by one, and raises all their problems together where its `with` ends.

    Until then a variable with a problem reads as None, whatever its type: nobody gets to see it.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._problems: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._problems:
            raise SettingsError(tuple(self._problems))

    def required(self, name: str, parse: Callable[[str], T], what: str) -> T:
        """Read a variable that must be there; `what` tells a reader of the problem what to give."""

        def parse_given(text: str) -> T:
            if not text:
                raise ValueError(f"missing; {what}")
            return parse(text)

        return self._read(name, parse_given)

    def optional(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """Read a variable that has a default."""
        return self._read(name, lambda text: parse(text) if text else default)

    def _read(self, name: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(self._environ.get(name, "").strip())
        except ValueError as error:
            self._problems.append(f"{name}: {error}")
            return cast("T", None)


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{_quoted(text)} is not a whole number")
    return int(text)


def _natural(text: str) -> int:
    if _whole(text) < 0:
        raise ValueError(f"{_quoted(text)} is below zero")
    return _whole(text)


def _at_most(limit: int | None, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = _natural(text)
        if limit is None or number <= limit:
            return number
        raise ValueError(f"{_quoted(text)} is more than {what}, {limit}")

    return parse


def _is_suspended(text: str) -> bool:
    if text in ("started", "suspended"):
        return text == "suspended"
    raise ValueError(f"{_quoted(text)} is neither started nor suspended")


def _is_destroy(text: str) -> bool:
    if text in ("stop", "destroy"):
        return text == "destroy"
    raise ValueError(f"{_quoted(text)} is neither stop nor destroy")


def _positive(parse: Callable[[str], N]) -> Callable[[str], N]:
    def parse_positive(text: str) -> N:
        number = parse(text)
        if number <= 0:
            raise ValueError(f"{_quoted(text)} is not above zero")
        return number

    return parse_positive


def _machine_id(text: str) -> str:
    if not _MACHINE_ID.fullmatch(text):
        raise ValueError(f"{_quoted(text)} is not 1 to 63 letters, digits, dashes and underscores")
    return text


def _switch(text: str) -> bool:
    if text.lower() not in ("1", "0", "true", "false", "on", "off", "yes", "no"):
        raise ValueError(f'"{text}" is neither on nor off')
    return text.lower() in ("1", "true", "on", "yes")


def _url(text: str) -> str:
    """Read a URL that has no more than a scheme, a host and perhaps a port."""
    match = _URL.fullmatch(text)
    if match is None:
        raise ValueError(f"{_quoted(text)} is not a URL such as http://host:port")
    if match["address"] is not None:
        try:
            IPv6Address(match["address"])
        except ValueError as error:
            raise ValueError(f"{_quoted(text)} has no IPv6 address in its brackets: {error}") from None
    if match["port"] is not None and not 0 < int(match["port"]) < 1 << 16:
        raise ValueError(f"{_quoted(text)} has no port from 1 to 65535")
    return text.rstrip("/")


def _other_user(text: str) -> User | None:
    user = User.parse(text)
    # Without privileges nothing has to change, and groups could not be dropped.
    return None if user.uid == os.geteuid() != 0 else user


def _command(text: str) -> tuple[str, ...]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{_quoted(text)} is not a shell command: {error}") from None
    if not words:
        return ()
    try:
        # What starts a script must not depend on the PATH of the script.
        return find_program(words[0]), *words[1:]
    except MissingProgramError as error:
        raise ValueError(str(error)) from None
