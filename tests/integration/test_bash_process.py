"""`BashRun` with real bash processes, as several users and in bubblewrap."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING
from unittest import skipIf, skipUnless

from twisted.trial.unittest import TestCase

from bfaas.protocol.formats import Exit, Reason, Stream
from bfaas.protocol.request import RunRequest
from bfaas.system.confinement import SEARCH_PATH, Confinement, User
from bfaas.worker.bash_process import BashRun, script_environment
from bfaas.worker.pipes import READ_SIZE
from tests.support.waiting import wait_until
from tests.support.workers import LIMIT, reactor, watch_for_leftovers

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.system import process_tree

BWRAP = ("bwrap", "--unshare-pid", "--die-with-parent", "--dev-bind", "/", "/", "--proc", "/proc")

needs_bwrap = skipIf(
    subprocess.run([*BWRAP, "true"], check=False, capture_output=True).returncode != 0
    if shutil.which("bwrap")
    else True,
    "bubblewrap is not installed, or not allowed here",
)

MAX_OUTPUT = 1 << 30

NOBODY = User(65534, 65534)

# Users and sandboxes: the same user, another one, one without a name; each without and with bubblewrap.
CONFINEMENTS: list[tuple[User | None, tuple[str, ...]]] = [(None, ())]
if os.geteuid() == 0:
    CONFINEMENTS += [(NOBODY, ()), (User(1_947_000, 1_947_000), ())]
if (
    shutil.which("bwrap")
    and subprocess.run([*BWRAP, "true"], check=False, capture_output=True).returncode == 0
):
    CONFINEMENTS += [(user, BWRAP) for user, _ in CONFINEMENTS]


def run_on_any_host(script: str) -> subprocess.CompletedProcess[bytes]:
    """Run a script as sshd does: in a shell that leads a session and inherits nothing."""
    return subprocess.run(
        ["setsid", "--wait", "/bin/bash", "-c", script],
        env={"PATH": SEARCH_PATH, "HOME": "/"}, umask=0o022,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False,
    )  # fmt: skip


class OutputBuffer:
    """Collects the output of a run."""

    def __init__(self) -> None:
        self.of: dict[Stream, list[bytes]] = {stream: [] for stream in Stream}

    def __call__(self, stream: Stream, data: bytes) -> None:
        self.of[stream].append(data)

    @property
    def both(self) -> tuple[bytes, bytes]:
        return b"".join(self.of[Stream.STDOUT]), b"".join(self.of[Stream.STDERR])


class BashRunTests(TestCase):
    timeout = 2 * LIMIT
    leftovers: Callable[[], list[process_tree.Process]]

    def setUp(self) -> None:
        self.leftovers = watch_for_leftovers(self)

    def start(
        self,
        script: str,
        *,
        max_output: int = MAX_OUTPUT,
        sandbox: tuple[str, ...] = (),
        user: User | None = None,
    ) -> tuple[BashRun, OutputBuffer]:
        output = OutputBuffer()
        run = BashRun(reactor, output, max_output)
        confinement = Confinement(user, sandbox)
        environment = script_environment("/", "machine", "ams", confinement)
        run.start(RunRequest.plain(script.encode()), environment, confinement)
        return run, output

    async def run_script(
        self,
        script: str,
        *,
        max_output: int = MAX_OUTPUT,
        sandbox: tuple[str, ...] = (),
        user: User | None = None,
    ) -> tuple[Exit, bytes, bytes]:
        run, output = self.start(script, max_output=max_output, sandbox=sandbox, user=user)
        exit_ = await run.wait_ended()
        return exit_, *output.both

    async def assert_ends_with_nothing_left(
        self, script: str, stdout: bytes, sandbox: tuple[str, ...] = ()
    ) -> None:
        exit_, out, _ = await self.run_script(script, sandbox=sandbox)
        self.assertEqual((0, stdout, []), (exit_.code, out, self.leftovers()))
        assert exit_.wall_ms is not None
        self.assertLess(exit_.wall_ms, 20_000)

    async def assert_killed(self, script: str, sandbox: tuple[str, ...] = ()) -> None:
        run, output = self.start(script, sandbox=sandbox)
        await wait_until(lambda: output.both[0] == b"up\n", "the script is up")
        run.kill(Reason.TIMEOUT)
        exit_ = await run.wait_ended()
        self.assertEqual((124, "timeout", None), (exit_.code, exit_.reason, exit_.signal))
        self.assertEqual((b"up\n", []), (output.both[0], self.leftovers()))

    async def test_delivers_all_output_of_both_streams(self) -> None:
        for _ in range(30):
            exit_, out, err = await self.run_script("echo out; echo err >&2; exit 3")
            self.assertEqual((3, None, b"out\n", b"err\n"), (exit_.code, exit_.signal, out, err))

    async def run_request(
        self, script: str, sandbox: tuple[str, ...] = (), user: User | None = None, **more: object
    ) -> tuple[Exit, bytes, bytes]:
        """Run a script with more fields of a JSON request."""
        request = RunRequest.from_json(json.dumps({"script": script, **more}).encode())
        output = OutputBuffer()
        run = BashRun(reactor, output, MAX_OUTPUT)
        confinement = Confinement(user, sandbox)
        run.start(request, script_environment("/", "machine", "ams", confinement), confinement)
        return await run.wait_ended(), *output.both

    async def test_script_reads_all_of_its_standard_input(self) -> None:
        stdin = "0123456789abcdef" * (1 << 16)
        exit_, out, err = await self.run_request("cat; echo >&2 end", stdin=stdin)
        self.assertEqual((0, stdin.encode(), b"end\n"), (exit_.code, out, err))

    async def test_standard_input_does_not_have_to_be_read(self) -> None:
        stdin = "x" * (1 << 20)
        for script, stdout in [
            ("echo out", b"out\n"),
            ("exec <&-; echo out", b"out\n"),
            ("head -c 3", b"xxx"),
            ("sleep 1000 <&0 & exec <&-; echo out", b"out\n"),
            ("head -c 100000 /dev/zero | tr '\\0' y; head -c 1", b"y" * 100_000 + b"x"),
        ]:
            exit_, out, _ = await self.run_request(script, stdin=stdin)
            self.assertEqual((0, stdout, []), (exit_.code, out, self.leftovers()))

    async def test_variables_override_the_defaults_of_the_script(self) -> None:
        env = {
            "PATH": "/nowhere",
            "LD_PRELOAD": "/proc/self/fd/3",
            "A": "b c\n=\u20ac",
            "FLY_MACHINE_ID": "x",
        }
        for script in ("", ": " + "x" * 200_000 + "\n"):
            exit_, out, _ = await self.run_request(
                script + 'printf "%s|" "$PATH" "$A" "$FLY_MACHINE_ID" "$HOME"', env=env
            )
            self.assertEqual((0, "/nowhere|b c\n=\u20ac|x|/|"), (exit_.code, out.decode()))

    @skipIf(os.geteuid() != 0, "only root can become another user")
    async def test_variables_do_not_reach_the_confining_programs(self) -> None:
        # The loader prints an error for each program that has the variable: only bash, none of root's.
        exit_, out, err = await self.run_request(
            "echo $EUID", (), User(65534, 65534), env={"LD_PRELOAD": "/no/library.so", "PATH": ""}
        )
        self.assertEqual((0, b"65534\n"), (exit_.code, out))
        self.assertEqual(1, err.count(b"/no/library.so"), err)

    async def test_reports_exit_codes_and_signals(self) -> None:
        for script, code, name in [
            ("", 0, None),
            ("exit 255", 255, None),
            ("exit 137", 137, None),
            ("kill -KILL $$", 137, "SIGKILL"),
            ("ulimit -c 0; kill -SEGV $$", 139, "SIGSEGV"),
            ("if", 2, None),
            ("no-such-command", 127, None),
            ("-x", 127, None),  # a command that is missing, not an option of bash
        ]:
            exit_, _, _ = await self.run_script(script)
            self.assertEqual((script, code, name, None), (script, exit_.code, exit_.signal, exit_.reason))

    async def test_cpu_time_includes_all_processes(self) -> None:
        exit_, _, _ = await self.run_script("(for i in {1..300000}; do :; done); sleep 0.2")
        assert exit_.wall_ms is not None
        assert exit_.cpu_ms is not None
        self.assertGreater(exit_.cpu_ms, 50)
        self.assertGreaterEqual(exit_.wall_ms, 200)

    async def test_carriage_returns_are_kept(self) -> None:
        _, out, _ = await self.run_script("echo a\r\necho b\r\n")
        self.assertEqual(b"a\r\nb\r\n", out)

    async def test_runs_a_script_that_is_too_long_for_an_argument(self) -> None:
        padding = "# é padding\n" * 20_000
        script = (
            'echo first "$0"; ls /proc/$$/fd; read line || echo no input\n' + padding + "echo last; exit 7"
        )
        short = 'echo first "$0"; ls /proc/$$/fd; read line || echo no input\necho last; exit 7'
        self.assertGreater(len(script), 200_000)
        short_exit, short_out, short_err = await self.run_script(short)
        exit_, out, err = await self.run_script(script)
        self.assertEqual(b"first /bin/bash\n0\n1\n2\nno input\nlast\n", out)
        self.assertEqual((7, out, err), (short_exit.code, short_out, short_err))
        self.assertEqual(7, exit_.code)

    async def test_runs_scripts_around_the_maximum_length_of_an_argument(self) -> None:
        for size in (128 * 1024 - 2, 128 * 1024 - 1, 128 * 1024):
            exit_, out, _ = await self.run_script("-x\necho $LINENO; exit 5\n".ljust(size, "#"))
            self.assertEqual((size, 5, b"2\n"), (size, exit_.code, out))

    async def test_drops_and_counts_output_beyond_the_limit(self) -> None:
        exit_, out, err = await self.run_script(
            "head -c 300000 /dev/zero; echo err >&2; exit 4", max_output=100_000
        )
        self.assertEqual(100_000, len(out) + len(err))
        self.assertEqual((4, True, 200_004), (exit_.code, exit_.truncated, exit_.dropped_bytes))

    async def test_output_up_to_the_limit_is_complete(self) -> None:
        exit_, out, _ = await self.run_script("echo 1234", max_output=5)
        self.assertEqual((b"1234\n", False, 0), (out, exit_.truncated, exit_.dropped_bytes))

    async def test_background_processes_are_killed_when_bash_exits(self) -> None:
        await self.assert_ends_with_nothing_left("sleep 1000 & echo out", b"out\n")

    async def test_other_sessions_are_killed_when_bash_exits(self) -> None:
        await self.assert_ends_with_nothing_left("setsid sleep 1000 & sleep 0.1; echo out", b"out\n")

    async def test_daemons_are_killed_when_bash_exits(self) -> None:
        await self.assert_ends_with_nothing_left(
            "( ( setsid sleep 1000 & ) & ); sleep 0.1; echo out", b"out\n"
        )

    async def test_disowned_jobs_are_killed_when_bash_exits(self) -> None:
        script = "nohup sleep 1000 & disown; sleep 1000 & disown -h; echo out"
        await self.assert_ends_with_nothing_left(script, b"out\n")

    async def test_hundreds_of_processes_are_killed_when_bash_exits(self) -> None:
        await self.assert_ends_with_nothing_left(
            "for i in {1..200}; do sleep 1000 & done; echo out", b"out\n"
        )

    async def test_delivers_output_of_background_processes_before_the_exit(self) -> None:
        script = "(head -c 60000 /dev/zero; kill -USR1 $$; sleep 1000) & trap 'exit 0' USR1; wait"
        exit_, out, _ = await self.run_script(script)
        self.assertEqual((0, bytes(60_000)), (exit_.code, out))

    async def test_kills_a_script_that_ignores_signals(self) -> None:
        await self.assert_killed("trap '' TERM INT HUP; echo up; while :; do :; done")

    async def test_kills_a_pipeline(self) -> None:
        await self.assert_killed("echo up; sleep 1000 | cat")

    async def test_kills_a_stopped_script(self) -> None:
        await self.assert_killed("echo up; kill -STOP $$")

    async def test_kills_a_script_with_another_session(self) -> None:
        await self.assert_killed("setsid sleep 1000 & sleep 0.1; echo up; wait")

    async def test_run_can_be_killed_immediately(self) -> None:
        run, _ = self.start("sleep 1000; true")
        run.kill()
        exit_ = await run.wait_ended()
        self.assertEqual((137, "SIGKILL", None), (exit_.code, exit_.signal, exit_.reason))

    async def test_only_the_first_kill_sets_the_reason(self) -> None:
        run, _ = self.start("sleep 1000")
        run.kill(Reason.TIMEOUT)
        run.kill(Reason.OUTPUT_LIMIT)
        exit_ = await run.wait_ended()
        run.kill(Reason.OUTPUT_LIMIT)
        self.assertEqual("timeout", exit_.reason)
        self.assertEqual(exit_, await run.wait_ended())

    async def test_paused_run_blocks_and_loses_no_output(self) -> None:
        run, output = self.start("seq 400000; echo end >&2")
        run.pauseProducing()
        await wait_until(lambda: any(p.state == "S" for p in self.leftovers()), "the script blocks")
        before = output.both
        run.resumeProducing()
        await run.wait_ended()
        self.assertEqual((b"", b""), before)
        self.assertEqual("".join(f"{n}\n" for n in range(1, 400_001)).encode(), output.both[0])
        self.assertEqual(b"end\n", output.both[1])

    async def test_run_that_is_paused_when_bash_exits_delivers_all_output(self) -> None:
        # More than a pipe of default size holds: with such a pipe, bash would not exit.
        run, output = self.start("head -c 1000000 /dev/zero; echo err >&2")
        run.pauseProducing()
        await run.wait_ended()
        self.assertEqual((bytes(1_000_000), b"err\n"), output.both)
        self.assertEqual(READ_SIZE, max(map(len, output.of[Stream.STDOUT])))

    async def test_bash_runs_in_the_sandbox(self) -> None:
        _, out, _ = await self.run_script("echo $MARK", sandbox=("env", "MARK=1"))
        self.assertEqual(b"1\n", out)

    @needs_bwrap
    async def test_reports_signals_of_scripts_in_bubblewrap(self) -> None:
        exit_, out, _ = await self.run_script("echo out; kill -KILL $$", sandbox=BWRAP)
        self.assertEqual((137, "SIGKILL", b"out\n"), (exit_.code, exit_.signal, out))
        exit_, _, _ = await self.run_script("exit 3", sandbox=BWRAP)
        self.assertEqual((3, None), (exit_.code, exit_.signal))

    @needs_bwrap
    async def test_kills_all_processes_in_bubblewrap(self) -> None:
        await self.assert_killed("setsid sleep 1000 & sleep 0.1; echo up; wait", BWRAP)

    @needs_bwrap
    async def test_processes_in_bubblewrap_are_killed_when_bash_exits(self) -> None:
        script = "setsid sleep 1000 & ( ( sleep 1000 & ) & ); echo out"
        await self.assert_ends_with_nothing_left(script, b"out\n", BWRAP)

    async def test_script_of_the_same_user_has_limits_but_none_of_processes(self) -> None:
        _, out, _ = await self.run_script(
            "for limit in c n f u; do ulimit -$limit; done; cat /proc/self/oom_score_adj"
        )
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        processes = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        self.assertEqual(["0", "1024", "1048576", processes, "1000"], out.decode().split())

    @skipUnless(os.geteuid() == 0, "only root can run scripts as another user")
    async def test_script_of_another_user_has_no_groups_and_no_capabilities(self) -> None:
        script = "id -u; id -G; ulimit -u; grep -E 'Cap(Prm|Eff|Amb)|NoNewPrivs' /proc/self/status"
        script += "\n" + "#" * 200_000  # too long for an argument
        exit_, out, err = await self.run_script(script, user=User(1_947_000, 1_947_001))
        none = ["CapPrm:", "0" * 16, "CapEff:", "0" * 16, "CapAmb:", "0" * 16, "NoNewPrivs:", "1"]
        self.assertEqual((0, b""), (exit_.code, err))
        self.assertEqual(["1947000", "1947001", "512", *none], out.decode().split())

    @skipUnless(os.geteuid() == 0, "only root can run scripts as another user")
    async def test_kills_a_script_of_another_user(self) -> None:
        run, output = self.start("setsid sleep 1000 & echo up; sleep 1000", user=User(1_947_000, 1_947_000))
        await wait_until(lambda: output.both[0] == b"up\n", "the script is up")
        run.kill(Reason.TIMEOUT)
        self.assertEqual(124, (await run.wait_ended()).code)
        self.assertEqual([], self.leftovers())

    @needs_bwrap
    async def test_limits_processes_in_bubblewrap(self) -> None:
        _, out, _ = await self.run_script("ulimit -u\n" + "#" * 200_000, sandbox=BWRAP)
        self.assertEqual(b"512\n", out)

    async def test_script_opens_its_streams_by_path(self) -> None:
        script = """
            echo 1 >/dev/stdout; echo 2 >/dev/fd/1; echo 3 >>/proc/self/fd/1; echo 4 | tee /dev/fd/1 | cat
            exec 5>/dev/stdout 6>/dev/stderr; echo 5 >&5; echo 6 >&6
            echo 7 >/dev/stderr; echo 8 >/proc/$$/fd/2
            python3 -c 'print(9, file=open("/dev/stderr", "a"))'
            read line </dev/stdin; cat /dev/stdin /dev/fd/0 /proc/self/fd/0
        """
        for user, sandbox in CONFINEMENTS:
            for stdin, rest in (("a\nb\n", b"b\n"), ("", b"")):
                for padding in ("", "#" * 200_000):
                    exit_, out, err = await self.run_request(script + padding, sandbox, user, stdin=stdin)
                    self.assertEqual((0, b"1\n2\n3\n4\n4\n5\n" + rest), (exit_.code, out), err)
                    self.assertEqual(b"6\n7\n8\n9\n", err)

    async def test_script_has_its_user_in_the_environment(self) -> None:
        script = 'set -u; echo $USER $LOGNAME $SHELL; [ "$USER" = "$(id -un 2>/dev/null)" ] && echo same'
        for user, sandbox in CONFINEMENTS:
            exit_, out, err = await self.run_script(script, sandbox=sandbox, user=user)
            name = "nobody" if user == NOBODY else str(user.uid) if user else Confinement().user_name
            expected = f"{name} {name} /bin/bash\nsame\n"
            self.assertEqual((0, expected, b""), (exit_.code, out.decode(), err))

    async def test_script_starts_as_on_any_host(self) -> None:
        script = """
            umask; trap -p; echo $-; cd; pwd
            for stream in 0 1 2; do [ -t $stream ] && echo terminal; done; (: </dev/tty) 2>&1 | sed 's/.*: //'
            grep -E '^Sig(Blk|Cgt)' /proc/$$/status
            ignored=0x$(awk '/^SigIgn/ {print $2}' /proc/$$/status)
            for number in {1..31}; do (( ignored >> (number - 1) & 1 )) && echo ignores $number; done
            ls /proc/$$/fd
            yes | head -n 1; echo ${PIPESTATUS[@]}
            read -r pid _ _ _ group session _ </proc/$$/stat
            [ $pid = $group ] && [ $pid = $session ] && echo leads
            set -m; sleep 0 & wait $!; echo $?; set +m
            timeout 0.1 sleep 5; echo $?
            bash -c 'kill -INT $$'; echo $?
            trap 'echo terminated; exit 5' TERM; kill 0; echo not reached
        """
        expected = run_on_any_host(script)
        self.assertEqual((5, True), (expected.returncode, expected.stdout.endswith(b"terminated\n")))
        old_umask = os.umask(0o077)
        self.addCleanup(os.umask, old_umask)
        self.addCleanup(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN))
        for user, sandbox in CONFINEMENTS:
            exit_, out, _ = await self.run_script(script, sandbox=sandbox, user=user)
            self.assertEqual((5, None, expected.stdout.decode()), (exit_.code, exit_.signal, out.decode()))

    async def test_script_can_signal_its_own_process_group(self) -> None:
        for user, sandbox in CONFINEMENTS:
            script = "trap 'echo got; exit 5' TERM; sleep 1000 & kill -TERM -- -$$; echo not reached"
            exit_, out, _ = await self.run_script(script, sandbox=sandbox, user=user)
            self.assertEqual((5, b"got\n", []), (exit_.code, out, self.leftovers()))
            exit_, out, _ = await self.run_script("echo out; kill 0; sleep 9", sandbox=sandbox, user=user)
            self.assertEqual((143, "SIGTERM", b"out\n"), (exit_.code, exit_.signal, out))

    async def test_merged_streams_keep_their_order(self) -> None:
        for user, sandbox in CONFINEMENTS:
            output = OutputBuffer()
            run = BashRun(reactor, output, MAX_OUTPUT)
            script = "for i in {1..100}; do echo o$i; echo e$i >&2; done; echo end >/dev/stderr"
            confinement = Confinement(user, sandbox)
            environment = script_environment("/", "machine", "ams", confinement)
            run.start(RunRequest.plain(script.encode()), environment, confinement, merge_output=True)
            self.assertEqual(0, (await run.wait_ended()).code)
            expected = "".join(f"o{i}\ne{i}\n" for i in range(1, 101)) + "end\n"
            self.assertEqual((expected.encode(), b""), output.both)

    async def test_script_that_does_not_start_has_the_reason_not_started(self) -> None:
        broken = ("sh", "-c", "echo one >&2; echo two; exit 3", "sh")
        for sandbox, errors in (
            (broken, {"one; two", "two; one"}),
            (("false",), {""}),
            (("/no/such/program",), None),
            (("bwrap", "--bind", "/no/such/place", "/", "--"), None),
            # A file system without bash.
            (("bwrap", "--bind", "/usr/lib", "/usr/lib", "--"), None),
        ):
            run, output = self.start("echo never", sandbox=sandbox)
            self.assertFalse(await run.wait_started())
            exit_ = await run.wait_ended()
            self.assertEqual((125, "not-started", None), (exit_.code, exit_.reason, exit_.signal))
            self.assertEqual((b"", b""), output.both)
            self.assertTrue(run.startup_errors if errors is None else run.startup_errors in errors)

    async def test_script_that_starts_has_its_own_exit_code(self) -> None:
        for script, code in (
            ("exit 126", 126), ("exec /no/such/program", 127), ("exec 4>&-; exit 125", 125),
            ("kill -9 $$", 137),
        ):  # fmt: skip
            run, _ = self.start(script)
            self.assertTrue(await run.wait_started())
            exit_ = await run.wait_ended()
            self.assertEqual((code, None), (exit_.code, exit_.reason))

    async def test_omits_peak_memory_that_may_be_the_workers(self) -> None:
        run, _ = self.start("true")
        self.assertIsNone((await run.wait_ended()).max_rss_kb)

    async def test_script_with_a_nul_is_an_error(self) -> None:
        with self.assertRaises(ValueError):
            self.start("echo \0")
