"""Tests of machines in containers, against a fake engine that fails in many ways."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.server import NOT_DONE_YET

from bfaas.machines.api import Machine, MachineConfig, NotFoundError, State, UnavailableError
from bfaas.machines.local import containers as containers_module
from bfaas.machines.local.containers import ContainerInventory, ContainerMachines, Containers
from bfaas.machines.local.engine import Engine, EngineError, EngineInfo
from bfaas.machines.local.host import HostError
from bfaas.machines.local.image_accounts import ImageAccounts
from bfaas.machines.local.socket_directory import SocketDirectory, default_parent
from tests.support.fake_engine import IMAGE, PASSWD, FakeEngine, cut, refuse, settings, silent, tar
from tests.support.waiting import reactor, wait_until

if TYPE_CHECKING:
    from tests.support.fake_engine import Answer

CONFIG = MachineConfig("image", {"PUBLIC": "key"}, cpus=2, memory_mb=300)
TTL = 60
INFO = EngineInfo("Docker 99.0", "1.41", False, False, (), "", ())


def hold(held: list[Any], start: bytes = b"") -> Answer:
    """Keep a request, whose response the test completes; send the start of the response's body."""

    def answer(request: Any) -> object:
        held.append(request)
        if start:
            request.write(start)
        return NOT_DONE_YET

    return answer


def content(path: str) -> str:
    return Path(path).read_text()


def exists(path: str) -> bool:
    return Path(path).exists()


class ContainersTestCase(TestCase):
    timeout = 30

    def setUp(self) -> None:
        self.fake = FakeEngine()
        self.sockets = tempfile.mkdtemp(prefix="bfaas-test-")
        self.addCleanup(shutil.rmtree, self.sockets, ignore_errors=True)
        self.host = f"unix://{self.fake.listen(self)}"
        self.running: list[ContainerMachines] = []
        self.addCleanup(lambda: Deferred.fromCoroutine(self.shut_down()))
        self.machines = self.start("own")

    def start(self, pool: str, **extra: str) -> ContainerMachines:
        """Return the machines of a pool, which are shut down at the end."""
        docker = settings(self.host, self.sockets, **extra)
        self.engine = Engine(reactor, docker.engine, INFO)
        sockets = SocketDirectory.create(self.sockets, pool)
        containers = Containers(reactor, self.engine, docker, pool, sockets)
        machines = ContainerMachines(reactor, lambda: 0.0, containers)
        self.running.append(machines)
        return machines

    async def shut_down(self) -> None:
        while self.running:
            await self.running.pop().shutdown()

    async def started(self) -> tuple[Machine, str]:
        machine, lease = await self.machines.create("worker-own-1", "ams", CONFIG, TTL)
        await self.machines.wait(machine, State.STARTED, 20)
        await wait_until(lambda: self.fake.waits)
        return machine, lease.nonce

    def state(self, machine: Machine) -> State:
        return self.machines.look_up(machine.id).state

    def is_in(self, machine: Machine, state: State) -> bool:
        return self.state(machine) is state


