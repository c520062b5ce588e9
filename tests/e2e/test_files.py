"""Files of runs, in and out, as curl, httpx, Node and `bfaas run` send and receive them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_twisted
from twisted.internet.utils import getProcessOutputAndValue

from tests.e2e.coordinator import reactor, start_coordinator, stop
from tests.e2e.hostile import start_harness
from tests.e2e.test_run_requests import ACCEPT_NDJSON, output, post, run_json
from tests.support.hostile_worker import End, ScriptedServer
from tests.support.hostile_worker import post as http_request
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.coordinator import Running

with_twisted = pytest_twisted.ensureDeferred

BINARY = bytes(range(256)) * 100


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def files(events: list[dict[str, Any]]) -> dict[str, tuple[str, bytes]]:
    """Return mode and content of each file in a response; fail unless all are complete."""
    contents: dict[str, bytes] = {}
    sizes = {}
    for event in events:
        if event["event"] == "file":
            contents[event["name"]] = contents.get(event["name"], b"") + base64.b64decode(event["base64"])
            sizes[event["name"]] = event["size"], event["mode"]
    assert {name: len(data) for name, data in contents.items()} == {
        name: size for name, (size, _) in sizes.items()
    }
    return {name: (sizes[name][1], data) for name, data in contents.items()}


def failures(events: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(failure["name"], failure["error"]) for failure in events[-1].get("output_errors", [])}


def run_program(*command: str, cwd: Path) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, cwd=cwd).stdout


def curl(running: Running, *arguments: str, cwd: Path) -> list[dict[str, Any]]:
    """Send a request with curl; return the events of its NDJSON response."""
    command = ["curl", "-sN", "--max-time", "50", "-H", "Accept: application/x-ndjson", *arguments]
    response = run_program(*command, f"http://localhost:{running.port}/run", cwd=cwd)
    assert response.startswith(b"{"), response
    return [json.loads(line) for line in response.splitlines()]


@with_twisted
async def test_a_form_of_curl_sends_files_and_its_response_returns_files(
    coordinator: Running, tmp_path: Path
) -> None:
    (tmp_path / "in put.csv").write_bytes(b"a,b\r\n1,2\r\n")
    (tmp_path / "data.bin").write_bytes(BINARY)
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "x.txt").write_text("x")
    (tmp_path / "tree" / "go").write_text("#!/bin/sh\ncat | wc -c; stat -c '%a %U %n' * > out/stat; id -un\n")
    (tmp_path / "tree" / "go").chmod(0o755)
    run_program("tar", "-C", "tree", "-czf", "tree.tgz", ".", cwd=tmp_path)
    (tmp_path / "script.sh").write_text(
        "mkdir out; ./go; cp 'in put.csv' out/; cat data.bin | tee out/bin | wc -c\n"
    )

    events = curl(
        coordinator, "-F", "script=@script.sh", "-F", "stdin=@data.bin", "-F", "env=A=b", "-F", "timeout=15s",
        "-F", "file=@in put.csv", "-F", "file=@data.bin", "-F", "tar=@tree.tgz", "-F", "outputs=out/*",
        cwd=tmp_path,
    )  # fmt: skip

    size, user, size_again = output(events).splitlines()
    assert size == size_again == str(len(BINARY))
    assert (events[-1]["event"], events[-1]["code"]) == ("exit", 0)
    assert failures(events) == set()
    received = files(events)
    assert received["out/in put.csv"] == ("0644", b"a,b\r\n1,2\r\n")
    assert received["out/bin"] == ("0644", BINARY)
    stat = f"644 {user} data.bin\n755 {user} deep\n755 {user} go\n644 {user} in put.csv\n755 {user} out\n"
    assert received["out/stat"][1].decode() == stat


@with_twisted
async def test_forms_of_other_clients(coordinator: Running, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{coordinator.port}/run?raw=1"
    form = httpx.Request(
        "POST",
        url,
        data={"script": 'cat "$A" b', "env": "A=caf\u00e9"},
        files=[("file", ("caf\u00e9", b"1\n")), ("file", ("b", b"2\n"))],
    )
    response = await coordinator.run(form.read(), "?raw=1", {"Content-Type": form.headers["content-type"]})
    assert response.body == b"1\n2\n\nexit: 0\n"
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    (tmp_path / "send.mjs").write_text(
        "const form = new FormData();\n"
        'form.set("script", "cat a.txt\\necho $A");\n'
        'form.set("env", "A=1");\n'
        'form.set("file", new Blob(["in\\n"]), "a.txt");\n'
        f'const response = await fetch("{url}", {{method: "POST", body: form}});\n'
        "process.stdout.write(await response.text());\n"
    )
    assert run_program(node, "send.mjs", cwd=tmp_path) == b"in\n1\n\nexit: 0\n"


@with_twisted
async def test_files_in_json(coordinator: Running) -> None:
    events = await run_json(
        coordinator,
        script="cat; cat a.txt d/e/f; [[ -x d/run ]] && echo executable",
        stdin_base64=encode(b"in\n"),
        files={
            "a.txt": "\u20ac\n",
            "d/e/f": {"base64": encode(b"f\n")},
            "d/run": {"base64": "", "mode": "0755"},
            "-rf": "",
        },
    )
    assert output(events) == "in\n\u20ac\nf\nexecutable\n"


@with_twisted
async def test_what_cannot_be_returned_is_reported(coordinator: Running) -> None:
    script = r"""
        mkdir -p dir/sub secret 'new
