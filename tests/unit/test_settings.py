"""Settings from environment variables: defaults, values, and the lines of invalid ones."""

from __future__ import annotations

from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from bfaas.access_tokens import AccessToken, AccessTokens
from bfaas.settings import (
    ApiSettings,
    BasherSettings,
    CoordSettings,
    DockerSettings,
    EngineSettings,
    FlySettings,
    SettingsError,
)
from bfaas.tokens import Signer, genkey

PAIR = genkey()

# The required variables of each role.
MOCK = {"MAXREQTIME": "10s", "WORKER_APP": "mock"}
DOCKER = {"MAXREQTIME": "10s", "WORKER_APP": "docker"}
FLY = {
    "WORKER_IMAGE": "registry/basher:1",
    "FLY_TOKEN": "FlyV1 secret",
    "MAXREQTIME": "1m30s",
    "WORKER_APP": "bfaas-workers",
    "PRIVATE": PAIR.private,
    "FLY_MACHINE_ID": "3d8d9d",
    "FLY_REGION": "ams",
}
BASHER = {"PUBLIC": PAIR.public, "FLY_MACHINE_ID": "3d8d9d"}


class CoordSettingsTests(SynchronousTestCase):
    def problems(self, environ: dict[str, str]) -> tuple[str, ...]:
        error = self.assertRaises(SettingsError, CoordSettings.from_environment, environ)
        self.assertEqual("\n".join(error.problems), str(error))
        for line in error.problems:
            self.assertEqual(1, len(line.splitlines()), line)
        return tuple(error.problems)

    def test_defaults_with_local_machines(self) -> None:
        found = CoordSettings.from_environment(MOCK)

        expected = CoordSettings(
            max_req_time=10.0,
            fly=None,
            replay=False,
            signer=found.signer,
            machine_id="mock",
            region="local",
            pool_size=2,
            standby=0,
            standby_suspended=False,
            worker_cpus=1,
            worker_memory_mb=256,
            max_wait=30.0,
            max_queue=100,
            max_per_client=20,
            max_body=1_048_576,
            max_output=67_108_864,
        )
        self.assertEqual(expected, found)

    def test_local_machines_get_a_new_key_each_time(self) -> None:
        first, second = (CoordSettings.from_environment(MOCK).signer for _ in range(2))

        self.assertNotEqual(first.public, second.public)

    def test_key_and_names_can_be_set_for_local_machines(self) -> None:
        environ = {"PRIVATE": PAIR.private, "FLY_MACHINE_ID": "laptop_1", "FLY_REGION": "home"}
        found = CoordSettings.from_environment(MOCK | environ)

        self.assertEqual(
            (PAIR.public, "laptop_1", "home"), (found.signer.public, found.machine_id, found.region)
        )

    def test_reads_every_variable(self) -> None:
        tuning = {
            "FLY_FLAPS_BASE_URL": "http://127.0.0.1:4280/",
            "FLY_REPLAY": "on",
            "POOLSIZE": "7",
            "POOL_STANDBY": "3",
            "POOL_STANDBY_STATE": "suspended",
            "WORKER_CPUS": "2",
            "WORKER_MEMORY_MB": "512",
            "MAXWAIT": "250ms",
            "MAXQUEUE": "0",
            "MAXPERCLIENT": "3",
            "MAXBODY": "64 KiB",
            "MAXOUTPUT": " 1MB ",
            "POOL_ON_EXIT": "destroy",
            "PROXY_IDLE_TIMEOUT": "10m",
            "ACCESS_TOKENS": f"alice:{'a' * 64},bob:{'b' * 64}",
        }
        found = CoordSettings.from_environment(FLY | tuning)

        expected = CoordSettings(
            max_req_time=90.0,
            fly=FlySettings(
                ApiSettings("bfaas-workers", "http://127.0.0.1:4280", "FlyV1 secret"),
                "registry/basher:1",
                "http://bfaas-workers.flycast",
            ),
            replay=True,
            signer=found.signer,
            machine_id="3d8d9d",
            region="ams",
            pool_size=7,
            standby=3,
            standby_suspended=True,
            worker_cpus=2,
            worker_memory_mb=512,
            max_wait=0.25,
            max_queue=0,
            max_per_client=3,
            max_body=65_536,
            max_output=1_000_000,
            destroy_on_exit=True,
            proxy_idle_timeout=600.0,
            access=AccessTokens(
                (AccessToken("alice", bytes.fromhex("a" * 64)), AccessToken("bob", bytes.fromhex("b" * 64)))
            ),
        )
        self.assertEqual(expected, found)
        self.assertEqual(PAIR.public, found.signer.public)
        self.assertNotIn("FlyV1 secret", repr(found))

    def test_reports_all_missing_variables_together(self) -> None:
        expected = (
            "WORKER_APP: missing; a Fly app; docker or mock for local machines",
            "MAXREQTIME: missing; a duration such as 10s",
            "FLY_TOKEN: missing; an API token that can manage the worker app",
            "WORKER_IMAGE: missing; the image of workers",
            "PRIVATE: missing; a private key from `bfaas genkey`",
            "FLY_MACHINE_ID: missing; this machine's name",
            "FLY_REGION: missing; a region such as ams",
        )
        self.assertEqual(expected, self.problems({}))
        self.assertEqual(expected, self.problems(dict.fromkeys(FLY, " \t")))

    def test_defaults_with_containers(self) -> None:
        found = CoordSettings.from_environment(DOCKER)

        engine = EngineSettings("unix:///var/run/docker.sock", "/var/run/docker.sock")
        self.assertEqual(DockerSettings(engine, "bfaas-basher", 64, "none", "", None), found.docker)
        self.assertEqual((None, "docker", "local"), (found.fly, found.machine_id, found.region))

    def test_reads_every_variable_of_containers(self) -> None:
        tuning = {
            "DOCKER_HOST": "tcp://10.0.0.1:2376",
            "DOCKER_TLS_VERIFY": "1",
            "DOCKER_CERT_PATH": "/certs",
            "WORKER_IMAGE": "registry:5000/team/basher:v1.2@sha256:ab",
            "WORKER_DISK_MB": "10",
            "WORKER_NETWORK": "my_net.1",
            "WORKER_RUNTIME": "io.containerd.runsc.v1",
            "WORKER_SOCKETS": "/run/sockets",
            "POOL_STANDBY_STATE": "suspended",
            "WORKER_MEMORY_MB": "4096",
        }
        found = CoordSettings.from_environment(DOCKER | tuning)

        engine = EngineSettings("tcp://10.0.0.1:2376", None, "https://10.0.0.1:2376", "/certs")
        expected = DockerSettings(
            engine, tuning["WORKER_IMAGE"], 10, "my_net.1", "io.containerd.runsc.v1", "/run/sockets"
        )
        self.assertEqual(expected, found.docker)

    def test_invalid_settings_of_containers(self) -> None:
        for name, value, problem in (
            ("DOCKER_HOST", "npipe:////./pipe/docker_engine", "is neither unix:///PATH nor tcp://HOST:PORT"),
            ("DOCKER_HOST", "tcp://host", "is neither unix:///PATH nor tcp://HOST:PORT"),
            ("DOCKER_HOST", "tcp://host:0", "has an invalid port: 1 to 65535"),
            ("DOCKER_HOST", "unix://relative", "is neither unix:///PATH nor tcp://HOST:PORT"),
            ("WORKER_IMAGE", "a b", "is not the name of an image"),
            ("WORKER_IMAGE", "-x", "is not the name of an image"),
            ("WORKER_DISK_MB", "0", "is not above zero"),
            ("WORKER_NETWORK", "host", "would give scripts the network of this host"),
            (
                "WORKER_NETWORK",
                "container:x",
                "is not a name of letters, digits, dots, dashes and underscores",
            ),
            ("WORKER_RUNTIME", "../x", "is not a name of letters, digits, dots, dashes and underscores"),
            ("WORKER_SOCKETS", "sockets", "is not an absolute path"),
        ):
            [line] = self.problems(DOCKER | {name: value})
            self.assertTrue(line.startswith(f"{name}: "), line)
            self.assertIn(problem, line)
        tls = {"DOCKER_HOST": "tcp://host:2376", "DOCKER_TLS_VERIFY": "1"}
        self.assertEqual(
            ("DOCKER_CERT_PATH: missing; the directory of ca.pem, cert.pem and key.pem",),
            self.problems(DOCKER | tls),
        )

    def test_warns_of_limits_beyond_the_idle_timeout_of_the_proxy(self) -> None:
        for environ, names in (
            (MOCK | {"MAXREQTIME": "1h"}, []),  # no proxy
            (MOCK | {"MAXREQTIME": "1h", "PROXY_IDLE_TIMEOUT": "60s"}, ["MAXREQTIME"]),
            (FLY | {"MAXREQTIME": "59s"}, []),
            (FLY | {"MAXREQTIME": "60s"}, ["MAXREQTIME"]),
            (FLY | {"MAXREQTIME": "10s", "MAXWAIT": "2m"}, ["MAXWAIT"]),
            (FLY | {"MAXREQTIME": "5m", "MAXWAIT": "2m"}, ["MAXWAIT", "MAXREQTIME"]),
            (FLY | {"MAXREQTIME": "5m", "MAXWAIT": "2m", "PROXY_IDLE_TIMEOUT": "600s"}, []),
        ):
            warnings = CoordSettings.from_environment(environ).idle_timeout_warnings
            self.assertEqual(names, [line.split()[0] for line in warnings], environ)
            for line in warnings:
                self.assertIn("PROXY_IDLE_TIMEOUT", line)

    def test_access_tokens_can_be_in_a_file(self) -> None:
        found = CoordSettings.from_environment(MOCK | {"ACCESS_TOKENS": "@tokens"})
        self.assertEqual(Path("tokens").absolute(), found.access)

    def test_invalid_access_token_is_not_shown(self) -> None:
        problems = self.problems(MOCK | {"ACCESS_TOKENS": f"alice:{'a' * 64},bfaas_secret"})
        self.assertEqual(
            ("ACCESS_TOKENS: line 2 is not NAME:DIGEST, as `bfaas token NAME` prints it",), problems
        )

    def test_blank_value_means_the_default(self) -> None:
        self.assertEqual(2, CoordSettings.from_environment(MOCK | {"POOLSIZE": " "}).pool_size)
        for on_exit in ("", "stop"):
            found = CoordSettings.from_environment(MOCK | {"POOL_ON_EXIT": on_exit})
            self.assertIs(False, found.destroy_on_exit)

    def test_reports_all_invalid_values_together(self) -> None:
        environ = {
            "MAXREQTIME": "10",
            "FLY_MACHINE_ID": "a b",
            "POOLSIZE": "x",
            "WORKER_CPUS": "0",
            "WORKER_MEMORY_MB": "1.5",
            "MAXWAIT": "-1s",
            "MAXQUEUE": "-1",
            "MAXPERCLIENT": "0",
            "MAXBODY": "big",
            "MAXOUTPUT": "0B",
            "FLY_REPLAY": "maybe",
            "POOL_STANDBY": "-1",
            "POOL_STANDBY_STATE": "asleep",
            "POOL_ON_EXIT": "Destroy",
        }
        expected = (
            'POOLSIZE: "x" is not a whole number',
            'POOL_STANDBY_STATE: "asleep" is neither started nor suspended',
            'MAXREQTIME: "10" is not a duration such as 1m30s',
            'FLY_REPLAY: "maybe" is neither on nor off',
            'FLY_MACHINE_ID: "a b" is not 1 to 63 letters, digits, dashes and underscores',
            'POOL_STANDBY: "-1" is below zero',
            'WORKER_CPUS: "0" is not above zero',
            'WORKER_MEMORY_MB: "1.5" is not a whole number',
            'MAXWAIT: "-1s" is not above zero',
            'MAXQUEUE: "-1" is below zero',
            'MAXPERCLIENT: "0" is not above zero',
            'MAXBODY: "big" is not a size such as 1MiB',
            'MAXOUTPUT: "0B" is not above zero',
            'POOL_ON_EXIT: "Destroy" is neither stop nor destroy',
        )
        self.assertEqual(expected, self.problems(MOCK | environ))

    def test_invalid_app_name_is_a_problem(self) -> None:
        problem = 'WORKER_APP: "a/../b" is not 1 to 63 letters, digits, dashes and underscores'

        self.assertEqual((problem,), self.problems(FLY | {"WORKER_APP": "a/../b"}))

    def test_url_has_a_scheme_a_host_and_perhaps_a_port(self) -> None:
        for url in (
            "http://_api.internal:4280",
            "https://api.machines.dev",
            "http://[fdaa::3]:4280",
            "http://[fdaa:0:18:a7b::3]",
            "http://127.0.0.1:1",
            "http://my_app.flycast.",
            "http://localhost:65535",
        ):
            environ = {"FLY_FLAPS_BASE_URL": url, "WORKER_URL": f"{url}/"}
            fly = CoordSettings.from_environment(FLY | environ).fly
            assert fly is not None
            self.assertEqual((url, url), (fly.api.url, fly.worker_url))
        for url, why in {
            "api.machines.dev": "is not a URL such as http://host:port",
            "http://[::1": "is not a URL such as http://host:port",
            "http://::1:80": "is not a URL such as http://host:port",
            "http://a:b": "is not a URL such as http://host:port",
            "http://user@a": "is not a URL such as http://host:port",
            "http://a/v1": "is not a URL such as http://host:port",
            "http://b\u00fccher.example": "is not a URL such as http://host:port",
            "http://[127.0.0.1]:80": "has an invalid IPv6 address",
            "http://[fdaa:::3]": "has an invalid IPv6 address",
            "http://a:0": "has an invalid port: 1 to 65535",
            "http://a:99999": "has an invalid port: 1 to 65535",
        }.items():
            [problem] = self.problems(FLY | {"WORKER_URL": url})
            self.assertIn(why, problem, url)

    def test_memory_is_limited_if_standby_machines_are_suspended(self) -> None:
        suspended = FLY | {"POOL_STANDBY_STATE": "suspended", "WORKER_MEMORY_MB": "2048"}
        self.assertEqual(2048, CoordSettings.from_environment(suspended).worker_memory_mb)
        self.assertEqual(
            ('WORKER_MEMORY_MB: "4096" is more than 2048 (the maximum for suspended machines on Fly)',),
            self.problems(suspended | {"WORKER_MEMORY_MB": "4096"}),
        )
        started = suspended | {"POOL_STANDBY_STATE": "started", "WORKER_MEMORY_MB": "4096"}
        self.assertEqual(4096, CoordSettings.from_environment(started).worker_memory_mb)

    def test_standby_is_at_most_the_pool_size(self) -> None:
        self.assertEqual(2, CoordSettings.from_environment(MOCK | {"POOL_STANDBY": "2"}).standby)
        self.assertEqual(
            ('POOL_STANDBY: "3" is more than 2 (POOLSIZE)',), self.problems(MOCK | {"POOL_STANDBY": "3"})
        )

    def test_time_limit_must_be_positive(self) -> None:
        for text in ("0", "0s", "0.1ns", "-10s"):
            self.assertEqual(
                (f'MAXREQTIME: "{text}" is not above zero',), self.problems(MOCK | {"MAXREQTIME": text})
            )

    def test_number_has_only_decimal_digits(self) -> None:
        for text in ("+1", "1_0", "1 0", "0x1", "1e1", "\u0661", "1" * 5000):
            self.assertEqual(1, len(self.problems(MOCK | {"POOLSIZE": text})), text)

    def test_machine_id_has_63_plain_characters_at_most(self) -> None:
        for name in ("a", "A-b_9", "m" * 63):
            found = CoordSettings.from_environment(MOCK | {"FLY_MACHINE_ID": name})
            self.assertEqual(name, found.machine_id)
        for name in ("m" * 64, "a/b", "a,b", "a.b", "ä", "a\nb", "\udcff"):
            self.assertEqual(1, len(self.problems(MOCK | {"FLY_MACHINE_ID": name})), name)

    def test_invalid_private_key_is_not_shown(self) -> None:
        for environ in (MOCK, FLY):
            (problem,) = self.problems(environ | {"PRIVATE": PAIR.private[:-1]})

            self.assertEqual("PRIVATE: not a key of 64 bytes in hex", problem)

    def test_repr_does_not_show_the_private_key(self) -> None:
        shown = repr(CoordSettings.from_environment(FLY))

        self.assertIn(PAIR.public, shown)
        self.assertNotIn(PAIR.private[:64], shown)