class LifecycleTests(ContainersTestCase):
    async def test_container_has_the_least_that_a_worker_needs(self) -> None:
        machine, _ = await self.started()

        body = self.fake.bodies[-1]
        host = body["HostConfig"]
        self.assertEqual({"bfaas.pool": "own", "bfaas.machine": machine.id}, body["Labels"])
        self.assertEqual("sha256:1", body["Image"])
        self.assertEqual(
            ("none", 300 << 20, 300 << 20), (host["NetworkMode"], host["Memory"], host["MemorySwap"])
        )
        self.assertEqual(2_000_000_000, host["NanoCpus"])
        self.assertTrue(host["ReadonlyRootfs"] and host["AutoRemove"] and host["Init"])
        self.assertEqual(
            (["ALL"], {"CHOWN", "SETUID", "SETGID", "KILL"}), (host["CapDrop"], set(host["CapAdd"]))
        )
        self.assertEqual({"/tmp", "/var/tmp", "/home/worker"}, set(host["Tmpfs"]))
        self.assertTrue(all("size=67108864" in options for options in host["Tmpfs"].values()))
        self.assertNotIn("Runtime", host)
        for forbidden in ("Privileged", "Devices", "PortBindings", "PidMode", "UsernsMode", "Binds"):
            self.assertNotIn(forbidden, host)

    async def test_each_start_has_a_user_of_its_own_with_the_name_of_the_image(self) -> None:
        users = set()
        for name in ("worker-own-1", "worker-own-2"):
            machine, _ = await self.machines.create(name, "ams", CONFIG, TTL)
            await self.machines.wait(machine, State.STARTED, 20)
            body = self.fake.bodies[-1]
            [passwd] = [m["Source"] for m in body["HostConfig"]["Mounts"] if m["Target"] == "/etc/passwd"]
            environment = dict(pair.split("=", 1) for pair in body["Env"])
            accounts = content(passwd).splitlines()
            self.assertEqual("root:x:0:0:root:/root:/bin/bash", accounts[0])
            uid = environment["RUN_AS"]
            self.assertEqual(f"worker:x:{uid}:10002:,,,:/home/worker:/bin/bash", accounts[1])
            self.assertEqual(("key", machine.id), (environment["PUBLIC"], environment["FLY_MACHINE_ID"]))
            users.add(uid)
        self.assertEqual(2, len(users))

    async def test_settings_choose_runtime_network_and_disk(self) -> None:
        extra = {"WORKER_RUNTIME": "runsc", "WORKER_NETWORK": "lan", "WORKER_DISK_MB": "10"}
        self.machines = self.start("other", **extra)
        await self.started()

        host = self.fake.bodies[-1]["HostConfig"]
        self.assertEqual(("runsc", "lan"), (host["Runtime"], host["NetworkMode"]))
        self.assertIn("size=10485760", host["Tmpfs"]["/tmp"])

    async def test_stop_removes_the_container_and_its_files(self) -> None:
        machine, nonce = await self.started()
        [mount] = [m for m in self.fake.bodies[-1]["HostConfig"]["Mounts"] if m["Target"] == "/run/bfaas"]
        self.assertTrue(exists(mount["Source"]))

        await self.machines.stop(machine.id, nonce)
        await self.machines.wait(machine, State.STOPPED, 20)

        self.assertEqual({}, self.fake.containers)
        self.assertFalse(exists(mount["Source"]))

    async def test_exit_of_the_worker_stops_the_machine(self) -> None:
        machine, _ = await self.started()
        [name] = self.fake.containers

        self.fake.exit(name, 0)

        await self.machines.wait(machine, State.STOPPED, 20)

    async def test_container_that_someone_removed_counts_as_ended(self) -> None:
        machine, _ = await self.started()
        [name] = self.fake.containers
        del self.fake.containers[name]
        for request in self.fake.waits.pop(name):
            request.transport.abortConnection()

        await self.machines.wait(machine, State.STOPPED, 20)

    async def test_suspended_machine_is_paused(self) -> None:
        machine, nonce = await self.started()

        await self.machines.suspend(machine.id, nonce)
        await self.machines.wait(machine, State.SUSPENDED, 20)
        await self.machines.start(machine.id, nonce)
        await self.machines.wait(machine, State.STARTED, 20)

        self.assertEqual(
            (1, 1), tuple(map(self.fake.count, (f"POST /containers/*/{a}" for a in ("pause", "unpause"))))
        )

    async def test_machine_that_cannot_be_paused_stays_started(self) -> None:
        machine, nonce = await self.started()
        self.fake.answers["POST /containers/*/pause"] = [refuse(500, "no freezer")]

        await self.machines.suspend(machine.id, nonce)
        await wait_until(lambda: self.state(machine) is State.STARTED)


