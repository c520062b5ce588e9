"""
Settings of each role, read once from environment variables into frozen dataclasses.

Values are stripped of surrounding whitespace, and an empty value counts as missing. Only text is checked
here; what depends on the host, such as users and programs, is resolved by `bfaas.system`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, cast

from bfaas.tokens import Signer, Verifier, genkey
from bfaas.units import parse_duration, parse_size, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bfaas.access_tokens import AccessTokens

T = TypeVar("T")
N = TypeVar("N", int, float)

_MOCK = "mock"
_DOCKER = "docker"

_MAX_BODY = 1 << 20
_MAX_OUTPUT = 64 << 20

_FLY_IDLE_TIMEOUT = 60.0
"""Seconds without data after which Fly's proxy closes a connection, unless `idle_timeout` is set."""

_MAX_SUSPENDED_MB = 2048
"""Largest memory of a machine that can be suspended (https://fly.io/docs/reference/suspend-resume/)."""

_DOCKER_HOST = "unix:///var/run/docker.sock"
_TCP_HOST = re.compile(r"(?:tcp|https?)://(?P<address>[^/]+:[0-9]+)/?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")
_NO_NETWORK = "none"

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_URL = re.compile(r"https?://(?:\[(?P<address>[^][/]+)\]|[A-Za-z0-9_.-]+)(?::(?P<port>[0-9]+))?/?")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")


def uses_containers(environ: Mapping[str, str]) -> bool:
    """Return whether machines are containers, so that no Fly app is needed."""
    return environ.get("WORKER_APP", "").strip() == _DOCKER


class SettingsError(Exception):
    """Invalid settings: one line for each problem, which starts with the variable's name."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class ApiSettings:
    """Access to the Machines API for one app."""

    worker_app: str
    url: str
    token: str = field(repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> ApiSettings:
        """Read the settings. Raise `SettingsError` with all problems."""
        with _Reader(environ) as read:
            return _api(read, read.required("WORKER_APP", _name, "the Fly app of the machines"))


@dataclass(frozen=True)
class FlySettings:
    """Workers on Fly: access to the API, the worker's image, and the URL that reaches workers."""

    api: ApiSettings
    worker_image: str
    worker_url: str


@dataclass(frozen=True)
class EngineSettings:
    """
    How to reach a container engine: `host` is DOCKER_HOST.

    `socket` is the path of its UNIX socket. If that is None, `url` is its URL, and `certificates` the
    directory with ca.pem, cert.pem and key.pem for TLS.
    """

    host: str
    socket: str | None
    url: str | None = None
    certificates: str | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> EngineSettings:
        """Read the settings. Raise `SettingsError` with all problems."""
        with _Reader(environ) as read:
            return _engine(read)


@dataclass(frozen=True)
class DockerSettings:
    """
    Workers in containers: the engine, the worker's image, and what a container has.

    `disk_mb` is the size of each writable directory. `network` is the name of a network, or none.
    `runtime` is the OCI runtime, or empty for the engine's default. `socket_directory` contains the sockets
    of workers, and is None for the default.
    """

    engine: EngineSettings
    worker_image: str
    disk_mb: int
    network: str
    runtime: str
    socket_directory: str | None


