"""
Some imports are restricted to a few modules, and each test is collected once.

The layers are contracts of import-linter, in pyproject.toml.
"""

from __future__ import annotations

import ast
import importlib
import unittest
from typing import TYPE_CHECKING, ClassVar

from twisted.trial.unittest import SynchronousTestCase

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

KLEIN = {
    "bfaas.coord",
    "bfaas.coordinator.app",
    "bfaas.coordinator.metrics",
    "bfaas.worker.app",
    "bfaas.machines.emulator.routes",
    "bfaas.coordinator.ui",
    "bfaas.http.server",
}
TREQ = {"bfaas.http.client"}
HTTPX = {"bfaas.client", "bfaas.client.asynchronous", "bfaas.client.blocking", "bfaas.client.exchange"}
MCP = {"bfaas.cli.mcp_server"}
REACTOR = {
    "bfaas.coord",
    "bfaas.basher",
    "bfaas.machines.emulator.service",
    "bfaas.system.runtime",
    "bfaas.cli.main",
}

TRIAL = ("unit", "integration", "project", "simulation")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Return all that a module imports, anywhere in it."""
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


def is_test(name: str) -> bool:
    return name.startswith("test")


class ImportTests(SynchronousTestCase):
    modules: ClassVar = {module_name(path): path for path in (ROOT / "bfaas").rglob("*.py")}

    def test_libraries_are_imported_by_their_modules_alone(self) -> None:
        for library, allowed in (("klein", KLEIN), ("treq", TREQ), ("httpx", HTTPX), ("mcp", MCP)):
            users = {
                name
                for name, path in self.modules.items()
                if any(used.partition(".")[0] == library for used in imports(path))
            }
            self.assertEqual(allowed, users, library)

    def test_only_entry_points_import_the_reactor_and_not_at_module_level(self) -> None:
        reactor = "twisted.internet.reactor"
        for name, path in self.modules.items():
            self.assertTrue(reactor not in imports(path) or name in REACTOR, name)
            self.assertNotIn(reactor, imports_at_module_level(path), name)


class CollectionTests(SynchronousTestCase):
    """Trial runs the methods of classes, pytest the functions of tests/e2e (see the Makefile)."""

    def test_all_tests_are_in_packages_that_are_run(self) -> None:
        for path in (ROOT / "tests").rglob("test_*.py"):
            package, *inner = path.relative_to(ROOT / "tests").parts[:-1]
            self.assertIn(package, (*TRIAL, "e2e"), path)
            for depth in range(len(inner) + 1):
                directory = ROOT.joinpath("tests", package, *inner[:depth])
                self.assertTrue((directory / "__init__.py").exists(), directory)

    def test_trial_finds_each_case_once(self) -> None:
        for package in TRIAL:
            for path in (ROOT / "tests" / package).rglob("*.py"):
                tree = ast.parse(path.read_text())
                functions = [
                    node.name
                    for node in tree.body
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_test(node.name)
                ]
                self.assertEqual([], functions, f"trial does not run functions: {path}")
                if path.name.startswith("test_"):
                    module = importlib.import_module(module_name(path))
                    foreign = [
                        case.__qualname__
                        for case in vars(module).values()
                        if isinstance(case, type)
                        and issubclass(case, unittest.TestCase)
                        and case.__module__ != module.__name__
                        and any(map(is_test, dir(case)))
                    ]
                    self.assertEqual([], foreign, f"cases of another module run again: {path}")
                else:
                    cases = [
                        node.name
                        for node in ast.walk(tree)
                        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                        and node.name.startswith("test_")
                    ]
                    self.assertEqual([], cases, f"trial does not load this module: {path}")

    def test_pytest_finds_no_classes(self) -> None:
        for path in (ROOT / "tests" / "e2e").glob("*.py"):
            tree = ast.parse(path.read_text())
            methods = [
                node.name
                for owner in ast.walk(tree)
                if isinstance(owner, ast.ClassDef)
                for node in owner.body
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
            ]
            self.assertEqual([], methods, path)
