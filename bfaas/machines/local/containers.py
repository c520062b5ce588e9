"""
Machines as containers of this host, with the Docker Engine API: each started machine is a `basher` in one.

A container is created for each start of a machine, because a stopped one keeps its files, and removed at the
stop. Its worker listens on a UNIX socket in a directory that the coordinator mounts, so a container needs no
network, and opens nothing on the host's. Where the coordinator itself runs in a container, that directory
(WORKER_SOCKETS) must be mounted at the path that it has on the host, because the engine mounts it from there.

Each start has a user id of its own for scripts, as local processes do: Linux counts processes, pending
signals, pipes and inotify watches by user, whatever the container. A passwd file that is mounted gives it the
name and the home of the image's own user.

The labels `bfaas.pool` and `bfaas.machine` show what a container belongs to. A coordinator removes the
containers of its pool that it does not know, whenever it lists its machines.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from random import SystemRandom
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import deferLater
from twisted.logger import Logger

from bfaas.backoff import BackoffSchedule
from bfaas.deadline import Deadline, DeadlineExceededError, ignore_cancellation
from bfaas.http.endpoints import unix_path, unix_url
from bfaas.machines.api import (
    Lease,
    Machine,
    MachineConfig,
    MachineInventory,
    MachinesError,
    NotFoundError,
    State,
    UnavailableError,
    WaitTimeoutError,
)
from bfaas.machines.emulator.backend import MachineBackend
from bfaas.machines.emulator.state import EmulatedMachines
from bfaas.machines.local.engine import (
    CALL_TIMEOUT,
    Engine,
    EngineError,
    EngineUnreachableError,
    JSONLines,
    examine_engine,
)
from bfaas.machines.local.host import HostError
from bfaas.machines.local.image_accounts import ImageAccounts
from bfaas.machines.local.script_users import UID_RANGES
from bfaas.machines.local.socket_directory import SocketDirectory, default_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from twisted.python.failure import Failure

    from bfaas.settings import DockerSettings

_log = Logger()

T = TypeVar("T")

POOL_LABEL = "bfaas.pool"
MACHINE_LABEL = "bfaas.machine"

_SOCKET_DIRECTORY = "/run/bfaas"  # in a container; its parent is not writable there
_DEFAULT_HOME = "/home/worker"

_CAPABILITIES = (
    "CHOWN",  # the pipes of a script, and its home, belong to its user
    "SETUID",  # a script runs as its user
    "SETGID",  # with only that user's group
    "KILL",  # the worker kills the processes of that user
)
"""What the worker keeps. Scripts have none: changing the user drops them, and nothing brings them back."""

_PROCESSES = 512 + 32
"""Processes and threads of a container: those of a script (`confinement`), and of its worker."""

_ULIMITS = {"nofile": 4096, "nproc": 4096, "core": 0}
"""
Limits of the worker; those of scripts are lower. By default, engines set the highest that Linux has, or that
they know, and fail where the host's are lower.
"""

PULL_TIMEOUT = 3600.0
"""Seconds that pulling an image may take."""

_BY_FORCE = {"force": "1", "v": "1"}
"""Query of a removal: the container is killed before, and its anonymous volumes are removed with it."""

_PULL_POLL_PERIOD = 0.5
_SHUTDOWN_TIMEOUT = 20.0
_LOGGED_FAILURES = 6
"""One failed removal in so many is logged. A container that has ended is removing itself for a moment."""

_DESTROY_TIMEOUT = 15.0  # seconds; less than the pool's
_UNKNOWN_REMOVAL_TIMEOUT = 5.0  # seconds; much less than the pool's for a list

_LAST_LINES = 20
_MAX_LINE = 500
_FRAME_HEADER = re.compile(rb"[\x00-\x02]\x00{3}.{4}", re.DOTALL)

_STATES = {
    "created": State.CREATED,
    "running": State.STARTED,
    "paused": State.SUSPENDED,
    "exited": State.STOPPED,
    "dead": State.STOPPED,
    "removing": State.DESTROYING,
}


@dataclass(frozen=True)
class _Image:
    """An image of workers: its id, the home of scripts, and its accounts."""

    id: str
    home: str
    accounts: ImageAccounts


@dataclass(eq=False)
class _Container:
    """
    A container, which may exist or not.

    `lock` is held while it is created and started, and while it is removed. `requested` is whether it may
    exist. `tasks` follow its exit and its output.
    """

    name: str
    socket: str
    uid: int
    exited: Callable[[], None]
    killed: bool = False
    requested: bool = False
    lock: DeferredLock = field(default_factory=DeferredLock)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    tasks: list[Deferred[None]] = field(default_factory=list)

    def check_wanted(self) -> None:
        """Raise `EngineError` if it was killed while it was being started."""
        if self.killed:
            raise EngineError("it was stopped before it had started")

    def add_output(self, data: bytes) -> None:
        """Keep the last lines of output, which has a header of 8 bytes before each piece."""
        text = _FRAME_HEADER.sub(b"", data).decode("utf-8", "replace")
        self.lines.extend(line[:_MAX_LINE] for line in text.splitlines() if line.strip())


class _PullingError(EngineError):
    """The image is being pulled."""


class _PullProgress:
    """Logs the progress of a pull, from the objects that the engine streams, at every tenth of it."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._layers: dict[str, tuple[int, int]] = {}
        self._logged = 0

    def update(self, event: Mapping[str, Any]) -> None:
        """Use one object. Raises `EngineError` if it is the failure of the pull."""
        if error := event.get("error"):
            raise EngineError(str(error))
        detail = event.get("progressDetail") or {}
        if event.get("status") == "Downloading" and detail.get("total"):
            self._layers[str(event.get("id"))] = (int(detail.get("current", 0)), int(detail["total"]))
        done, total = (
            (sum(numbers) for numbers in zip(*self._layers.values(), strict=True)) if self._layers else (0, 0)
        )
        tenths = 10 * done // total if total else 0
        if tenths > self._logged:
            self._logged = tenths
            _log.info(
                "pulling {image}: {done} of {total} MB", image=self._image, done=done >> 20, total=total >> 20
            )


