"""
A client of the Docker Engine API (https://docs.docker.com/reference/api/engine/), which Podman serves too.

Versions 1.41 (Docker 20.10, Podman 3 and newer) to 1.51 are used. What is called is the same in all of them.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode, urlsplit

from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectError
from twisted.internet.ssl import (
    Certificate,
    CertificateOptions,
    PrivateCertificate,
    trustRootFromCertificates,
)
from twisted.web.http_headers import Headers

from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.client import BodyReceiver, pooled_agent, read_body, send_request
from bfaas.http.endpoints import describe, root_cause, unix_url

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from twisted.web.iweb import IResponse

    from bfaas.settings import EngineSettings

_OLDEST_VERSION = (1, 41)
_NEWEST_VERSION = (1, 51)

_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")

CALL_TIMEOUT = 30.0
"""Seconds that a call may take. Busy engines start a container in seconds."""

_CHECK_TIMEOUT = 10.0
_MAX_RESPONSE = 16 << 20  # bytes; a list of a thousand containers has 2 MB
_MAX_LINE = 1 << 20
_NOT_FOUND = 404
_FIRST_ERROR = 400


class EngineError(OSError):
    """
    The engine rejected a call, with its own message in one line.

    `status` is that of its response; None if there was no complete response.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status

    @property
    def not_found(self) -> bool:
        """Whether the container or the image does not exist."""
        return self.status == _NOT_FOUND


class EngineUnreachableError(EngineError):
    """The engine sent no complete response. The call may or may not have taken effect."""


@dataclass(frozen=True)
class EngineInfo:
    """
    An engine: its name, such as `Docker 20.10.24`, and the version of its API that is used.

    `remaps_users` is whether root in a container is another user on the host. `rootless`: that user is the
    one who runs the engine. `runtimes` are the names of its OCI runtimes; Podman accepts others as well.
    `unlimited` names the resources that it cannot limit.
    """

    name: str
    api_version: str
    remaps_users: bool
    rootless: bool
    runtimes: tuple[str, ...]
    default_runtime: str
    unlimited: tuple[str, ...]

    def has_runtime(self, name: str) -> bool:
        """Return whether the engine has an OCI runtime, as far as is known: Podman accepts paths as well."""
        return name in self.runtimes or self.name.startswith("Podman")