class FailureTests(ContainersTestCase):
    async def test_failed_start_is_a_failed_machine_and_leaves_nothing(self) -> None:
        await self.machines.list()  # the image is known from here on
        for call in ("POST /containers/create", "POST /containers/*/attach", "POST /containers/*/start"):
            for answer in (refuse(500, "no space left on device"), cut()):
                self.fake.answers[call] = [answer]
                name = f"worker-own-{len(self.fake.calls)}"
                machine, lease = await self.machines.create(name, "ams", CONFIG, TTL)
                await wait_until(partial(self.is_in, machine, State.FAILED), call)
                await self.machines.destroy(machine.id, lease.nonce)
                self.assertEqual({}, self.fake.containers)

    async def test_container_of_a_lost_response_is_removed(self) -> None:
        await self.machines.list()

        def create_and_die(request: Any) -> object:
            self.fake._create(request)
            return cut()(request)

        self.fake.answers["POST /containers/create"] = [create_and_die]
        machine, lease = await self.machines.create("worker-own-1", "ams", CONFIG, TTL)
        await wait_until(lambda: self.state(machine) is State.FAILED)
        self.assertEqual(1, len(self.fake.containers))

        await self.machines.destroy(machine.id, lease.nonce)

        self.assertEqual({}, self.fake.containers)

    async def test_machine_is_stopped_only_when_the_engine_has_confirmed_it(self) -> None:
        machine, nonce = await self.started()
        held: list[Any] = []
        busy = refuse(409, "removal of container is already in progress")
        self.fake.answers["DELETE /containers/*"] = [busy, cut(), hold(held)]

        await self.machines.stop(machine.id, nonce)
        await wait_until(lambda: held)
        self.assertIs(State.STOPPING, self.state(machine))
        refuse(500, "device busy")(held[0])
        held[0].finish()
        await self.machines.wait(machine, State.STOPPED, 20)

        self.assertEqual({}, self.fake.containers)

    async def test_destroy_returns_when_the_container_is_gone(self) -> None:
        machine, nonce = await self.started()
        self.fake.answers["DELETE /containers/*"] = [cut(), refuse(500, "device busy")]

        await self.machines.destroy(machine.id, nonce)

        self.assertEqual({}, self.fake.containers)
        self.assertIs(State.DESTROYED, self.state(machine))

    async def test_stop_during_a_start_prevents_it(self) -> None:
        await self.machines.list()
        held: list[Any] = []
        self.fake.answers["POST /containers/create"] = [hold(held)]
        machine, lease = await self.machines.create("worker-own-1", "ams", CONFIG, TTL)
        await wait_until(lambda: held)

        await self.machines.stop(machine.id, lease.nonce)
        self.fake._create(held[0])
        held[0].write(b'{"Id": "1"}')
        held[0].finish()
        await self.machines.wait(machine, State.STOPPED, 20)

        self.assertEqual(0, self.fake.count("POST /containers/*/start"))
        self.assertEqual({}, self.fake.containers)

    async def test_shutdown_during_a_creation_waits_for_it_and_removes_the_container(self) -> None:
        await self.machines.list()
        held: list[Any] = []
        self.fake.answers["POST /containers/create"] = [hold(held)]
        await self.machines.create("worker-own-1", "ams", CONFIG, TTL)
        await wait_until(lambda: held)

        def create() -> None:
            request = held.pop()
            self.fake._create(request)
            request.write(b'{"Id": "1"}')
            request.finish()

        reactor.callLater(0.1, create)
        await self.shut_down()

        self.assertEqual([], held)
        self.assertEqual({}, self.fake.containers)

    async def test_exit_is_noticed_after_failures_of_the_engine(self) -> None:
        self.fake.answers["POST /containers/*/wait"] = [cut(), refuse(500, "restarting"), cut(b"{"), b"[]"]
        machine, _ = await self.started()
        await wait_until(lambda: self.fake.waits)
        self.assertIs(State.STARTED, self.state(machine))

        self.fake.exit(next(iter(self.fake.containers)), 1)

        await self.machines.wait(machine, State.STOPPED, 20)

    async def test_list_fails_while_the_engine_does(self) -> None:
        # The first on the connection that the lookup of the image left, which may have been closed since.
        self.fake.answers["GET /containers/json"] = [cut(), cut()]

        raised = await self.assertFailure(Deferred.fromCoroutine(self.machines.list()), UnavailableError)

        self.assertIn(self.host, str(raised))
        self.assertEqual([], await self.machines.list())

    async def test_shutdown_ends_although_the_engine_fails(self) -> None:
        await self.started()
        self.fake.answers["GET /containers/json"] = [refuse(500, "database is locked")]

        await self.shut_down()

        self.assertFalse(exists(f"{self.sockets}/own"))