class Containers(MachineBackend):
    """Backend that runs machines in containers. `pool` is the name of their pool."""

    _RETRY_BACKOFF = BackoffSchedule(initial=0.02, maximum=5.0)

    def __init__(
        self, reactor: Any, engine: Engine, settings: DockerSettings, pool: str, sockets: SocketDirectory
    ) -> None:
        self._reactor = reactor
        self._engine = engine
        self._settings = settings
        self._pool = pool
        self._sockets = sockets
        self._random = SystemRandom()
        self._containers: dict[str, _Container] = {}
        self._probes: set[str] = set()
        self._image: _Image | None = None
        self._image_lock = DeferredLock()
        self._pull: Deferred[None] | None = None
        self._pull_error: EngineError | None = None
        self._warnings: set[str] = set()

    # The backend.

    def allocate_url(self) -> str:
        """Return the URL of a socket."""
        return unix_url(self._sockets.new_socket())

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Create and start a container. Its worker may not listen yet when this returns. Raises `OSError`."""
        await self.kill(machine.id)  # what is left of a start that failed
        name = f"{machine.name}.{os.urandom(4).hex()}"
        container = _Container(name, unix_path(machine.url or ""), self._unused_uid(), exited)
        self._containers[machine.id] = container
        await _uncancelled(self._start_locked(container, machine, config))
        self._follow(container, self._wait_for_exit(container))

    async def _start_locked(self, container: _Container, machine: Machine, config: MachineConfig) -> None:
        async with container.lock:
            await self._start(container, machine, config)

    async def _start(self, container: _Container, machine: Machine, config: MachineConfig) -> None:
        image = await self.image()
        container.check_wanted()
        container.requested = True
        specification = self._specification(container, machine, config, image)
        created = await self._engine.call(
            "POST", "/containers/create", {"name": container.name}, specification
        )
        self._log_warnings((created or {}).get("Warnings") or ())
        container.check_wanted()
        query = {"stream": "1", "stdout": "1", "stderr": "1"}
        output = await self._engine.open("POST", f"/containers/{container.name}/attach", query)
        self._follow(container, self._engine.stream(output, container.add_output))
        container.check_wanted()
        await self._engine.call("POST", f"/containers/{container.name}/start")

    def _specification(
        self, container: _Container, machine: Machine, config: MachineConfig, image: _Image
    ) -> dict[str, Any]:
        """Return the body of POST /containers/create. Raises `OSError`."""
        run, passwd = self._sockets.prepare(container.socket, image.accounts.with_uid(container.uid))
        environment = {
            **config.env,
            "FLY_MACHINE_ID": machine.id,
            "FLY_REGION": machine.region,
            "RUN_AS": str(container.uid),
            "HOME": image.home,
        }
        disk, memory = self._settings.disk_mb << 20, config.memory_mb << 20
        tmpfs = f"rw,exec,nosuid,nodev,size={disk}"
        host = {
            "NetworkMode": self._settings.network,
            "Memory": memory,
            "MemorySwap": memory,  # the sum of memory and swap
            "NanoCpus": config.cpus * 10**9,
            "PidsLimit": _PROCESSES,
            "Ulimits": [{"Name": name, "Soft": limit, "Hard": limit} for name, limit in _ULIMITS.items()],
            "ReadonlyRootfs": True,
            "Tmpfs": {
                "/tmp": f"{tmpfs},mode=1777",  # noqa: S108 - in the container
                "/var/tmp": f"{tmpfs},mode=1777",  # noqa: S108 - in the container
                image.home: f"{tmpfs},mode=755",
            },
            "ShmSize": disk,
            "IpcMode": "private",
            # A mount fails if its source is missing, unlike a bind, which creates it.
            "Mounts": [
                {"Type": "bind", "Source": str(run), "Target": _SOCKET_DIRECTORY},
                {"Type": "bind", "Source": str(passwd), "Target": "/etc/passwd", "ReadOnly": True},
            ],
            "GroupAdd": [str(os.getegid())],
            "CapDrop": ["ALL"],
            "CapAdd": list(_CAPABILITIES),
            "SecurityOpt": ["no-new-privileges"],
            "Init": True,
            "AutoRemove": True,  # so that nothing is left of a worker that ends when no coordinator is alive
            "LogConfig": {"Type": "none", "Config": {}},
        }
        if self._settings.runtime:
            host["Runtime"] = self._settings.runtime
        return {
            "Image": image.id,
            "Env": [f"{name}={value}" for name, value in environment.items()],
            "Cmd": ["--listen", f"unix:{_SOCKET_DIRECTORY}/worker.sock:mode=666:lockfile=0"],
            "Labels": {POOL_LABEL: self._pool, MACHINE_LABEL: machine.id},
            # Podman sends it before it removes a container by force, and waits.
            "StopSignal": "SIGKILL",
            "HostConfig": host,
        }

    def _unused_uid(self) -> int:
        """Return an id for a script's user that no other container of this pool has."""
        ids = UID_RANGES[1 if self._engine.info.rootless else 0]
        used = {container.uid for container in self._containers.values()}
        return next(uid for uid in iter(lambda: self._random.choice(ids), None) if uid not in used)

    def _log_warnings(self, warnings: Any) -> None:
        """Log each warning of the engine once, such as of a limit that its kernel does not support."""
        for warning in set(map(str, warnings)) - self._warnings:
            self._warnings.add(warning)
            _log.warn("the container engine warns: {text}", text=warning)

    def _follow(self, container: _Container, work: Any) -> None:
        """Follow a container in the background until it is removed."""
        task = Deferred.fromCoroutine(work)
        container.tasks.append(task)
        task.addErrback(ignore_cancellation)
        task.addErrback(_ignore_engine)
        task.addErrback(lambda failure: _log.failure("while following a container", failure))

    async def _wait_for_exit(self, container: _Container) -> None:
        """Wait until the container has exited, through failures of the engine, and report that."""
        status = None
        for failures in count():
            try:
                response = await self._engine.open("POST", f"/containers/{container.name}/wait")
                content: list[bytes] = []
                await self._engine.stream(response, content.append)
                status = json.loads(b"".join(content)).get("StatusCode")
                break
            except (EngineError, ValueError, AttributeError) as error:
                if isinstance(error, EngineError) and error.not_found:
                    break  # it was removed by itself, or by someone
            await deferLater(self._reactor, self._RETRY_BACKOFF.delay(failures, self._random))
        if container.killed:
            return
        if status != 0:
            _log.warn(
                "the container {name} ended with {status}: {lines}",
                name=container.name,
                status="an unknown status" if status is None else status,
                lines="\n".join(container.lines),
            )
        container.exited()

    async def kill(self, machine_id: str) -> None:
        """
        Kill and remove the container of a machine. Do nothing if it has none.

        Returns when the engine has confirmed that it does not exist, with as many attempts as that takes.
        """
        container = self._containers.get(machine_id)
        if container is None:
            return
        container.killed = True
        async with container.lock:
            if container.requested:
                await self._remove(container.name)
                container.requested = False
            for task in container.tasks:
                task.cancel()
            if self._containers.get(machine_id) is container:
                self._sockets.discard(container.socket)
                del self._containers[machine_id]

    async def _remove(self, name: str) -> None:
        for failures in count():
            try:
                await self._try_to_remove(name)
                break
            except EngineError as error:
                if failures % _LOGGED_FAILURES == _LOGGED_FAILURES - 1:
                    _log.warn("cannot remove the container {name} yet: {error}", name=name, error=error)
            await deferLater(self._reactor, self._RETRY_BACKOFF.delay(failures, self._random))

    async def _try_to_remove(self, name: str, timeout: float = CALL_TIMEOUT) -> None:
        """Kill and remove a container, which may not exist. Raises `EngineError`."""
        try:
            await self._engine.call("DELETE", f"/containers/{name}", _BY_FORCE, timeout=timeout)
        except EngineError as error:
            if not error.not_found:
                raise

    async def pause(self, machine_id: str) -> None:
        """Freeze all processes of a container. Raises `OSError`."""
        await self._engine.call("POST", f"/containers/{self._containers[machine_id].name}/pause")

    async def resume(self, machine_id: str) -> None:
        """Continue a paused container. Raises `OSError`."""
        await self._engine.call("POST", f"/containers/{self._containers[machine_id].name}/unpause")

    # Beyond the protocol `MachineBackend`.

    async def reconcile(self) -> None:
        """
        Remove the containers of this pool that it does not know, such as those of an earlier instance.

        One that the engine does not remove is left for the next time, because the pool can do without that.
        Also checks that the image exists, and begins to pull it if it does not. Raises `EngineError`.
        """
        await self.image()
        found = await self._list_own()
        known = {container.name for container in self._containers.values()} | self._probes
        await self._remove_unknown([name for name in found if name not in known])

    async def _remove_unknown(self, names: list[str]) -> None:
        """Try to remove containers, in random order: one that takes too long must not always be the first."""
        removed = 0
        for name in self._random.sample(names, len(names)):
            try:
                await self._try_to_remove(name, _UNKNOWN_REMOVAL_TIMEOUT)
                removed += 1
            except EngineError as error:
                _log.warn("the unknown container {name} is left for now: {error}", name=name, error=error)
                if isinstance(error, EngineUnreachableError):
                    break  # the others may take as long
        if removed:
            _log.info("removed {count} containers that {pool} did not know", count=removed, pool=self._pool)

    async def _list_own(self) -> list[str]:
        filters = json.dumps({"label": [f"{POOL_LABEL}={self._pool}"]})
        found = await self._engine.call("GET", "/containers/json", {"all": "1", "filters": filters})
        return [_container_name(item) for item in found or ()]

    async def close(self) -> None:
        """Remove all containers of the pool, and the directory."""
        try:
            async with self._image_lock:  # an examination that is under way removes its own container
                await self._remove_unknown(await self._list_own())
        finally:
            await self._engine.close()
            self._sockets.close()

    # The image.

    async def wait_for_image(self) -> str:
        """Pull the image if it is missing. Return its id. Raises `EngineError`."""
        while True:
            try:
                return (await self.image()).id
            except _PullingError:
                await deferLater(self._reactor, _PULL_POLL_PERIOD)

    async def image(self) -> _Image:
        """
        Return the image as it is now: the next container uses a newer one of the same name.

        The examination of a new image continues when its caller gives up: otherwise, one that takes longer
        than callers wait would begin again with each of them. Raises `EngineError`, also while it is being
        pulled.
        """
        return await _uncancelled(self._look_up_image())

    async def _look_up_image(self) -> _Image:
        name = self._settings.worker_image
        async with self._image_lock:
            if self._pull is not None:
                raise _PullingError(f"WORKER_IMAGE: {name} is being pulled")
            if self._pull_error is not None:
                error, self._pull_error = self._pull_error, None
                raise error
            try:
                found = await self._engine.call("GET", f"/images/{quote(name, safe='/:@')}/json")
            except EngineError as error:
                if not error.not_found:
                    raise
                self._begin_to_pull(name)
                raise _PullingError(f"WORKER_IMAGE: {name} is being pulled") from None
            if self._image is None or self._image.id != found["Id"]:
                self._image = await self._examine_image(found)
            return self._image

    async def _examine_image(self, found: Mapping[str, Any]) -> _Image:
        """Read an image's accounts, from a container that is created for that and never started."""
        pairs = (pair.partition("=") for pair in found["Config"].get("Env") or ())
        environment = {name: value for name, _, value in pairs}
        name = f"worker-{self._pool}-image.{os.urandom(4).hex()}"
        self._probes.add(name)
        try:
            # The command is not executed, but an image without an entry point needs one.
            body = {"Image": found["Id"], "Cmd": ["true"], "Labels": {POOL_LABEL: self._pool}}
            await self._engine.call("POST", "/containers/create", {"name": name}, body)
            try:
                archive = await self._engine.call_raw(
                    "GET", f"/containers/{name}/archive", {"path": "/etc/passwd"}
                )
            except EngineError as error:
                if not error.not_found:
                    raise
                archive = b""
        finally:
            self._probes.discard(name)  # if the engine fails now, it is removed later, by `reconcile`
            with suppress(EngineError):
                await self._try_to_remove(name)
        accounts = ImageAccounts.from_archive(archive, environment.get("RUN_AS", ""))
        if accounts.gid == os.getegid():
            raise EngineError(
                f"scripts of {self._settings.worker_image} have the group of this process, {accounts.gid}, "
                "and could reach their worker's socket: run the coordinator with another group"
            )
        return _Image(found["Id"], environment.get("HOME") or _DEFAULT_HOME, accounts)

    def _begin_to_pull(self, name: str) -> None:
        def finish(_: object) -> None:
            self._pull = None

        def fail(failure: Any) -> None:
            failure.trap(EngineError)
            self._pull_error = EngineError(f"WORKER_IMAGE: cannot pull {name}: {failure.value}")

        pull = self._pull = Deferred.fromCoroutine(self._pull_image(name))
        pull.addErrback(fail)
        pull.addErrback(ignore_cancellation)
        pull.addErrback(lambda failure: _log.failure("while pulling an image", failure))
        pull.addCallback(finish)

    async def _pull_image(self, name: str) -> None:
        """Pull an image, and log the progress. Raises `EngineError`."""
        _log.info("pulling {image}", image=name)
        progress = _PullProgress(name)
        # Without a tag, all tags would be pulled.
        has_tag = ":" in name.rpartition("/")[2] or "@" in name
        query = {"fromImage": name if has_tag else f"{name}:latest"}

        async def pull() -> None:
            response = await self._engine.open("POST", "/images/create", query)
            await self._engine.stream(response, JSONLines(progress.update).feed)

        try:
            await Deadline(self._reactor, PULL_TIMEOUT).run(pull())
        except DeadlineExceededError:
            raise EngineError(f"it takes longer than {PULL_TIMEOUT:g} s") from None
        _log.info("pulled {image}", image=name)


