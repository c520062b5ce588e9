"""The shape of the project: imports point one way, and a few things are imported in one place only."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import ClassVar

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).parent.parent

# Each may import what stands before it.
ROOMS = [
    "bfaas.wire",
    "bfaas.reader",
    "bfaas.auth",
    "bfaas.confine",
    "bfaas.settings",
    "bfaas.deadline",
    "bfaas.tree",
    "bfaas.machines.api",
    "bfaas.machines.bodies",
    "bfaas.machines.rates",
    "bfaas.machines.memory",
    "bfaas.machines.removals",
    "bfaas.machines.script_users",
    "bfaas.machines.state",
    "bfaas.machines.local",
    "bfaas.fence",
    "bfaas.agent",
    "bfaas.endpoints",
    "bfaas.exchange",
    "bfaas.machines.documents",
    "bfaas.machines.fly",
    "bfaas.logs",
    "bfaas.start",
    "bfaas.stdio",
    "bfaas.process",
    "bfaas.channel",
    "bfaas.clients",
    "bfaas.proxied",
    "bfaas.site",
    "bfaas.media",
    "bfaas.listener",
    "bfaas.ask",
    "bfaas.browser",
    "bfaas.machines.routes",
    "bfaas.machines.flycast",
    "bfaas.machines.server",
    "bfaas.member",
    "bfaas.backoff",
    "bfaas.life",
    "bfaas.standby",
    "bfaas.sweep",
    "bfaas.line",
    "bfaas.pool",
    "bfaas.pipe",
    "bfaas.bash",
    "bfaas.answer",
    "bfaas.runner",
    "bfaas.basher",
    "bfaas.proxy",
    "bfaas.runs",
    "bfaas.page",
    "bfaas.coordinator",
    "bfaas.metrics",
    "bfaas.coord",
    "bfaas.operate",
    "bfaas.client",
    "bfaas.doctor",
    "bfaas.cli",
]

# What a room must not know of, beyond the order.
STRANGERS = {
    "bfaas.runner": {"bfaas.pool", "bfaas.life", "bfaas.machines.api", "bfaas.proxy"},
    "bfaas.basher": {"bfaas.pool", "bfaas.life", "bfaas.machines.api", "bfaas.proxy"},
    "bfaas.pool": {"bfaas.site", "bfaas.exchange", "bfaas.machines.fly", "bfaas.machines.local"},
    "bfaas.life": {"bfaas.site", "bfaas.exchange", "bfaas.machines.fly", "bfaas.machines.local"},
    "bfaas.proxy": {"bfaas.pool", "bfaas.life"},
    "bfaas.machines.local": {"bfaas.pool", "bfaas.site", "bfaas.exchange"},
    "bfaas.machines.routes": {"bfaas.machines.local", "bfaas.machines.memory"},
}

KLEIN = {
    "bfaas.coordinator",
    "bfaas.metrics",
    "bfaas.runner",
    "bfaas.machines.routes",
    "bfaas.page",
    "bfaas.site",
}
TREQ = {"bfaas.machines.fly", "bfaas.proxy", "bfaas.cli"}
REACTOR = {"bfaas.coord", "bfaas.basher", "bfaas.machines.server", "bfaas.process", "bfaas.cli"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_at_module_level(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


class StructureTests(SynchronousTestCase):
    modules: ClassVar = {module_name(path): path for path in (ROOT / "bfaas").rglob("*.py")}

    def test_every_module_has_its_room(self) -> None:
        packages = {"bfaas", "bfaas.machines"}

        self.assertEqual(sorted(ROOMS), sorted(set(self.modules) - packages))

    def test_imports_point_one_way(self) -> None:
        for place, room in enumerate(ROOMS):
            later = imports(self.modules[room]) & set(ROOMS[place:])
            self.assertEqual(set(), later, f"{room} imports what stands after it")

    def test_rooms_do_not_know_strangers(self) -> None:
        for room, strangers in STRANGERS.items():
            self.assertEqual(set(), imports(self.modules[room]) & strangers, room)

    def test_libraries_stay_where_they_belong(self) -> None:
        for library, rooms in (("klein", KLEIN), ("treq", TREQ)):
            users = {
                name
                for name, path in self.modules.items()
                if any(used.partition(".")[0] == library for used in imports(path))
            }
            self.assertEqual(set(), users - rooms, library)

    def test_only_composition_roots_see_the_reactor_and_none_at_import(self) -> None:
        for name, path in self.modules.items():
            seen = "twisted.internet.reactor"
            self.assertTrue(seen not in imports(path) or name in REACTOR, name)
            self.assertNotIn(seen, imports_at_module_level(path), name)
