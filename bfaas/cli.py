"""The `bfaas` command: runs scripts, and helps those who run coordinators."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from bfaas.auth import KeyFormatError, Signer, genkey

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from twisted.internet.defer import Deferred

    from bfaas.machines.api import MachinesAPI

    Command = Callable[[Namespace, Mapping[str, str]], int]  # does it and returns the exit code


T = TypeVar("T")

_URL = "http://127.0.0.1:8000"


class CommandError(Exception):
    """A command cannot be done. The message is one line for standard error."""

    code: ClassVar[int] = 1


class UsageError(CommandError):
    """An argument is not what it has to be."""

    code: ClassVar[int] = 2


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """
    Run the command and return its exit code: 1 where it cannot be done, 2 where an argument is wrong.

    Raises `SystemExit` for `--help` (0), and for arguments that there are not, or too few (2).
    """
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        return command(arguments, environ)
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return error.code


def _parser() -> ArgumentParser:
    """Describe the commands; each names, as `command`, the function that does it."""
    parser = ArgumentParser(
        prog="bfaas", description="Runs scripts at a coordinator; keys and machines for its owner."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("run", help="have a coordinator run a script, and exit as it did")
    command.add_argument("--url", metavar="URL", help=f"the coordinator; $BFAAS_URL, or else {_URL}")
    command.add_argument("--timeout", metavar="5s", help="a time of its own, below the coordinator's")
    command.add_argument("--stdin", action="store_true", help="give the script this standard input")
    command.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="a variable for it; may be repeated"
    )
    command.add_argument("--json", action="store_true", help="print events, one JSON object a line")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("-f", "--file", metavar="FILE", help="a file that holds the script")
    which.add_argument(
        "script", metavar="SCRIPT", nargs="?", help="the script; - reads it from standard input"
    )
    command.set_defaults(command=_run)

    command = commands.add_parser("genkey", help="make a pair of keys, as shell variables")
    command.set_defaults(command=_genkey)

    command = commands.add_parser("genauth", help="sign a header with the key in $PRIVATE, good for a minute")
    command.add_argument("machine", metavar="MACHINE", help="the machine that will accept it")
    command.set_defaults(command=_genauth)

    command = commands.add_parser("doctor", help="try all that a coordinator with these settings needs")
    command.set_defaults(command=_doctor)

    command = commands.add_parser("machines", help="list the machines of the app $WORKER_APP")
    command.set_defaults(command=_machines)

    command = commands.add_parser("destroy", help="destroy a pool's machines, after asking")
    command.add_argument("--pool", metavar="NAME", help="the pool; $FLY_MACHINE_ID where it is not given")
    command.add_argument("--yes", action="store_true", help="do not ask")
    command.set_defaults(command=_destroy)

    return parser


def _run(arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas import client  # noqa: PLC0415 - what the keys' commands can do without

    if arguments.stdin and arguments.script == "-":
        raise UsageError("standard input cannot be both the script and its input")
    try:
        if arguments.file is not None:
            script = Path(arguments.file).read_bytes()
        else:
            script = sys.stdin.buffer.read() if arguments.script == "-" else os.fsencode(arguments.script)
        errand = client.Errand.of(
            arguments.url or environ.get("BFAAS_URL", "").strip() or _URL,
            script,
            sys.stdin.buffer.read() if arguments.stdin else None,
            dict(map(_variable, arguments.env)),
            arguments.timeout,
            as_json=arguments.json,
        )
    except UnicodeDecodeError:
        raise UsageError("with --stdin, --env or --timeout, all of it must be UTF-8") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None
    return client.run(errand)


def _variable(word: str) -> tuple[str, str]:
    """Split NAME=VALUE. Raises `ValueError`."""
    name, equals, value = os.fsencode(word).decode().partition("=")
    if not equals:
        raise ValueError(f"--env: {word!r} is not NAME=VALUE")
    return name, value


def _genkey(_arguments: Namespace, _environ: Mapping[str, str]) -> int:
    pair = genkey()
    sys.stdout.write(f"PUBLIC={pair.public}\nPRIVATE={pair.private}\n")
    return 0


def _genauth(arguments: Namespace, environ: Mapping[str, str]) -> int:
    private = environ.get("PRIVATE", "").strip()
    if not private:
        raise CommandError("PRIVATE: missing; a key that `bfaas genkey` made")
    try:
        signer = Signer(private)
    except KeyFormatError as error:
        raise CommandError(f"PRIVATE: {error}") from None
    sys.stdout.write(f"{signer.sign(arguments.machine, time.time())}\n")
    return 0


def _doctor(_arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas import doctor  # noqa: PLC0415 - what the keys' commands can do without

    return doctor.examine(environ)


def _machines(_arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas import operate  # noqa: PLC0415 - what the keys' commands can do without

    sys.stdout.write(_with_api(environ, operate.table))
    return 0


def _destroy(arguments: Namespace, environ: Mapping[str, str]) -> int:
    from bfaas import operate  # noqa: PLC0415 - what the keys' commands can do without

    pool = arguments.pool or environ.get("FLY_MACHINE_ID", "").strip()
    if not pool:
        raise CommandError("which pool? Give --pool, or FLY_MACHINE_ID")

    async def ask_and_destroy(api: MachinesAPI) -> int | None:
        machines = await operate.of_pool(api, pool)
        for machine in machines:
            sys.stdout.write(f"{machine.id}  {machine.state}  {machine.name}\n")
        sure = arguments.yes or not machines or _sure(f"Destroy these {len(machines)} machines of {pool}?")
        return await operate.destroy(api, machines) if sure else None

    destroyed = _with_api(environ, ask_and_destroy)
    if destroyed is None:
        raise CommandError("nothing was destroyed")
    sys.stdout.write(f"destroyed {destroyed} machines of {pool}\n")
    return 0


def _sure(question: str) -> bool:
    sys.stdout.write(f"{question} [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _with_api(
    environ: Mapping[str, str], work: Callable[[MachinesAPI], Coroutine[Deferred[Any], Any, T]]
) -> T:
    """Do something with the Machines API that the environment names."""
    from bfaas.machines.api import MachinesError  # noqa: PLC0415
    from bfaas.operate import with_api  # noqa: PLC0415
    from bfaas.settings import ApiSettings, SettingsError  # noqa: PLC0415

    try:
        return with_api(ApiSettings.from_environment(environ), work)
    except (SettingsError, MachinesError) as error:
        raise CommandError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
