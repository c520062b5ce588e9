"""The modules that workers do not load: they exist, they are not used, and they load once they are."""

from __future__ import annotations

import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase, TestCase

from bfaas.system import lean_imports
from tests.support.waiting import wait_until
from tests.support.workers import LIMIT, Worker

# The worker, which writes at its end what it has loaded.
REPORTING = """
import atexit, runpy, sys
from bfaas.system import lean_imports
atexit.register(lambda: print("loaded:", *lean_imports.loaded(), "end", file=sys.stderr))
runpy.run_module("bfaas.basher", None, "__main__")
"""

# Each listed name exists in the real module, and is the submodule's where one is named.
NAMES = """
import importlib
from bfaas.system.lean_imports import LAZY
for module, names in LAZY.items():
    real = importlib.import_module(module)
    for entry in names.split():
        name, _, submodule = entry.removeprefix("-").partition("=")
        value = getattr(real, name)
        if submodule:
            assert value is getattr(importlib.import_module(f"{module}.{submodule}"), name), (module, name)
print("checked")
"""

INSTALLED = """
import sys
from bfaas.system import lean_imports
lean_imports.install()
"""


def run(code: str) -> str:
    """Run code in a Python of its own; return what it prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    return done.stdout + done.stderr


class UnusedTests(TestCase):
    timeout = 2 * LIMIT

    async def report(self, worker: Worker) -> str:
        self.assertEqual(0, await worker.ended())
        await wait_until(lambda: b"loaded: " in worker.errors, "the report")
        return worker.errors.decode().partition("loaded: ")[2].strip()

    async def test_worker_loads_none_of_the_lazy_modules(self) -> None:
        worker = await Worker.start(self, program=("-c", REPORTING))
        statuses = [
            (await worker.fetch(method, path, b"", token)).status
            for method, path, token in (
                ("GET", "/healthz", None),
                ("GET", "/healthz", None),
                ("GET", "/none", None),
                ("PUT", "/run", None),
                ("POST", "/run", None),
                ("POST", "/run", "wrong"),
            )
        ]
        self.assertEqual([200, 200, 404, 405, 401, 401], statuses)
        response = await worker.run_json(script="cat in/a > b", files={"in/a": "1"}, outputs=["b"])
        self.assertEqual(200, response.status, response.body)
        self.assertEqual("end", await self.report(worker))


class LazyTests(SynchronousTestCase):
    def test_listed_names_exist(self) -> None:
        self.assertEqual("checked\n", run(NAMES))

    def test_absent_modules_cannot_be_imported(self) -> None:
        for name in lean_imports.ABSENT:
            self.assertIn(f"import of {name} halted", run(f"{INSTALLED}import {name}"))

    def test_modules_load_when_they_are_used(self) -> None:
        for used in (
            "import pickle; pickle.loads(pickle.dumps(1))",
            "from asyncio import Future; Future.cancel",
            "from asyncio import Future; issubclass(int, Future)",
            "from asyncio import Future; Future[int]",
            "from asyncio import Future\nclass G(Future): pass\nG.cancel",
            "from asyncio import run",
            "from uuid import UUID; assert UUID(int=1).int == 1",
            "from html import *; assert escape('<') == '&lt;'",
            "from werkzeug import Request; Request.application",
        ):
            module = used.split()[1].rstrip(";")
            code = f"{INSTALLED}import {module}\nassert lean_imports.loaded() == []\n{used}\n"
            self.assertIn(module, run(f"{code}print(*lean_imports.loaded())").splitlines()[-1].split(), used)

    def test_submodules_of_a_lazy_package_do_not_load_it(self) -> None:
        code = "import klein._version, werkzeug.exceptions, werkzeug; werkzeug.exceptions.NotFound"
        self.assertEqual("[]\n", run(f"{INSTALLED}{code}; print(lean_imports.loaded())"))

    def test_a_class_has_no_instances_before_it_is_loaded(self) -> None:
        code = "from uuid import UUID; print(isinstance(1, UUID)); print(lean_imports.loaded())"
        self.assertEqual("False\n[]\n", run(INSTALLED + code))
        code = "from uuid import UUID; print(isinstance(UUID(int=1), UUID), isinstance(1, UUID))"
        self.assertEqual("True False\n", run(INSTALLED + code))

    def test_other_uses_of_a_name_are_errors(self) -> None:
        for use in ("1 in Future", "Future | None", "len(Future)", "Future.__mro__"):
            self.assertIn("Error", run(f"{INSTALLED}from asyncio import Future; {use}"), use)

    def test_requests_have_no_part_of_perspective_broker(self) -> None:
        code = "from twisted.web.server import Request; print(hasattr(Request, 'jellyFor'))"
        self.assertEqual("False\n", run(INSTALLED + code))
        self.assertEqual("True\n", run(code))
