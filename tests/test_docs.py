"""What the documents say that a test can know."""

from __future__ import annotations

import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from bfaas.member import Phase
from bfaas.runs import Refused
from bfaas.wire import Reason

ROOT = Path(__file__).parents[1]
DOCS = {path.name: path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}


class DocumentTests(SynchronousTestCase):
    def test_links_lead_somewhere(self) -> None:
        for folder, paths in ((ROOT, ROOT.glob("*.md")), (ROOT / "docs", (ROOT / "docs").glob("*.md"))):
            for path in paths:
                for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
                    self.assertTrue((folder / target).exists(), f"{path.name}: {target}")

    def test_every_module_has_its_place_in_the_readme(self) -> None:
        table = DOCS["README.md"].partition("| module | what it is |")[2]
        for path in (ROOT / "bfaas").glob("*.py"):
            self.assertTrue(path.name == "__init__.py" or path.name in table, path.name)

    def test_every_phase_and_every_ending_is_explained(self) -> None:
        for phase in Phase:
            self.assertRegex(DOCS["architecture.md"], rf"(?m)^\|.*\b{phase.value}\b")
        for reason in (*Reason, *Refused):
            self.assertRegex(DOCS["operations.md"], rf"(?m)^\| .*`{reason.value}`")

    def test_every_metric_is_explained(self) -> None:
        names = re.findall(r'"(bfaas_\w+)"', (ROOT / "bfaas" / "metrics.py").read_text())
        self.assertEqual(10, len(names))
        for name in names:
            self.assertRegex(DOCS["operations.md"], rf"(?m)^\| .*`{name}(\{{[\w,]+\}})?`.* \|")

    def test_what_readyz_says_is_explained(self) -> None:
        source = "".join(path.read_text() for path in (ROOT / "bfaas").rglob("*.py"))
        told = re.findall(r"(?m)^\| (?:`GET /readyz` )?\| `([a-zA-Z ]+)` \|", DOCS["operations.md"])
        self.assertEqual(6, len(told), told)
        for words in told:
            self.assertIn(f'"{words}"', source)
