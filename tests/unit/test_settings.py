from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.settings import ApiSettings, BasherSettings, CoordSettings, FlySettings, SettingsError
from bfaas.tokens import Signer, genkey
from bfaas.units import _nanoseconds, parse_duration, parse_size

MICROSECOND = 1_000
MILLISECOND = 1_000_000
SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE

PAIR = genkey()

# The least that each role needs.
MOCK = {"MAXREQTIME": "10s", "WORKER_APP": "mock"}
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


class ParseDurationTests(SynchronousTestCase):
    """What Go reads and refuses is taken from the two tables of its own time/time_test.go."""

    def test_it_reads_what_go_reads(self) -> None:
        expected = {
            "0": 0,
            "5s": 5 * SECOND,
            "30s": 30 * SECOND,
            "1478s": 1478 * SECOND,
            "-5s": -5 * SECOND,
            "+5s": 5 * SECOND,
            "-0": 0,
            "+0": 0,
            "5.0s": 5 * SECOND,
            "5.6s": 5 * SECOND + 600 * MILLISECOND,
            "5.s": 5 * SECOND,
            ".5s": 500 * MILLISECOND,
            "1.0s": SECOND,
            "1.00s": SECOND,
            "1.004s": SECOND + 4 * MILLISECOND,
            "1.0040s": SECOND + 4 * MILLISECOND,
            "100.00100s": 100 * SECOND + MILLISECOND,
            "10ns": 10,
            "11us": 11 * MICROSECOND,
            "12\u00b5s": 12 * MICROSECOND,
            "12\u03bcs": 12 * MICROSECOND,
            "13ms": 13 * MILLISECOND,
            "14s": 14 * SECOND,
            "15m": 15 * MINUTE,
            "16h": 16 * HOUR,
            "3h30m": 3 * HOUR + 30 * MINUTE,
            "10.5s4m": 4 * MINUTE + 10 * SECOND + 500 * MILLISECOND,
            "-2m3.4s": -(2 * MINUTE + 3 * SECOND + 400 * MILLISECOND),
            "1h2m3s4ms5us6ns": HOUR + 2 * MINUTE + 3 * SECOND + 4 * MILLISECOND + 5 * MICROSECOND + 6,
            "39h9m14.425s": 39 * HOUR + 9 * MINUTE + 14 * SECOND + 425 * MILLISECOND,
            "52763797000ns": 52763797000,
            "0.3333333333333333333h": 20 * MINUTE,
            "9007199254740993ns": 2**53 + 1,
            "9223372036854775807ns": 2**63 - 1,
            "9223372036854775.807us": 2**63 - 1,
            "9223372036s854ms775us807ns": 2**63 - 1,
            "-9223372036854775808ns": -(2**63),
            "-9223372036854775.808us": -(2**63),
            "-9223372036s854ms775us808ns": -(2**63),
            "-2562047h47m16.854775808s": -(2**63),
            "0.100000000000000000000h": 6 * MINUTE,
            "0.830103483285477580700h": 49 * MINUTE + 48 * SECOND + 372539827,
        }
        self.assertEqual(expected, {text: _nanoseconds(text) for text in expected})

    def test_it_refuses_what_go_refuses(self) -> None:
        # Where Go's cases hold bytes that are not UTF-8, these hold what Python reads them as.
        bad = [
            "", "3", "-", "s", ".", "-.", ".s", "+.s", "1d", "\x85\x85", "\udc85\udc85", "\xffff", "\udcffff",
            "hello \xffff world", "\ufffd", "\ufffd hello \ufffd world",
            "9223372036854775810ns", "9223372036854775808ns", "-9223372036854775809ns", "9223372036854776us",
            "3000000h", "9223372036854775.808us", "9223372036854ms775us808ns",
        ]  # fmt: skip
        self.assert_refused(bad)

    def test_it_refuses_what_is_nearly_a_duration(self) -> None:
        bad = [
            " 5s", "5s ", "5 s", "5s\n", "5S", "5sec", "5s5", "5s.", "--5s", "5s-5s", "00", "0.0", "0.",
            "1.2.3s", "1,5s", "1e3s", "1_0s", "0x1s", "\u0665s", "1\u00b5", "5s0", "inf", "nan",
            "1" * 5000 + "ns",
        ]  # fmt: skip
        self.assert_refused(bad)

    def assert_refused(self, bad: list[str]) -> None:
        for text in bad:
            error = self.assertRaises(ValueError, parse_duration, text)
            self.assertEqual(1, len(str(error).splitlines()), text)

    def test_any_number_of_zeros_makes_no_difference(self) -> None:
        zeros = "0" * 5000
        self.assertEqual(1, _nanoseconds(f"{zeros}1ns"))
        self.assertEqual(0, _nanoseconds(f".{zeros}1h"))
        self.assertEqual(SECOND, _nanoseconds(f"1.{zeros}s"))

    def test_it_is_in_seconds(self) -> None:
        expected = {"10s": 10.0, "1m30s": 90.0, "1.5h": 5400.0, "250ms": 0.25, "-1ns": -1e-9, "0": 0.0}
        self.assertEqual(expected, {text: parse_duration(text) for text in expected})

    @settings(deadline=None)
    @given(st.text() | st.text("0123456789.hmsnuµμ+-"))
    def test_whatever_the_text_the_answer_is_in_range_or_a_value_error(self, text: str) -> None:
        try:
            nanoseconds = _nanoseconds(text)
        except ValueError:
            return
        self.assertTrue(-(2**63) <= nanoseconds < 2**63)

    @settings(deadline=None)
    @given(st.integers(-(2**63), 2**63 - 1))
    def test_every_number_of_nanoseconds_can_be_written(self, nanoseconds: int) -> None:
        self.assertEqual(nanoseconds, _nanoseconds(f"{nanoseconds}ns"))


