"""
The `bfaas` command: run scripts, and manage keys and machines.

Modules that are slow to load are imported by the commands that need them, after signals are handled.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from argparse import SUPPRESS, Action, ArgumentParser
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from bfaas import __version__
from bfaas.system.stdio import (
    InputError,
    OutputError,
    end_by_signal,
    prepare_command,
    read_file,
    read_input,
    read_line,
    write_error,
    write_output,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from twisted.internet.defer import Deferred

    from bfaas.machines.api import MachineInventory

    Command = Callable[[Namespace, Mapping[str, str]], int]  # runs the command and returns its exit code


T = TypeVar("T")

_DEFAULT_URL = "http://127.0.0.1:8000"


class CommandError(Exception):
    """A command failed. The message is one line for standard error."""

    code: ClassVar[int] = 1


class UsageError(CommandError):
    """An argument is invalid."""

    code: ClassVar[int] = 2


def program() -> NoReturn:
    """Run the program `bfaas`: prepare the process, run the command, exit."""
    prepare_command()
    sys.exit(main())


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """
    Run the command and return its exit code.

    The code is 1 if the command failed, 2 if an argument is invalid, 74 (`EX_IOERR`) if output cannot be
    written. End the process by SIGPIPE if the pipe of its output is closed. Raise `SystemExit` for
    `--help` and `--version` (0), and for unknown, missing and surplus arguments (2).
    """
    try:
        arguments = _parser().parse_args(argv)
        command: Command = arguments.command
        return command(arguments, environ)
    except CommandError as error:
        write_error(f"{error}\n")
        return error.code
    except OutputError as error:
        write_error(f"bfaas: the output cannot be written: {error}\n")
        return os.EX_IOERR
    except BrokenPipeError:
        end_by_signal(signal.SIGPIPE)


class _Parser(ArgumentParser):
    """A parser that writes its messages like all other output (argparse ignores or raises write errors)."""

    def print_help(self, file: object = None) -> None:  # noqa: ARG002 - argparse's signature
        write_output(self.format_help())

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            (write_error if status else write_output)(message)
        raise SystemExit(status)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n")


class _Version(Action):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(nargs=0, default=SUPPRESS, **keywords)

    def __call__(self, parser: ArgumentParser, *_: object) -> NoReturn:
        parser.exit(0, f"bfaas {__version__}\n")


def _parser() -> ArgumentParser:
    """Return the parser. Each command sets `command` to the function that runs it."""
    parser = _Parser(
        prog="bfaas", description="Run scripts at a coordinator, and manage its keys and machines."
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("run", help="run a script at a coordinator, and exit with its exit code")
    command.add_argument(
        "--url", metavar="URL", help=f"the coordinator; default: $BFAAS_URL, or {_DEFAULT_URL}"
    )
    command.add_argument("--token", metavar="TOKEN", help="an access token; default: $BFAAS_TOKEN")
    command.add_argument("--timeout", metavar="5s", help="a time limit below the coordinator's")
    command.add_argument("--stdin", action="store_true", help="pass standard input to the script")
    command.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable of the script; may be repeated",
    )
    command.add_argument(
        "--file",
        metavar="[NAME=]PATH",
        action="append",
        default=[],
        dest="files",
        help="a file or directory for the script's working directory; may be repeated",
    )
    command.add_argument(
        "--output",
        metavar="PATTERN",
        action="append",
        default=[],
        dest="outputs",
        help="files to return, such as 'out/*'; may be repeated",
    )
    command.add_argument("--output-dir", metavar="DIR", help="where to write these files; default: .")
    command.add_argument(
        "--json", action="store_true", help="print events, files included, one JSON object per line"
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("-f", dest="script_file", metavar="FILE", help="run the script in this file")
    source.add_argument(
        "script", metavar="SCRIPT", nargs="?", help="the script; - reads it from standard input"
    )
    command.set_defaults(command=_run)

    command = commands.add_parser(
        "mcp", help="give AI agents a shell: serve the Model Context Protocol on standard input and output"
    )
    command.add_argument(
        "--url", metavar="URL", help=f"the coordinator; default: $BFAAS_URL, or {_DEFAULT_URL}"
    )
    command.add_argument("--token", metavar="TOKEN", help="an access token; default: $BFAAS_TOKEN")
    command.add_argument(
        "--max-output",
        metavar="N",
        type=int,
        default=30_000,
        help="characters of each output stream and text file that are returned; default: 30000",
    )
    command.set_defaults(command=_mcp)

    command = commands.add_parser(
        "token", help="print a new access token, and the line NAME:DIGEST for the setting ACCESS_TOKENS"
    )
    command.add_argument("name", metavar="NAME", help="the client that gets the token")
    command.set_defaults(command=_token)

    command = commands.add_parser("genkey", help="print a new key pair as shell variables")
    command.set_defaults(command=_genkey)

    command = commands.add_parser(
        "genauth", help="print an auth token, valid for a minute, signed with the key in $PRIVATE"
    )
    command.add_argument("machine", metavar="MACHINE", help="the machine that accepts it")
    command.set_defaults(command=_genauth)

    command = commands.add_parser("doctor", help="check the configuration end to end")
    command.set_defaults(command=_doctor)

    command = commands.add_parser(
        "machines", help="list the machines of the app $WORKER_APP, or with docker those of the engine"
    )
    command.set_defaults(command=_machines)

    command = commands.add_parser("destroy", help="destroy a pool's machines, after a confirmation")
    command.add_argument("--pool", metavar="NAME", help="the pool; default: $FLY_MACHINE_ID")
    command.add_argument("--yes", action="store_true", help="destroy without a confirmation")
    command.set_defaults(command=_destroy)

    return parser


def _run(arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas.cli import run  # noqa: PLC0415 - see the module's docstring
    from bfaas.cli.files import files_to_send  # noqa: PLC0415

    if arguments.stdin and arguments.script == "-":
        raise UsageError("standard input cannot be both the script and its input")
    if arguments.output_dir is not None and (arguments.json or not arguments.outputs):
        raise UsageError("--output-dir needs --output, and cannot be used with --json")
    try:
        # Checked before any input is read, which can take long or never end.
        default = environ.get("BFAAS_URL", "").strip() or _DEFAULT_URL
        url = run.base_url(default if arguments.url is None else arguments.url)
        options = {
            "env": dict(map(_variable, arguments.env)),
            "timeout": arguments.timeout,
            "files": files_to_send(arguments.files),
            "outputs": arguments.outputs,
        }
        command = run.RunCommand.of(
            url,
            environ.get("BFAAS_TOKEN", "").strip() if arguments.token is None else arguments.token,
            _script(arguments),
            read_input() if arguments.stdin else None,
            options,
            output_dir=arguments.output_dir or ".",
            as_json=arguments.json,
        )
    except UnicodeError:
        raise UsageError("in a request with options, script, variables and names must be UTF-8") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    except InputError as error:
        raise CommandError(str(error)) from None
    try:
        # Before the run, whose files would be lost.
        os.makedirs(command.output_dir, exist_ok=True)  # noqa: PTH103 - the rest of this module needs no paths
    except OSError as error:
        raise CommandError(f"{command.output_dir}: {error.strerror}") from None
    return run.run(command)


def _script(arguments: Namespace) -> bytes:
    if arguments.script_file is not None:
        return read_file(arguments.script_file)
    return read_input() if arguments.script == "-" else os.fsencode(arguments.script)


def _variable(text: str) -> tuple[str, str]:
    """Split NAME=VALUE. Raise `ValueError`."""
    name, equals, value = os.fsencode(text).decode().partition("=")
    if not equals:
        raise ValueError(f"--env: {text!r} is not NAME=VALUE")
    return name, value


def _mcp(arguments: Namespace, _environ: Mapping[str, str]) -> int:
    try:
        from bfaas.cli import mcp_server  # noqa: PLC0415 - see the module's docstring
        from bfaas.client import AsyncClient  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(f"bfaas mcp requires its extra: pip install 'bfaas[mcp]' ({error})") from None

    if sys.stdin is None or sys.stdout is None:
        raise CommandError("standard input or output is closed")
    if arguments.max_output < 1:
        raise UsageError("--max-output: must be above zero")
    try:
        client = AsyncClient(arguments.url, token=arguments.token)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return mcp_server.serve(client, arguments.max_output)


def _token(arguments: Namespace, _environ: Mapping[str, str]) -> int:
    from bfaas.access_tokens import AccessToken, generate_token  # noqa: PLC0415 - see the module's docstring

    token = generate_token()
    try:
        line = AccessToken.of(arguments.name, token)
    except ValueError as error:
        raise UsageError(f"{arguments.name!r}: {error}") from None
    write_output(f"BFAAS_TOKEN={token}\n{line}\n")
    return 0


def _genkey(_arguments: Namespace, _environ: Mapping[str, str]) -> int:
    from bfaas.tokens import genkey  # noqa: PLC0415 - see the module's docstring

    pair = genkey()
    write_output(f"PUBLIC={pair.public}\nPRIVATE={pair.private}\n")
    return 0


def _genauth(arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas.tokens import KeyFormatError, Signer  # noqa: PLC0415 - see the module's docstring

    private = environ.get("PRIVATE", "").strip()
    if not private:
        raise CommandError("PRIVATE: missing; a private key from `bfaas genkey`")
    try:
        signer = Signer(private)
    except KeyFormatError as error:
        raise CommandError(f"PRIVATE: {error}") from None
    write_output(f"{signer.sign(arguments.machine, time.time())}\n")
    return 0


def _doctor(_arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas.cli import doctor  # noqa: PLC0415 - see the module's docstring

    return doctor.run_checks(environ)


def _machines(_arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas.cli import machines as commands  # noqa: PLC0415 - see the module's docstring

    write_output(_with_machines(environ, commands.format_table))
    return 0


def _destroy(arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas.cli import machines as commands  # noqa: PLC0415 - see the module's docstring

    pool = arguments.pool or environ.get("FLY_MACHINE_ID", "").strip()
    if not pool:
        raise CommandError("no pool: use --pool, or set FLY_MACHINE_ID")

    async def confirm_and_destroy(api: MachineInventory) -> int | None:
        machines = await commands.machines_of(api, pool)
        for machine in machines:
            write_output(f"{machine.id}  {machine.state}  {machine.name}\n")
        confirmed = (
            arguments.yes
            or not machines
            or await _confirm(f"Destroy {commands.format_count(len(machines))} of {pool}?")
        )
        return await commands.destroy(api, machines) if confirmed else None

    destroyed = _with_machines(environ, confirm_and_destroy)
    if destroyed is None:
        raise CommandError("nothing was destroyed")
    write_output(f"destroyed {commands.format_count(destroyed)} of {pool}\n")
    return 0


async def _confirm(question: str) -> bool:
    from twisted.internet.threads import deferToThread  # noqa: PLC0415 - see the module's docstring

    write_output(f"{question} [y/N] ")
    # In a thread, since a blocked reactor handles no signals.
    answer: bytes = await deferToThread(read_line)
    return answer.strip().lower() in (b"y", b"yes")


def _with_machines(
    environ: Mapping[str, str], work: Callable[[MachineInventory], Coroutine[Deferred[Any], Any, T]]
) -> T:
    """Call `work` with the machines that the environment names, and return its result."""
    from bfaas.cli.machines import with_machines  # noqa: PLC0415
    from bfaas.machines.api import MachinesError  # noqa: PLC0415
    from bfaas.machines.local.engine import EngineError  # noqa: PLC0415
    from bfaas.settings import SettingsError  # noqa: PLC0415

    try:
        return with_machines(environ, work)
    except (SettingsError, EngineError, MachinesError) as error:
        raise CommandError(str(error)) from None


if __name__ == "__main__":
    program()
