"""The `bfaas` command with closed, full, broken and non-blocking standard streams, and with signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from twisted.trial.unittest import SynchronousTestCase

from bfaas import __version__
from bfaas.cli.run import base_url
from bfaas.tokens import genkey
from tests.support.paths import ROOT
from tests.support.waiting import block_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BFAAS = f"{sys.executable} -m bfaas.cli.main"
LIMIT = 60


# Commands with their exit codes if all streams work. Nothing listens on port 9.
QUICK = {
    "--help": 0,
    "--version": 0,
    "run --help": 0,
    "genkey": 0,
    "genauth m1": 0,
    "nonsense": 2,
    "": 2,
}
ALL = {
    **QUICK,
    "run --url http://127.0.0.1:9 true": os.EX_UNAVAILABLE,
    "run -f /nowhere": 1,
    "doctor": 1,
    "machines": 1,
    "destroy": 1,
}
WRITE_NO_OUTPUT = {command for command in ALL if ALL[command] and command != "doctor"}

# Runs a command whose descriptor N is a pipe without a reader.
WITHOUT_READER = f"""{sys.executable} -Sc '
import os, sys
reader, writer = os.pipe()
os.dup2(writer, int(sys.argv[1]))
os.closerange(reader, writer + 1)
os.execvp(sys.argv[2], sys.argv[2:])'"""


