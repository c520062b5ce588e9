"""A container engine on a UNIX socket, whose responses a test sets."""

from __future__ import annotations

import io
import json
import re
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.protocols.policies import WrappingFactory
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from bfaas.settings import CoordSettings
from tests.support.waiting import reactor, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.trial.unittest import TestCase

    from bfaas.settings import DockerSettings

    Answer = Callable[[Any], object]

VERSION = {
    "Version": "99.0",
    "ApiVersion": "1.41",
    "MinAPIVersion": "1.12",
    "Components": [{"Name": "Engine"}],
}
INFO = {
    "SecurityOptions": ["name=seccomp,profile=default"],
    "Runtimes": {"runc": {}, "runsc": {}},
    "DefaultRuntime": "runc",
    "MemoryLimit": True,
    "PidsLimit": True,
    "CpuCfsQuota": True,
}
PASSWD = b"root:x:0:0:root:/root:/bin/bash\nworker:x:10001:10002:,,,:/home/worker:/bin/bash\n"
IMAGE = {"Id": "sha256:1", "Config": {"Env": ["RUN_AS=worker", "HOME=/home/worker"]}}


def refuse(status: int, message: str) -> Answer:
    """Return a response of the engine for a call that failed."""

    def answer(request: Any) -> object:
        request.setResponseCode(status)
        return {"message": message}

    return answer


def cut(start: bytes = b"") -> Answer:
    """Begin a response, and close the connection, as an engine does that dies."""

    def answer(request: Any) -> object:
        if start:
            request.setHeader("Content-Length", "1000")
            request.write(start)
            reactor.callLater(0.01, request.transport.loseConnection)
        else:
            request.transport.abortConnection()
        return NOT_DONE_YET

    return answer


def silent(_: Any) -> object:
    """Send nothing."""
    return NOT_DONE_YET


class FakeEngine(Resource):
    """
    The calls that containers need. `calls` are method and path of all that came, without the version.

    `answers` replaces responses: for a call, such as `POST /containers/*/start`, a list from which each
    request takes the first, until it is empty. A string, bytes or JSON is a response, too.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.answers: dict[str, list[Any]] = {}
        self.containers: dict[str, dict[str, Any]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.waits: dict[str, list[Any]] = {}
        self.images = {"bfaas-basher": IMAGE}

    def count(self, call: str) -> int:
        return self.calls.count(call)

    def render(self, request: Any) -> Any:
        path = re.sub(r"^/v[0-9.]+", "", request.path.decode())
        name = path.split("/")[2] if path.startswith("/containers/") else ""
        method = request.method.decode()
        is_named = name and name not in ("create", "json")
        call = f"{method} {path.replace(name, '*', 1) if is_named else path}"
        self.calls.append(call)
        queued = self.answers.get(call, [])
        answer = queued.pop(0) if queued else self._default(request, method, path, name)
        if callable(answer):
            answer = answer(request)
        if answer is NOT_DONE_YET:
            return NOT_DONE_YET
        if isinstance(answer, bytes):
            return answer
        return json.dumps(answer).encode()

    def _default(self, request: Any, method: str, path: str, name: str) -> Any:
        if path.startswith("/images/"):
            return self.images.get(path.split("/", 2)[2].removesuffix("/json")) or refuse(
                404, "no such image"
            )
        general = {
            "GET /version": lambda: VERSION,
            "GET /info": lambda: INFO,
            "GET /containers/json": lambda: self._list(request),
            "POST /containers/create": lambda: self._create(request),
        }
        if (answer := general.get(f"{method} {path}")) is not None:
            return answer()
        if name not in self.containers:
            return refuse(404, f"No such container: {name}")
        action = "DELETE" if method == "DELETE" else path.rpartition("/")[2]
        return getattr(self, f"_{action}", self._no_content)(request, name)

    def _list(self, request: Any) -> list[dict[str, Any]]:
        wanted = json.loads(request.args[b"filters"][0])["label"]
        return [
            {"Id": name, "Names": [f"/{name}"], "Labels": body["Labels"], "State": "running"}
            for name, body in self.containers.items()
            if all(label in _labels(body) for label in wanted)
        ]

    def _create(self, request: Any) -> dict[str, Any]:
        body = json.loads(request.content.read())
        self.bodies.append(body)
        self.containers[request.args[b"name"][0].decode()] = body
        request.setResponseCode(201)
        return {"Id": "1", "Warnings": ["a limit is not supported"]}

    def _archive(self, _: Any, __: str) -> bytes:
        return tar(PASSWD)

    def _attach(self, request: Any, _: str) -> object:
        request.write(b"\x01\0\0\0\0\0\0\x06hello\n")
        return NOT_DONE_YET

    def _wait(self, request: Any, name: str) -> object:
        request.write(b"")  # the head
        self.waits.setdefault(name, []).append(request)
        return NOT_DONE_YET

    def _DELETE(self, request: Any, name: str) -> bytes:
        del self.containers[name]
        return self._no_content(request, name)

    def _no_content(self, request: Any, _: str) -> bytes:
        request.setResponseCode(204)
        return b""

    def exit(self, name: str, status: int) -> None:
        """End a container."""
        self.containers.pop(name, None)
        for request in self.waits.pop(name, []):
            request.write(json.dumps({"StatusCode": status}).encode())
            request.finish()

    def listen(self, test: TestCase) -> str:
        """Listen on a socket, and return its path."""
        directory = tempfile.TemporaryDirectory(prefix="bfaas-engine-")
        test.addCleanup(directory.cleanup)
        path = str(Path(directory.name, "engine.sock"))
        site = Site(self)
        connections = WrappingFactory(site)
        site.noisy = connections.noisy = False
        port = reactor.listenUNIX(path, connections)

        async def close() -> None:
            await port.stopListening()
            for connection in list(connections.protocols):
                connection.transport.abortConnection()
            await wait_until(lambda: not connections.protocols)

        test.addCleanup(lambda: Deferred.fromCoroutine(close()))
        return path


def _labels(body: dict[str, Any]) -> set[str]:
    """Return what filters match: names of labels, and pairs of name and value."""
    return {*body["Labels"], *(f"{name}={value}" for name, value in body["Labels"].items())}


def tar(passwd: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as files:
        member = tarfile.TarInfo("passwd")
        member.size = len(passwd)
        files.addfile(member, io.BytesIO(passwd))
    return archive.getvalue()


def settings(host: str, sockets: str, **extra: str) -> DockerSettings:
    """Return the settings of a coordinator for an engine."""
    environ = {"WORKER_APP": "docker", "MAXREQTIME": "10s", "DOCKER_HOST": host, "WORKER_SOCKETS": sockets}
    found = CoordSettings.from_environment(environ | extra).docker
    assert found is not None
    return found