@dataclass(frozen=True)
class CoordSettings:
    """
    Settings of the coordinator. Durations are in seconds, sizes in bytes.

    `fly` is None if workers are local: containers if there is `docker`, processes otherwise.
    `proxy_idle_timeout` is how long the proxy in front of the coordinator keeps a connection without data;
    None means Fly's default, or no proxy for local workers. `access` is the access tokens of clients or a
    file of them, and None if clients need no token.
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
    docker: DockerSettings | None = None
    access: AccessTokens | Path | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings. Raise `SettingsError` with all problems."""
        with _Reader(environ) as read:
            worker_app = read.required("WORKER_APP", _name, "a Fly app; docker or mock for local machines")
            local = worker_app in (_MOCK, _DOCKER)
            pool_size = read.optional("POOLSIZE", _positive(_integer), 2)
            standby_suspended = read.optional(
                "POOL_STANDBY_STATE", _choice("started", "suspended"), default=False
            )
            parse_memory: Callable[[str], int] = _integer
            if standby_suspended and not local:
                parse_memory = _at_most(_MAX_SUSPENDED_MB, "the maximum for suspended machines on Fly")
            return cls(
                max_req_time=read.required("MAXREQTIME", _positive(parse_duration), "a duration such as 10s"),
                fly=None if local else _fly(read, worker_app),
                replay=read.optional("FLY_REPLAY", _boolean, default=False),
                signer=(
                    read.optional("PRIVATE", Signer, Signer(genkey().private))
                    if local
                    else read.required("PRIVATE", Signer, "a private key from `bfaas genkey`")
                ),
                machine_id=(
                    read.optional("FLY_MACHINE_ID", _name, worker_app)
                    if local
                    else read.required("FLY_MACHINE_ID", _name, "this machine's name")
                ),
                region=(
                    read.optional("FLY_REGION", str, "local")
                    if local
                    else read.required("FLY_REGION", str, "a region such as ams")
                ),
                pool_size=pool_size,
                standby=read.optional("POOL_STANDBY", _at_most(pool_size, "POOLSIZE"), 0),
                standby_suspended=standby_suspended,
                worker_cpus=read.optional("WORKER_CPUS", _positive(_integer), 1),
                worker_memory_mb=read.optional("WORKER_MEMORY_MB", _positive(parse_memory), 256),
                max_wait=read.optional("MAXWAIT", _positive(parse_duration), 30.0),
                max_queue=read.optional("MAXQUEUE", _non_negative, 100),
                max_per_client=read.optional("MAXPERCLIENT", _positive(_integer), 20),
                max_body=read.optional("MAXBODY", _positive(parse_size), _MAX_BODY),
                max_output=read.optional("MAXOUTPUT", _positive(parse_size), _MAX_OUTPUT),
                destroy_on_exit=read.optional("POOL_ON_EXIT", _choice("stop", "destroy"), default=False),
                proxy_idle_timeout=read.optional("PROXY_IDLE_TIMEOUT", _positive(parse_duration), None),
                docker=_docker(read) if worker_app == _DOCKER else None,
                access=read.optional("ACCESS_TOKENS", _access_tokens, None),
            )

    @property
    def idle_timeout_warnings(self) -> tuple[str, ...]:
        """One line for each limit that allows a response to be idle until the proxy closes its connection."""
        idle_timeout = self.proxy_idle_timeout or (_FLY_IDLE_TIMEOUT if self.fly else None)
        idle_periods = (
            ("MAXWAIT", self.max_wait, "a queued request"),
            ("MAXREQTIME", self.max_req_time, "a raw response, which has no heartbeats,"),
        )
        return tuple(
            f"{name} is {seconds:g} s: {subject} can be idle for that long, but the proxy closes connections "
            f"after {idle_timeout:g} s without data (PROXY_IDLE_TIMEOUT; idle_timeout in fly.toml)"
            for name, seconds, subject in idle_periods
            if idle_timeout is not None and seconds >= idle_timeout
        )


@dataclass(frozen=True)
class BasherSettings:
    """
    Settings of a worker. Durations are in seconds, sizes in bytes.

    `max_req_time` is None if the worker has no limit of its own. `sandbox` is the command prefix of a sandbox
    for scripts, and may be empty. `max_silence` is how long it waits for a request, and None if it waits
    without limit. `run_as` is the name or number of the user that scripts run as, and empty
    for the worker's own user; see `bfaas.system.confinement.Confinement.resolve`.
    """

    verifier: Verifier
    machine_id: str
    region: str
    max_req_time: float | None
    max_body: int
    max_output: int
    max_silence: float | None
    sandbox: tuple[str, ...]
    run_as: str
    home: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings. Raise `SettingsError` with all problems."""
        with _Reader(environ) as read:
            return cls(
                verifier=read.required("PUBLIC", Verifier, "the public key of the coordinator's PRIVATE"),
                machine_id=read.required("FLY_MACHINE_ID", _name, "this machine's name"),
                region=read.optional("FLY_REGION", str, ""),
                max_req_time=read.optional("MAXREQTIME", _positive(parse_duration), None),
                max_body=read.optional("MAXBODY", _positive(parse_size), _MAX_BODY),
                max_output=read.optional("MAXOUTPUT", _positive(parse_size), _MAX_OUTPUT),
                max_silence=read.optional("MAX_SILENCE", _positive(parse_duration), None),
                sandbox=read.optional("SANDBOX", _shell_words, ()),
                run_as=read.optional("RUN_AS", str, ""),
                home=read.optional("HOME", str, "/"),
            )


def _fly(read: _Reader, worker_app: str) -> FlySettings:
    return FlySettings(
        api=_api(read, worker_app),
        worker_image=read.required("WORKER_IMAGE", str, "the image of workers"),
        worker_url=read.optional("WORKER_URL", _url, f"http://{worker_app}.flycast"),
    )


def _docker(read: _Reader) -> DockerSettings:
    return DockerSettings(
        engine=_engine(read),
        worker_image=read.optional("WORKER_IMAGE", _image, "bfaas-basher"),
        disk_mb=read.optional("WORKER_DISK_MB", _positive(_integer), 64),
        network=read.optional("WORKER_NETWORK", _network, _NO_NETWORK),
        runtime=read.optional("WORKER_RUNTIME", _name_with_dots, ""),
        socket_directory=read.optional("WORKER_SOCKETS", _absolute_path, None),
    )


def _engine(read: _Reader) -> EngineSettings:
    host = read.optional("DOCKER_HOST", _docker_host, _DOCKER_HOST)
    verify = read.optional("DOCKER_TLS_VERIFY", bool, default=False)
    certificates = read.optional("DOCKER_CERT_PATH", _absolute_path, None)
    if host is None or host.startswith("unix://"):
        return EngineSettings(host, host and host.removeprefix("unix://"))
    match = _TCP_HOST.fullmatch(host)
    address = match["address"] if match else ""
    if not verify:
        return EngineSettings(host, None, f"http://{address}")
    if certificates is None:
        certificates = read.required("DOCKER_CERT_PATH", str, "the directory of ca.pem, cert.pem and key.pem")
    return EngineSettings(host, None, f"https://{address}", certificates)


def _api(read: _Reader, worker_app: str) -> ApiSettings:
    return ApiSettings(
        worker_app=worker_app,
        url=read.optional("FLY_FLAPS_BASE_URL", _url, "http://_api.internal:4280"),
        token=read.required("FLY_TOKEN", str, "an API token that can manage the worker app"),
    )


class _Reader:
    """
    Reads variables one by one; at the end of its `with` block, raises all their problems together.

    Until then a variable with a problem reads as None, whatever its type: the caller never sees the result.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._problems: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._problems:
            raise SettingsError(tuple(self._problems))

    def required(self, name: str, parse: Callable[[str], T], description: str) -> T:
        """Read a required variable; if it is missing, the problem includes the description of its value."""

        def parse_given(text: str) -> T:
            if not text:
                raise ValueError(f"missing; {description}")
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


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not a whole number")
    return int(text)