def examine_engine(settings: EngineSettings) -> EngineInfo:
    """Ask an engine what it is, and negotiate the version. Blocks for a moment. Raises `EngineError`."""
    try:
        with _Connection(settings) as connection:
            version = connection.get("/version")
            api_version = _negotiate(settings, version)
            info = connection.get(f"/v{api_version}/info")
    except ssl.SSLError as error:
        raise EngineUnreachableError(f"{_subject(settings)}: TLS: {error.reason or error}") from error
    except PermissionError as error:
        remedy = "add this user to the group of the socket (docker)" if settings.socket else "see its log"
        raise EngineUnreachableError(f"{_subject(settings)}: permission denied; {remedy}") from error
    except TimeoutError as error:
        message = f"{_subject(settings)} does not respond within {_CHECK_TIMEOUT:g} s"
        raise EngineUnreachableError(message) from error
    except EngineError:
        raise
    except (OSError, HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise EngineUnreachableError(f"{_subject(settings)} cannot be reached: {reason}") from error
    return _engine_info(version, api_version, info)


def _subject(settings: EngineSettings) -> str:
    return f"the container engine at {settings.host} (DOCKER_HOST)"


def _negotiate(settings: EngineSettings, version: Mapping[str, Any]) -> str:
    """Return the newest version of the API that both sides know. Raises `EngineError` if there is none."""
    newest, oldest = (_parse_version(str(version.get(name, ""))) for name in ("ApiVersion", "MinAPIVersion"))
    if newest is None:
        raise EngineError(f"{_subject(settings)} is none: its response to /version has no ApiVersion")
    chosen = min(newest, _NEWEST_VERSION)
    if chosen < _OLDEST_VERSION:
        raise EngineError(
            f"{_subject(settings)} is too old: its API has version {_format(newest)}, "
            f"and {_format(_OLDEST_VERSION)} (Docker 20.10) is required"
        )
    if oldest is not None and chosen < oldest:
        raise EngineError(
            f"{_subject(settings)} is too new: its API begins with version {_format(oldest)}, "
            f"and this program knows up to {_format(_NEWEST_VERSION)}"
        )
    return _format(chosen)


def _parse_version(text: str) -> tuple[int, int] | None:
    match = _VERSION.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def _format(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _engine_info(version: Mapping[str, Any], api_version: str, info: Mapping[str, Any]) -> EngineInfo:
    components = [item for item in version.get("Components") or () if isinstance(item, dict)]
    is_podman = any("podman" in str(item.get("Name", "")).lower() for item in components)
    options = " ".join(map(str, info.get("SecurityOptions") or ()))
    limits = {"MemoryLimit": "memory", "PidsLimit": "processes", "CpuCfsQuota": "processors"}
    rootless = "name=rootless" in options or info.get("Rootless") is True  # Docker's way, and Podman's
    # Podman says that it limits these here, but Linux delegates only cgroup v2 to users.
    powerless = rootless and str(info.get("CgroupVersion")) == "1"
    return EngineInfo(
        name=f"{'Podman' if is_podman else 'Docker'} {version.get('Version', '')}".strip(),
        api_version=api_version,
        remaps_users="name=userns" in options,
        rootless=rootless,
        runtimes=tuple(map(str, info.get("Runtimes") or ())),
        default_runtime=str(info.get("DefaultRuntime") or ""),
        unlimited=tuple(name for key, name in limits.items() if powerless or info.get(key) is False),
    )


class _Connection:
    """One blocking connection to an engine."""

    def __init__(self, settings: EngineSettings) -> None:
        self._connection: HTTPConnection
        if settings.socket is not None:
            self._connection = _UnixConnection(settings.socket)
        else:
            address = urlsplit(settings.url or "").netloc
            if settings.certificates is None:
                self._connection = HTTPConnection(address, timeout=_CHECK_TIMEOUT)
            else:
                context = _ssl_context(Path(settings.certificates))
                self._connection = HTTPSConnection(address, timeout=_CHECK_TIMEOUT, context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, path: str) -> Mapping[str, Any]:
        """GET a JSON object. Raises `OSError`, `HTTPException`."""
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        body = response.read(_MAX_RESPONSE)
        if response.status >= _FIRST_ERROR:
            raise EngineError(f"GET {path}: {_message(body, response.status)}", response.status)
        document = _decode(body, f"GET {path}")
        if not isinstance(document, dict):
            raise EngineError(f"GET {path}: the response is not an object")
        return document


class _UnixConnection(HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_CHECK_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_CHECK_TIMEOUT)
        self.sock.connect(self._path)


def _ssl_context(directory: Path) -> ssl.SSLContext:
    """Return TLS for a blocking connection, as `_tls_options` does for others. Raises `EngineError`."""
    try:
        context = ssl.create_default_context(cafile=directory / "ca.pem")
        context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    except OSError as error:  # SSLError is one
        raise _certificates_error(directory, error) from error
    return context


class Engine:
    """Calls of one engine's API. Close it with `close`."""

    def __init__(self, reactor: Any, settings: EngineSettings, info: EngineInfo) -> None:
        """Prepare connections. Raises `EngineError` if the certificates cannot be read."""
        self._reactor = reactor
        self._host = settings.host
        self._url = settings.url if settings.socket is None else unix_url(settings.socket)
        self._prefix = f"/v{info.api_version}"
        self.info = info
        tls = None if settings.certificates is None else _tls_options(Path(settings.certificates))
        self._agent, self._connections = pooled_agent(reactor, tls)

    async def close(self) -> None:
        """Close the idle connections."""
        await self._connections.closeCachedConnections()

    async def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout: float = CALL_TIMEOUT,
    ) -> Any:
        """
        Make a call, and return the JSON value of its response, or None if it is empty.

        Raises `EngineError`.
        """
        data = await self.call_raw(method, path, query, body, timeout)
        return _decode(data, f"{method} {path}") if data.strip() else None

    async def call_raw(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout: float = CALL_TIMEOUT,
    ) -> bytes:
        """Make a call, and return the body of its response. Raises `EngineError`."""

        async def exchange() -> bytes:
            response = await self.open(method, path, query, body)
            content: bytes = await self._complete(read_body(response, _MAX_RESPONSE))
            return content

        try:
            return await Deadline(self._reactor, timeout).run(exchange())
        except DeadlineExceededError:
            raise self._unreachable(f"does not respond to {method} {path} within {timeout:g} s") from None

    async def open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> IResponse:
        """
        Make a call whose response is a stream, and return the response with its body unread.

        There is no time limit. Raises `EngineError`.
        """
        target = self._prefix + path + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        headers = Headers({} if data is None else {"Content-Type": ["application/json"]})
        response: IResponse = await self._complete(
            send_request(self._agent, method, self._url or "", target, headers, data)
        )
        if response.code >= _FIRST_ERROR:
            content = await self._complete(read_body(response, _MAX_RESPONSE))
            raise EngineError(_message(content, response.code), response.code)
        return response

    async def stream(self, response: IResponse, on_data: Callable[[bytes], None]) -> None:
        """Pass the body of a response to `on_data` until it ends. Raises `EngineError`."""
        body = BodyReceiver(on_data)
        response.deliverBody(body)
        await self._complete(body.done)

    async def _complete(self, work: Any) -> Any:
        """Wait for a part of a call. Raises `EngineError` for any failure of the connection."""
        try:
            return await work
        except (CancelledError, EngineError):
            raise
        except Exception as error:  # the agent's, which has many
            cause = root_cause(error)
            if isinstance(cause, ConnectError):
                reason = os.strerror(cause.osError) if cause.osError else describe(error)
                raise self._unreachable(f"cannot be reached: {reason}") from error
            raise self._unreachable(f"sent no complete response: {describe(error)}") from error

    def _unreachable(self, problem: str) -> EngineUnreachableError:
        return EngineUnreachableError(f"the container engine at {self._host} {problem}")


class JSONLines:
    """Splits a stream into lines, each a JSON object, as in the progress of a pull."""

    def __init__(self, on_object: Callable[[dict[str, Any]], None]) -> None:
        self._on_object = on_object
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        """Pass on the objects of complete lines. Raises `EngineError`."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _MAX_LINE:
            raise EngineError("a line of the response is too long")
        for line in filter(bytes.strip, lines):
            value = _decode(line, "the stream")
            if isinstance(value, dict):
                self._on_object(value)


def _tls_options(directory: Path) -> CertificateOptions:
    """Return TLS with the files of Docker's own client (`docker --tlsverify`). Raises `EngineError`."""
    try:
        authority = Certificate.loadPEM((directory / "ca.pem").read_bytes())
        pem = (directory / "cert.pem").read_bytes() + b"\n" + (directory / "key.pem").read_bytes()
        client = PrivateCertificate.loadPEM(pem)
    except Exception as error:  # OSError, and OpenSSL's
        raise _certificates_error(directory, error) from error
    return CertificateOptions(
        privateKey=client.privateKey.original,
        certificate=client.original,
        trustRoot=trustRootFromCertificates([authority]),
    )


def _certificates_error(directory: Path, error: Exception) -> EngineError:
    return EngineError(f"DOCKER_CERT_PATH: {directory} has no usable ca.pem, cert.pem and key.pem: {error}")


def _decode(data: bytes, source: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EngineUnreachableError(f"{source}: the response is not JSON: {error}") from error


def _message(body: bytes, status: int) -> str:
    """Return the message of an error response, which is `{"message": …}`."""
    try:
        message = json.loads(body)["message"]
    except (ValueError, RecursionError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace")
    return str(message).strip() or f"status {status}"