class ParseSizeTests(SynchronousTestCase):
    def test_it_reads_units_of_both_kinds(self) -> None:
        expected = {
            "0": 0, "1024": 1024, "007": 7, "10B": 10, "2kB": 2_000, "2KB": 2_000, "3MB": 3_000_000,
            "4GB": 4_000_000_000, "64 KiB": 65_536, "1MiB": 1_048_576, "2GiB": 2_147_483_648,
        }  # fmt: skip
        self.assertEqual(expected, {text: parse_size(text) for text in expected})

    def test_it_refuses_all_else(self) -> None:
        bad = (
            "", " ", "B", "MiB", "-1", "+1", "1.5MiB", "1_000", "1,000", "1  MiB", "1\tMiB", "1MiB1",
            "1 ", " 1", "1\n", "1M", "1k", "1kib", "1mb", "1TiB", "0x10", "1e3", "\u0661", "1" * 5000,
        )  # fmt: skip
        for text in bad:
            error = self.assertRaises(ValueError, parse_size, text)
            self.assertEqual(1, len(str(error).splitlines()), text)


class CoordSettingsTests(SynchronousTestCase):
    def problems(self, environ: dict[str, str]) -> tuple[str, ...]:
        error = self.assertRaises(SettingsError, CoordSettings.from_environment, environ)
        self.assertEqual("\n".join(error.problems), str(error))
        for line in error.problems:
            self.assertEqual(1, len(line.splitlines()), line)
        return tuple(error.problems)

    def test_mock_needs_little_and_has_defaults(self) -> None:
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

    def test_mock_makes_a_new_pair_each_time(self) -> None:
        first, second = (CoordSettings.from_environment(MOCK).signer for _ in range(2))

        self.assertNotEqual(first.public, second.public)

    def test_mock_takes_what_it_is_given(self) -> None:
        given = {"PRIVATE": PAIR.private, "FLY_MACHINE_ID": "laptop_1", "FLY_REGION": "home"}
        found = CoordSettings.from_environment(MOCK | given)

        self.assertEqual(
            (PAIR.public, "laptop_1", "home"), (found.signer.public, found.machine_id, found.region)
        )

    def test_every_variable_is_read(self) -> None:
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
        )
        self.assertEqual(expected, found)
        self.assertEqual(PAIR.public, found.signer.public)
        self.assertNotIn("FlyV1 secret", repr(found))

    def test_all_that_is_missing_is_told_at_once(self) -> None:
        expected = (
            "WORKER_APP: missing; a Fly app, or mock for local machines",
            "MAXREQTIME: missing; a duration such as 10s",
            "FLY_TOKEN: missing; an API token that can manage the worker app",
            "WORKER_IMAGE: missing; the image of workers",
            "PRIVATE: missing; a private key from `bfaas genkey`",
            "FLY_MACHINE_ID: missing; this machine's name",
            "FLY_REGION: missing; a region such as ams",
        )
        self.assertEqual(expected, self.problems({}))
        self.assertEqual(expected, self.problems(dict.fromkeys(FLY, " \t")))

    def test_what_is_silent_for_longer_than_the_proxy_waits_is_a_warning(self) -> None:
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

    def test_a_blank_value_is_its_default(self) -> None:
        self.assertEqual(2, CoordSettings.from_environment(MOCK | {"POOLSIZE": " "}).pool_size)
        for on_exit in ("", "stop"):
            found = CoordSettings.from_environment(MOCK | {"POOL_ON_EXIT": on_exit})
            self.assertIs(False, found.destroy_on_exit)

    def test_all_that_is_malformed_is_told_at_once(self) -> None:
        given = {
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
        self.assertEqual(expected, self.problems(MOCK | given))

    def test_a_url_is_a_scheme_a_host_and_a_port(self) -> None:
        for url in (
            "http://_api.internal:4280",
            "https://api.machines.dev",
            "http://[fdaa::3]:4280",
            "http://[fdaa:0:18:a7b::3]",
            "http://127.0.0.1:1",
            "http://my_app.flycast.",
            "http://localhost:65535",
        ):
            given = {"FLY_FLAPS_BASE_URL": url, "WORKER_URL": f"{url}/"}
            fly = CoordSettings.from_environment(FLY | given).fly
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

    def test_what_is_suspended_has_no_more_memory_than_fly_suspends(self) -> None:
        suspended = FLY | {"POOL_STANDBY_STATE": "suspended", "WORKER_MEMORY_MB": "2048"}
        self.assertEqual(2048, CoordSettings.from_environment(suspended).worker_memory_mb)
        self.assertEqual(
            ('WORKER_MEMORY_MB: "4096" is more than 2048 (the maximum for suspended machines on Fly)',),
            self.problems(suspended | {"WORKER_MEMORY_MB": "4096"}),
        )
        started = suspended | {"POOL_STANDBY_STATE": "started", "WORKER_MEMORY_MB": "4096"}
        self.assertEqual(4096, CoordSettings.from_environment(started).worker_memory_mb)

    def test_no_more_can_stand_by_than_there_are(self) -> None:
        self.assertEqual(2, CoordSettings.from_environment(MOCK | {"POOL_STANDBY": "2"}).standby)
        self.assertEqual(
            ('POOL_STANDBY: "3" is more than 2 (POOLSIZE)',), self.problems(MOCK | {"POOL_STANDBY": "3"})
        )

    def test_a_request_must_have_some_time(self) -> None:
        for text in ("0", "0s", "0.1ns", "-10s"):
            self.assertEqual(
                (f'MAXREQTIME: "{text}" is not above zero',), self.problems(MOCK | {"MAXREQTIME": text})
            )

    def test_a_number_is_plain_digits(self) -> None:
        for text in ("+1", "1_0", "1 0", "0x1", "1e1", "\u0661", "1" * 5000):
            self.assertEqual(1, len(self.problems(MOCK | {"POOLSIZE": text})), text)

    def test_a_machines_name_is_short_and_plain(self) -> None:
        for name in ("a", "A-b_9", "m" * 63):
            found = CoordSettings.from_environment(MOCK | {"FLY_MACHINE_ID": name})
            self.assertEqual(name, found.machine_id)
        for name in ("m" * 64, "a/b", "a,b", "a.b", "ä", "a\nb", "\udcff"):
            self.assertEqual(1, len(self.problems(MOCK | {"FLY_MACHINE_ID": name})), name)

    def test_a_malformed_private_key_is_not_shown(self) -> None:
        for environ in (MOCK, FLY):
            (problem,) = self.problems(environ | {"PRIVATE": PAIR.private[:-1]})

            self.assertEqual("PRIVATE: not a key of 64 bytes in hex", problem)

    def test_their_repr_does_not_show_the_private_key(self) -> None:
        shown = repr(CoordSettings.from_environment(FLY))

        self.assertIn(PAIR.public, shown)
        self.assertNotIn(PAIR.private[:64], shown)


class BasherSettingsTests(SynchronousTestCase):
    def test_a_worker_needs_little_and_has_defaults(self) -> None:
        found = BasherSettings.from_environment(BASHER)

        expected = BasherSettings(
            verifier=found.verifier,
            machine_id="3d8d9d",
            region="",
            max_req_time=None,
            max_body=1_048_576,
            max_output=67_108_864,
            sandbox=(),
            run_as="",
            home="/",
        )
        self.assertEqual(expected, found)

    def test_every_variable_is_read(self) -> None:
        tuning = {
            "FLY_REGION": "ams",
            "MAXREQTIME": "10s",
            "MAXBODY": "1kB",
            "MAXOUTPUT": "2kB",
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
            sandbox=("env", "--chdir", "a b"),
            run_as="nobody",
            home="/home/bash",
        )
        self.assertEqual(expected, found)

    def test_the_verifier_knows_every_key_given(self) -> None:
        other = genkey()
        found = BasherSettings.from_environment(BASHER | {"PUBLIC": f"{PAIR.public}, {other.public}"})

        for pair in (PAIR, other):
            found.verifier.verify(Signer(pair.private).sign("3d8d9d", 0), "3d8d9d", 0)

    def test_all_problems_are_told_at_once(self) -> None:
        given = {"PUBLIC": PAIR.private, "MAXREQTIME": "0", "SANDBOX": "bwrap 'a"}
        error = self.assertRaises(SettingsError, BasherSettings.from_environment, given)

        expected = (
            "PUBLIC: not a key of 32 bytes in hex",
            "FLY_MACHINE_ID: missing; this machine's name",
            'MAXREQTIME: "0" is not above zero',
            'SANDBOX: "bwrap \'a" is not a shell command: No closing quotation',
        )
        self.assertEqual(expected, error.problems)

    def test_a_missing_key_is_told(self) -> None:
        error = self.assertRaises(SettingsError, BasherSettings.from_environment, {"FLY_MACHINE_ID": "m"})

        self.assertEqual("PUBLIC: missing; the public key of the coordinator's PRIVATE", str(error))
