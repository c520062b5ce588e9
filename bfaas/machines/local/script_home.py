"""The directory in which a local machine's script runs, and the user that it runs as."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bfaas.machines.local.state_directory import wipe
from bfaas.system.confinement import sandbox_prefix, write_accounts

if TYPE_CHECKING:
    from pathlib import Path

    from bfaas.machines.local.script_users import ScriptUsers
    from bfaas.system.confinement import User


class ScriptHome:
    """
    A directory with the home of a script, and with account files where a sandbox needs them.

    `user` is reserved for the script; None means the user of this process. The caller wipes the directory
    and then releases the user.
    """

    def __init__(self, directory: Path, users: ScriptUsers | None, *, sandboxed: bool) -> None:
        """Create the directory. Raises `OSError`."""
        self.user: User | None = users.acquire() if users else None
        self.directory = directory
        self.home = directory / "home"
        self._sandboxed = sandboxed
        self._has_accounts = sandboxed and self.user is not None
        try:
            self._create()
        except OSError:
            if users is not None and self.user is not None:
                users.release(self.user)
            raise

    def restore(self) -> None:
        """Create the directory again, empty. Raises `OSError`."""
        wipe(self.directory)
        self._create()

    def _create(self) -> None:
        self.directory.mkdir()
        try:
            # chmod, because the umask must not decide: the script's user has to reach its home.
            self.directory.chmod(0o711)
            self.home.mkdir(mode=0o700)
            self.home.chmod(0o700)
            if self._has_accounts and self.user is not None:
                write_accounts(self.directory, self.user)
            if self.user is not None:
                os.chown(self.home, *self.user)
        except OSError:
            wipe(self.directory)
            raise

    @property
    def sandbox(self) -> tuple[str, ...]:
        """The words that run a command in a sandbox with this home; empty without a sandbox."""
        if not self._sandboxed:
            return ()
        return sandbox_prefix(str(self.home), str(self.directory) if self._has_accounts else None)