class ContainerMachines(EmulatedMachines):
    """Machines of this host: the emulator's state with containers as its backend."""

    def __init__(self, reactor: Any, wall_clock: Callable[[], float], containers: Containers) -> None:
        super().__init__(reactor, wall_clock, containers)
        self._containers = containers

    async def list(self) -> list[Machine]:
        """Return every machine, after the removal of containers that belong to none."""
        try:
            await self._containers.reconcile()
        except EngineError as error:
            raise UnavailableError(str(error)) from error
        return await super().list()

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """Destroy a machine, and wait until its container is gone: it would exceed the size of the pool."""
        machine = self.look_up(machine_id)
        if machine.state is not State.DESTROYING:
            await super().destroy(machine_id, nonce)
        try:
            await self.wait(machine, State.DESTROYED, _DESTROY_TIMEOUT)
        except WaitTimeoutError:
            raise UnavailableError("the container engine has not removed its container yet") from None

    async def wait_for_image(self) -> str:
        """Pull the image if it is missing. Return its id. Raises `EngineError`."""
        return await self._containers.wait_for_image()

    async def shutdown(self) -> None:
        """Remove all containers. If the engine fails, those that are left are logged."""
        with suppress(DeadlineExceededError):  # the engine's failures were logged
            await Deadline(self._clock, _SHUTDOWN_TIMEOUT).run(super().shutdown())
        try:
            await Deadline(self._clock, _SHUTDOWN_TIMEOUT).run(self._containers.close())
        except (EngineError, DeadlineExceededError) as error:
            self._log.error("containers may be left: {error}", error=error)