line'; echo 1 > dir/sub/file; echo ok > ok.txt; echo x > secret/x; chmod 0 secret; echo x > unreadable
        chmod 0 unreadable; ln -s /etc/passwd link.txt; ln -s / root; mkfifo fifo.txt; touch $'bad\xff.txt'
        touch $'control\n.txt'; ln ok.txt hard.txt
    """
    outputs = [
        "*.txt", "dir", "dir/*", "root/etc/passwd", "root/*", "missing", "no*match", "unreadable", "secret/x",
    ]  # fmt: skip
    events = await run_json(coordinator, script=script, outputs=outputs)

    assert events[-1]["code"] == 0
    assert files(events) == {"ok.txt": ("0644", b"ok\n"), "hard.txt": ("0644", b"ok\n")}
    assert failures(events) == {
        ("missing", "not-found"), ("no*match", "not-found"), ("root/etc/passwd", "not-found"),
        ("root/*", "not-found"), ("secret/x", "not-found"), ("dir/*", "not-found"), ("dir", "directory"),
        ("link.txt", "symbolic-link"), ("fifo.txt", "special-file"),
        ("bad\ufffd.txt", "invalid-name"), ("control\ufffd.txt", "invalid-name"),
        ("unreadable", "unreadable"),
    }  # fmt: skip


@with_twisted
async def test_files_are_returned_after_a_failed_script_but_not_after_a_timeout(coordinator: Running) -> None:
    events = await run_json(coordinator, script="echo 1 > a; exit 3", outputs=["a"])
    assert (files(events), events[-1]["code"]) == ({"a": ("0644", b"1\n")}, 3)
    events = await run_json(coordinator, script="echo 1 > a; sleep 1000", outputs=["a"], timeout="1s")
    assert (files(events), events[-1]["reason"]) == ({}, "timeout")


@with_twisted
async def test_incomplete_characters_come_before_files(coordinator: Running) -> None:
    events = await run_json(coordinator, script=r"printf 'a\xc3'; touch b", outputs=["b"])
    assert [event["event"] for event in events[-2:]] == ["file", "exit"]
    assert output(events) == "a\ufffd"


@with_twisted
async def test_output_and_files_together_are_limited() -> None:
    coordinator = await start_coordinator(MAXOUTPUT="100kB", MAXPERCLIENT="100")
    script = (
        "head -c 50000 /dev/zero | tr '\\0' x; head -c 60000 /dev/zero > big; head -c 40000 /dev/zero > small"
    )
    events = await run_json(coordinator, script=script, outputs=["*"])
    assert (files(events), failures(events)) == (
        {"small": ("0644", bytes(40_000))},
        {("big", "output-limit")},
    )
    script = "truncate -s 1G sparse; head -c 100000 /dev/zero > fits"
    events = await run_json(coordinator, script=script, outputs=["sparse", "fits"])
    assert (files(events), failures(events)) == (
        {"fits": ("0644", bytes(100_000))},
        {("sparse", "output-limit")},
    )
    events = await run_json(coordinator, script="touch {1..1020}", outputs=["*"])
    assert len(files(events)) == 1000
    assert {error for _, error in failures(events)} == {"too-many-files"}
    assert len(failures(events)) + events[-1]["output_errors_dropped"] == 20
    assert await stop(coordinator) == 0


@with_twisted
async def test_a_large_tree_does_not_hide_a_file(coordinator: Running) -> None:
    path = "/".join(["d", *12 * ["$name"]])
    script = f"name=$(printf %0250d 1); mkdir -p {path}; echo 1 > d/file; cd {path} && touch {{1..800}}"
    events = await run_json(coordinator, script=script, outputs=["d/file"])
    assert files(events) == {"d/file": ("0644", b"1\n")}
    events = await run_json(coordinator, script=script, outputs=["d/**"])
    assert (files(events), failures(events)) == ({}, {("d/**", "too-many-files")}), events[-1]


@with_twisted
async def test_a_script_cannot_influence_how_its_files_are_read(coordinator: Running) -> None:
    script = r"""
        cat > tar <<< 'echo evil'; chmod +x tar; cp tar find
        touch ./--checkpoint-action=exec=evil; touch -- -T
        cat > .bashrc <<< 'echo evil'; echo ok > ok
        (setsid bash -c 'while :; do ln -sf /etc/passwd ok 2>/dev/null; done' & ) 2>/dev/null
        sleep 0.1; rm -f ok; echo ok > ok
    """
    env = {
        "PATH": ".:/usr/bin:/bin",
        "BASH_ENV": ".bashrc",
        "TAR_OPTIONS": "--checkpoint=1",
        "ENV": ".bashrc",
    }
    events = await run_json(coordinator, script=script, env=env, outputs=["-T", "--*", "ok"])
    assert output(events).replace("evil\n", "") == ""
    assert {"-T", "--checkpoint-action=exec=evil"} <= files(events).keys()
    assert b"root:" not in files(events).get("ok", ("", b""))[1]


@with_twisted
async def test_invalid_requests_with_files_use_no_machine(coordinator: Running) -> None:
    invalid: list[tuple[dict[str, Any], str]] = [
        (
            {"files": {"../x": ""}},
            'files: "../x": it must be a relative path without empty components, . and ..',
        ),
        ({"files": {"a": {"base64": "?"}}}, 'files: "a" is not base64 (RFC 4648, section 4)'),
        ({"outputs": ["/etc/passwd"]}, "outputs: "),
    ]
    for fields, message in invalid:
        body = json.dumps({"script": "", **fields}).encode()
        status, _, text = await post(coordinator, body, Content_Type="application/json")
        assert (status, text.startswith(message), text.count("\n")) == (400, True, 1), text
    body = json.dumps({"script": "", "outputs": ["a"]}).encode()
    response = await coordinator.run(body, "?raw=1", headers={"Content-Type": "application/json"})
    assert response.status == 400
    assert response.body == b"a raw response cannot contain outputs: request events or NDJSON\n"
    for kind, expected in (
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        ("multipart/form-data; boundary=\xfc", 400),
        ("multipart/form-data; boundary=a; boundary=b", 400),
        (f"multipart/form-data; boundary={'x' * 71}", 400),
        ("multipart/mixed; boundary=a", 415),
    ):
        status, _, text = await post(coordinator, b"--a--", Content_Type=kind)
        assert (status, text.count("\n")) == (expected, 1), (kind, text)


@with_twisted
async def test_requests_of_the_largest_size_reach_the_worker() -> None:
    coordinator = await start_coordinator(MAXBODY="200kB", MAXPERCLIENT="100")
    form = b'--B\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    script = form % (b"script", b"wc -c < a")
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    data = os.urandom(200_000 - len(script + head + b"\r\n--B--"))
    body = script + head + data + b"\r\n--B--"
    status, _, text = await post(
        coordinator, body, Content_Type="multipart/form-data; boundary=B", **ACCEPT_NDJSON
    )
    assert (status, json.loads(text.splitlines()[0])["data"]) == (200, f"{len(data)}\n")
    status, _, _ = await post(coordinator, body + b"x", Content_Type="multipart/form-data; boundary=B")
    assert status == 413
    # As JSON, each of these characters takes six bytes.
    body = form % (b"script", b": " + b"\x01" * 190_000) + form % (b"env", b"A=") + b"--B--"
    status, _, text = await post(coordinator, body, Content_Type="multipart/form-data; boundary=B")
    assert (status, text.startswith("the form is too large as JSON")) == (413, True)
    assert await stop(coordinator) == 0


@with_twisted
async def test_workers_of_the_go_original_get_scripts_only() -> None:
    as_json = "Content-Type: application/json"
    async with start_harness(MAXREQTIME="5s") as harness:
        harness.worker.ready = (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", End.CLOSE)
        for fields in ({"stdin": "x"}, {"files": {"a": "x"}}, {"outputs": ["a"]}):
            body = json.dumps({"script": "", **fields}).encode()
            received, _ = await harness.request(http_request("/run", body, as_json))
            assert received.startswith(b"HTTP/1.1 400 "), received
            assert received.endswith(
                b"the workers of this coordinator support scripts only: no input, files or other options\n"
            )
        for body, *fields_ in ((b"plain",), (b'{"script": "plain"}', as_json)):
            received, _ = await harness.request(http_request("/run", body, *fields_))
            assert received.startswith(b"HTTP/1.1 200 "), received
        assert [body for _, body in harness.worker.runs] == [b"plain", b"plain"]


def bfaas(running: Running, *arguments: str, cwd: Path, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run `bfaas run` in a directory, with an umask of 027; return exit code, output and errors."""
    command = [sys.executable, "-m", "bfaas.cli.main", "run", *arguments]
    env = {**os.environ, "BFAAS_URL": f"http://127.0.0.1:{running.port}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, input=stdin, capture_output=True, cwd=cwd, env=env, umask=0o027, check=False
    )
    return done.returncode, done.stdout, done.stderr


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@with_twisted
async def test_the_command_sends_files_and_writes_those_that_are_returned(
    coordinator: Running, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_bytes(b"b\r\na\r\n")
    (tmp_path / "data.bin").write_bytes(BINARY)
    (tmp_path / "tree" / "d").mkdir(parents=True)
    (tmp_path / "tree" / "d" / "go").write_text("#!/bin/sh\ncat > out/stdin\n")
    (tmp_path / "tree" / "d" / "go").chmod(0o755)
    (tmp_path / "got" / "out").mkdir(parents=True)
    (tmp_path / "got" / "out" / "sorted").write_text("an old file, which is longer than the new one")
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "got" / "out" / "data").symlink_to(tmp_path / "elsewhere")
    script = """
        mkdir out; sort in.csv > out/sorted; mv b/in out/data; ./tree/d/go; touch out/empty
        chmod 6777 out/empty; echo done
    """
    arguments = (
        "--file=in.csv", "--file", "b/in=data.bin", "--file=./tree/", "--stdin", script, "--output", "out/*",
        "--output-dir", "got",
    )  # fmt: skip
    assert bfaas(coordinator, *arguments, cwd=tmp_path, stdin=b"\xff\0") == (0, b"done\n", b"")
    assert contents(tmp_path / "got") == {
        "out/sorted": b"a\r\nb\r\n",
        "out/data": BINARY,
        "out/stdin": b"\xff\0",
        "out/empty": b"",
    }
    assert not (tmp_path / "got" / "out" / "data").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert (tmp_path / "got" / "out" / "empty").stat().st_mode & 0o7777 == 0o750

    code, output, _ = bfaas(coordinator, "--json", "--output=a", "echo 1 > a", cwd=tmp_path)
    assert (code, [json.loads(line)["event"] for line in output.splitlines()]) == (0, ["file", "exit"])
    assert not (tmp_path / "a").exists()


