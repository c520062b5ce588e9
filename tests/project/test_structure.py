"""A few things are imported in a few places only. (The layers are in pyproject.toml, for import-linter.)"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, ClassVar

from twisted.trial.unittest import SynchronousTestCase

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

KLEIN = {
    "bfaas.coordinator.app",
    "bfaas.coordinator.metrics",
    "bfaas.worker.app",
    "bfaas.machines.emulator.routes",
    "bfaas.coordinator.ui",
    "bfaas.http.server",
}
TREQ = {"bfaas.http.client"}
REACTOR = {
    "bfaas.coord",
    "bfaas.basher",
    "bfaas.machines.emulator.service",
    "bfaas.system.runtime",
    "bfaas.cli.main",
}


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

    def test_libraries_stay_where_they_belong(self) -> None:
        for library, rooms in (("klein", KLEIN), ("treq", TREQ)):
            users = {
                name
                for name, path in self.modules.items()
                if any(used.partition(".")[0] == library for used in imports(path))
            }
            self.assertEqual(rooms, users, library)

    def test_only_composition_roots_see_the_reactor_and_none_at_import(self) -> None:
        for name, path in self.modules.items():
            seen = "twisted.internet.reactor"
            self.assertTrue(seen not in imports(path) or name in REACTOR, name)
            self.assertNotIn(seen, imports_at_module_level(path), name)
