from __future__ import annotations

import io
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

from twisted.trial.unittest import SynchronousTestCase

from bfaas.access_tokens import AccessTokens
from bfaas.cli.main import main
from bfaas.tokens import AuthError, Signer, Verifier, genkey
from tests.support.paths import ROOT


def run(*argv: str, **environ: str) -> tuple[int, str, str]:
    """Run the command in this process. Return its exit code, output and errors."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            code = main(argv, environ)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, output.getvalue(), errors.getvalue()


class GenkeyTests(SynchronousTestCase):
    def test_it_prints_a_matching_pair(self) -> None:
        code, output, errors = run("genkey")
        public, private = output.splitlines()

        self.assertEqual((0, ""), (code, errors))
        self.assertTrue(public.startswith("PUBLIC="))
        self.assertTrue(private.startswith("PRIVATE="))
        self.assertEqual(public.removeprefix("PUBLIC="), Signer(private.removeprefix("PRIVATE=")).public)


class GenauthTests(SynchronousTestCase):
    def test_it_prints_an_auth_token_for_the_machine(self) -> None:
        pair = genkey()
        code, output, errors = run("genauth", "worker-1", PRIVATE=pair.private)
        verifier = Verifier(pair.public)

        self.assertEqual((0, ""), (code, errors))
        verifier.verify(output.removesuffix("\n"), "worker-1", time.time())
        self.assertRaises(AuthError, verifier.verify, output.removesuffix("\n"), "worker-2", time.time())

    def test_missing_key_is_reported_by_the_name_of_its_variable(self) -> None:
        expected = (1, "", "PRIVATE: missing; a private key from `bfaas genkey`\n")
        self.assertEqual(expected, run("genauth", "worker-1"))
        self.assertEqual(expected, run("genauth", "worker-1", PRIVATE=" "))

    def test_invalid_key_is_reported_and_not_printed(self) -> None:
        expected = (1, "", "PRIVATE: not a key of 64 bytes in hex\n")
        self.assertEqual(expected, run("genauth", "worker-1", PRIVATE=genkey().public))


class TokenTests(SynchronousTestCase):
    def test_it_prints_a_token_and_its_line_for_the_setting(self) -> None:
        code, output, errors = run("token", "alice")
        variable, line = output.splitlines()
        token = variable.removeprefix("BFAAS_TOKEN=")

        self.assertEqual((0, ""), (code, errors))
        tokens, problems = AccessTokens.parse(line)
        self.assertEqual(("alice", ()), (tokens.find(token), problems))
        self.assertNotIn(token, run("token", "alice")[1])

    def test_invalid_name_is_reported(self) -> None:
        message = "'a b': a name has 1 to 63 letters, digits, dots, dashes and underscores\n"
        self.assertEqual((2, "", message), run("token", "a b"))

    def test_a_token_that_no_header_can_contain_is_rejected_and_not_shown(self) -> None:
        message = "the access token contains characters that no token has\n"
        self.assertEqual((2, "", message), run("run", "--token", "sec ret", "true"))
        self.assertEqual((2, "", message), run("run", "true", BFAAS_TOKEN="sec\nret"))


class CommandTests(SynchronousTestCase):
    def test_invalid_arguments_exit_with_2(self) -> None:
        for argv in ((), ("nothing",), ("genauth",), ("genkey", "more")):
            code, output, errors = run(*argv)
            self.assertEqual((2, ""), (code, output))
            self.assertIn("usage: bfaas", errors)

    def test_help_lists_the_commands(self) -> None:
        code, output, errors = run("--help")

        self.assertEqual((0, ""), (code, errors))
        self.assertIn("genkey", output)
        self.assertIn("genauth", output)

    def test_a_shell_can_evaluate_the_keys(self) -> None:
        script = (
            'set -ae; eval "$("$0" -m bfaas.cli.main genkey)"; echo "$PUBLIC"; '
            '"$0" -m bfaas.cli.main genauth worker-1'
        )
        done = subprocess.run(
            ["bash", "-c", script, sys.executable], cwd=ROOT, capture_output=True, text=True, check=True
        )
        public, header = done.stdout.splitlines()

        Verifier(public).verify(header, "worker-1", time.time())
        self.assertEqual("", done.stderr)

    def test_the_command_does_not_import_twisted(self) -> None:
        program = "import sys, bfaas.cli.main; sys.exit('twisted' in sys.modules)"
        self.assertEqual(0, subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode)
