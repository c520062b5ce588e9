"""Check the Dockerfile, Fly's files, and the script that deploys a new worker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import IO, Any

import yaml
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


class ServerFileTests(SynchronousTestCase):
    """The files of docs/deploy-docker.md, for systemd and Compose."""

    def setUp(self) -> None:
        self.document = (ROOT / "docs" / "deploy-docker.md").read_text()
        self.unit = ConfigParser(strict=False, interpolation=None)
        self.unit.optionxform = str  # type: ignore[assignment,method-assign]
        self.unit.read(ROOT / "deploy" / "bfaas.service")

    def test_commands_are_those_of_a_shell_and_name_files_that_exist(self) -> None:
        blocks = re.findall(r"(?ms)^```\n(.*?)^```$", self.document)
        self.assertEqual(4, len(blocks))
        for block in blocks:
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for path in re.findall(r"deploy/[\w.]+", self.document):
            self.assertTrue((ROOT / path).is_file(), path)

    def test_unit_has_the_user_and_the_files_of_the_commands(self) -> None:
        service = self.unit["Service"]
        self.assertIn(f"/usr/sbin/nologin {service['User']}\n", self.document)
        self.assertIn(f"cp deploy/bfaas.env {service['EnvironmentFile']}\n", self.document)
        self.assertIn(service["ExecStart"].split(" ")[0].rpartition("/")[0], self.document)
        self.assertIn("--unix-socket /run/bfaas/coord.sock", self.document)
        self.assertIn("unix:/run/bfaas/coord.sock:", service["ExecStart"])

    def test_settings_are_valid_and_the_unit_waits_for_runs_to_end(self) -> None:
        lines = (ROOT / "deploy" / "bfaas.env").read_text().splitlines()
        environ = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
        settings = CoordSettings.from_environment(environ)
        assert settings.docker is not None
        self.assertEqual((), settings.idle_timeout_warnings)
        self.assertIn(f"touch {settings.access}\n", self.document)
        seconds = settings.max_req_time + StepTimeouts().exit
        self.assertLess(seconds, int(self.unit["Service"]["TimeoutStopSec"]))

    def test_compose_file_mounts_the_directory_of_the_sockets_at_its_own_path(self) -> None:
        compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
        [service] = compose["services"].values()
        settings = CoordSettings.from_environment(service["environment"])
        assert settings.docker is not None
        directory = settings.docker.socket_directory
        self.assertIn(f"{directory}:{directory}", service["volumes"])
        self.assertIn("/var/run/docker.sock:/var/run/docker.sock", service["volumes"])


class FlyFileTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.fly, self.basher = read("fly.toml"), read("fly.toml.basher")
        secrets = {"PRIVATE": genkey().private, "FLY_TOKEN": "t", "WORKER_IMAGE": "i"}
        from_fly = {"FLY_MACHINE_ID": "m1", "FLY_REGION": "ams"}
        self.environ = {**self.fly["env"], **secrets, **from_fly}
        self.settings = CoordSettings.from_environment(self.environ)

    def test_environment_and_secrets_are_sufficient_for_a_coordinator(self) -> None:
        assert self.settings.fly is not None
        self.assertEqual(self.basher["app"], self.settings.fly.api.worker_app)
        self.assertGreater(self.settings.pool_size, self.settings.standby)
        self.assertGreater(self.settings.standby, 0)

    def test_variables_do_not_have_reserved_names(self) -> None:
        # https://fly.io/docs/reference/configuration/#the-env-variables-section
        self.assertEqual([], [name for name in self.fly["env"] if name.startswith("FLY_")])

    def test_every_variable_is_documented(self) -> None:
        document = (ROOT / "docs" / "configuration.md").read_text()
        for name in self.fly["env"]:
            self.assertIn(f"`{name}`", document)

    def test_kill_timeout_covers_a_shutdown(self) -> None:
        # While the API hangs: a stop and the wait for it, then two attempts to destroy.
        required = self.settings.max_req_time + 2 * StepTimeouts().stop + 2 * StepTimeouts().destroy
        self.assertEqual("SIGTERM", self.fly["kill_signal"])
        self.assertGreaterEqual(self.fly["kill_timeout"], required)
        self.assertGreater(self.fly["kill_timeout"], self.settings.max_req_time + StepTimeouts().exit)
        self.assertLessEqual(self.fly["kill_timeout"], 300)

    def test_proxy_limit_is_above_the_coordinators_own(self) -> None:
        concurrency = self.fly["http_service"]["concurrency"]
        self.assertEqual("requests", concurrency["type"])
        self.assertGreater(concurrency["hard_limit"], self.settings.pool_size + self.settings.max_queue)

    def test_proxy_neither_buffers_streams_nor_closes_silent_ones(self) -> None:
        options = self.fly["http_service"]["http_options"]
        self.assertIs(False, options["compress"])
        self.assertEqual(self.settings.proxy_idle_timeout, options["idle_timeout"])
        self.assertEqual((), self.settings.idle_timeout_warnings)

    def test_workers_service_keeps_silent_runs_open(self) -> None:
        for max_req_time in ("10s", "5m", "0.5s"):
            environ = {**self.environ, "MAXREQTIME": max_req_time, "MAXWAIT": "30s"}
            settings = CoordSettings.from_environment(environ)
            config = encode_config(pool_config(settings).template)
            [port] = config["services"][0]["ports"]
            self.assertIs(False, port["http_options"]["compress"])
            self.assertGreater(port["http_options"]["idle_timeout"], settings.max_req_time)
            self.assertGreater(port["http_options"]["idle_timeout"], settings.max_wait)
            self.assertEqual(pool_config(settings).template, decode_config(config))

    def test_flyctl_knows_all_keys(self) -> None:
        known = json.loads((ROOT / "tests/data/fly_toml_keys.json").read_text())["keys"]

        def check(section: str, table: dict[str, Any]) -> None:
            names = known[section]
            self.assertLessEqual(set(table), set(names), section)
            for name, value in table.items():
                if name in ("env", "headers"):
                    continue
                for item in value if isinstance(value, list) else [value]:
                    if isinstance(item, dict):
                        check(f"{section}.{name}".lstrip("."), item)

        for app in (self.fly, self.basher):
            checks = app.pop("checks", {})
            check("", app)
            for item in checks.values():
                check("checks.*", item)

    def test_port_is_the_coordinators(self) -> None:
        ports = {self.fly["http_service"]["internal_port"], self.fly["checks"]["ready"]["port"]}
        self.assertEqual({8000}, ports)

    def test_metrics_port_is_that_of_the_image(self) -> None:
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

    def test_workers_app_has_no_service_and_no_settings(self) -> None:
        self.assertEqual({"app", "primary_region", "build"}, set(self.basher))

    def test_coordinators_image_can_verify_certificates(self) -> None:
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

    def test_build_targets_exist(self) -> None:
        targets = re.findall(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for app in (self.fly, self.basher):
            self.assertIn(app["build"]["build-target"], targets)


class WorkerImageTests(SynchronousTestCase):
    def test_worker_starts_without_the_packages_that_its_image_lacks(self) -> None:
        removed = re.findall(r"/site-packages/(\w+)", (ROOT / "Dockerfile").read_text())
        self.assertIn("OpenSSL", removed)
        missing = f"import sys; sys.modules.update(dict.fromkeys({removed}))"
        code = f"{missing}; import bfaas.basher, bfaas.worker.app, twisted.internet.reactor; print('fine')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        self.assertEqual((b"fine\n", b""), (done.stdout, done.stderr))


class LockTests(SynchronousTestCase):
    def test_it_pins_every_dependency_and_nothing_else(self) -> None:
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
        Run the script with a fake flyctl. Return the exit code, the output, and the calls of flyctl.

        Output that goes to the file `output` is not returned.
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
        recorded = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, ((done.stdout or b"") + (done.stderr or b"")).decode(), recorded

    def test_it_builds_pushes_and_sets_the_image(self) -> None:
        status, output, calls = self.update("--label", "v1", IMAGE="example.invalid/bfaas-basher:v1")

        expected = [
            "deploy --config fly.toml.basher --app bfaas-basher --build-only --push --image-label v1",
            "secrets set --app bfaas-coord WORKER_IMAGE=example.invalid/bfaas-basher:v1",
        ]
        self.assertEqual((0, expected), (status, calls))
        self.assertIn("of bfaas-coord now use example.invalid/bfaas-basher:v1\n", output)

    def test_options_select_other_apps(self) -> None:
        _, _, calls = self.update("--worker-app", "w", "--coord-app", "c", IMAGE="i")
        self.assertRegex(calls[0], "--app w --build-only --push --image-label [0-9]{8}-[0-9]{6}")
        self.assertEqual("secrets set --app c WORKER_IMAGE=i", calls[1])

    def test_nothing_is_set_after_a_failure(self) -> None:
        for env, reason in (({"IMAGE": "i", "STATUS": "3"}, "Pushing"), ({}, "nothing was set")):
            status, output, calls = self.update("--label", "v1", output=None, **env)
            self.assertNotEqual(0, status)
            self.assertIn(reason, output)
            self.assertEqual(1, len(calls))

    def test_image_in_an_unterminated_last_line_is_read(self) -> None:
        status, _, calls = self.update("--label", "v1", IMAGE="i", END="")
        self.assertEqual((0, "secrets set --app bfaas-coord WORKER_IMAGE=i"), (status, calls[1]))

    def test_output_file_is_appended_to_not_truncated(self) -> None:
        log = Path(self.mktemp())
        log.write_text("before\n")
        with log.open("ab") as end:
            self.update("--label", "v1", output=end, IMAGE="i")
        self.assertEqual(
            ["before", "--> Pushing image done", "image: i", "the coordinators of bfaas-coord now use i"],
            log.read_text().splitlines(),
        )

    def test_dry_run_does_nothing(self) -> None:
        status, output, calls = self.update("--dry-run", "--label", "v1")
        self.assertEqual((0, []), (status, calls))
        self.assertIn("--image-label v1\nfly secrets set --app bfaas-coord WORKER_IMAGE=IMAGE\n", output)

    def test_invalid_options_are_rejected(self) -> None:
        for options in (["--nonsense"], ["--label"]):
            status, output, calls = self.update(*options)
            self.assertEqual((2, []), (status, calls))
            self.assertIn("updateWorker.sh", output)
