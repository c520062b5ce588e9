"""Distributions contain the package and the plugin, which is found in any kind of installation."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from bfaas import __version__
from tests.support.paths import ROOT

TAPNAMES = {"bfaas-coord", "bfaas-basher", "bfaas-machines"}

LIST_PLUGINS = """
import twisted, twisted.application.service as service
from twisted.plugin import getPlugins
print(*sorted(plugin.tapname for plugin in getPlugins(service.IServiceMaker)))
print(twisted.__file__)
"""


def run(*command: str, cwd: str = "/") -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise AssertionError(f"{command} failed: {done.stdout}{done.stderr}")
    return done.stdout


class PackagingTests(SynchronousTestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)

    def test_the_wheel_contains_only_the_package_and_the_plugin(self) -> None:
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(self.directory), str(ROOT))
        [wheel] = self.directory.glob("*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        foreign = {
            name
            for name in names
            if not name.startswith(("bfaas/", "bfaas-")) and name != "twisted/plugins/bfaas_plugin.py"
        }

        self.assertIn("twisted/plugins/bfaas_plugin.py", names)
        self.assertIn("bfaas/machines/api.py", names)
        self.assertIn("bfaas/py.typed", names)
        ui = ROOT / "bfaas" / "coordinator" / "ui"
        page = {f"bfaas/coordinator/ui/{path.name}" for path in ui.iterdir() if path.is_file()}
        self.assertIn("bfaas/coordinator/ui/index.html", page)
        self.assertLessEqual(page, names)
        self.assertEqual(set(), foreign)

        about = f"bfaas-{__version__}.dist-info"
        with zipfile.ZipFile(wheel) as archive:
            self.assertEqual(archive.read(f"{about}/licenses/LICENSE"), (ROOT / "LICENSE").read_bytes())
            metadata = email.message_from_bytes(archive.read(f"{about}/METADATA"))
        self.assertEqual((__version__, "MIT"), (metadata["Version"], metadata["License-Expression"]))

    def test_plugin_is_found_from_a_plain_and_an_editable_install(self) -> None:
        for editable in ([], ["--editable"]):
            home = self.directory / ("editable" if editable else "plain")
            # Dependencies come from the environment of this test: nothing is downloaded.
            venv.create(home, symlinks=True)
            [site] = home.glob("lib/python*/site-packages")
            (site / "host.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
            python = str(home / "bin" / "python")
            pip = [sys.executable, "-m", "pip", "--python", python]
            run(*pip, "install", "-q", "--no-deps", "--no-build-isolation", *editable, str(ROOT))

            tapnames, package = run(python, "-c", LIST_PLUGINS).splitlines()

            self.assertLessEqual(TAPNAMES, set(tapnames.split()))
            self.assertNotIn(str(ROOT / "twisted"), package)
            self.assertEqual(f"bfaas {__version__}\n", run(str(home / "bin" / "bfaas"), "--version"))
            self.assertIn("PRIVATE=", run(str(home / "bin" / "bfaas"), "genkey"))

    def test_the_sdist_contains_what_its_tests_read(self) -> None:
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(self.directory), str(ROOT))
        [sdist] = self.directory.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        needed = {
            "LICENSE",
            "README.md",
            "CHANGELOG.md",
            "SECURITY.md",
            "Dockerfile",
            "fly.toml",
            "requirements.lock",
        }
        self.assertLessEqual(
            needed | {"tests/project/test_packaging.py", "bfaas/py.typed", "pyproject.toml"}, names
        )

    def test_the_version_is_defined_in_one_place(self) -> None:
        self.assertIn(f"\n  version: {__version__}\n", (ROOT / "docs" / "openapi.yaml").read_text())
        self.assertNotIn(f'"{__version__}"', (ROOT / "pyproject.toml").read_text())

    def test_plugin_imports_no_role(self) -> None:
        heavy = (
            "import sys, twisted.plugins.bfaas_plugin as p; print(*(m for m in sys.modules if 'bfaas.' in m))"
        )

        self.assertEqual("", run(sys.executable, "-c", heavy, cwd=str(ROOT)).strip())