class ContainerInventory(MachineInventory):
    """The containers of all pools that share an engine, for people: without their coordinators' leases."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def list(self) -> list[Machine]:
        """Return every machine that has a container."""
        filters = json.dumps({"label": [MACHINE_LABEL]})
        query = {"all": "1", "filters": filters}
        try:
            found = await self._engine.call("GET", "/containers/json", query)
        except EngineError as error:
            raise UnavailableError(str(error)) from error
        return [_machine(item) for item in found or ()]

    async def get_lease(self, machine_id: str) -> Lease:
        """Raise `NotFoundError`: leases are in the memory of coordinators."""
        raise NotFoundError(f"the lease of {machine_id} is unknown")

    async def destroy(self, machine_id: str, nonce: str | None) -> None:  # noqa: ARG002 - there are no leases
        """Remove the container of a machine."""
        for machine in await self.list():
            if machine.id == machine_id:
                try:
                    await self._engine.call("DELETE", f"/containers/{machine.instance_id}", _BY_FORCE)
                except EngineError as error:
                    if error.not_found:
                        raise NotFoundError(str(error)) from error
                    raise MachinesError(str(error)) from error
                return
        raise NotFoundError(f"machine {machine_id} not found")


def _machine(item: Mapping[str, Any]) -> Machine:
    """Return the machine of a container, an item of GET /containers/json."""
    labels = item.get("Labels") or {}
    return Machine(
        id=str(labels.get(MACHINE_LABEL, "")),
        name=_container_name(item).rpartition(".")[0],
        state=_STATES.get(str(item.get("State")), State.UNKNOWN),
        region="local",
        image=str(item.get("Image", "")),
        metadata={},
        instance_id=str(item["Id"]),
        created_at=float(item.get("Created", 0)),
    )


def _container_name(item: Mapping[str, Any]) -> str:
    """Return the name of a container, an item of GET /containers/json. It starts with a slash there."""
    return str(item["Names"][0]).lstrip("/")


def _uncancelled(work: Coroutine[Deferred[Any], Any, T]) -> Deferred[T]:
    """
    Begin `work`, and return its result. A cancellation of the result leaves `work` to end by itself.

    An engine continues a call whose client has left: a container could appear after its removal had failed to
    find it.
    """
    result: Deferred[T] = Deferred()
    Deferred.fromCoroutine(work).addCallbacks(result.callback, result.errback)
    return result


def _ignore_engine(failure: Failure) -> None:
    """Errback: ignore failures of the engine, which end the output of a container early."""
    failure.trap(EngineError)


def compose_container_machines(
    reactor: Any,
    wall_clock: Callable[[], float],
    settings: DockerSettings,
    pool: str,
    environ: Mapping[str, str],
) -> ContainerMachines:
    """
    Return the machines of a pool in containers of the engine that the settings name.

    Blocks for a moment. Raises `EngineError` or `HostError`, whose messages are one line.
    """
    info = examine_engine(settings.engine)
    if info.remaps_users:
        raise HostError(
            f"{info.name} maps root in containers to another user (userns-remap), who could not create the "
            "sockets of workers: turn that off, or use a rootless engine of the coordinator's user"
        )
    for limit in info.unlimited:
        _log.warn("{engine} cannot limit the {limit} of containers", engine=info.name, limit=limit)
    sockets = SocketDirectory.create(settings.socket_directory or default_parent(environ), pool)
    engine = Engine(reactor, settings.engine, info)
    return ContainerMachines(reactor, wall_clock, Containers(reactor, engine, settings, pool, sockets))