class OwnershipTests(ContainersTestCase):
    def leave(self, name: str, pool: str) -> None:
        self.fake.containers[name] = {"Labels": {"bfaas.pool": pool, "bfaas.machine": name}}

    async def test_first_list_removes_what_an_earlier_instance_left(self) -> None:
        self.leave("worker-own-1.a", "own")
        self.leave("worker-other-1.a", "other")

        self.assertEqual([], await self.machines.list())

        self.assertEqual(["worker-other-1.a"], list(self.fake.containers))

    async def test_list_succeeds_although_a_container_cannot_be_removed(self) -> None:
        await self.machines.list()  # removes the container in which the image is examined
        self.leave("worker-own-1.a", "own")
        self.leave("worker-own-2.a", "own")
        self.fake.answers["DELETE /containers/*"] = [refuse(500, "device or resource busy")]

        self.assertEqual([], await self.machines.list())

        self.assertEqual(1, len(self.fake.containers))
        self.assertEqual([], await self.machines.list())
        self.assertEqual({}, self.fake.containers)

    async def test_list_does_not_wait_for_a_removal_that_hangs(self) -> None:
        self.patch(containers_module, "_UNKNOWN_REMOVAL_TIMEOUT", 0.1)
        await self.machines.list()
        self.leave("worker-own-1.a", "own")
        self.fake.answers["DELETE /containers/*"] = [silent]

        self.assertEqual([], await self.machines.list())

        self.assertEqual(1, len(self.fake.containers))

    async def test_list_keeps_own_containers(self) -> None:
        machine, _ = await self.started()

        self.assertEqual([machine.id], [found.id for found in await self.machines.list()])

        self.assertEqual(1, len(self.fake.containers))

    async def test_shutdown_removes_all_of_the_pool_and_no_other(self) -> None:
        await self.started()
        self.leave("worker-own-2.a", "own")
        self.leave("worker-other-1.a", "other")

        await self.shut_down()

        self.assertEqual(["worker-other-1.a"], list(self.fake.containers))

    async def test_inventory_shows_and_destroys_machines_of_all_pools(self) -> None:
        machine, _ = await self.started()
        self.leave("worker-other-1.a", "other")
        inventory = ContainerInventory(self.engine)

        found = {each.name: each for each in await inventory.list()}
        self.assertEqual({"worker-own-1", "worker-other-1"}, set(found))
        self.assertEqual((machine.id, State.STARTED), (found["worker-own-1"].id, found["worker-own-1"].state))
        await self.assertFailure(Deferred.fromCoroutine(inventory.get_lease(machine.id)), NotFoundError)
        await inventory.destroy(found["worker-other-1"].id, None)

        self.assertEqual(1, len(self.fake.containers))
        await self.assertFailure(Deferred.fromCoroutine(inventory.destroy("none", None)), NotFoundError)