class BasherSettingsTests(SynchronousTestCase):
    def test_defaults(self) -> None:
        found = BasherSettings.from_environment(BASHER)

        expected = BasherSettings(
            verifier=found.verifier,
            machine_id="3d8d9d",
            region="",
            max_req_time=None,
            max_body=1_048_576,
            max_output=67_108_864,
            max_silence=None,
            sandbox=(),
            run_as="",
            home="/",
        )
        self.assertEqual(expected, found)

    def test_reads_every_variable(self) -> None:
        tuning = {
            "FLY_REGION": "ams",
            "MAXREQTIME": "10s",
            "MAXBODY": "1kB",
            "MAXOUTPUT": "2kB",
            "MAX_SILENCE": "5m",
            "SANDBOX": "env --chdir 'a b'",
            "HOME": "/home/bash",
            "RUN_AS": "nobody",
        }
        found = BasherSettings.from_environment(BASHER | tuning)

        expected = BasherSettings(
            verifier=found.verifier,
            machine_id="3d8d9d",
            region="ams",
            max_req_time=10.0,
            max_body=1_000,
            max_output=2_000,
            max_silence=300.0,
            sandbox=("env", "--chdir", "a b"),
            run_as="nobody",
            home="/home/bash",
        )
        self.assertEqual(expected, found)

    def test_verifier_accepts_each_of_several_keys(self) -> None:
        other = genkey()
        found = BasherSettings.from_environment(BASHER | {"PUBLIC": f"{PAIR.public}, {other.public}"})

        for pair in (PAIR, other):
            found.verifier.verify(Signer(pair.private).sign("3d8d9d", 0), "3d8d9d", 0)

    def test_reports_all_problems_together(self) -> None:
        environ = {"PUBLIC": PAIR.private, "MAXREQTIME": "0", "SANDBOX": "bwrap 'a"}
        error = self.assertRaises(SettingsError, BasherSettings.from_environment, environ)

        expected = (
            "PUBLIC: not a key of 32 bytes in hex",
            "FLY_MACHINE_ID: missing; this machine's name",
            'MAXREQTIME: "0" is not above zero',
            'SANDBOX: "bwrap \'a" is not a shell command: No closing quotation',
        )
        self.assertEqual(expected, error.problems)

    def test_key_is_required(self) -> None:
        error = self.assertRaises(SettingsError, BasherSettings.from_environment, {"FLY_MACHINE_ID": "m"})

        self.assertEqual("PUBLIC: missing; the public key of the coordinator's PRIVATE", str(error))