def shell(script: str, **environ: str) -> tuple[int, str, str]:
    """Run a script in which $BFAAS is the command. Return its exit code, output and errors."""
    env = {"PATH": os.environ["PATH"], "BFAAS": BFAAS, "PRIVATE": genkey().private, **environ}
    done = subprocess.run(
        ["bash", "-c", script],
        env=env, capture_output=True, check=False, timeout=LIMIT, text=True, errors="replace",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


class StreamTests(SynchronousTestCase):
    def each(
        self,
        commands: Iterable[str],
        redirections: str,
        code: Callable[[str], int],
        prefix: str = "",
        **environ: str,
    ) -> None:
        """Run commands in parallel with redirections, and compare exit codes. No traceback may be printed."""
        script = "".join(
            f"( ( {prefix} $BFAAS {command} {redirections}; echo $? {command} >&3 ) 2>&4 ) & "
            for command in commands
        )
        with tempfile.TemporaryDirectory() as directory:
            codes, errors = Path(directory, "codes"), Path(directory, "errors")
            _, _, output = shell(f"exec 3>{codes} 4>{errors}; {script} wait", **environ)
            output += errors.read_text()
            found = sorted(codes.read_text().splitlines())

        for word in ("Traceback", "Exception ignored", "Error:", "Fatal"):
            self.assertNotIn(word, output)
        expected = sorted(f"{code(command)} {command}".strip() for command in commands)
        self.assertEqual(expected, found, f"{prefix} {redirections}")

    def test_closed_standard_input_does_not_matter(self) -> None:
        self.each(QUICK, "<&-", ALL.__getitem__)

    def test_closed_or_full_standard_error_does_not_matter(self) -> None:
        self.each(QUICK, "2>&-", ALL.__getitem__)
        self.each(QUICK, "2>/dev/full", ALL.__getitem__)
        self.each(ALL, "", ALL.__getitem__, f"{WITHOUT_READER} 2")

    def test_output_that_cannot_be_written_is_exit_code_74(self) -> None:
        def code(command: str) -> int:
            return ALL[command] if command in WRITE_NO_OUTPUT else os.EX_IOERR

        self.each(ALL, ">/dev/full", code)
        self.each(QUICK, ">/dev/full 2>&1", code, PYTHONUNBUFFERED="1")
        self.each(ALL, "<&- >&- 2>&-", code)

    def test_output_without_a_reader_ends_it_by_sigpipe(self) -> None:
        def code(command: str) -> int:
            return ALL[command] if command in WRITE_NO_OUTPUT else 128 + signal.SIGPIPE

        self.each(ALL, "", code, f"{WITHOUT_READER} 1")


class InputTests(SynchronousTestCase):
    def test_unreadable_input_is_reported_in_one_line(self) -> None:
        for arguments, line in {
            "- <&-": "standard input: is closed",
            "--stdin cat <&-": "standard input: is closed",
            "-f /": "/: Is a directory",
            "-f ''": ": No such file or directory",
            "-f $'/no\\xffwhere'": "/no\\udcffwhere: No such file or directory",
            "-f /dev/zero": "/dev/zero: larger than 64 MiB",
            "- </dev/zero": "standard input: larger than 64 MiB",
            "--stdin cat </dev/zero": "standard input: larger than 64 MiB",
        }.items():
            self.assertEqual((1, "", f"{line}\n"), shell(f"$BFAAS run {arguments}"), arguments)

    def test_arguments_that_are_not_utf_8_are_reported_in_one_line(self) -> None:
        utf8 = "in a request with options, script, variables and names must be UTF-8"
        for arguments, line in {
            "run --env A=$'\\xff' true": utf8,
            "run --env $'\\xff'=1 true": utf8,
            "run --env A=1 $'echo \\xff'": utf8,
            "run --timeout $'\\xff' true": utf8,
            "run --url $'http://\\xff' true": "'http://\\udcff' is not a URL such as http://127.0.0.1:8000",
        }.items():
            self.assertEqual((2, "", f"{line}\n"), shell(f"$BFAAS {arguments}"), arguments)
        for arguments in ("$'\\xff'", "genkey $'\\xff'"):
            code, output, errors = shell(f"$BFAAS {arguments}")
            self.assertEqual((2, "", False), (code, output, "Traceback" in errors))
            self.assertIn("\\udcff", errors)
        self.assertEqual(0, shell("$BFAAS genauth $'\\xff'")[0])

    def test_non_blocking_input_is_read_to_its_end(self) -> None:
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        url = "--url http://127.0.0.1:9"
        command = [sys.executable, "-m", "bfaas.cli.main", "run", *url.split(), "-"]
        with subprocess.Popen(command, stdin=ours, stderr=subprocess.PIPE) as process:
            os.close(ours)
            time.sleep(1)
            self.assertIsNone(process.poll())
            os.close(theirs)
            _, errors = process.communicate(timeout=LIMIT)
        self.assertEqual(69, process.returncode)
        self.assertIn(b"does not respond", errors)


WRITE = """
import os, sys
from bfaas.system.stdio import write_all
os.set_blocking(1, False)
write_all(1, os.urandom(1) * 3_000_000)
"""


class WriteTests(SynchronousTestCase):
    def test_writes_everything_to_a_non_blocking_descriptor(self) -> None:
        for options in ((), ("-u",)):
            with subprocess.Popen([sys.executable, *options, "-c", WRITE], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                time.sleep(0.5)
                self.assertEqual(3_000_000, len(process.stdout.read()))
            self.assertEqual(0, process.returncode)

    def test_file_size_limit_is_an_error(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            script = f"cd {directory}; ulimit -f 0; $BFAAS genkey > keys"
            line = "bfaas: the output cannot be written: File too large\n"
            self.assertEqual(
                (os.EX_IOERR, "", line), shell(f"{{ {script}; }} 2>&1 | cat >&2; exit ${{PIPESTATUS[0]}}")
            )

    def test_version_is_that_of_the_package(self) -> None:
        self.assertEqual((0, f"bfaas {__version__}\n", ""), shell("$BFAAS --version"))
        twistd = f"{sys.executable} -c 'from twisted.scripts.twistd import run; run()'"
        for role in ("bfaas-coord", "bfaas-basher", "bfaas-machines"):
            line = f"{role} {__version__}\n"
            self.assertEqual((0, line, ""), shell(f"cd {ROOT}; {twistd} {role} --version"))


def wait_for(process: subprocess.Popen[bytes]) -> int:
    return process.wait(timeout=LIMIT)


class SignalTests(SynchronousTestCase):
    def start(
        self, *arguments: str, ignore: bool = False, stdin: int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        """Start the command, and wait until it reads standard input."""
        command = [sys.executable, "-m", "bfaas.cli.main", *arguments]
        shield = ["env", "--ignore-signal=INT,HUP,TERM"] if ignore else []
        process = subprocess.Popen(
            [*shield, *command], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        wait_for_read(process.pid)
        return process

    def test_ends_by_a_signal_while_reading_standard_input(self) -> None:
        for arguments in (["-"], ["--stdin", "cat"]):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                process = self.start("run", "--url", "http://127.0.0.1:9", *arguments)
                process.send_signal(number)
                self.assertEqual(-number, wait_for(process))
                self.assertEqual((b"", b""), process.communicate())

    def test_ends_by_a_signal_while_opening_a_fifo(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            os.mkfifo(f"{directory}/fifo")
            process = self.start("run", "-f", f"{directory}/fifo")
            process.send_signal(signal.SIGINT)
            self.assertEqual(-signal.SIGINT, wait_for(process))
            self.assertEqual((b"", b""), process.communicate())

    def test_ignored_signals_stay_ignored(self) -> None:
        process = self.start("run", "--url", "http://127.0.0.1:9", "-", ignore=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT)
        self.assertEqual(69, process.returncode)
        self.assertIn(b"does not respond", errors)

    def test_ctrl_c_at_a_terminal_ends_a_loop(self) -> None:
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        loop = f"for i in 1 2 3; do {BFAAS} run --url http://127.0.0.1:9 -; echo again; done"
        # A session whose controlling terminal this is.
        process = subprocess.Popen(
            ["setsid", "--ctty", "bash", "-c", loop], stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        block_until(lambda: children.read_text() != "")
        wait_for_read(int(children.read_text()))
        os.write(ours, b"\x03")
        self.assertEqual(-signal.SIGINT, wait_for(process))
        self.assertNotIn(b"again", os.read(ours, 4096))


def wait_for_read(pid: int) -> None:
    """Wait until the command sleeps in read(2) of standard input, or in the opening of a FIFO."""

    def reads() -> bool:
        process = Path(f"/proc/{pid}")
        sleeps = (process / "stat").read_text().rpartition(")")[2].split()[0] == "S"
        call, first, *_ = [*(process / "syscall").read_text().split(), ""]
        # On x86-64 read is system call 0 and openat 257, on others 63 and 56.
        is_input = (call in ("0", "63") and first == "0x0") or call in ("257", "56")
        return sleeps and is_input and b"bfaas.cli.main" in (process / "cmdline").read_bytes()

    block_until(reads)


class UrlTests(SynchronousTestCase):
    def test_accepts_a_scheme_a_host_and_perhaps_a_port(self) -> None:
        for url in (
            "http://localhost", "https://a.example", "http://127.0.0.1:8000", "http://127.1", "http://h:65535",
            "http://_api.internal:4280", "http://my_host", "http://[::1]:8000", "http://[fdaa::3]",
            "http://[::ffff:1.2.3.4]:1", "http://[fe80::1%eth0]", "http://xn--mnchen-3ya.de", "http://a.example.:80",
        ):  # fmt: skip
            self.assertEqual(url, base_url(url))
        for url, plain in {
            "HTTP://h/": "http://h", "http://h:/": "http://h", "http://h:80/": "http://h:80",
        }.items():  # fmt: skip
            self.assertEqual(plain, base_url(url))

    def test_rejects_all_other_urls_in_one_line(self) -> None:
        for url in (
            "", "h", "h:80", "//h", "http:h", "http:/h", "http://", "http:///run", "http://:80", "ftp://h",
            "file:///etc", "http://h:99999", "http://h:0", "http://h:-1", "http://h:x", "http://h:8\uff10",
            "http://h:80:80", "http://h/run", "http://h/?raw=1", "http://h?x", "http://h#x", "http://h//",
            " http://h", "http://h ", "http://a b", "http://a\nb", "http://a\tb", "http://h\x00", "http://h\x7f",
            "http://m\xfcnchen.de", "http://\udcff", "http://256.1.1.1", "http://1.2.3.4.5", "http://a..b",
            "http://.", "http://-a", "http://a-", "http://h\\x", "http://h%41", "http://::1", "http://[::1",
            "http://[::g]", "http://[::1]x", "http://[v1.x]", "http://[]", f"http://{'a' * 64}",
            f"http://{'a.' * 130}",
        ):  # fmt: skip
            error = self.assertRaises(ValueError, base_url, url)
            self.assertTrue(str(error).endswith(" is not a URL such as http://127.0.0.1:8000"), url)
            self.assertTrue(str(error).isprintable(), url)

    def test_does_not_show_passwords(self) -> None:
        for url in ("http://user:secret@h", "http://user@h", "user:secret@h:99999"):
            error = self.assertRaises(ValueError, base_url, url)
            self.assertEqual("a coordinator's URL cannot contain credentials", str(error))