@with_twisted
async def test_the_command_reports_files_that_are_not_returned(coordinator: Running, tmp_path: Path) -> None:
    arguments = ("--output=a", "--output=missing", "--output=link", "echo 1 > a; ln -s a link; exit $CODE")
    lines = (
        b"bfaas: missing: no such file after the run\nbfaas: link: a symbolic link, which is not followed\n"
    )
    for code, expected in (("0", os.EX_IOERR), ("3", 3)):
        result = bfaas(coordinator, f"--env=CODE={code}", *arguments, cwd=tmp_path)
        assert result == (expected, b"", lines)
        assert contents(tmp_path) == {"a": b"1\n"}


@with_twisted
async def test_files_that_the_command_cannot_read_or_write_are_one_line(
    coordinator: Running, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to("/etc/passwd")
    (tmp_path / "full").symlink_to("/proc")
    cases: list[tuple[tuple[str, ...], int, bytes]] = [
        (("--file=missing",), 1, b"missing: No such file or directory"),
        (("--file=tree",), 1, b"tree/link: neither a regular file nor a directory"),
        (
            ("--file=../x=a",),
            2,
            b'files: "../x": it must be a relative path without empty components, . and ..',
        ),
        (("--file=a", "--file=a=tree/../a"), 2, b"--file: two files have the name 'a'"),
        (("--file=a", "--file=a/b=a"), 2, b"files: a path is invalid: it is both a file and a directory"),
        (("--output=/etc/passwd",), 2, b'outputs: "/etc/passwd": it must be a relative path'),
        (("--output=a", "--output-dir=a"), 1, b"a: File exists"),
        (("--output-dir=d",), 2, b"--output-dir needs --output, and cannot be used with --json"),
        (("--output=x", "--output-dir=full"), 74, b"bfaas: the output cannot be written: full/x: "),
        (("--output=x", "--output-dir=/dev/null/x"), 1, b"/dev/null/x: Not a directory"),
    ]
    for arguments, code, line in cases:
        result = bfaas(coordinator, *arguments, "echo 1 > x; echo sent", cwd=tmp_path)
        output_ = b"sent\n" if code == os.EX_IOERR else b""
        assert (result[:2], result[2].count(b"\n")) == ((code, output_), 1), result
        assert result[2].startswith(line)
    await coordinator.settle()


@with_twisted
async def test_the_command_writes_only_complete_files_that_were_requested(tmp_path: Path) -> None:
    broken = b"bfaas: the response broke off: "
    incomplete = (
        b"bfaas: ended by the coordinator: timeout\nbfaas: a: incomplete, and therefore not written\n"
    )
    for name, size, code, line in (
        ("b", 1, 125, broken),
        ("../a", 1, 125, broken),
        ("/a", 1, 125, broken),
        ("a", 2, 124, incomplete),
    ):
        piece = {"name": name, "size": size, "mode": "0644", "base64": "MQ=="}
        server = ScriptedServer(
            [
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n",
                b"event: file\ndata: %b\n\n" % json.dumps(piece).encode(),
                b'event: exit\ndata: {"code": 124, "reason": "timeout"}\n\n',
                End.CLOSE,
            ]
        )
        port = reactor.listenTCP(0, server, interface="127.0.0.1")
        url = f"--url=http://127.0.0.1:{port.getHost().port}"
        words = ["-m", "bfaas.cli.main", "run", url, "--output=a", "--output-dir", str(tmp_path), "x"]
        _, errors, code_ = await getProcessOutputAndValue(sys.executable, words, os.environ, reactor=reactor)
        await port.stopListening()
        assert (code_, errors.startswith(line)) == (code, True), errors
        assert contents(tmp_path) == {}
