"""
Fly's private network, in a network namespace: names with AAAA records only; settings of docs/deploy-fly.md.

dnsmasq serves the names, the C library resolves them, and curl sends the requests. Needs root, iproute2,
dnsmasq and curl, which `.ci/run` installs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from bfaas.tokens import genkey
from tests.e2e.coordinator import PATIENCE, TWISTD
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator

LACKS = [tool for tool in ("ip", "dnsmasq", "curl") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace"),
    pytest.mark.skipif(bool(LACKS) and "CI" not in os.environ, reason=f"not installed: {', '.join(LACKS)}"),
]

DNS, API, FLYCAST, WEB, SILENT = "fdaa::3", "fdaa:0:18::2", "fdaa:0:18:0:1::3", "fdaa:0:18::4", "fdaa:dead::1"
TOKEN = "FlyV1 fm2_permission,fm2_discharge"

# The settings in docs/deploy-fly.md, and those that Fly sets.
SETTINGS = {
    "WORKER_APP": "my-basher",
    "WORKER_IMAGE": "registry.example/basher:1",
    "FLY_TOKEN": TOKEN,
    "PRIVATE": genkey().private,
    "MAXREQTIME": "10s",
    "FLY_MACHINE_ID": "3d8d9d1f",
    "FLY_REGION": "ams",
}


class Completed(NamedTuple):
    """The exit code of a program, and its output and errors."""

    code: int
    output: str


def endpoint(address: str, port: int, kind: str = "tcp", more: str = "") -> str:
    """Return a description of an endpoint for Twisted."""
    return f"{kind}:{port}:interface={address.replace(':', chr(92) + ':')}{more}"


class Network:
    """A network namespace, the configuration of its resolver, and the programs that run in it."""

    def __init__(self, home: Path) -> None:
        self.name = f"bfaas-test-{os.getpid()}"
        self.home = home
        self.etc = Path("/etc/netns") / self.name
        self.authority = Authority()
        self._programs: list[subprocess.Popen[bytes]] = []

    def open(self) -> None:
        self.etc.mkdir(parents=True)
        (self.etc / "resolv.conf").write_text(f"nameserver {DNS}\n")
        # Debian's trust store, as it is in the images, with the tests' authority in it alone.
        certificates = self.etc / "ssl" / "certs"
        certificates.mkdir(parents=True)
        (certificates / "ca-certificates.crt").write_bytes(self.authority.certificate)
        ip("netns", "add", self.name)
        self.ip("link", "set", "lo", "up")
        for address in (DNS, API, FLYCAST, WEB):
            self.ip("-6", "address", "add", f"{address}/128", "dev", "lo")
        # A host that receives packets and never responds.
        self.ip("link", "add", "out", "type", "veth", "peer", "name", "away")
        for end in ("out", "away"):
            self.ip("link", "set", end, "up")
        self.ip("-6", "route", "add", f"{SILENT}/128", "dev", "out", "src", API)
        self.ip("-6", "neigh", "add", SILENT, "lladdr", "02:00:00:00:00:01", "dev", "out")

    def close(self) -> None:
        for program in reversed(self._programs):
            self.end(program)
        subprocess.run(["ip", "netns", "delete", self.name], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self.etc, ignore_errors=True)

    def ip(self, *words: str) -> None:
        ip("-n", self.name, *words)

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def start(self, *words: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start a program in the namespace, with nothing but these settings in its environment."""
        log = (self.home / f"log-{len(self._programs):03}").open("wb")
        program = subprocess.Popen(
            self.command(*words), env=environment(settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()
        self._programs.append(program)
        return program

    def end(self, program: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal to a program, wait for its end, and return its exit code."""
        if program.poll() is None:
            program.send_signal(number)
        try:
            return program.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
            raise

    def log(self, program: subprocess.Popen[bytes]) -> str:
        return (self.home / f"log-{self._programs.index(program):03}").read_text(errors="replace")

    def logs(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.home.glob("log-*")))

    def run(self, *words: str, **settings: str) -> Completed:
        """Run a program in the namespace to its end."""
        done = subprocess.run(
            self.command(*words), env=environment(settings), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=2 * PATIENCE, check=False,
        )  # fmt: skip
        return Completed(done.returncode, done.stdout.decode())

    def bfaas(self, *words: str, **settings: str) -> Completed:
        return self.run(sys.executable, "-m", "bfaas.cli.main", *words, **settings)

    def curl(self, *words: str) -> Completed:
        return self.run("curl", "-sS", "--max-time", "30", *words)

    def wait_for_status(self, url: str, status: int = 200) -> None:
        """Send requests until a response has the status."""
        end = time.monotonic() + PATIENCE
        while self.curl("-o", "/dev/null", "-w", "%{http_code}", url).output != str(status):
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    @contextmanager
    def coordinator(self, **settings: str) -> Iterator[str]:
        """Run a coordinator, and stop it. Yields its URL, with the default port."""
        program = self.start(sys.executable, *TWISTD, "bfaas-coord", **settings)
        self.wait_for_status("http://127.0.0.1:8000/readyz")
        yield "http://127.0.0.1:8000"
        assert self.end(program) == 0, self.logs()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stderr=subprocess.PIPE)


def environment(settings: dict[str, str]) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return {**inherited, "LANG": "C.UTF-8", "HOME": "/", **settings}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Run the namespace, with its resolver, the Machines API and the workers' proxy."""
    network = Network(tmp_path_factory.mktemp("network"))
    try:
        try:
            network.open()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace here: {error} {error.stderr.decode()}")
        records = {
            "_api.internal": API,
            "my-basher.flycast": FLYCAST,
            "under_score.flycast": FLYCAST,
            "api.machines.test": WEB,
            "wrong.machines.test": WEB,
            "under_score.test": WEB,
            "silent.internal": SILENT,
        }
        network.start(
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=root",
            "--no-resolv", "--no-hosts", "--bind-interfaces", f"--listen-address={DNS}",
            *(f"--local=/{zone}/" for zone in ("internal", "flycast", "test")),
            *(f"--host-record={name},{address}" for name, address in records.items()),
        )  # fmt: skip
        network.start(
            sys.executable, *TWISTD, "bfaas-machines", "--app", "my-basher",
            "--listen", endpoint(API, 4280), "--proxy", endpoint(FLYCAST, 80), FLY_TOKEN=TOKEN,
        )  # fmt: skip
        network.wait_for_status("http://_api.internal:4280/v1/apps/my-basher/machines", 401)
        yield network
    finally:
        network.close()


def test_names_have_only_aaaa_records(network: Network) -> None:
    for name, address in (("_api.internal", API), ("my-basher.flycast", FLYCAST)):
        code, output = network.run("getent", "ahosts", name)
        assert (code, {line.split()[0] for line in output.splitlines()}) == (0, {address})
        assert network.run("getent", "ahostsv4", name).code == 2


def test_a_coordinator_runs_with_only_the_documented_settings(network: Network) -> None:
    pool = SETTINGS["FLY_MACHINE_ID"]
    with network.coordinator(**SETTINGS) as url:
        assert network.curl(f"{url}/run?raw=1", "-d", "echo hello").output == "hello\n\nexit: 0\n"
        assert json.loads(network.curl(f"{url}/status").output)["pool"]["name"] == pool
        [_, line] = network.bfaas("machines", FLY_TOKEN=TOKEN, WORKER_APP="my-basher").output.splitlines()
        assert f" {pool} " in line, line
        assert network.bfaas("run", "--url", "http://localhost:8000", "echo out; exit 3") == (3, "out\n")
    destroyed = network.bfaas("destroy", "--yes", **SETTINGS)
    assert destroyed.code == 0, destroyed.output
    assert destroyed.output.endswith(f"destroyed 1 machine of {pool}\n")


@pytest.mark.parametrize(
    "token",
    [
        "fm2_permission,fm2_discharge",
        "fm2_permission, fm2_discharge,fo1_user",
        "flyv1 fm2_permission,fm2_discharge",
    ],
)
def test_tokens_with_and_without_a_scheme_are_accepted(network: Network, token: str) -> None:
    done = network.bfaas("machines", FLY_TOKEN=token, WORKER_APP="my-basher")
    assert done.code == 0, done.output


def test_doctor_finds_no_problem(network: Network) -> None:
    code, output = network.bfaas("doctor", **SETTINGS)
    assert code == 0, output
    assert [line[:4] for line in output.splitlines()] == ["ok  "] * 4, output
    assert "ran a script at http://my-basher.flycast" in output


@pytest.mark.parametrize(
    ("api", "worker"),
    [
        (f"http://[{API}]:4280", f"http://[{FLYCAST}]"),
        ("http://_api.internal.:4280", "http://my-basher.flycast.:80"),
        ("http://_api.internal:4280/", "http://under_score.flycast"),
    ],
)
def test_any_host_that_resolves_is_accepted(network: Network, api: str, worker: str) -> None:
    code, output = network.bfaas("doctor", **SETTINGS, FLY_FLAPS_BASE_URL=api, WORKER_URL=worker)
    assert code == 0, output
    assert f"ran a script at {worker}" in output


def test_names_in_etc_hosts_are_resolved(network: Network) -> None:
    # `ip netns exec` mounts this file over /etc/hosts.
    hosts = network.etc / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{API} flaps my_api\n")
    try:
        for name in ("flaps", "my_api"):
            url = f"http://{name}:4280"
            done = network.bfaas("machines", FLY_TOKEN=TOKEN, WORKER_APP="my-basher", FLY_FLAPS_BASE_URL=url)
            assert done.code == 0, done.output
    finally:
        hosts.unlink()


def test_bfaas_run_connects_to_addresses_and_names(network: Network) -> None:
    listener = network.start(
        sys.executable, *TWISTD, "bfaas-coord", "--listen", endpoint(WEB, 8001),
        WORKER_APP="mock", MAXREQTIME="10s",
    )  # fmt: skip
    network.wait_for_status(f"http://[{WEB}]:8001/readyz")
    for url in (f"http://[{WEB}]:8001", "http://under_score.test:8001/"):
        assert network.bfaas("run", "--url", url, "echo fine") == (0, "fine\n")
    assert network.bfaas("run", "echo fine", BFAAS_URL="http://under_score.test.:8001") == (0, "fine\n")
    code, output = network.bfaas("run", "--url", "http://nowhere.test", "true")
    assert code == 69
    assert output.startswith("bfaas: http://nowhere.test does not respond: DNS lookup failed: nowhere.test: ")
    assert network.end(listener) == 0


CONNECTION = "FAIL  API, token, app: "
FAILURES: list[tuple[dict[str, str], str, str]] = [
    (
        {"FLY_TOKEN": "FlyV1 fm2_other"},
        f"{CONNECTION}GET /v1/apps/my-basher/machines?summary=true: 401 ",
        "FLY_TOKEN: ",
    ),
    ({"WORKER_APP": "other"}, f"{CONNECTION}GET /v1/apps/other/machines?summary=true: 404 ", "WORKER_APP: "),
    (
        {"FLY_FLAPS_BASE_URL": "http://_apj.internal:4280"},
        "DNS lookup failed: _apj.internal: Name or service not known",
        "FLY_FLAPS_BASE_URL: is the name in http://_apj.internal:4280 right",
    ),
    (
        {"FLY_FLAPS_BASE_URL": "http://_api.internal:4281"},
        "Connection was refused",
        "FLY_FLAPS_BASE_URL: is the port in http://_api.internal:4281 right?",
    ),
    (
        {"FLY_FLAPS_BASE_URL": "http://silent.internal:4280"},
        "no connection within 5 s",
        "FLY_FLAPS_BASE_URL: is the host in http://silent.internal:4280 right? It is not reachable",
    ),
    (
        {"FLY_FLAPS_BASE_URL": "https://_api.internal:4280"},
        "TLS: ",
        "FLY_FLAPS_BASE_URL: does https://_api.internal:4280 use TLS?",
    ),
    (
        {"WORKER_URL": "http://other.flycast"},
        "FAIL  worker: DNS lookup failed: other.flycast: Name or service not known",
        "WORKER_URL: http://other.flycast cannot be reached; does the workers' app have an address",
    ),
    (
        {"WORKER_URL": "http://[fdaa:0:18:0:1::3]:81"},
        "FAIL  worker: Connection was refused",
        "WORKER_URL: http://[fdaa:0:18:0:1::3]:81 cannot be reached",
    ),
]


def test_doctor_distinguishes_failed_connections_from_wrong_tokens_and_apps(network: Network) -> None:
    # All at once: calls that cannot connect are retried for 15 s.
    doctors = [
        network.start(sys.executable, "-m", "bfaas.cli.main", "doctor", **{**SETTINGS, **wrong})
        for wrong, _, _ in FAILURES
    ]
    for doctor, (_, found, advice) in zip(doctors, FAILURES, strict=True):
        assert doctor.wait(PATIENCE) == 1
        *_, failure, remedy = network.log(doctor).splitlines()
        assert failure.startswith(CONNECTION if "FAIL" not in found else found), failure
        assert found in failure
        assert advice in remedy


@pytest.mark.parametrize(
    ("nameserver", "url"), [(SILENT, "http://_api.internal:4280"), (DNS, "http://silent.internal:4280")]
)
def test_doctor_ends_at_once_on_sigint_while_connecting(network: Network, nameserver: str, url: str) -> None:
    resolv = network.etc / "resolv.conf"
    before = resolv.read_text()
    resolv.write_text(f"nameserver {nameserver}\n")
    settings = {**SETTINGS, "FLY_FLAPS_BASE_URL": url}
    try:
        doctor = network.start(sys.executable, "-m", "bfaas.cli.main", "doctor", **settings)
        end = time.monotonic() + PATIENCE
        while "ok    settings" not in network.log(doctor):
            assert time.monotonic() < end, network.log(doctor)
            time.sleep(0.05)
        time.sleep(0.5)  # until it has sent its first packet
        assert doctor.poll() is None
        began = time.monotonic()
        assert network.end(doctor, signal.SIGINT) == -signal.SIGINT
        assert time.monotonic() - began < 4.0  # the limits are 10 s and 5 s
    finally:
        resolv.write_text(before)


def test_https_is_verified_against_the_systems_trust_store(network: Network) -> None:
    def serve(authority: Authority, host: str, port: int) -> subprocess.Popen[bytes]:
        """Run the Machines API behind TLS, with a certificate for a host."""
        key, certificate = (network.home / f"{kind}-{port}.pem" for kind in ("key", "certificate"))
        for path, pem in zip((key, certificate), authority.issue(host), strict=True):
            path.write_bytes(pem)
        listen = endpoint(WEB, port, "ssl", f":privateKey={key}:certKey={certificate}")
        return network.start(
            sys.executable, *TWISTD, "bfaas-machines", "--app", "my-basher", "--listen", listen,
            "--proxy", endpoint(WEB, port + 1), FLY_TOKEN=TOKEN,
        )  # fmt: skip

    def machines(url: str) -> Completed:
        return network.bfaas("machines", FLY_TOKEN=TOKEN, WORKER_APP="my-basher", FLY_FLAPS_BASE_URL=url)

    programs = [
        serve(network.authority, "api.machines.test", 443),
        serve(Authority(), "api.machines.test", 8443),
    ]
    for port in (443, 8443):
        network.wait_for_status(f"http://[{WEB}]:{port + 1}/", 503)

    for url in ("https://api.machines.test", "https://API.machines.test", "https://api.machines.test.:443"):
        done = machines(url)
        assert (done.code, len(done.output.splitlines())) == (0, 1), done.output
    for url, why in (
        ("https://wrong.machines.test", "the certificate is not valid for wrong.machines.test"),
        (f"https://[{WEB}]", f"the certificate is not valid for {WEB}"),
        ("https://api.machines.test:8443", "the certificate is not trusted: "),
    ):
        done = machines(url)
        assert done.code == 1
        assert why in done.output
        code, output = network.bfaas("doctor", **SETTINGS, FLY_FLAPS_BASE_URL=url)
        *_, failure, remedy = output.splitlines()
        assert code == 1
        assert f"FAIL  API, token, app: GET /v1/apps/my-basher/machines?summary=true: {why}" in failure, (
            output
        )
        assert f"-> FLY_FLAPS_BASE_URL: is {url} the right name?" in remedy.strip(), output
    for program in programs:
        assert network.end(program) == 0, network.logs()
