"""How many processes Linux has killed because memory ran out, as far as this process can learn it."""

from __future__ import annotations

import re
from pathlib import Path

_COUNT = re.compile(r"(?m)^oom_kill ([0-9]+)$")


def count_kills(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """
    Return the number of killed processes of this process's control group; None if it is unknown.

    The number is that of `memory.events` (cgroup v2) or `memory.oom_control` (v1). In a container the group's
    path may be relative to the host's root, while the container's root is the group itself. The root group of
    version 2 has no such file: there, as in a virtual machine, it is that of the system (`/proc/vmstat`).
    """
    for path in (*_group_files(proc, root), proc / "vmstat"):
        try:
            match = _COUNT.search(path.read_text())
        except OSError:
            continue
        if match is not None:
            return int(match[1])
    return None


def _group_files(proc: Path, root: Path) -> list[Path]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, group = line.split(":", 2)  # cgroups(7)
        if not controllers:
            base, name = root, "memory.events"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.oom_control"
        else:
            continue
        files += [base / group.lstrip("/") / name, base / name]
    return files
