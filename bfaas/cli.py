"""The `bfaas` command."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from typing import TYPE_CHECKING

from bfaas.auth import KeyFormatError, Signer, genkey

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Mapping, Sequence

    Command = Callable[[Namespace, Mapping[str, str]], int]  # does it and returns the exit code


class CommandError(Exception):
    """A command cannot be done. The message is one line for standard error."""


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """
    Run the command and return its exit code: 1 where it cannot be done.

    Raises `SystemExit` for `--help` (0) and for arguments that are wrong (2).
    """
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        return command(arguments, environ)
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _parser() -> ArgumentParser:
    """Describe the commands; each names, as `command`, the function that does it."""
    parser = ArgumentParser(prog="bfaas", description="Keys and headers for coordinators and workers.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("genkey", help="make a pair of keys, as shell variables")
    command.set_defaults(command=_genkey)

    command = commands.add_parser("genauth", help="sign a header with the key in $PRIVATE, good for a minute")
    command.add_argument("machine", metavar="MACHINE", help="the machine that will accept it")
    command.set_defaults(command=_genauth)

    return parser


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


if __name__ == "__main__":
    sys.exit(main())