def _non_negative(text: str) -> int:
    number = _integer(text)
    if number < 0:
        raise ValueError(f"{quoted(text)} is below zero")
    return number


def _at_most(limit: int | None, limit_name: str) -> Callable[[str], int]:
    """Return a parser of numbers from 0 to `limit`. It is None if the limit itself is invalid."""

    def parse(text: str) -> int:
        number = _non_negative(text)
        if limit is None or number <= limit:
            return number
        raise ValueError(f"{quoted(text)} is more than {limit} ({limit_name})")

    return parse


def _positive(parse: Callable[[str], N]) -> Callable[[str], N]:
    def parse_positive(text: str) -> N:
        number = parse(text)
        if number <= 0:
            raise ValueError(f"{quoted(text)} is not above zero")
        return number

    return parse_positive


def _choice(first: str, second: str) -> Callable[[str], bool]:
    """Return a parser that accepts two words, and returns whether it is the second."""

    def parse(text: str) -> bool:
        if text in (first, second):
            return text == second
        raise ValueError(f"{quoted(text)} is neither {first} nor {second}")

    return parse


def _boolean(text: str) -> bool:
    if text.lower() not in ("1", "0", "true", "false", "on", "off", "yes", "no"):
        raise ValueError(f"{quoted(text)} is neither on nor off")
    return text.lower() in ("1", "true", "on", "yes")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not 1 to 63 letters, digits, dashes and underscores")
    return text


def _name_with_dots(text: str) -> str:
    """Parse the name of a runtime or a network in a container engine."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", text):
        raise ValueError(f"{quoted(text)} is not a name of letters, digits, dots, dashes and underscores")
    return text


def _network(text: str) -> str:
    """Parse the name of a network. The host's own is not allowed."""
    if text == "host":
        raise ValueError("host would give scripts the network of this host; create a network for them")
    return _name_with_dots(text)


def _image(text: str) -> str:
    if not _IMAGE.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not the name of an image")
    return text


def _access_tokens(text: str) -> AccessTokens | Path:
    """Parse @FILE, or lines NAME:DIGEST with commas between them."""
    if text.startswith("@"):
        return Path(text[1:]).absolute()
    from bfaas.access_tokens import AccessTokens  # noqa: PLC0415 - workers do not need it

    tokens, problems = AccessTokens.parse(text)
    if problems:
        raise ValueError(problems[0])
    return tokens


def _absolute_path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError(f"{quoted(text)} is not an absolute path")
    return text


def _docker_host(text: str) -> str:
    if text.startswith("unix:///"):
        return text
    match = _TCP_HOST.fullmatch(text)
    if match is None:
        raise ValueError(f"{quoted(text)} is neither unix:///PATH nor tcp://HOST:PORT")
    _url(f"http://{match['address']}")
    return text


def _url(text: str) -> str:
    """Parse a URL of a scheme, a host and optionally a port, without a path."""
    match = _URL.fullmatch(text)
    if match is None:
        raise ValueError(f"{quoted(text)} is not a URL such as http://host:port")
    if match["address"] is not None:
        try:
            IPv6Address(match["address"])
        except ValueError as error:
            raise ValueError(f"{quoted(text)} has an invalid IPv6 address: {error}") from None
    if match["port"] is not None and not 0 < int(match["port"]) < 1 << 16:
        raise ValueError(f"{quoted(text)} has an invalid port: 1 to 65535")
    return text.rstrip("/")


def _shell_words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{quoted(text)} is not a shell command: {error}") from None
