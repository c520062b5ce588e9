"""Tests of machines in containers, on the engine in DOCKER_HOST, with the image `bfaas-basher`."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from bfaas.machines.local.containers import ContainerInventory, compose_container_machines
from bfaas.machines.local.engine import Engine, examine_engine
from bfaas.settings import CoordSettings
from tests.support import machines_contract
from tests.support.hostile_worker import reactor

if TYPE_CHECKING:
    from bfaas.settings import DockerSettings


def docker_settings(test: Any, **extra: str) -> DockerSettings:
    """Return settings for the engine in DOCKER_HOST; skip the test if there is none."""
    if not os.environ.get("DOCKER_HOST"):
        test.skipTest("DOCKER_HOST is not set")
    directory = tempfile.TemporaryDirectory(prefix="bfaas-sockets-")
    test.addCleanup(directory.cleanup)
    environ = {
        "WORKER_APP": "docker",
        "MAXREQTIME": "10s",
        "WORKER_SOCKETS": directory.name,
        "DOCKER_HOST": os.environ["DOCKER_HOST"],
        **extra,
    }
    settings = CoordSettings.from_environment(environ).docker
    assert settings is not None
    return settings


class ContainersContract(machines_contract.MachinesContract):
    timeout = 120

    def setUp(self) -> None:
        settings = docker_settings(self)
        machines = self.api = compose_container_machines(reactor, self.wall, settings, "contract", os.environ)

        async def shut_down() -> None:
            await machines.shutdown()
            engine = Engine(reactor, settings.engine, examine_engine(settings.engine))
            left = await ContainerInventory(engine).list()
            await engine.close()
            self.assertEqual([], [machine for machine in left if machine.name == "m"])

        self.addCleanup(lambda: Deferred.fromCoroutine(shut_down()))
