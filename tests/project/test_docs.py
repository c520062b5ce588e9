"""What the documents say that a test can know."""

from __future__ import annotations

import re

from twisted.trial.unittest import SynchronousTestCase

from bfaas.coordinator.run_tracker import Refused
from bfaas.pooling.slot import Phase
from bfaas.protocol.formats import Reason
from tests.support.paths import ROOT

DOCS = {path.name: path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}


class DocumentTests(SynchronousTestCase):
    def test_links_lead_somewhere(self) -> None:
        for folder, paths in ((ROOT, ROOT.glob("*.md")), (ROOT / "docs", (ROOT / "docs").glob("*.md"))):
            for path in paths:
                for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
                    self.assertTrue((folder / target).exists(), f"{path.name}: {target}")

    def test_every_package_is_in_the_readme(self) -> None:
        table = DOCS["README.md"].partition("| package | what it is |")[2]
        for path in (ROOT / "bfaas").iterdir():
            if path.suffix == ".py" or (path / "__init__.py").exists():
                self.assertTrue(path.name == "__init__.py" or path.name in table, path.name)

    def test_every_phase_and_every_ending_is_explained(self) -> None:
        for phase in Phase:
            self.assertRegex(DOCS["architecture.md"], rf"(?m)^\|.*\b{phase.value}\b")
        for reason in (*Reason, *Refused):
            self.assertRegex(DOCS["operations.md"], rf"(?m)^\| .*`{reason.value}`")

    def test_every_metric_is_explained(self) -> None:
        names = re.findall(r'"(bfaas_\w+)"', (ROOT / "bfaas" / "coordinator" / "metrics.py").read_text())
        self.assertEqual(10, len(names))
        for name in names:
            self.assertRegex(DOCS["operations.md"], rf"(?m)^\| .*`{name}(\{{[\w,]+\}})?`.* \|")

    def test_what_readyz_says_is_explained(self) -> None:
        source = "".join(path.read_text() for path in (ROOT / "bfaas").rglob("*.py"))
        told = re.findall(r"(?m)^\| (?:`GET /readyz` )?\| `([a-zA-Z ]+)` \|", DOCS["operations.md"])
        self.assertEqual(6, len(told), told)
        for words in told:
            self.assertIn(f'"{words}"', source)
