"""What a deployment is made of: the images' recipe, Fly's files, the script that brings out a new worker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import IO, Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from bfaas.machines.codec import decode_config, encode_config
from bfaas.pooling.config import StepTimeouts, pool_config
from bfaas.settings import CoordSettings
from bfaas.tokens import genkey
from tests.project.lock import needed
from tests.support.paths import ROOT

FAKE_FLY = """#!/bin/bash
echo "$*" >> "$CALLS"
case $1 in
deploy)
    echo "--> Pushing image done"
    [ -z "${IMAGE:-}" ] || printf 'image: %s' "$IMAGE${END-$'\\n'}"
    exit "${STATUS:-0}" ;;
esac
"""


def read(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / name).read_text())


class FlyFileTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.fly, self.basher = read("fly.toml"), read("fly.toml.basher")
        secrets = {"PRIVATE": genkey().private, "FLY_TOKEN": "t", "WORKER_IMAGE": "i"}
        given = {"FLY_MACHINE_ID": "m1", "FLY_REGION": "ams"}
        self.environ = {**self.fly["env"], **secrets, **given}
        self.settings = CoordSettings.from_environment(self.environ)

    def test_its_environment_and_the_secrets_are_all_that_a_coordinator_needs(self) -> None:
        assert self.settings.fly is not None
        self.assertEqual(self.basher["app"], self.settings.fly.api.worker_app)
        self.assertGreater(self.settings.pool_size, self.settings.standby)
        self.assertGreater(self.settings.standby, 0)

    def test_no_variable_of_it_has_a_name_that_fly_reserves(self) -> None:
        # https://fly.io/docs/reference/configuration/#the-env-variables-section
        self.assertEqual([], [name for name in self.fly["env"] if name.startswith("FLY_")])

    def test_every_variable_is_documented(self) -> None:
        document = (ROOT / "docs" / "configuration.md").read_text()
        for name in self.fly["env"]:
            self.assertIn(f"`{name}`", document)

    def test_a_coordinator_has_the_time_to_end_in_order(self) -> None:
        # While the API hangs: a stop and the wait for it, then two attempts to destroy.
        needs = self.settings.max_req_time + 2 * StepTimeouts().stop + 2 * StepTimeouts().destroy
        self.assertEqual("SIGTERM", self.fly["kill_signal"])
        self.assertGreaterEqual(self.fly["kill_timeout"], needs)
        self.assertGreater(self.fly["kill_timeout"], self.settings.max_req_time + StepTimeouts().exit)
        self.assertLessEqual(self.fly["kill_timeout"], 300)

    def test_its_own_refusals_come_before_those_of_the_proxy(self) -> None:
        concurrency = self.fly["http_service"]["concurrency"]
        self.assertEqual("requests", concurrency["type"])
        self.assertGreater(concurrency["hard_limit"], self.settings.pool_size + self.settings.max_queue)

    def test_streams_are_not_held_back_and_silent_ones_not_cut(self) -> None:
        options = self.fly["http_service"]["http_options"]
        self.assertIs(False, options["compress"])
        self.assertEqual(self.settings.proxy_idle_timeout, options["idle_timeout"])
        self.assertEqual((), self.settings.idle_timeout_warnings)

    def test_the_workers_service_keeps_silent_runs(self) -> None:
        for most in ("10s", "5m", "0.5s"):
            environ = {**self.environ, "MAXREQTIME": most, "MAXWAIT": "30s"}
            settings = CoordSettings.from_environment(environ)
            config = encode_config(pool_config(settings).template)
            [port] = config["services"][0]["ports"]
            self.assertIs(False, port["http_options"]["compress"])
            self.assertGreater(port["http_options"]["idle_timeout"], settings.max_req_time)
            self.assertGreater(port["http_options"]["idle_timeout"], settings.max_wait)
            self.assertEqual(pool_config(settings).template, decode_config(config))

    def test_no_key_is_unknown_to_flyctl(self) -> None:
        known = json.loads((ROOT / "tests/data/fly_toml_keys.json").read_text())["keys"]

        def check(place: str, table: dict[str, Any]) -> None:
            names = known[place]
            self.assertLessEqual(set(table), set(names), place)
            for name, value in table.items():
                if name in ("env", "headers"):
                    continue
                for item in value if isinstance(value, list) else [value]:
                    if isinstance(item, dict):
                        check(f"{place}.{name}".lstrip("."), item)

        for app in (self.fly, self.basher):
            checks = app.pop("checks", {})
            check("", app)
            for checked in checks.values():
                check("checks.*", checked)

    def test_the_port_is_the_one_that_it_listens_on(self) -> None:
        ports = {self.fly["http_service"]["internal_port"], self.fly["checks"]["ready"]["port"]}
        self.assertEqual({8000}, ports)

    def test_the_metrics_are_where_the_image_tells_them(self) -> None:
        self.assertEqual("/metrics", self.fly["metrics"]["path"])
        [entry] = re.findall(
            r"^ENTRYPOINT (.*bfaas-coord.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
        )
        endpoint = json.loads(entry)[-1]
        self.assertEqual(f"tcp:{self.fly['metrics']['port']}:interface=\\:\\:", endpoint)
        reactor = MemoryReactorClock()
        self.successResultOf(serverFromString(reactor, endpoint).listen(Factory.forProtocol(Protocol)))
        [(_, _, _, interface)] = reactor.tcpServers
        self.assertEqual("::", interface)  # Fly's private network is IPv6

    def test_workers_have_no_address_of_their_own_and_no_settings(self) -> None:
        self.assertEqual({"app", "primary_region", "build"}, set(self.basher))

    def test_a_coordinator_s_image_can_verify_certificates(self) -> None:
        stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
        base, built, coord = (
            next(stage for stage in stages if f" AS {name}\n" in stage)
            for name in ("python", "built", "coord")
        )
        self.assertIn(" ca-certificates ", base)
        self.assertTrue(coord.startswith("python AS coord\n"))
        self.assertIn("COPY --from=built /opt/bfaas /opt/bfaas\n", coord)
        self.assertNotIn("rm -r /opt", built + coord)
        lock = (ROOT / "requirements.lock").read_text()
        for package in ("pyOpenSSL", "service-identity"):
            self.assertIn(f"\n{package}==", lock)

    def test_the_targets_are_there(self) -> None:
        targets = re.findall(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for app in (self.fly, self.basher):
            self.assertIn(app["build"]["build-target"], targets)


class WorkerImageTests(SynchronousTestCase):
    def test_the_worker_starts_without_what_its_image_lacks(self) -> None:
        lacks = re.findall(r"/site-packages/(\w+)", (ROOT / "Dockerfile").read_text())
        self.assertIn("OpenSSL", lacks)
        missing = f"import sys; sys.modules.update(dict.fromkeys({lacks}))"
        code = f"{missing}; import bfaas.basher, bfaas.worker.app, twisted.internet.reactor; print('fine')"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        self.assertEqual((b"fine\n", b""), (said.stdout, said.stderr))


class LockTests(SynchronousTestCase):
    def test_it_names_all_that_is_needed_and_nothing_else_one_version_each(self) -> None:
        lines = (ROOT / "requirements.lock").read_text().splitlines()[1:]
        names = [line.split("==")[0] for line in lines]

        self.assertEqual(sorted(needed(), key=str.lower), names)
        for line in lines:
            self.assertRegex(line, r"^[\w.-]+==[\d.]+$")


class UpdateWorkerTests(SynchronousTestCase):
    def update(
        self, *options: str, output: IO[bytes] | None = None, **env: str
    ) -> tuple[int, str, list[str]]:
        """
        Run it with a flyctl that takes notes; tells the exit code, what was said, and the notes.

        What is said to a file, `output`, is not told.
        """
        home = Path(self.mktemp()).absolute()
        home.mkdir(parents=True)
        (home / "fly").write_text(FAKE_FLY)
        (home / "fly").chmod(0o755)
        calls = home / "calls"
        environment = {"PATH": f"{home}:{os.environ['PATH']}", "CALLS": str(calls), **env}
        done = subprocess.run(
            [ROOT / "updateWorker.sh", *options],
            env=environment,
            stdout=output or subprocess.PIPE,
            stderr=output or subprocess.PIPE,
            check=False,
        )
        called = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, ((done.stdout or b"") + (done.stderr or b"")).decode(), called

    def test_it_builds_pushes_and_tells_the_coordinators(self) -> None:
        status, said, called = self.update("--label", "v1", IMAGE="example.invalid/bfaas-basher:v1")

        expected = [
            "deploy --config fly.toml.basher --app bfaas-basher --build-only --push --image-label v1",
            "secrets set --app bfaas-coord WORKER_IMAGE=example.invalid/bfaas-basher:v1",
        ]
        self.assertEqual((0, expected), (status, called))
        self.assertIn("of bfaas-coord now use example.invalid/bfaas-basher:v1\n", said)

    def test_other_apps_can_be_named(self) -> None:
        _, _, called = self.update("--worker-app", "w", "--coord-app", "c", IMAGE="i")
        self.assertRegex(called[0], "--app w --build-only --push --image-label [0-9]{8}-[0-9]{6}")
        self.assertEqual("secrets set --app c WORKER_IMAGE=i", called[1])

    def test_nothing_is_set_after_a_failure(self) -> None:
        for env, why in (({"IMAGE": "i", "STATUS": "3"}, "Pushing"), ({}, "nothing was set")):
            status, said, called = self.update("--label", "v1", output=None, **env)
            self.assertNotEqual(0, status)
            self.assertIn(why, said)
            self.assertEqual(1, len(called))

    def test_a_last_line_without_an_end_is_read(self) -> None:
        status, _, called = self.update("--label", "v1", IMAGE="i", END="")
        self.assertEqual((0, "secrets set --app bfaas-coord WORKER_IMAGE=i"), (status, called[1]))

    def test_a_log_that_it_is_appended_to_is_kept(self) -> None:
        log = Path(self.mktemp())
        log.write_text("before\n")
        with log.open("ab") as end:
            self.update("--label", "v1", output=end, IMAGE="i")
        self.assertEqual(
            ["before", "--> Pushing image done", "image: i", "the coordinators of bfaas-coord now use i"],
            log.read_text().splitlines(),
        )

    def test_it_can_be_tried_without_doing_anything(self) -> None:
        status, said, called = self.update("--dry-run", "--label", "v1")
        self.assertEqual((0, []), (status, called))
        self.assertIn("--image-label v1\nfly secrets set --app bfaas-coord WORKER_IMAGE=IMAGE\n", said)

    def test_what_it_does_not_know_is_refused(self) -> None:
        for options in (["--nonsense"], ["--label"]):
            status, said, called = self.update(*options)
            self.assertEqual((2, []), (status, called))
            self.assertIn("updateWorker.sh", said)