class ImageTests(ContainersTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.fake.images = {}
        self.pull: list[Any] = []

    def begin_to_pull(self) -> None:
        progress = {"status": "Downloading", "id": "a", "progressDetail": {"current": 5, "total": 9}}
        self.fake.answers["POST /images/create"] = [hold(self.pull, json.dumps(progress).encode() + b"\r\n")]

    async def test_missing_image_is_pulled_while_lists_fail(self) -> None:
        self.begin_to_pull()
        for _ in range(2):
            raised = await self.assertFailure(Deferred.fromCoroutine(self.machines.list()), UnavailableError)
            self.assertIn("bfaas-basher is being pulled", str(raised))
        await wait_until(lambda: self.pull)
        self.assertEqual([b"bfaas-basher:latest"], self.pull[0].args[b"fromImage"])

        self.fake.images["bfaas-basher"] = IMAGE
        self.pull[0].finish()
        await self.machines.wait_for_image()

        self.assertEqual([], await self.machines.list())
        self.assertEqual(1, self.fake.count("POST /images/create"))

    async def test_failed_pull_is_reported_and_tried_again(self) -> None:
        for answer, text in (
            (refuse(404, "pull access denied"), "pull access denied"),
            (b'{"status": "Pulling"}\r\n{"error": "toomanyrequests"}\r\n', "toomanyrequests"),
            (cut(b'{"status": "Pu'), "no complete response"),
        ):
            self.fake.answers["POST /images/create"] = [answer]
            raised = await self.assertFailure(
                Deferred.fromCoroutine(self.machines.wait_for_image()), EngineError
            )
            self.assertIn(
                f"WORKER_IMAGE: cannot pull bfaas-basher: {'' if 'complete' in text else text}", str(raised)
            )
            self.assertIn(text, str(raised))

    async def test_examination_that_takes_longer_than_a_caller_waits_is_completed(self) -> None:
        self.fake.images = {"bfaas-basher": IMAGE}
        held: list[Any] = []
        self.fake.answers["GET /containers/*/archive"] = [hold(held)]
        impatient = Deferred.fromCoroutine(self.machines.list())
        await wait_until(lambda: held)
        impatient.cancel()
        await self.assertFailure(impatient, CancelledError)

        patient = Deferred.fromCoroutine(self.machines.list())
        held[0].write(tar(PASSWD))
        held[0].finish()

        self.assertEqual([], await patient)
        self.assertEqual(1, self.fake.count("POST /containers/create"))

    async def test_next_start_uses_a_newer_image_of_the_name(self) -> None:
        self.fake.images["bfaas-basher"] = IMAGE
        machine, nonce = await self.started()
        await self.machines.stop(machine.id, nonce)
        await self.machines.wait(machine, State.STOPPED, 20)

        self.fake.images["bfaas-basher"] = {"Id": "sha256:2", "Config": {"Env": None}}
        await self.machines.start(machine.id, nonce)
        await self.machines.wait(machine, State.STARTED, 20)

        self.assertEqual("sha256:2", self.fake.bodies[-1]["Image"])
        self.assertIn("HOME=/home/worker", self.fake.bodies[-1]["Env"])


class SocketDirectoryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.parent = tempfile.mkdtemp(prefix="bfaas-test-")
        self.addCleanup(shutil.rmtree, self.parent)

    def create(self, pool: str = "own") -> SocketDirectory:
        return SocketDirectory.create(self.parent, pool)

    def test_only_one_coordinator_of_a_name_runs(self) -> None:
        first = self.create()
        raised = self.assertRaises(HostError, self.create)
        self.assertIn("another coordinator named own is running", str(raised))
        self.create("other").close()

        first.close()
        self.create().close()

    def test_takes_over_and_empties_the_directory_of_a_dead_one(self) -> None:
        left = Path(self.parent, "own", "abc", "run")
        left.mkdir(parents=True)
        left.parent.parent.chmod(0o700)

        directory = self.create()

        self.assertEqual([], list(directory.path.iterdir()))
        directory.close()

    def test_others_cannot_have_prepared_it(self) -> None:
        Path(self.parent, "own").mkdir(mode=0o777)
        Path(self.parent, "own").chmod(0o777)
        self.assertRaises(HostError, self.create)
        Path(self.parent, "link").symlink_to("/etc")
        self.assertRaises(HostError, self.create, "link")

    def test_paths_fit_a_socket_address(self) -> None:
        room = 107 - len(f"{self.parent}//000000000000/run/worker.sock")
        self.assertIn("too long by 1 ", str(self.assertRaises(HostError, self.create, "p" * (room + 1))))
        directory = self.create("p" * room)
        self.assertEqual(107, len(directory.new_socket()))
        directory.close()

    def test_default_is_the_directory_of_the_service(self) -> None:
        self.assertEqual("/run/bfaas", default_parent({"RUNTIME_DIRECTORY": "/run/bfaas:/run/more"}))


class ImageAccountsTests(SynchronousTestCase):
    def test_user_is_found_by_name_or_number(self) -> None:
        for user in ("worker", "10001"):
            accounts = ImageAccounts.from_archive(tar(PASSWD), user)
            self.assertEqual(10002, accounts.gid)
            self.assertEqual(PASSWD.decode().replace("10001", "77"), accounts.with_uid(77))

    def test_other_accounts_are_left_alone(self) -> None:
        for user in ("", "nobody", "work"):
            accounts = ImageAccounts.from_archive(tar(PASSWD), user)
            self.assertEqual((None, PASSWD.decode()), (accounts.gid, accounts.with_uid(77)))
        for archive in (b"", b"no archive", tar(b"")):
            self.assertEqual("", ImageAccounts.from_archive(archive, "worker").with_uid(77))
        broken = b"worker\nworker:x:1:x:::\n:::\n"
        self.assertEqual(broken.decode(), ImageAccounts.from_archive(tar(broken), "worker").with_uid(77))
